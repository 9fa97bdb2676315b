"""Sees in which collective this rank waits."""

from __future__ import annotations

import threading

import torch.distributed as dist

from gru4recf_dist.parallel.whereabouts import HERE


class WaitWatch:
    """From `start` on watches for this rank to wait in a collective; other ranks, in `wait_until_seen`, are told then.

    All ranks make one; only one of them starts it.
    """

    def __init__(self) -> None:
        self._store = dist.distributed_c10d._get_default_store()
        self._seen: str | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> str | None:
        """End watching; the purpose of the collective that was seen first, if one was."""
        self._is_over.set()
        if self._thread.ident is not None:
            self._thread.join()
        return self._seen

    def wait_until_seen(self) -> None:
        self._store.wait(["seen"])

    def _look(self) -> None:
        while self._seen is None and not self._is_over.wait(0.01):
            self._seen = HERE.position().waiting_in
        self._store.set("seen", "")

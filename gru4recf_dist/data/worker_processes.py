"""Loader worker processes: they live through the stop signals of their group, and end when their owner does."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator
from multiprocessing import resource_tracker
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from gru4recf_dist.errors import UserError

_STOP_SIGNALS = {signal.SIGTERM, signal.SIGUSR1}
# How long a worker may be dead before it is noticed. torch looks every 5 s, as it counts on SIGCHLD; but workers are
# children of the fork server.
_LOOK_SECONDS = 0.5


def in_workers(dataset: IterableDataset, workers: int) -> Generator[Any]:
    """What ``dataset`` yields in each of ``workers`` processes, asking them in turn.

    The processes end when the generator is closed or the program ends.

    Raises:
        UserError: one of them was killed. What one of them raises itself comes as it is, with its traceback.
    """
    # forkserver: a fork of a process that runs gloo, NCCL or fsspec threads may hang.
    # Preloaded, a worker starts in a tenth of a second; importing torch takes each of them seconds, every epoch.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([type(dataset).__module__])
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=context,
        worker_init_fn=_end_with_owner,
    )
    others = set(multiprocessing.active_children())
    # torchrun and SLURM send stop signals to every process of the group. The trainer acts on them after its step,
    # for which its workers must live on: they inherit this mask (a handler would not survive forkserver's exec).
    unmasked = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        # The resource tracker inherits the mask too, but its start lifts the block of SIGTERM here.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        loaded = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unmasked)
    loaded._try_get_data = functools.partial(loaded._try_get_data, _LOOK_SECONDS)
    processes = set(multiprocessing.active_children()) - others

    def end() -> None:
        # At its end Python sends SIGTERM to the processes left over and waits: for ever, as they block that signal.
        loaded._shutdown_workers()
        for process in processes:
            process.kill()

    atexit.register(end)
    try:
        yield from loaded
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"loader.workers: {reason}; something has killed it, the system when memory is short"
        ) from error
    finally:
        atexit.unregister(end)
        end()


def _end_with_owner(worker: int) -> None:
    """In a worker: end as soon as the process that reads from it is gone, even by SIGKILL.

    A worker of torch's looks whether its parent lives. With forkserver that is the server, which lives for as long as
    there are workers: both would stay for ever.
    """

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, name="end with owner", daemon=True).start()

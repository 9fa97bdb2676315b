"""The processes of a run that a launcher has started: torchrun, its ranks, their loader workers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psutil


def rank_processes(launcher: int) -> Iterator[tuple[int, psutil.Process]]:
    """Number and process of each rank below the process ``launcher``: torchrun, or what has started it.

    A process that ends meanwhile is left out.
    """
    with contextlib.suppress(psutil.Error):
        # Not below a rank: its children have its environment.
        level = psutil.Process(launcher).children()
        while level:
            below = []
            for process in level:
                with contextlib.suppress(psutil.Error):
                    number = process.environ().get("RANK")
                    if number is None:
                        below += process.children()
                    else:
                        yield int(number), process
            level = below


def rank_process(launcher: int, number: int) -> psutil.Process | None:
    """The process of one rank; None if there is none."""
    return next((process for found, process in rank_processes(launcher) if found == number), None)

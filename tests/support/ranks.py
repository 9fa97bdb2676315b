"""Run a function on several ranks of this machine, quickly, and show the traceback that came first."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 20

# Its server imports torch once; every rank is a fork of it.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.preloaded"])


class RankFailed(AssertionError):
    """The first rank that failed, with its traceback."""


def run_ranks(
    world: int, function: Callable[..., Any], tmp_path: Path, *arguments: Any, device: str = "cpu"
) -> list[Any]:
    """Call ``function(ranks, *arguments)`` on ``world`` ranks: over gloo on the CPU, over NCCL with ``device`` cuda.

    Args:
        function: at the top level of a module, so that it can be pickled; so must its arguments and result be.
        tmp_path: the rendezvous file is made here: no ports.

    Returns:
        what each rank returned, in the order of the ranks.
    """
    rendezvous = tmp_path / f"rendezvous-{time.monotonic_ns()}"
    pipes, processes = [], []
    for rank in range(world):
        ours, theirs = _context.Pipe(duplex=False)
        process = _context.Process(
            target=_rank_main,
            args=(theirs, rank, world, device, f"file://{rendezvous}", function, arguments),
            daemon=True,
        )
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return _collect(pipes)
    finally:
        for process in processes:
            process.join(timeout=0.5)
            if process.is_alive():
                process.kill()
                process.join()


def _collect(pipes: list) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[tuple[float, int, str]] = []
    open_pipes = {pipe: rank for rank, pipe in enumerate(pipes)}
    while open_pipes and not failures:
        for pipe in wait(list(open_pipes)):
            rank = open_pipes.pop(pipe)
            try:
                failed_at, content = pickle.loads(pipe.recv_bytes())
            except EOFError:
                failures.append((time.time(), rank, "the process died without a word"))
                continue
            if failed_at is None:
                results[rank] = content
            else:
                failures.append((failed_at, rank, content))
    if failures:
        # Survivors only say "connection reset by peer"; give the cause a moment to arrive too.
        for pipe in wait(list(open_pipes), timeout=1.0):
            try:
                failed_at, content = pickle.loads(pipe.recv_bytes())
            except EOFError:
                continue
            if failed_at is not None:
                failures.append((failed_at, open_pipes[pipe], content))
        _, rank, text = min(failures)
        raise RankFailed(f"rank {rank} failed first:\n{text}")
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(pipe, rank: int, world: int, device: str, rendezvous: str, function, arguments) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    import torch

    from gru4recf_dist.parallel import ranks as process_ranks

    torch.set_num_threads(1)
    try:
        ranks = process_ranks.start(device, TIMEOUT_SECONDS, init_method=rendezvous)
        result = function(ranks, *arguments)
        # As bytes: multiprocessing would share tensors through a process that is about to end.
        pipe.send_bytes(pickle.dumps((None, result)))
        process_ranks.stop()
    except BaseException:
        pipe.send_bytes(pickle.dumps((time.time(), traceback.format_exc())))

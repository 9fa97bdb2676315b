"""The ranks of a run: who this process is, its device, and the process groups that the parts of a step use."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from gru4recf_dist.errors import RanksLost, UserError, report_from_every_rank
from gru4recf_dist.launcher import end_with_launcher
from gru4recf_dist.parallel.roll_call import RollCall
from gru4recf_dist.parallel.whereabouts import BACKGROUND, HERE


@dataclass(frozen=True)
class Ranks:
    """This process among the ``world`` ranks.

    Attributes:
        device: where the encoder lives.
        dense: group of the encoder's all-reduce.
        table: group of the item table's exchanges; its own, so that they never wait behind the encoder's.
        host: gloo group for CPU tensors: counts, flags, checkpoints.
        background, ahead: as `host`, for the threads that write checkpoints and that exchange the next step's ids while
            training goes on: in one group, two threads' collectives would meet each other's.
    """

    rank: int
    world: int
    device: torch.device
    dense: dist.ProcessGroup
    table: dist.ProcessGroup
    host: dist.ProcessGroup
    background: dist.ProcessGroup
    ahead: dist.ProcessGroup

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def in_background(self) -> Ranks:
        """The same ranks for the thread that writes beside the training."""
        return replace(self, host=self.background)

    def ahead_of_step(self) -> Ranks:
        """The same ranks for the thread that exchanges the next step's ids."""
        return replace(self, host=self.ahead)


def add_launcher_argument(parser: argparse.ArgumentParser) -> None:
    """Accept what the `deepspeed` launcher hands to every process; it is in the environment too."""
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def choose_device(name: str) -> torch.device:
    """`auto`: this process's GPU if there is one.

    Raises:
        UserError: `cuda` was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for, but torch sees no CUDA device")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def start(device: str = "auto", timeout_seconds: int = 1800, init_method: str | None = None) -> Ranks:
    """Join the process group that torchrun (or SLURM through torchrun) describes; alone without one.

    Args:
        device: `auto`, `cpu` or `cuda`.
        timeout_seconds: how long a collective waits for a missing rank before it fails.
        init_method: rendezvous instead of the environment's, such as `file:///path`; needs RANK and WORLD_SIZE.
    """
    chosen = choose_device(device)
    timeout = timedelta(seconds=timeout_seconds)
    # How many collectives torch remembers, for when one of them hangs. gloo remembers none by default.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        # cuDNN's RNNs use TF32 unless told otherwise: 1e-3 is not the fp32 that `precision` promises.
        torch.backends.cudnn.rnn.fp32_precision = "ieee"
    if not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            dist.init_process_group(
                backend, init_method=init_method or "env://", rank=rank, world_size=world, timeout=timeout
            )
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    everyone = dist.group.WORLD
    return Ranks(
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        device=chosen,
        dense=everyone,
        table=dist.new_group(timeout=timeout),
        host=dist.new_group(backend="gloo", timeout=timeout),
        background=dist.new_group(backend="gloo", timeout=timeout),
        ahead=dist.new_group(backend="gloo", timeout=timeout),
    )


@contextlib.contextmanager
def running(device: str, timeout_seconds: int, keep: Callable[[str, bytes], None] | None = None) -> Iterator[Ranks]:
    """The ranks for the length of a program: joined at the start, left together at the end.

    When the block raises, the group is left as it is: leaving it could block, and the error must get out.

    Args:
        keep: as for `RollCall`.

    Raises:
        RanksLost: a collective failed; it names who did not arrive, if that was found out.
    """
    # As train.py has done before it loaded torch; other programs may be a little late.
    end_with_launcher()
    ranks = start(device, timeout_seconds)
    report_from_every_rank()
    roll_calls = []
    # Who has not arrived in a checkpoint's thread may well be on time in the training.
    for name, here in (("background", BACKGROUND), ("roll_call", HERE)) if ranks.world > 1 else ():
        store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store().clone())
        roll_calls.append(RollCall(ranks.rank, ranks.world, timeout_seconds, store, keep, here))
        roll_calls[-1].start()
    try:
        yield ranks
        wait_for_all(ranks)
    except RuntimeError as error:
        if not _tells_of_others(error):
            raise
        found = next(filter(None, (roll_call.findings() for roll_call in roll_calls)), None)
        raise RanksLost(found or f"{HERE.position()}: another rank is gone ({_torchs_reason(error)})") from error
    for roll_call in roll_calls:
        roll_call.stop()
    stop()


def _tells_of_others(error: RuntimeError) -> bool:
    """Whether it is what a collective raises when another rank is late or gone; gloo has no class for it."""
    words = ("Timed out", "timed out", "timeout", "Connection", "Socket", "socket", "Broken pipe")
    text = str(error)
    # What a loader worker raised comes with its traceback, in which anything may stand; a kernel may time out too.
    if text.startswith("Caught ") or "CUDA error" in text:
        return False
    return isinstance(error, dist.DistError) or any(word in text for word in words)


def _torchs_reason(error: Exception) -> str:
    """The first line, without the place in torch's source that gloo puts before it."""
    return str(error).partition("\n")[0].rpartition("] ")[2].partition(". ")[0]


def wait_for_all(ranks: Ranks) -> None:
    """Wait until every rank is here. A rank that leaves while others still use its sockets makes them fail."""
    if ranks.world > 1:
        with HERE.waiting("barrier"):
            dist.barrier(group=ranks.host)


def from_first(ranks: Ranks, compute: Callable[[], Any]) -> Any:
    """What ``compute`` returns on rank 0, on every rank; a `UserError` there is raised everywhere.

    Whatever else is raised there ends the others with a `UserError` too: they would wait for rank 0 until a time-out.
    """
    mine, bug = _outcome(ranks, compute) if ranks.is_first else (None, None)
    answer = [mine]
    if ranks.world > 1:
        with HERE.waiting("answer of rank 0"):
            dist.broadcast_object_list(answer, src=0, group=ranks.host)
    return _agreed(answer, bug)[0]


def from_each(ranks: Ranks, compute: Callable[[], Any]) -> list[Any]:
    """What ``compute`` returns on each rank, in their order, on every rank; errors as `from_first`, of any rank."""
    mine, bug = _outcome(ranks, compute)
    answers = [mine]
    if ranks.world > 1:
        answers = [None] * ranks.world
        with HERE.waiting("answers of all"):
            dist.all_gather_object(answers, mine, group=ranks.host)
    return _agreed(answers, bug)


def _outcome(ranks: Ranks, compute: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What the other ranks are to know of ``compute``, and what only this one can raise."""
    try:
        return compute(), None
    except UserError as error:
        return error, None
    except Exception as error:
        return UserError(f"rank {ranks.rank} ended with {type(error).__name__}"), error


def _agreed(answers: list[Any], bug: Exception | None) -> list[Any]:
    if bug is not None:
        raise bug
    for answer in answers:
        if isinstance(answer, UserError):
            raise answer
    return answers


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()

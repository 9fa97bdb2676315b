"""When and where a training run's checkpoints are written: in a thread while it goes on, or while it waits.

The thread of each rank writes one checkpoint at a time, from a copy of the rank's share in host memory, and agrees with
those of the other ranks over a group of its own: whether a checkpoint was written is the same on all ranks. They act on
it where they wait for their threads, which all do at the same places: so what follows from it is the same too.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gru4recf_dist.checkpoint import Checkpoints, copied_tensors, state_tensors
from gru4recf_dist.config import CheckpointConfig
from gru4recf_dist.errors import UserError, redacted
from gru4recf_dist.monitoring import Monitor
from gru4recf_dist.parallel import collectives
from gru4recf_dist.parallel.engines import Engine
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.parallel.whereabouts import BACKGROUND, HERE, IDLE, LEFT_TO_BACKGROUND
from gru4recf_dist.table.table_group import TableGroup

GIB = 1 << 30


@dataclass
class _Write:
    """One checkpoint on its way to storage.

    Attributes:
        seconds: from the copy to the commit.
        waited_seconds: of these, those in which training stood still.
        bytes: on rank 0.
        error: why it was not written.
    """

    step: int
    best: bool
    started: float
    seconds: float = 0.0
    waited_seconds: float = 0.0
    bytes: int = 0
    error: str | None = None
    shown: bool = False


class CheckpointSaver:
    """Writes the checkpoints of a run. `save`, `wait` and `finish` must be called by all ranks alike.

    Attributes:
        best_was_lost: the checkpoint that was the best so far could not be written; who reads it puts it back to False.

    Args:
        monitor: shows time and size of each checkpoint, and those that were not written.
    """

    def __init__(self, checkpoints: Checkpoints, config: CheckpointConfig, ranks: Ranks, monitor: Monitor) -> None:
        self._checkpoints, self._config, self._ranks, self._monitor = checkpoints, config, ranks, monitor
        self._thread = None
        if config.in_background:
            self._thread = ThreadPoolExecutor(1, "checkpoint", HERE.note_this_thread_in, (BACKGROUND,))
        self._last: _Write | None = None
        self._pending: Future[None] | None = None
        self._failures = 0
        self.best_was_lost = False

    def save(self, step: int, engine: Engine, tables: TableGroup, state: dict[str, Any], best: bool) -> None:
        """Begin to write the checkpoint of ``step``, once the one before it is written; or write it.

        Args:
            state: what else is needed to go on; plain JSON types.
            best: whether it is the best so far.

        Raises:
            UserError: ``checkpoint.max_failures`` in a row could not be written.
        """
        self.wait()
        # A run that is killed goes on from here: the lines up to here must be there too.
        self._monitor.flush()
        write = _Write(step, best, time.perf_counter())
        # Through JSON: what it was made from changes with the next step.
        commit = {"table_steps": tables.steps, "world_size": self._ranks.world, "state": state}
        commit = json.loads(json.dumps(commit))
        self._last = write
        if self._thread is None:
            self._write(write, state_tensors(engine, tables), commit, self._ranks)
            write.waited_seconds = write.seconds
            self._settle()
            return
        tensors = copied_tensors(engine, tables)
        self._pending = self._thread.submit(self._write_in_background, write, tensors, commit)
        write.waited_seconds = time.perf_counter() - write.started

    def _write_in_background(self, write: _Write, tensors: dict[str, torch.Tensor], commit: dict) -> None:
        BACKGROUND.enter("checkpoint", write.step)
        self._write(write, tensors, commit, self._ranks.in_background())
        # Where it has failed for want of another rank, it stays where it is.
        BACKGROUND.enter(IDLE)

    def _write(self, write: _Write, tensors: dict[str, torch.Tensor], commit: dict, ranks: Ranks) -> None:
        try:
            write.bytes = self._checkpoints.write(write.step, tensors, commit, write.best, ranks)
        except UserError as error:
            # Its text alone: the exception would keep the copy.
            write.error = str(error)
        write.seconds = time.perf_counter() - write.started

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            UserError: as `save`.
        """
        if self._pending is None:
            return
        before, phase = time.perf_counter(), HERE.phase
        pending, self._pending = self._pending, None
        HERE.enter(LEFT_TO_BACKGROUND)
        pending.result()
        HERE.enter(phase)
        self._last.waited_seconds += time.perf_counter() - before
        self._settle()

    def _settle(self) -> None:
        """Draw the consequences of the last write."""
        self._failures = 0 if self._last.error is None else self._failures + 1
        self.best_was_lost |= self._last.best and self._last.error is not None
        self._show(self._last)
        if self._failures >= self._config.max_failures:
            raise UserError(f"{self._last.error}; {self._failures} in a row (checkpoint.max_failures)")

    def finish(self) -> None:
        """Wait until nothing is being written, when training is over.

        Raises:
            UserError: as `save`; or the last checkpoint could not be written, so that what was trained would be lost.
        """
        self.wait()
        if self._last is not None and self._last.error is not None:
            raise UserError(self._last.error)

    def close(self) -> None:
        """End the thread, when it has written what it was given; whatever comes of that."""
        if self._thread is not None:
            self._thread.shutdown()

    def show_written(self) -> None:
        """Show what has become of the checkpoint in the thread, if that is known. Waits for nothing."""
        if self._pending is not None and self._pending.done() and self._pending.exception() is None:
            self._show(self._last)

    def _show(self, write: _Write) -> None:
        if write.shown:
            return
        write.shown = True
        if write.error is not None:
            what = "best checkpoint so far" if write.best else "checkpoint"
            # Before `_settle`, the count does not have it yet.
            count = self._failures + (self._pending is not None)
            self._monitor.say(
                f"warning: the {what}, of step {write.step}, was not written, failure {count} of at most "
                f"{self._config.max_failures} in a row: {redacted(write.error)}"
            )
            return
        figures = {"seconds": write.seconds, "wait_seconds": write.waited_seconds, "gib": write.bytes / GIB}
        self._monitor.scalars(write.step, {f"checkpoint/{name}": value for name, value in figures.items()})


def check_finite(step: int, encoder: nn.Module, tables: TableGroup, ranks: Ranks) -> None:
    """A finite loss may have a gradient that is not: a checkpoint of what it left could never be resumed.

    Args:
        encoder: with the present weights.

    Raises:
        UserError: a weight is not finite, on whichever rank.
    """
    dense = [(~weight.detach().isfinite()).any() for weight in encoder.parameters()]
    broken = torch.tensor(tables.has_broken_row() or bool(torch.stack(dense).any()), dtype=torch.int64)
    if int(collectives.sum_over_ranks(broken, ranks.host)):
        raise UserError(
            f"step {step}: the weights are not finite; this checkpoint was not written. "
            "Try lower optimizer.lr and table.lr, or optimizer.clip"
        )

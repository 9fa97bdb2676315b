"""Steps before they are made: packed batches, and what the ranks tell each other of them while the step before runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from gru4recf_dist.config import Config
from gru4recf_dist.data.batches import PackedBatch, pack_micro_batches
from gru4recf_dist.data.blocks import Block
from gru4recf_dist.data.streams import SessionLoader
from gru4recf_dist.objective import Objective
from gru4recf_dist.parallel import traffic
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.parallel.whereabouts import HERE, Whereabouts
from gru4recf_dist.recommender import Recommender
from gru4recf_dist.table.batch_negatives import BatchTargets
from gru4recf_dist.table.item_table import Exchange
from gru4recf_dist.table.partition import Routing, route


class Exchanges(NamedTuple):
    """Of the rows that a micro-batch needs: of its inputs (and targets, if they are rows of the same table), and of its
    targets elsewhere; None if there are none.
    """

    inputs: Exchange
    outputs: Exchange | None = None


@dataclass(frozen=True)
class Told:
    """What the ranks have told each other of a step: integers only, none of which an update changes.

    Attributes:
        exchanges: of each micro-batch, as `Recommender.lookup` takes them.
        targets: of all ranks, if negatives are drawn from them.
        sent: what this took of this rank.
    """

    exchanges: list[Exchanges]
    targets: BatchTargets | None
    sent: traffic.Traffic


class PreparedStep:
    """This rank's part of a global batch, ready for an update.

    Attributes:
        packed: its micro-batches.
    """

    def __init__(self, packed: list[PackedBatch], told: Future[Told]) -> None:
        self.packed, self._told = packed, told

    def told(self) -> Told:
        """What the ranks have told each other of it; waits for those that are not so far."""
        with HERE.waiting("ids"):
            return self._told.result()


class StepsAhead:
    """Prepares steps: packs and routes them, and has a thread of its own exchange ids with the other ranks' threads.

    No row and no weight is read, so all of it may go on while the update before is made: rows would be stale. Every
    rank must prepare the same steps in the same order.
    """

    def __init__(self, config: Config, model: Recommender, objective: Objective, ranks: Ranks) -> None:
        self._config, self._model, self._objective, self._ranks = config, model, objective, ranks.ahead_of_step()
        self._thread = ThreadPoolExecutor(1, "ids ahead", HERE.note_this_thread_in, (Whereabouts(),))
        self._last: Future[Told] | None = None

    def prepare(self, block: Block) -> PreparedStep:
        """This rank's sessions of a global batch."""
        loader, parts = self._config.loader, self._config.accumulation
        return self.of(pack_micro_batches(block, parts, loader.max_length, loader.context, self._model.event_features))

    def of(self, packed: list[PackedBatch]) -> PreparedStep:
        """Batches that are packed already."""
        routings = [self._route(batch) for batch in packed]
        self._last = self._thread.submit(self._tell, packed, routings)
        return PreparedStep(packed, self._last)

    @contextlib.contextmanager
    def rest_of_epoch(self, loader: SessionLoader) -> Iterator[Iterator[PreparedStep]]:
        """The rest of ``loader``'s epoch. However it is left, the thread that prepares the next step has then ended.

        Left without an error, which every rank must do after the same step, it is settled too.
        """
        with contextlib.closing(loader.prepared(self.prepare)) as steps:
            yield steps
        self.settle()

    def settle(self) -> None:
        """Wait until no exchange is under way, even of a step that is not made; all ranks must have prepared it."""
        if self._last is not None:
            with HERE.waiting("ids"):
                self._last.result()

    def _route(self, batch: PackedBatch) -> list[Routing]:
        """Of each of the batch's `Exchanges`."""
        partition, model = self._model.table.partition, self._model
        # Distinct ids travel once where inputs and targets are rows of one table.
        ids = (batch.items, batch.targets) if model.shares_rows else (batch.items,)
        return [route(partition, *ids), *([route(partition, batch.targets)] if model.has_other_outputs else [])]

    def _tell(self, packed: list[PackedBatch], routings: list[list[Routing]]) -> Told:
        table, host = self._model.table, self._ranks.host
        with traffic.counted_apart() as sent:
            exchanges = [Exchanges(*(table.exchange(each, host) for each in of_batch)) for of_batch in routings]
            return Told(exchanges, self._objective.batch_targets(packed, self._ranks), sent)

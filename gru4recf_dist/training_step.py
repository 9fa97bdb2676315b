"""One update of encoder and table with a global batch: the same for every engine, precision and number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from gru4recf_dist.config import Config
from gru4recf_dist.data.batches import PackedBatch, pack_micro_batches
from gru4recf_dist.data.blocks import Block
from gru4recf_dist.objective import Objective
from gru4recf_dist.parallel import collectives
from gru4recf_dist.parallel.engines import Engine
from gru4recf_dist.parallel.loss_scale import LossScale
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.recommender import Recommender
from gru4recf_dist.table.batch_negatives import StepProposal
from gru4recf_dist.table.partition import Routing, route


@dataclass(frozen=True)
class MicroBatch:
    """A packed batch, and where the rows of its inputs and targets lie: integers only."""

    packed: PackedBatch
    routing: Routing


@dataclass(frozen=True)
class StepResult:
    """What a step did; sums are over all ranks.

    Attributes:
        loss, targets, events, sessions_lost: sums over the global batch.
        stop: whether any rank was asked to stop.
        updated: False if the update was skipped, because an fp16 gradient overflowed.
        gradient_norm: of the encoder, before clipping.
        table_squared_norm: of this rank's share of the rows, before clipping.
    """

    loss: float
    targets: float
    events: float
    sessions_lost: float
    stop: bool
    updated: bool
    gradient_norm: torch.Tensor
    table_squared_norm: torch.Tensor


class TrainingStep:
    """Makes updates of ``model`` through ``engine``."""

    def __init__(self, config: Config, model: Recommender, engine: Engine, objective: Objective, ranks: Ranks) -> None:
        self.config, self.model, self.engine, self.objective, self.ranks = config, model, engine, objective, ranks
        self.loss_scale = LossScale(config.loss_scale if config.precision == "fp16" else None)
        self._watch = _GradientWatch(engine.module.parameters())

    def prepare(self, block: Block) -> list[MicroBatch]:
        """This rank's sessions of a global batch, ready for an update.

        It reads no row and no weight, so it may run while the update before is made: rows would be stale.
        """
        loader, partition = self.config.loader, self.model.table.partition
        packed = pack_micro_batches(
            block, self.config.accumulation, loader.max_length, loader.context, self.model.event_features
        )
        return [MicroBatch(batch, route(partition, batch.items, batch.targets)) for batch in packed]

    def __call__(self, batches: list[MicroBatch], step: int, factor: float, stop: bool) -> StepResult:
        """One update.

        Args:
            batches: this rank's part of the global batch, of `prepare`.
            step: its number, from 1; decides dropout and negatives.
            factor: on both learning rates.
            stop: whether this rank was asked to stop.

        Raises:
            UserError: loss or gradients are not finite; nothing was updated.
        """
        # Dropout depends on (seed, step, rank) alone: there is no generator state to save.
        torch.manual_seed(hash((self.config.seed, step, self.ranks.rank)) & 0x7FFFFFFFFFFFFFFF)
        scale = self.loss_scale.value
        packed = [batch.packed for batch in batches]
        counts = self._counts(packed, stop)
        proposal = self.objective.propose(packed, step)
        loss = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for number, batch in enumerate(batches, 1):
            with self.engine.accumulating(last=number == len(batches)):
                local = self._loss(batch, proposal)
                targets = counts.result()[0]
                # The engine's mean over ranks and the table's division by W both undo the factor W.
                self.engine.backward(local * (self.ranks.world / max(targets, 1.0)), scale)
                loss += local.detach()
        targets, events, sessions_lost, stops = counts.result()
        total_loss, finite = self._agree(loss)
        updated = self.loss_scale.update(step, finite)
        if updated:
            norm = self.engine.step(self.config.optimizer.lr * factor, scale)
            table_norm = self.model.table.apply_gradients(self.config.table.lr * factor, scale)
        else:
            self.engine.skip()
            self.model.table.discard_gradients()
            norm = table_norm = torch.tensor(math.nan)
        return StepResult(total_loss, targets, events, sessions_lost, stops > 0, updated, norm, table_norm)

    def _loss(self, batch: MicroBatch, proposal: StepProposal | None) -> torch.Tensor:
        """Sum of this rank's losses over a micro-batch."""
        table = self.model.table
        item_places, target_places = (places.to(self.ranks.device) for places in batch.routing.inverse)
        exchange = table.exchange(batch.routing)
        features = self.model.features.lookup(exchange)
        rows = table.lookup(exchange)
        events = {name: values.to(self.ranks.device) for name, values in batch.packed.event_features.items()}
        queries = self.engine(rows, features, item_places, batch.packed.batch_sizes, events)
        return self.objective(queries, rows[target_places], batch.packed, proposal)

    def _counts(self, batches: list[PackedBatch], stop: bool) -> collectives.PendingSum:
        """Sums over micro-batches and ranks, on their way while the forward runs."""
        sums = [sum(batch.targets_count for batch in batches), sum(batch.events for batch in batches)]
        sums += [sum(batch.sessions_lost for batch in batches), stop]
        return collectives.PendingSum(torch.tensor(sums, dtype=torch.float64), self.ranks.host)

    def _agree(self, loss: torch.Tensor) -> tuple[float, bool]:
        """The loss over all ranks, and whether it and every rank's gradients are finite.

        It comes before the update: every rank makes it, or none does.
        """
        broken = self._watch.take() | self.model.table.has_broken_gradient()
        sums = torch.stack([loss, broken.to(loss)]).cpu()
        total, broken_ranks = collectives.sum_over_ranks(sums, self.ranks.host, "loss").tolist()
        return total, math.isfinite(total) and not broken_ranks


class _GradientWatch:
    """Sees every gradient of ``parameters`` as backward makes it, wherever the engine then puts it."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._broken: list[torch.Tensor] = []
        for parameter in parameters:
            parameter.register_hook(self._look)

    def _look(self, gradient: torch.Tensor) -> None:
        # A tensor: asking for its value would make the host wait for the device.
        self._broken.append((~gradient.isfinite()).any())

    def take(self) -> torch.Tensor:
        """Whether one since the last call was not finite, bool []."""
        broken, self._broken = self._broken, []
        return torch.stack(broken).any()

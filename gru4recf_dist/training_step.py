"""One update of encoder and tables with a global batch: the same for every engine, precision and number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from gru4recf_dist.config import Config
from gru4recf_dist.data.batches import PackedBatch
from gru4recf_dist.model.places import rows_at
from gru4recf_dist.model.subnets import ITEM_TABLE, subnet_of_parameter, subnet_of_table
from gru4recf_dist.objective import Objective
from gru4recf_dist.parallel import collectives, traffic
from gru4recf_dist.parallel.engines import Engine
from gru4recf_dist.parallel.loss_scale import LossScale
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.parallel.waits import to_host
from gru4recf_dist.parallel.whereabouts import HERE
from gru4recf_dist.recommender import Recommender
from gru4recf_dist.steps_ahead import Exchanges, PreparedStep
from gru4recf_dist.strategies import Phase
from gru4recf_dist.table.batch_negatives import StepProposal


@dataclass(frozen=True)
class StepResult:
    """What a step did; sums are over all ranks.

    Attributes:
        loss, targets, events, sessions_lost: sums over the global batch.
        stop: whether any rank was asked to stop.
        updated: False if the update was skipped: a gradient or the loss was not finite.
        broken: names of what was not finite on this rank, if a smaller loss scale would not help; None if no rank had
            such a thing.
        gradient_norm: of the encoder, before clipping.
        table_squared_norm: of this rank's share of the rows of all tables, before clipping.
    """

    loss: float
    targets: float
    events: float
    sessions_lost: float
    stop: bool
    updated: bool
    broken: list[str] | None
    gradient_norm: torch.Tensor
    table_squared_norm: torch.Tensor


class TrainingStep:
    """Makes updates of ``model`` through ``engine``."""

    def __init__(self, config: Config, model: Recommender, engine: Engine, objective: Objective, ranks: Ranks) -> None:
        self.config, self.model, self.engine, self.objective, self.ranks = config, model, engine, objective, ranks
        self.loss_scale = LossScale(config.loss_scale if config.precision == "fp16" else None)
        self._watch = _GradientWatch(engine.module.named_parameters())

    def enter(self, phase: Phase) -> None:
        """Train the subnets of ``phase`` from the next update on, and what is shared; nothing else changes a bit."""
        config = self.config.model
        self.model.encoder.take_part(phase.present)
        if self.config.training.strategy == "simultaneous":
            return

        def is_frozen(subnet: str | None) -> bool:
            return subnet is not None and subnet not in phase.trained

        self.model.tables.freeze({name for name in self.model.tables.names if is_frozen(subnet_of_table(config, name))})
        parameters = (name for name, _ in self.engine.module.named_parameters())
        self.engine.train_only([name for name in parameters if not is_frozen(subnet_of_parameter(config, name))])

    def __call__(self, prepared: PreparedStep, step: int, factor: float, stop: bool) -> StepResult:
        """One update.

        Args:
            prepared: this rank's part of the global batch.
            step: its number, from 1; decides dropout and negatives.
            factor: on both learning rates.
            stop: whether this rank was asked to stop.
        """
        HERE.enter("forward", step)
        # Dropout depends on (seed, step, rank) alone: there is no generator state to save.
        torch.manual_seed(hash((self.config.seed, step, self.ranks.rank)) & 0x7FFFFFFFFFFFFFFF)
        scale = self.loss_scale.value
        counts = self._counts(prepared.packed, stop)
        told = prepared.told()
        traffic.counts().include(told.sent)
        proposal = self.objective.propose(told.targets, step)
        loss = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for number, (batch, rows) in enumerate(zip(prepared.packed, told.exchanges, strict=True), 1):
            with self.engine.accumulating(last=number == len(prepared.packed)):
                HERE.enter("forward")
                local = self._loss(batch, rows, proposal)
                HERE.enter("backward")
                targets = counts.result()[0]
                # The engine's mean over ranks and the table's division by W both undo the factor W.
                self.engine.backward(local * (self.ranks.world / max(targets, 1.0)), scale)
                loss += local.detach()
        targets, events, sessions_lost, stops = counts.result()
        HERE.enter("update")
        total_loss, finite = self._agree(loss)
        broken = None if self.loss_scale.update(finite) else self._broken_names(loss)
        self._watch.forget()
        if finite:
            norm = self.engine.step(self.config.optimizer.lr * factor, scale)
            table_norm = self.model.tables.apply_gradients(self.config.table.lr * factor, scale)
        else:
            self.engine.skip()
            self.model.tables.discard_gradients()
            norm = table_norm = torch.tensor(math.nan)
        return StepResult(total_loss, targets, events, sessions_lost, stops > 0, finite, broken, norm, table_norm)

    def _loss(self, batch: PackedBatch, exchanges: Exchanges, proposal: StepProposal | None) -> torch.Tensor:
        """Sum of this rank's losses over a micro-batch."""
        looked = self.model.lookup(*exchanges)
        # After the rows that the encoder waits for.
        fetched = self.objective.fetch(proposal)
        events = {name: values.to(self.ranks.device) for name, values in batch.event_features.items()}
        queries = self.engine(looked.rows, looked.features, looked.places, batch.batch_sizes, events)
        positives = self.model.candidates.join([rows_at(*target) for target in looked.targets])
        return self.objective(queries, positives, batch, proposal, fetched)

    def _counts(self, batches: list[PackedBatch], stop: bool) -> collectives.PendingSum:
        """Sums over micro-batches and ranks, on their way while the forward runs."""
        sums = [sum(batch.targets_count for batch in batches), sum(batch.events for batch in batches)]
        sums += [sum(batch.sessions_lost for batch in batches), stop]
        return collectives.PendingSum(torch.tensor(sums, dtype=torch.float64), self.ranks.host)

    def _agree(self, loss: torch.Tensor) -> tuple[float, bool]:
        """The loss over all ranks, and whether it and every rank's gradients are finite.

        It comes before the update: every rank makes it, or none does.
        """
        broken = self._watch.any() | self.model.tables.has_broken_gradient()
        sums = to_host(torch.stack([loss, broken.to(loss)]))
        total, broken_ranks = collectives.sum_over_ranks(sums, self.ranks.host, "loss").tolist()
        return total, math.isfinite(total) and not broken_ranks

    def _broken_names(self, loss: torch.Tensor) -> list[str]:
        """Of what is not finite on this rank, for people."""
        names = [] if bool(loss.isfinite()) else ["loss"]
        for table in self.model.tables.broken_gradients():
            names.append(f"gradient of the {'item' if table == ITEM_TABLE else table} rows")
        return names + [f"gradient of {name}" for name in self._watch.broken()]


class _GradientWatch:
    """Sees every gradient of ``parameters`` as backward makes it, wherever the engine then puts it."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self._seen: list[tuple[str, torch.Tensor]] = []
        for name, parameter in parameters:
            parameter.register_hook(partial(self._look, name))

    def _look(self, name: str, gradient: torch.Tensor) -> None:
        # A tensor: asking for its value would make the host wait for the device.
        self._seen.append((name, (~gradient.isfinite()).any()))

    def any(self) -> torch.Tensor:
        """Whether one since `forget` was not finite, bool []."""
        return torch.stack([broken for _, broken in self._seen]).any()

    def broken(self) -> list[str]:
        """The names of those that were not, each once."""
        return list(dict.fromkeys(name for name, broken in self._seen if bool(broken)))

    def forget(self) -> None:
        self._seen.clear()

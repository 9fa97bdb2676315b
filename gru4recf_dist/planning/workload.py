"""What is planned: configuration, catalog, ranks; and the expected events, ids and negatives of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from gru4recf_dist.config import Config
from gru4recf_dist.model.encoder import SessionEncoder
from gru4recf_dist.model.features import FeatureSpec
from gru4recf_dist.model.packed_gru import PackedGRU
from gru4recf_dist.model.subnets import ITEM_TABLE, has_item_subnet
from gru4recf_dist.parallel.gathering import PADDING
from gru4recf_dist.planning.popularity import Popularity, largest_of


@dataclass(frozen=True)
class ItemFeature:
    """A feature as it lies in the store and travels; ``longest``: values of a token_seq."""

    spec: FeatureSpec
    longest: int = 1

    @property
    def width(self) -> int:
        """32-bit values of an item that travel."""
        return {"token_seq": self.longest, "vector": self.spec.size}.get(self.spec.kind, 1)

    @property
    def row_bytes(self) -> int:
        """Of an item in the store, at most: the bounds of a token_seq are 8 bytes more."""
        return 4 * self.width + (8 if self.spec.kind == "token_seq" else 0)


@dataclass(frozen=True)
class LogitCost:
    """What a loss does for every logit besides the four matrix products, forward and backward together.

    Attributes:
        passes: reads and writes of a block of logits, or of as many values.
        functions: values of an exponential, a logistic function or a logarithm.
        blocks: values of a block that exist at a time.
    """

    passes: int
    functions: int
    blocks: int

    def __add__(self, other: LogitCost) -> LogitCost:
        return LogitCost(self.passes + other.passes, self.functions + other.functions, self.blocks + other.blocks)


_SOFTMAX = LogitCost(passes=14, functions=2, blocks=2)
# Theirs is written as formulas, of which torch keeps the intermediate values for backward: the saved blocks, and three
# that are in the making.
_LOGIT_COSTS = {
    "sampled_softmax": _SOFTMAX,
    "full_softmax": _SOFTMAX,
    "bpr": LogitCost(passes=50, functions=9, blocks=6),
    "bpr_max": LogitCost(passes=103, functions=15, blocks=10),
    "top1": LogitCost(passes=74, functions=8, blocks=7),
    "top1_max": LogitCost(passes=96, functions=11, blocks=9),
}
# What `loss.elu` adds.
_ELU = LogitCost(passes=7, functions=3, blocks=1)


@dataclass(frozen=True)
class Workload:
    """A run that is planned.

    Attributes:
        items: N.
        world: ranks, one a GPU.
        session_events: mean events of a training session.
        event_features: as the encoder embeds them; they lie in the shards and travel nowhere.
    """

    config: Config
    items: int
    world: int
    session_events: float
    features: tuple[ItemFeature, ...]
    popularity: Popularity
    event_features: tuple[FeatureSpec, ...] = ()

    @property
    def host_table(self) -> bool:
        """Whether the table lies in host memory, and only the rows of a step on the device."""
        return self.config.table.device == "cpu"

    @property
    def samples(self) -> bool:
        return self.config.loss.samples

    @property
    def logit_cost(self) -> LogitCost:
        loss = self.config.loss
        cost = _LOGIT_COSTS[loss.name]
        return cost + _ELU if loss.elu else cost

    @property
    def over_gloo(self) -> bool:
        """Whether rows travel between hosts' memories: their gradients are then sent without padding."""
        return self.config.device == "cpu" or self.host_table

    @property
    def rows(self) -> int:
        """Table rows of the largest rank."""
        return -(-(self.items + 1) // self.world)

    @property
    def dim(self) -> int:
        return self.config.model.embedding_size

    @property
    def query_size(self) -> int:
        """Q: columns of a query, and of a candidate's row."""
        return sum(part.width for part in self.encoder.parts)

    @property
    def table_widths(self) -> dict[str, int]:
        """Columns of each table, by name."""
        return {ITEM_TABLE: self.dim, **{part.table: part.width for part in self.encoder.parts}}

    @property
    def reads_items(self) -> bool:
        """Whether item rows are inputs."""
        return has_item_subnet(self.config.model)

    @property
    def target_width(self) -> int:
        """Columns of the targets' rows that are no inputs, and travel over an exchange of their own; 0 if all are."""
        return sum(part.width for part in self.encoder.parts if not (self.reads_items and part.table == ITEM_TABLE))

    def touched_rows(self, counts: StepCounts) -> dict[str, float]:
        """Rows of each table that a rank reads and updates for a micro-batch."""
        candidates = counts.negatives / self.world if self.samples else float(self.rows)
        outputs = {part.table: candidates + counts.target_ids for part in self.encoder.parts}
        if not self.reads_items:
            return outputs
        # Targets are among the ids of the inputs' exchange.
        return {**outputs, ITEM_TABLE: counts.ids + (candidates if ITEM_TABLE in outputs else 0.0)}

    @property
    def element_bytes(self) -> int:
        return 8 if self.config.precision == "fp64" else 4

    @cached_property
    def encoder(self) -> SessionEncoder:
        # Without memory: the vocabularies of features can be large.
        with torch.device("meta"):
            specs = [feature.spec for feature in self.features]
            return SessionEncoder(self.config.model, specs, events=self.event_features)

    @property
    def encoder_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.encoder.parameters())

    @property
    def rnns(self) -> list[PackedGRU]:
        return [module for module in self.encoder.modules() if isinstance(module, PackedGRU)]

    @property
    def activation_elements(self) -> int:
        """Values that the encoder keeps of each event until backward, and that have a gradient there."""
        model, rnns = self.config.model, self.rnns
        # Inputs before and after dropout; of a GRU the three gates, the candidate's product, state and output.
        kept = 2 * sum(rnn.input_size for rnn in rnns) + len(rnns) * model.num_layers * 6 * model.hidden_size
        # Outputs of all RNNs before and after dropout; query, positive, and their product.
        return kept + 2 * len(rnns) * model.hidden_size + 3 * self.query_size


@dataclass(frozen=True)
class StepCounts:
    """Of a micro-batch; means over the ranks where nothing else is said.

    Attributes:
        events: packed events, T; `events_largest` of the rank with most.
        longest: events of the longest session, which an RNN takes one after the other.
        lookup_imbalance: rows that the most asked rank is asked for, over the mean.
        ids: distinct items of inputs, and of targets where their rows are the same.
        target_ids: distinct items of targets, where some of their rows are no inputs; else 0.
        negatives: distinct negatives, of all ranks.
        negatives_share: what each rank puts into their gathering, padding included.
        negatives_moved: what a rank hands to another before it (see `parallel.gathering`).
    """

    events: float
    events_largest: float
    ids: float
    target_ids: float
    negatives: float
    negatives_share: float
    negatives_moved: float
    longest: float
    lookup_imbalance: float = 1.0


def expected_counts(workload: Workload) -> StepCounts:
    """Expectations for sessions whose events are drawn independently by popularity.

    Real sessions repeat items and stay with a topic: their distinct ids are fewer.
    """
    config, world = workload.config, workload.world
    sessions = config.batch_size / world / config.accumulation
    spread = largest_of(world)
    inputs = workload.session_events - 1.0
    events = sessions * inputs
    shares_rows = workload.target_width < workload.query_size
    negatives = share = moved = 0.0
    if workload.samples:
        loss = config.loss
        negatives = workload.popularity.distinct_negatives(loss.negatives, loss.sampler, loss.alpha)
        negatives += workload.popularity.distinct_beside(
            events * world if loss.in_batch == "all" else min(loss.in_batch, events * world),
            loss.negatives,
            loss.sampler,
            loss.alpha,
        )
        # Ids are in a pseudo-random order: a distinct item falls to each rank alike.
        share = min(negatives, negatives / world + spread * math.sqrt(negatives / world * (1.0 - 1.0 / world)))
        if share * world > (1.0 + PADDING) * negatives:
            share = math.ceil(negatives / world)
            # Rows before a rank deviate from an even share like a Brownian bridge: 0.31 sqrt(negatives) is its mean.
            moved = math.sqrt(math.pi / 32 * negatives) * (1.0 - 1.0 / world)
    drawn = sessions * (workload.session_events if shares_rows else inputs)
    return StepCounts(
        events=events,
        # Lengths of sessions spread about as far as their mean.
        events_largest=events + spread * inputs * math.sqrt(sessions),
        ids=workload.popularity.distinct(drawn),
        target_ids=workload.popularity.distinct(sessions * inputs) if workload.target_width else 0.0,
        negatives=negatives,
        negatives_share=share,
        negatives_moved=moved,
        # Of as many sessions the longest is expected at the mean times a harmonic number, if their lengths spread so.
        longest=min(inputs * (np.euler_gamma + math.log(max(sessions, 1.0))), config.loader.max_length),
        lookup_imbalance=workload.popularity.lookup_imbalance(drawn, world),
    )

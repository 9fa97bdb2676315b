"""What this rank sends to other ranks: payload bytes by purpose, counted at every collective.

Counted is what the usual algorithms send: in an all-to-all a rank's rows for other ranks; in a ring, W-1 shares for an
all-gather or a reduce-scatter and 2(W-1)/W of the tensor for an all-reduce. Headers of the transport are not in it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

# What a differentiable collective sends back has a purpose of its own.
GRADIENTS_OF = {
    "rows": "row_gradients",
    "negatives": "negative_gradients",
    "queries": "query_gradients",
    "partial_sums": "partial_sum_gradients",
}
# `other` is what no training step sends: evaluation, logging.
PURPOSES = (
    "counts",
    "ids",
    "batch_targets",
    "features",
    *(purpose for pair in GRADIENTS_OF.items() for purpose in pair),
    "encoder_gradients",
    "loss",
    "other",
)
_PLACES = {purpose: place for place, purpose in enumerate(PURPOSES)}


@dataclass
class Traffic:
    """Totals of this rank.

    Attributes:
        sent: float64 [P], bytes by purpose, in the order of `PURPOSES`.
        looked_up: table rows that ranks, this one among them, asked this rank for.
    """

    sent: np.ndarray = field(default_factory=lambda: np.zeros(len(PURPOSES)))
    looked_up: int = 0

    def add(self, purpose: str, sent_bytes: float) -> None:
        self.sent[_PLACES[purpose]] += sent_bytes

    def add_all_reduce(self, purpose: str, tensor_bytes: float, world: int) -> None:
        """An all-reduce of ``tensor_bytes`` among ``world`` ranks."""
        self.add(purpose, 2 * (world - 1) / world * tensor_bytes)

    def include(self, other: Traffic) -> None:
        """Add what was counted apart."""
        self.sent += other.sent
        self.looked_up += other.looked_up

    def vector(self) -> np.ndarray:
        """Bytes by purpose and rows looked up, float64 [P + 1]."""
        return np.append(self.sent, self.looked_up)

    def copy(self) -> Traffic:
        return Traffic(self.sent.copy(), self.looked_up)

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.sent + other.sent, self.looked_up + other.looked_up)

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(self.sent - other.sent, self.looked_up - other.looked_up)


# One process is one rank, so there is one.
TOTAL = Traffic()
_apart = threading.local()


def counts() -> Traffic:
    """Where the calling thread counts what it sends."""
    return getattr(_apart, "counts", TOTAL)


@contextlib.contextmanager
def counted_apart() -> Iterator[Traffic]:
    """What the calling thread sends within it is counted in what this gives, not in `TOTAL`."""
    _apart.counts = Traffic()
    try:
        yield _apart.counts
    finally:
        del _apart.counts


def summary(ranks: np.ndarray, steps: int) -> dict[str, float]:
    """Scalars for the log.

    Args:
        ranks: float64 [W, P + 1], each rank's bytes by purpose and rows looked up, over ``steps`` steps.

    Returns:
        `perf/wire/PURPOSE_bytes` and `perf/wire/bytes`, a step's sums over the ranks; `perf/wire/imbalance` and
        `table/lookup_imbalance`, the most loaded rank over the mean. Without `perf/wire/` if nothing was sent.
    """
    sent, looked_up = ranks[:, :-1], ranks[:, -1]
    values = {"table/lookup_imbalance": imbalance(looked_up)}
    if sent.any():
        totals = zip(PURPOSES, sent.sum(axis=0), strict=True)
        values |= {f"perf/wire/{purpose}_bytes": float(total) / steps for purpose, total in totals if total}
        values["perf/wire/bytes"] = float(sent.sum()) / steps
        values["perf/wire/imbalance"] = imbalance(sent.sum(axis=1))
    return values


def imbalance(loads: np.ndarray) -> float:
    """The largest load over the mean; 1 if there is none."""
    return float(loads.max() / loads.mean()) if loads.any() else 1.0

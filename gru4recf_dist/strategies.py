"""Which subnets an update trains: the training strategies of Hidasi et al., RecSys 2016, as functions of integers.

A phase is a time in which the same subnets are trained. What is shared by all subnets (a dense layer, a common output
table) is trained in every phase; docs/architectures.md says what belongs to whom.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

from gru4recf_dist.config import TrainingConfig


@dataclass(frozen=True)
class Phase:
    """What an update does with the subnets.

    Attributes:
        trained: names of those that are trained; the others are left as they are.
        present: names of those that take part in the scores.
        is_last: whether all that are to come in have come in.
    """

    trained: tuple[str, ...]
    present: tuple[str, ...]
    is_last: bool


def phase_of(config: TrainingConfig, subnets: list[str], epoch: int, step: int) -> Phase:
    """The phase of an update.

    Args:
        subnets: names of all, in the order in which they take turns.
        epoch: the update's, from 0.
        step: updates made before, over all epochs.
    """
    everyone = tuple(subnets)
    if config.strategy == "simultaneous":
        return Phase(everyone, everyone, is_last=True)
    if config.strategy == "interleaving":
        return Phase((subnets[step % len(subnets)],), everyone, is_last=True)
    ends = list(accumulate(config.phase_epochs(len(subnets))))
    if config.strategy == "alternating":
        return Phase((subnets[bisect_right(ends, epoch % ends[-1])],), everyone, is_last=True)
    # Residual: the last one is trained to the end.
    turn = min(bisect_right(ends, epoch), len(subnets) - 1)
    return Phase((subnets[turn],), everyone[: turn + 1], is_last=turn == len(subnets) - 1)

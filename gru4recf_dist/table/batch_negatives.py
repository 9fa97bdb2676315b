"""Negatives of a step from two sources: the sampler, and the targets of the global batch itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gru4recf_dist.data.shard_format import PADDING_ID
from gru4recf_dist.parallel import collectives
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.table.negatives import Negatives, NegativeSampler

# Keeps these draws apart from the sampler's, which the run's seed and the step seed too.
_STREAM = 0x626174


@dataclass(frozen=True)
class BatchTargets:
    """The counted targets of the global batch, as distinct items.

    Attributes:
        ids: int64 [V], ascending.
        counts: int64 [V], how many of the batch's targets each is.
    """

    ids: np.ndarray
    counts: np.ndarray

    def draw(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """Items of ``count`` of the targets; int64, ascending.

        The targets, sorted by item, are cut into ``count`` equal parts, and one is drawn of each: every item comes up
        count * share times on average, as with independent draws, but the number varies less. As many draws as there
        are targets take each once.
        """
        total = int(self.counts.sum())
        places = ((np.arange(count) + generator.random(count)) * (total / count)).astype(np.int64)
        ends = np.cumsum(self.counts)
        return self.ids[np.searchsorted(ends, np.minimum(places, total - 1), side="right")]

    def log_share(self, ids: np.ndarray) -> np.ndarray:
        """log of the share of the targets that each of ``ids`` has, -inf for an item that is none; float64."""
        places = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        counts = np.where(self.ids[places] == ids, self.counts[places], 0)
        with np.errstate(divide="ignore"):
            return np.log(counts) - np.log(self.counts.sum())


def gather_targets(targets: list[torch.Tensor], ranks: Ranks) -> BatchTargets:
    """The targets of all ranks' micro-batches; padding is left out.

    Sorted, they do not tell how the batch was divided: they are the same for any number of ranks and micro-batches.

    Args:
        targets: this rank's, int64 on the CPU.
    """
    # Half the bytes: an item id fits 31 bits.
    mine = torch.cat(targets).to(torch.int32)
    mine = mine[mine != PADDING_ID]
    counts = collectives.gather_counts(len(mine), ranks.host)
    everyone = collectives.all_gather_rows(mine, counts, ranks.host, "batch_targets") if sum(counts) else mine
    return BatchTargets(*np.unique(everyone.numpy().astype(np.int64), return_counts=True))


class StepProposal:
    """What one step's negatives are drawn from: K times from the sampler's q and M times from the batch's targets.

    K may be 0: then a batch without a target has no negative.

    Of item j, K q_j + M p_j draws are expected, where p_j is its share of this batch's targets. A draw of either source
    counts by the inverse of that sum (the balance heuristic of Veach & Guibas, SIGGRAPH 1995; for two sources of
    negatives see Yang et al., "Mixed Negative Sampling", WWW 2020 Companion): then the sum over all draws estimates the
    sum over all items without bias, as with one source (Bengio & Senécal, 2008), *for every batch*. Were p_j an item's
    share of the training events instead, that would hold only if the batch's targets were independent of its queries;
    but each query's own session is among them, and its items would weigh up to 1 / (T p_j) times too much.

    Args:
        batch: None without in-batch negatives.
    """

    def __init__(self, sampler: NegativeSampler, in_batch: int, batch: BatchTargets | None, step: int) -> None:
        self._sampler, self._in_batch, self._batch = sampler, in_batch, batch
        self.negatives = sampler.draw(step)
        # A batch of sessions of one event has no target.
        if batch is None or not len(batch.ids):
            self._batch = None
            return
        generator = np.random.default_rng((sampler.seed, _STREAM, step))
        drawn, counts = np.unique(batch.draw(in_batch, generator), return_counts=True)
        ids, places = np.unique(np.concatenate([self.negatives.ids, drawn]), return_inverse=True)
        total = np.zeros(len(ids), np.int64)
        np.add.at(total, places, np.concatenate([self.negatives.counts, counts]))
        self.negatives = Negatives(ids, total, self.log_expected(ids))

    def log_expected(self, ids: np.ndarray) -> np.ndarray:
        """log of how many draws each of ``ids`` is expected to get; float64."""
        expected = self._sampler.log_expected(ids)
        if self._batch is None:
            return expected
        return np.logaddexp(expected, np.log(self._in_batch) + self._batch.log_share(ids))

"""The training objective over the sharded tables: what a rank's events cost, with every collective that this takes."""

from __future__ import annotations

import numpy as np
import torch

from gru4recf_dist.config import Config
from gru4recf_dist.data.batches import PackedBatch
from gru4recf_dist.model import losses
from gru4recf_dist.model.ranking_losses import ranking_loss
from gru4recf_dist.parallel import collectives
from gru4recf_dist.parallel.gathering import Gathering
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.table.batch_negatives import BatchTargets, StepProposal, gather_targets
from gru4recf_dist.table.candidates import Candidates
from gru4recf_dist.table.negatives import NegativeSampler


class Objective:
    """The loss that is configured: full or sampled softmax, or one of GRU4Rec's over the same negatives.

    Args:
        sampler: draws negatives; None with full softmax.
    """

    def __init__(self, config: Config, candidates: Candidates, sampler: NegativeSampler | None) -> None:
        self.config, self.candidates, self.sampler = config.loss, candidates, sampler

    def batch_targets(self, batches: list[PackedBatch], ranks: Ranks) -> BatchTargets | None:
        """The targets of a step's global batch, of which `propose` draws; None if it draws of the sampler alone.

        Args:
            batches: all of this rank's micro-batches.
            ranks: with the group to talk over.
        """
        if self.sampler is None or not self.config.in_batch:
            return None
        return gather_targets([batch.targets for batch in batches], ranks)

    def propose(self, targets: BatchTargets | None, step: int) -> StepProposal | None:
        """The negatives of a step, the same on every rank and for any number of ranks; None with full softmax.

        Args:
            targets: of `batch_targets`.
            step: number of the update.
        """
        if self.sampler is None:
            return None
        in_batch = self.config.in_batch
        if in_batch == "all":
            # As many draws as there are targets take each of them once.
            in_batch = int(targets.counts.sum())
        return StepProposal(self.sampler, in_batch, targets, step)

    def fetch(self, proposal: StepProposal | None) -> list[Gathering]:
        """Begin to fetch the negatives' rows, which travel while the encoder runs."""
        return [] if proposal is None else self.candidates.gather(proposal.negatives.ids)

    def __call__(
        self,
        queries: torch.Tensor,
        positives: torch.Tensor,
        batch: PackedBatch,
        proposal: StepProposal | None,
        fetched: list[Gathering],
    ) -> torch.Tensor:
        """Sum of this rank's losses over its counted positions: a scalar.

        Args:
            queries: [T, Q], the encoder's output.
            positives: [T, Q], candidate of each target (`Candidates.join`).
            batch: its targets and weights.
            proposal: the step's negatives, of `propose`.
            fetched: of `fetch`, for this very loss.
        """
        if proposal is None:
            each = self._full(queries, positives)
        else:
            rows = self.candidates.gathered(fetched)
            each = self._over_negatives(queries, positives, batch.targets, proposal, rows)
        weights = batch.weights.to(device=each.device, dtype=each.dtype)
        return (each * weights).sum()

    def _full(self, queries: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
        """Vocabulary-parallel cross-entropy: every rank sums over its own rows for the queries of all."""
        group = self.candidates.ranks.table
        counts = collectives.gather_counts(len(queries), self.candidates.ranks.host)
        everyone = Gathering(queries, counts, group, "queries").rows()
        rows = self.candidates.own_items()
        partial = losses.blockwise_logsumexp(everyone, rows, block_rows=self.config.block_rows)
        # Each rank gets back the W partial sums of its own queries.
        mine = collectives.differentiable_all_to_all(
            partial, [len(queries)] * len(counts), counts, group, "partial_sums"
        )
        total = torch.logsumexp(mine.view(len(counts), len(queries)), dim=0)
        return total - (queries * positives).sum(dim=-1)

    def _over_negatives(
        self,
        queries: torch.Tensor,
        positives: torch.Tensor,
        targets: torch.Tensor,
        proposal: StepProposal,
        rows: torch.Tensor,
    ) -> torch.Tensor:
        """Sampled softmax, or a ranking loss."""
        config, negatives = self.config, proposal.negatives
        compared = (queries, positives, rows)
        exclude = losses.columns_of(targets, torch.from_numpy(negatives.ids)).to(queries.device)
        if config.name != "sampled_softmax":
            counts = torch.from_numpy(negatives.counts).to(queries.device)
            settings = (config.regularization, config.elu, config.block_rows)
            return ranking_loss(config.name, *compared, counts, exclude, *settings)
        correction = np.log(negatives.counts)
        if config.logq != "off":
            correction = correction - negatives.log_expected
        positive_correction = None
        if config.logq == "classic":
            # The padding target of a position that does not count has no probability: any item stands in.
            expected = proposal.log_expected(targets.clamp(min=1).numpy())
            positive_correction = torch.from_numpy(expected).to(queries)
        correction = torch.from_numpy(correction).to(queries)
        return losses.sampled_softmax(*compared, correction, exclude, positive_correction, config.block_rows)

"""Distributed full-sort evaluation: every item is a candidate, no [queries, items] matrix is made, ranks are exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from gru4recf_dist.config import Config
from gru4recf_dist.data import assignment
from gru4recf_dist.data.batches import QueryBatch, pack_queries
from gru4recf_dist.data.columns import concatenate
from gru4recf_dist.data.seen import SeenItems
from gru4recf_dist.data.shard_format import Manifest
from gru4recf_dist.errors import UserError
from gru4recf_dist.evaluation import ranking, score_tiles
from gru4recf_dist.evaluation.metrics import RankHistogram
from gru4recf_dist.evaluation.sessions import batch_count, read_batches
from gru4recf_dist.model.places import rows_at
from gru4recf_dist.parallel import collectives
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.parallel.waits import to_host
from gru4recf_dist.recommender import Recommender
from gru4recf_dist.table.partition import route
from gru4recf_dist.table.table_group import TableGroup


class BrokenOff(Exception):
    """An evaluation was not made to its end, as a rank did not want it any more."""


@dataclass(frozen=True)
class _Queries:
    """Queries of all ranks, the same on each: Q of them."""

    vectors: torch.Tensor
    targets: torch.Tensor
    target_scores: torch.Tensor
    seen: SeenItems

    @classmethod
    def join(cls, parts: list[_Queries]) -> _Queries:
        """Of several rounds, one after the other."""
        before = np.cumsum([0, *(len(part.targets) for part in parts)])
        seen = [part.seen.later(int(start)).columns() for part, start in zip(parts, before, strict=False)]
        return cls(
            vectors=torch.cat([part.vectors for part in parts]),
            targets=torch.cat([part.targets for part in parts]),
            target_scores=torch.cat([part.target_scores for part in parts]),
            seen=SeenItems.from_columns(torch.cat(seen)),
        )


class Evaluator:
    """Ranks the targets of a split against all items.

    Each batch of sessions, of fixed composition, is encoded whole by one rank; the queries are gathered, every rank
    counts the items of its own rows that beat each target, and one all-reduce of integers gives the exact ranks.

    Args:
        popularity: int64 [N+1]; an item without a training event has an untrained row: as a target it is a miss.
    """

    def __init__(self, config: Config, manifest: Manifest, popularity: np.ndarray, ranks: Ranks) -> None:
        self.config, self.manifest, self.ranks = config, manifest, ranks
        self.popularity = popularity
        self.protocol = protocol_of(config, manifest)

    def evaluate(
        self, model: Recommender, split: str, is_unwanted: Callable[[], bool] = lambda: False
    ) -> dict[str, dict[str, float]]:
        """Metrics of a split, the same on every rank.

        Args:
            is_unwanted: asked on every rank before each batch; if one says so, all of them break off.

        Returns:
            ``{split: {...}, split_excluding_seen: {...}}``; in the second the session's earlier items are no
            candidates, so a target among them is a miss. Both count every target in the denominator.

        Raises:
            BrokenOff: on every rank, if it ``is_unwanted``.
        """
        settings = self.config.evaluation
        self._check_finite(model.tables)
        everything, unseen = (RankHistogram(max(settings.ks)) for _ in range(2))
        untrained_targets = sessions_lost = 0
        batches = read_batches(
            self.config.data,
            self.manifest,
            split,
            settings.batch_sessions,
            self.ranks.rank,
            self.ranks.world,
            self.config.loader.on_bad_shard,
        )
        waiting: list[_Queries] = []
        rounds = self._rounds(split)
        for number in range(1, rounds + 1):
            block = next(batches, None) or concatenate([])
            sessions_lost += int(np.count_nonzero(block.lengths == 0))
            batch = pack_queries(
                block,
                self.config.loader.max_length,
                self.config.loader.context,
                every_position=self.protocol == "every_position",
                event_features=model.event_features,
            )
            waiting.append(self._gather(model, batch, is_unwanted()))
            # The table's rows are gone through once for many queries.
            if number < rounds and sum(len(each.targets) for each in waiting) < ranking.QUERIES:
                continue
            queries, waiting = _Queries.join(waiting), []
            # The same scores on every rank, so all of them stop together.
            if not bool(to_host(queries.target_scores.isfinite().all())):
                raise _diverged()
            above, seen_above = self._count(model, queries)
            trained = torch.from_numpy(self.popularity[queries.targets.numpy()] > 0)
            repeated = queries.seen.contain(queries.targets)
            everything.add((above + 1).numpy(), trained.numpy())
            unseen.add((above - seen_above + 1).numpy(), (trained & ~repeated).numpy())
            untrained_targets += int((~trained).sum())
        sessions_lost = int(collectives.sum_over_ranks(torch.tensor(sessions_lost), self.ranks.host))
        common = {
            "sessions_lost": sessions_lost,
            "targets": everything.total,
            "untrained_target_share": untrained_targets / everything.total if everything.total else 0.0,
        }
        return {
            split: {**everything.metrics(settings.ks), **common},
            f"{split}_excluding_seen": {**unseen.metrics(settings.ks), **common},
        }

    def _check_finite(self, tables: TableGroup) -> None:
        """NaN compares false with everything: nothing would stand above any target, and a broken model look perfect."""
        broken = torch.tensor(tables.has_broken_row(), dtype=torch.int64)
        if int(collectives.sum_over_ranks(broken, self.ranks.host)):
            raise _diverged()

    def _rounds(self, split: str) -> int:
        """Batches of the rank that has most; the others take part with an empty one."""
        batches = batch_count(self.manifest, split, self.config.evaluation.batch_sessions)
        return max(len(assignment.share(batches, rank, self.ranks.world)) for rank in range(self.ranks.world))

    def _gather(self, model: Recommender, batch: QueryBatch, unwanted: bool) -> _Queries:
        """Encode this rank's batch and put the ranks' queries together (vectors on the device, integers on the CPU)."""
        device, host = self.ranks.device, self.ranks.host
        sizes = np.array([len(batch.targets), len(batch.seen.item), unwanted], dtype=np.float64)
        *sizes, unwanted_by = collectives.gather_vector(sizes, host).astype(np.int64).T.tolist()
        if any(unwanted_by):
            raise BrokenOff
        counts, runs = sizes
        encoded = model.encode(batch.items, batch.batch_sizes, batch.event_features)
        vectors = encoded[batch.positions.to(device)]
        with torch.no_grad():
            routing = route(model.table.partition, batch.targets)
            places = routing.inverse[0].to(device)
            rows = [rows_at(rows, places).float() for rows in model.candidates.lookup(model.table.exchange(routing))]
        scores = model.candidates.exact_scores(vectors, rows)
        seen = collectives.all_gather_rows(batch.seen.later(sum(counts[: self.ranks.rank])).columns(), runs, host)
        return _Queries(
            vectors=collectives.all_gather_rows(vectors, counts, self.ranks.table),
            targets=collectives.all_gather_rows(batch.targets, counts, host),
            target_scores=collectives.all_gather_rows(scores, counts, self.ranks.table),
            seen=SeenItems.from_columns(seen),
        )

    def _count(self, model: Recommender, queries: _Queries) -> tuple[torch.Tensor, torch.Tensor]:
        """Items above each target, and those of them that the session has seen; int64 [Q] each, on the CPU."""
        settings, candidates = self.config.evaluation, model.candidates
        targets = queries.targets.to(self.ranks.device)
        common = (queries.vectors, targets, queries.target_scores)
        tile_rows = settings.tile_rows or score_tiles.default_tile_rows(self.ranks.device)
        above = ranking.count_above(*common, candidates, tile_rows, settings.ties)
        of_sessions = queries.seen.to(self.ranks.device)
        seen = ranking.count_seen_above(*common, of_sessions, candidates, settings.ties)
        both = to_host(collectives.sum_over_ranks(torch.stack([above, seen]), self.ranks.table))
        return both[0], both[1]


def _diverged() -> UserError:
    return UserError("the model's values are not finite: it has diverged. Try lower optimizer.lr and table.lr")


def protocol_of(config: Config, manifest: Manifest) -> str:
    """The evaluation protocol, with `auto` resolved to what the data set was prepared for."""
    chosen = config.evaluation.protocol
    return manifest.protocol if chosen == "auto" else chosen

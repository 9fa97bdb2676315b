"""What a model must beat: popularity, and a first-order Markov chain over items. Both with ties broken at random.

They are counted on one process from the training shards: integers, and sorted arrays of those distinct transitions that
begin at an item which the evaluated sessions ask for.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from gru4recf_dist.data import columns
from gru4recf_dist.data.batches import QueryBatch, pack_queries
from gru4recf_dist.data.shard_format import Manifest
from gru4recf_dist.data.shards import read_blocks
from gru4recf_dist.evaluation.metrics import ExpectedOverTies
from gru4recf_dist.evaluation.sessions import read_batches
from gru4recf_dist.table.negatives import distinct_counts


class Popularity:
    """Scores an item by its training events."""

    def __init__(self, popularity: np.ndarray) -> None:
        self._counts = popularity
        self._values, numbers = distinct_counts(popularity[1:])
        # How many items have one of the first counts.
        self._below = np.concatenate([[0], np.cumsum(numbers)])

    def scores(self, last: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Scores of ``items`` after ``last`` events, int64 [n]."""
        return self._counts[items]

    def above_and_tied(self, last: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many of all items score above, and exactly, each of ``scores``; int64 [n] each."""
        low, high = (self._below[np.searchsorted(self._values, scores, side)] for side in ("left", "right"))
        return self._below[-1] - high, high - low


class MarkovChain:
    """Scores an item by how often it followed the session's last item in training.

    Args:
        sources: the items that sessions will end with, ascending: no transition from another one is kept.
    """

    def __init__(self, data: str, manifest: Manifest, sources: np.ndarray, on_bad_shard: str = "fail") -> None:
        self._items = manifest.items
        self._base = manifest.items + 1
        keys, counts = _transitions(data, manifest, sources, self._base, on_bad_shard)
        # A last key above all others: a search for any pair ends at a place.
        self._keys = np.append(keys, np.iinfo(np.int64).max)
        self._counts = np.append(counts, 0)
        source = keys // self._base
        # Within each source item by ascending count: one binary search finds how many are above a count.
        self._width = int(counts.max(initial=0)) + 2
        self._ordered = np.sort(source * self._width + counts)

    def scores(self, last: np.ndarray, items: np.ndarray) -> np.ndarray:
        wanted = last * self._base + items
        places = np.searchsorted(self._keys, wanted)
        return np.where(self._keys[places] == wanted, self._counts[places], 0)

    def above_and_tied(self, last: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        start, stop = (np.searchsorted(self._keys, item * self._base) for item in (last, last + 1))
        low, high = (np.searchsorted(self._ordered, last * self._width + scores, side) for side in ("left", "right"))
        # Items that never followed `last` are all tied at 0.
        tied = np.where(scores > 0, high - low, self._items - (stop - start))
        return np.where(scores > 0, stop - high, stop - start), tied


def _transitions(
    data: str, manifest: Manifest, sources: np.ndarray, base: int, on_bad_shard: str
) -> tuple[np.ndarray, np.ndarray]:
    """Distinct pairs of consecutive training items, the first one of ``sources``, as keys ``item * base + next``,
    ascending, and their counts."""
    merged, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    for shard in manifest.splits["train"].shards:
        keys = [np.empty(0, np.int64)]
        for block in read_blocks(data, shard, manifest.items, on_bad_shard, manifest.event_features):
            first = columns.ragged_arange(block.lengths) == 0
            items = block.items.astype(np.int64)
            pairs = ~first[1:] & _are_in(sources, items[:-1])
            keys.append((items[:-1] * base + items[1:])[pairs])
        new, new_counts = np.unique(np.concatenate(keys), return_counts=True)
        merged, places = np.unique(np.concatenate([merged, new]), return_inverse=True)
        counts = np.bincount(places, np.concatenate([counts, new_counts]), len(merged)).astype(np.int64)
    return merged, counts


def _are_in(ascending: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Which of ``items`` are among others; bool, of the shape of ``items``."""
    if not len(ascending):
        return np.zeros(len(items), bool)
    return ascending[np.minimum(np.searchsorted(ascending, items), len(ascending) - 1)] == items


def _last_items(queries: Iterator[QueryBatch]) -> np.ndarray:
    """The distinct items that queries end with, ascending."""
    distinct = np.empty(0, np.int64)
    for batch in queries:
        distinct = np.union1d(distinct, batch.items[batch.positions].numpy())
    return distinct


def evaluate_baselines(
    data: str,
    manifest: Manifest,
    popularity: np.ndarray,
    split: str,
    protocol: str,
    ks: list[int],
    on_bad_shard: str = "fail",
    batch_sessions: int = 1024,
) -> dict[str, dict[str, float]]:
    """Metrics of the baselines on a split, with the same targets and misses as the model's.

    Args:
        batch_sessions: sessions that are in memory at a time; no metric depends on it.

    Returns:
        by name: ``popularity``, ``markov``, and both with the suffix ``_excluding_seen``.
    """

    def queries() -> Iterator[QueryBatch]:
        for block in read_batches(data, manifest, split, batch_sessions, on_bad_shard=on_bad_shard):
            # The history is never cut here: a baseline sees what the session holds.
            longest = max(int(block.lengths.max()), 2)
            yield pack_queries(block, longest, context=0, every_position=protocol == "every_position")

    markov = MarkovChain(data, manifest, _last_items(queries()), on_bad_shard)
    baselines = {"popularity": Popularity(popularity), "markov": markov}
    expected = {f"{name}{suffix}": ExpectedOverTies(ks) for name in baselines for suffix in ("", "_excluding_seen")}
    for batch in queries():
        last, targets = batch.items[batch.positions].numpy(), batch.targets.numpy()
        trained = popularity[targets] > 0
        repeated = batch.seen.contain(batch.targets).numpy()
        for name, baseline in baselines.items():
            scores = baseline.scores(last, targets)
            above, tied = baseline.above_and_tied(last, scores)
            expected[name].add(above, tied, trained)
            better, equal = np.zeros((2, len(targets)), np.int64)
            for query, seen in (map(torch.Tensor.numpy, pair) for pair in batch.seen.pairs()):
                seen_scores = baseline.scores(last[query], seen)
                better += np.bincount(query[seen_scores > scores[query]], minlength=len(targets))
                equal += np.bincount(query[seen_scores == scores[query]], minlength=len(targets))
            # Where the target itself was seen it is a miss, and its tie may be left empty.
            rest = np.maximum(tied - equal, 1)
            expected[f"{name}_excluding_seen"].add(above - better, rest, trained & ~repeated)
    return {name: sums.metrics() for name, sums in expected.items()}

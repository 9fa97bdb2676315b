"""Which of the metrics that evaluation gives are shown as scalars, and by what names."""

from __future__ import annotations

from gru4recf_dist.config import Config
from gru4recf_dist.data.shard_format import Manifest

# What a run is judged by: measured when it has finished, with the weights of its best checkpoint.
FINAL = "eval/when_finished/"
_METRICS = ("ndcg", "hit", "mrr")


def evaluation_scalars(metrics: dict[str, dict[str, float]]) -> dict[str, float]:
    """A split's metrics as points of curves.

    Left out is what makes no curve of its own: recall, which is hit (one target a query), and what is the same at every
    evaluation. Sessions that damaged shards lost are there if there are any.

    Args:
        metrics: as `Evaluator.evaluate` returns them.
    """
    return {
        f"eval/{split}/{name}": value
        for split, part in metrics.items()
        for name, value in part.items()
        if name.startswith(_METRICS) or (name == "sessions_lost" and value and not split.endswith("_excluding_seen"))
    }


def final_names(config: Config, manifest: Manifest) -> dict[str, tuple[str, str]]:
    """Scalars of a finished run, each with its split and metric: at early stopping's k, on all that was measured."""
    k = config.early_stopping.metric.partition("@")[2]
    measured = [split for split in ("valid", "test") if manifest.splits[split].sessions]
    return {
        f"{FINAL}{candidates}/{metric}@{k}": (candidates, f"{metric}@{k}")
        for metric in _METRICS
        for split in measured
        for candidates in (split, f"{split}_excluding_seen")
    }

"""What tells runs apart: hyper-parameters, the metrics they are judged by, and what a person reads about them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import BaseModel

from gru4recf_dist import typed_yaml
from gru4recf_dist.config import Config
from gru4recf_dist.data.shard_format import SPLITS, Manifest
from gru4recf_dist.shown_metrics import final_names

# Where and how a run works and is watched, not what comes out of it.
_NO_HYPER_PARAMETERS = (
    *("run_dir", "resume", "timeout_seconds", "device"),
    *("loss_scale", "evaluation", "checkpoint", "monitoring", "storage"),
)


@dataclass(frozen=True)
class RunDescription:
    """What HPARAMS and TEXT of TensorBoard show of a run.

    Attributes:
        hyper_parameters: by dotted key.
        final_metrics: scalars that are logged at the end, with the names that a person sees.
        texts: Markdown by tag.
    """

    hyper_parameters: dict[str, str | float | int | bool]
    final_metrics: dict[str, str]
    texts: dict[str, str]


def describe(config: Config, manifest: Manifest, world: int) -> RunDescription:
    """The description of a run on ``world`` ranks."""
    kept = {key: value for key, value in _flat(config, "") if key.partition(".")[0] not in _NO_HYPER_PARAMETERS}
    return RunDescription(
        {**kept, "ranks": world},
        {tag: " ".join(parts) for tag, parts in final_names(config, manifest).items()},
        {"config": _as_code(typed_yaml.dump(config)), "data": data_report(config.data, manifest)},
    )


def _flat(section: BaseModel, prefix: str) -> Iterator[tuple[str, str | float | int | bool]]:
    """Dotted keys with values of the types that HPARAMS takes.

    What is no section stays one value, as JSON: all runs then have the same keys. TensorBoard takes them from one run.
    """
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, int | float | bool | str) else json.dumps(value)


def data_report(data: str, manifest: Manifest) -> str:
    """The data set as Markdown: its size, what is predicted, its features."""
    untrained = {
        row["step"].removeprefix("split: "): row["untrained_targets"]
        for report in (manifest.report, *(append.report for append in manifest.appends))
        for row in report
        if row.get("step", "").startswith("split: ") and row.get("untrained_targets") is not None
    }
    splits = [
        [name, *(f"{count:,}" for count in (split.sessions, split.events, split.targets)), _count(untrained.get(name))]
        for name, split in ((name, manifest.splits[name]) for name in SPLITS)
    ]
    features = [
        [feature.name, feature.kind, f"{feature.size:,}", f"{feature.longest:,}"] for feature in manifest.features
    ]
    of_events = [[feature.name, feature.kind, f"{feature.size:,}"] for feature in manifest.event_features]
    return "\n".join(
        [
            f"**{manifest.name}**: {manifest.items:,} items, {manifest.streams} streams, protocol {manifest.protocol}",
            "",
            *_table(["split", "sessions", "events", "targets", "targets never seen in training"], splits),
            "",
            "Features of the items:",
            "",
            *(_table(["feature", "kind", "size", "most values of an item"], features) if features else ["none"]),
            "",
            "Features of the events:",
            "",
            *(_table(["feature", "kind", "size"], of_events) if of_events else ["none"]),
            "",
            f"Read from `{data}`.",
        ]
    )


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def _as_code(text: str) -> str:
    return f"```yaml\n{text}```\n"

"""Starting a run from the weights of an earlier one, on a data set that may have grown since (`init_from`).

Item rows and the embedded values of features keep what was learned, with the state of their optimizers and its step
counts, so that Adam's moments mean what they did. What the old data set did not have begins as in a fresh run: with its
initial value, its optimizer state zero. Steps, epochs, schedule, order of the sessions and early stopping begin anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gru4recf_dist import recommender, trained_run
from gru4recf_dist.checkpoint import Checkpoints, weight_settings
from gru4recf_dist.checkpoint_commits import read_commit
from gru4recf_dist.config import Config
from gru4recf_dist.data import storage
from gru4recf_dist.data.shard_format import Manifest
from gru4recf_dist.errors import UserError
from gru4recf_dist.model.features import FeatureSpec, encoder_order, kept_rows, new_parameters
from gru4recf_dist.model.subnets import grouped
from gru4recf_dist.parallel.engines import Engine
from gru4recf_dist.parallel.ranks import Ranks, from_first
from gru4recf_dist.table.table_group import TableGroup


@dataclass(frozen=True)
class Origin:
    """The checkpoint to start from.

    Attributes:
        step: of the earlier run.
        specs, events: the item and event features as that run embedded them.
    """

    step: int
    specs: list[FeatureSpec]
    events: list[FeatureSpec]


def find(config: Config, manifest: Manifest, ranks: Ranks | None = None) -> Origin:
    """The best checkpoint of ``config.init_from`` (the newest, if none is marked), once it is known to fit.

    Args:
        ranks: those that look for it together, all of them; None: whether its tensors are damaged is not looked at.

    Raises:
        UserError: there is none, or it is damaged; or its model is another one, or its data set is no ancestor of
            ``manifest``'s.
    """
    folder = config.init_from
    before = _on_first(ranks, lambda: trained_run.read_config(folder, [], key="init_from"))
    step = trained_run.chosen_step(folder, ranks, key="init_from")
    return _on_first(ranks, lambda: _fitting(config, manifest, before, step))


def _on_first(ranks: Ranks | None, compute: Callable[[], Any]) -> Any:
    return compute() if ranks is None else from_first(ranks, compute)


def _fitting(config: Config, manifest: Manifest, before: Config, step: int) -> Origin:
    folder = config.init_from
    _check_settings(before, config)
    state = read_commit(storage.join(folder, "checkpoints"), step)["state"]
    if "features" not in state:
        raise UserError(f"init_from: {folder}: its checkpoints are of a version that did not record the features")
    if state["training_data"] not in (manifest.training_digest, *manifest.ancestors):
        raise UserError(
            f"init_from: {folder} was trained on a data set that {config.data} was not made from by appending: "
            "the same ids would mean other items"
        )
    specs = [FeatureSpec(**spec) for spec in state["features"]]
    events = [FeatureSpec(**spec) for spec in state.get("event_features", [])]
    _check_features("features", folder, specs, recommender.feature_specs(config.model, manifest))
    _check_features("event_features", folder, events, recommender.event_specs(config.model, manifest))
    return Origin(step, specs, events)


def load(config: Config, manifest: Manifest, engine: Engine, tables: TableGroup, ranks: Ranks) -> None:
    """Fill the freshly initialised ``engine`` and ``tables`` from ``config.init_from``.

    Raises:
        UserError: as `find`.
    """
    origin = find(config, manifest, ranks)
    old, new = (
        grouped(config.model, specs) for specs in (origin.specs, recommender.feature_specs(config.model, manifest))
    )
    # Of several groups the modules are numbered.
    names = ["feature_embed_layer"] if len(new) == 1 else [f"feature_embed_layer.{n}" for n in range(len(new))]
    parts = list(zip(names, old, new, strict=True))
    parts.append(("event_inputs.embedding", origin.events, recommender.event_specs(config.model, manifest)))
    kept, fresh = {}, set()
    for module, before, now in parts:
        kept |= {f"{module}.{name}": places for name, places in kept_rows(before, now).items()}
        fresh |= {f"{module}.{name}" for name in new_parameters(before, now)}
    Checkpoints(config.init_from, ranks).load_smaller(origin.step, engine, tables, kept, fresh)


def _check_settings(before: Config, config: Config) -> None:
    now = weight_settings(config)
    for key, old in weight_settings(before).items():
        # `all` and the list of all are the same features: `_check_features` compares what was meant.
        if key not in ("model.features", "model.event_features") and old != now[key]:
            raise UserError(f"{key}: {now[key]!r}, but {config.init_from} (init_from) was trained with {old!r}")


def _check_features(key: str, folder: str, old: list[FeatureSpec], new: list[FeatureSpec]) -> None:
    before, now = encoder_order(old), encoder_order(new)
    names = [[f"{spec.name} ({spec.kind})" for spec in specs] for specs in (before, now)]
    if names[0] != names[1]:
        given = ", ".join(names[1]) or "none"
        was_given = ", ".join(names[0]) or "none"
        raise UserError(f"model.{key}: {given}, but {folder} (init_from) was trained with {was_given}")
    for was, now_is in zip(before, now, strict=True):
        grows = was.kind in ("token", "token_seq")
        if now_is.size < was.size or (not grows and now_is.size != was.size):
            raise UserError(
                f"model.{key}: '{was.name}' has size {now_is.size}, but {folder} (init_from) was trained with "
                f"size {was.size}"
            )

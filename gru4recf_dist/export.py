"""Write a run's best checkpoint for other programs: as a plain torch model, or as one of RecBole 1.2.1.

    python -m gru4recf_dist.export --run RUN_DIR --format torch --output DIR [key=value ...]
    python -m gru4recf_dist.export --run RUN_DIR --format recbole --output DIR [--ids FOLDER] [key=value ...]

torch: DIR gets all that scoring takes, of any model; `gru4recf_dist.exported.load(DIR)` scores sessions with it.

recbole: DIR gets `model.pth` (GRU4RecF, or GRU4Rec for `model.fusion: item_only`), its settings as `recbole.yaml`,
`items.json` and `features.json`, which item and value each row is for, and the data set as RecBole's files, to which
RecBole gives these ids. With --ids (as for `gru4recf_dist.import_recbole`) rows stand in the order of a RecBole data
set that is there already, and no data set is written. Settings that RecBole cannot express are refused.
"""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

import torch
import yaml

from gru4recf_dist import exported, recommender, trained_run
from gru4recf_dist.config import Config, ModelConfig
from gru4recf_dist.data import storage
from gru4recf_dist.data.shard_format import Manifest
from gru4recf_dist.data.tokens import read_item_tokens, read_vocabulary
from gru4recf_dist.errors import UserError, exits_cleanly
from gru4recf_dist.model.features import FeatureSpec
from gru4recf_dist.parallel import ranks as process_ranks
from gru4recf_dist.recbole.atomic_export import ITEM_FIELD, TIME_FIELD, USER_FIELD, write_data_set
from gru4recf_dist.recbole.checkpoint_files import write_checkpoint
from gru4recf_dist.recbole.token_ids import TokenIds, read_ids, write_ids
from gru4recf_dist.recbole.weights import TABLE, Layout, weight_names
from gru4recf_dist.recommender import Recommender

MODEL, SETTINGS = "model.pth", "recbole.yaml"
_FUSIONS = {"concat_output": "GRU4RecF", "item_only": "GRU4Rec"}
# Settings of the model that RecBole has too, that can be folded into its weights, or that only training knows.
_EXPRESSED = ("features", "embedding_size", "hidden_size", "num_layers", "pooling", "dropout", "dropout_embedding")
_FOLDED = ("temperature", "learn_temperature")
_ONLY_TRAINING = "dropout_"
_KINDS = ("token", "token_seq", "float")


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Write the folder; the weights come last."""
    arguments = _parse(argv)
    for_recbole = arguments.format == "recbole"
    config = trained_run.read_config(arguments.run, arguments.overrides)
    if storage.list_names(arguments.output):
        raise UserError(f"--output: {arguments.output} is not empty")
    if for_recbole:
        _check_settings(config.model)
    elif arguments.ids is not None:
        raise UserError("--ids: only --format recbole has ids of its own")
    given = None if arguments.ids is None else read_ids(arguments.ids)
    # One process holds it all, as the one that loads it will.
    with process_ranks.running("cpu", config.timeout_seconds) as ranks:
        if ranks.world > 1:
            raise UserError("export runs on one rank: start it without torchrun")
        model, manifest = trained_run.load_model(config.model_copy(update={"device": "cpu"}), ranks)
        if not for_recbole:
            exported.write(arguments.output, config, model, manifest)
            print(f"{config.model.fusion} of {manifest.items} items: {arguments.output}", file=sys.stderr)
            return
        specs = recommender.feature_specs(config.model, manifest)
        _check_features(specs, recommender.event_specs(config.model, manifest))
        weights = _weights(model, config.model)
        _check_weights(weights, config.model, specs)
        _write(arguments.output, config, manifest, weights, specs, given)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gru4recf_dist.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    trained_run.add_run_argument(parser)
    parser.add_argument("--format", required=True, choices=("torch", "recbole"))
    parser.add_argument("--output", required=True, metavar="DIR", help="folder or URL to make")
    parser.add_argument(
        "--ids", metavar="FOLDER", help="recbole: items.json and features.json, or NAME-SequentialDataset.pth"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data=FOLDER")
    return parser.parse_intermixed_args(argv)


def _check_settings(model: ModelConfig) -> None:
    """Refuse what would give other scores in RecBole. Settings that came later than this count as such."""
    if model.fusion not in _FUSIONS:
        raise UserError(f"model.fusion: RecBole has no {model.fusion!r} (it has {' and '.join(_FUSIONS)})")
    for name, value in model:
        is_default = value == type(model).model_fields[name].get_default(call_default_factory=True)
        # Tied is how RecBole's are; event features that are not used are none.
        is_same = (name == "output_table" and model.tied) or (name == "event_features" and not value)
        is_same |= name == "feature_sizes" and set(value.values()) <= {model.embedding_size}
        # Which event features there are the data set knows: `_check_features`.
        if is_default or is_same or name in ("fusion", "event_features", *_EXPRESSED, *_FOLDED):
            continue
        if name == "feature_sizes":
            raise UserError(
                f"model.feature_sizes: RecBole embeds every feature in embedding_size ({model.embedding_size}), so "
                f"{value!r} has no counterpart: train without it"
            )
        if not name.startswith(_ONLY_TRAINING):
            raise UserError(f"model.{name}: RecBole has nothing like {value!r}, so the scores would be others")
        print(f"model.{name}: RecBole has none; it matters only if training goes on there", file=sys.stderr)


def _check_features(specs: list[FeatureSpec], events: list[FeatureSpec]) -> None:
    """Refuse features that RecBole has no counterpart of; the message says what to train with."""
    for spec in specs:
        if spec.kind not in _KINDS:
            raise UserError(f"model.features: RecBole has nothing like '{spec.name}', a {spec.kind}: train without it")
        if spec.missing:
            raise UserError(
                f"model.features: '{spec.name}' has missing values, for which RecBole has no vector: prepare the data "
                "with flag_missing: false, or train without it"
            )
    if events:
        names = ", ".join(f"'{spec.name}'" for spec in events)
        raise UserError(f"model.event_features: RecBole has none ({names} here): train with model.event_features=[]")


def _check_weights(weights: dict[str, torch.Tensor], config: ModelConfig, specs: list[FeatureSpec]) -> None:
    unknown = set(weights) - set(weight_names(config, specs))
    if unknown:
        raise UserError(f"the weight '{min(unknown)}' has no counterpart in RecBole's {_FUSIONS[config.fusion]}")


def _write(
    output: str,
    config: Config,
    manifest: Manifest,
    weights: dict[str, torch.Tensor],
    specs: list[FeatureSpec],
    given: TokenIds | None,
) -> None:
    tokens = {
        spec.name: read_vocabulary(config.data, manifest.feature(spec.name)) for spec in specs if spec.kind != "float"
    }
    items = read_item_tokens(config.data, manifest)
    ids, name, changed = given, None, 0
    if ids is None:
        # RecBole has files of its own for some names, ml-100k for one.
        name = re.sub(r"[^A-Za-z0-9_-]", "-", manifest.name) + "-exported"
        features = [manifest.feature(spec.name) for spec in specs]
        made = write_data_set(output, name, config.data, manifest, features, items, tokens)
        ids, items, tokens, changed = made.ids, made.items, made.values, made.changed
    layout = Layout(config.model, specs, items, tokens, ids, all_values=False)
    settings = _settings(config, layout.model, specs, name)
    write_ids(output, ids)
    with storage.open_atomic(storage.join(output, SETTINGS)) as stream:
        stream.write(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).encode())
    with storage.open_atomic(storage.join(output, MODEL)) as stream:
        write_checkpoint(stream, settings, layout.to_theirs(weights), config.optimizer.lr)
    print(f"{layout.model} of {len(items) - 1} items: {output}", file=sys.stderr)
    if changed:
        print(f"{changed} tokens that RecBole's files cannot hold are percent-encoded in them", file=sys.stderr)
    if len(layout.items.others):
        print(f"{len(layout.items.others)} items of RecBole's are unknown here: their rows are zero", file=sys.stderr)


def _weights(model: Recommender, config: ModelConfig) -> dict[str, torch.Tensor]:
    """The weights of GRU4RecF, the temperature in its last layer: scores are products with that layer's output."""
    weights = {name: parameter.detach().clone() for name, parameter in model.encoder.named_parameters()}
    learned = weights.pop("log_temperature", None)
    scale = 1.0 / config.temperature if learned is None else float(torch.exp(-learned))
    for name in ("dense_layer.weight", "dense_layer.bias"):
        weights[name] *= scale
    weights[TABLE] = model.table.weight
    return weights


def _settings(config: Config, model: str, specs: list[FeatureSpec], data_set: str | None) -> dict[str, Any]:
    """RecBole's configuration of the same model, and of the ``data_set`` that was written, if one was."""
    settings: dict[str, Any] = {
        "model": model,
        **({} if data_set is None else {"dataset": data_set}),
        "embedding_size": config.model.embedding_size,
        "hidden_size": config.model.hidden_size,
        "num_layers": config.model.num_layers,
        "dropout_prob": config.model.input_dropout,
        "loss_type": "CE",
        "train_neg_sample_args": None,
        "learning_rate": config.optimizer.lr,
        "MAX_ITEM_LIST_LENGTH": config.loader.max_length,
        "USER_ID_FIELD": USER_FIELD,
        "ITEM_ID_FIELD": ITEM_FIELD,
        "TIME_FIELD": TIME_FIELD,
        "load_col": {
            "inter": [USER_FIELD, ITEM_FIELD, TIME_FIELD],
            "item": [ITEM_FIELD, *(spec.name for spec in specs)],
        },
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
        "metrics": ["Hit", "NDCG", "MRR"],
        "topk": config.evaluation.ks,
        "valid_metric": f"NDCG@{max(config.evaluation.ks)}",
    }
    if specs:
        settings["selected_features"] = [spec.name for spec in specs]
        settings["pooling_mode"] = config.model.pooling
        settings["numerical_features"] = [spec.name for spec in specs if spec.kind == "float"]
    return settings


if __name__ == "__main__":
    sys.exit(main())

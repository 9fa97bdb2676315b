"""A run's folder, for `evaluate`, `recommend` and `init_from`, from a checkpoint of RecBole's GRU4RecF or GRU4Rec.

    python -m gru4recf_dist.import_recbole --checkpoint MODEL.pth --data DATA --run RUN_DIR
        [--ids FOLDER | --recbole-data FOLDER] [key=value ...]

DATA is a data set that was prepared from the same events. Which row of the checkpoint is which item RecBole knows from
its own data set: from --ids (items.json and features.json, or a data set that RecBole saved), from the files that it
read (--recbole-data, the folder with NAME.inter and NAME.item), or, with neither, from the checkpoint, which only
GRU4RecF's tells. Nothing that is pickled in a file is run.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from gru4recf_dist import recommender, typed_yaml
from gru4recf_dist.checkpoint import state_tensors
from gru4recf_dist.config import Config, LoaderConfig
from gru4recf_dist.data import storage
from gru4recf_dist.data.shard_format import Manifest, read_manifest
from gru4recf_dist.data.tokens import read_item_tokens, read_vocabulary
from gru4recf_dist.errors import UserError, exits_cleanly
from gru4recf_dist.parallel import ranks as process_ranks
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.recbole.atomic_files import ids_of_files
from gru4recf_dist.recbole.checkpoint_files import RecBoleCheckpoint, read_checkpoint
from gru4recf_dist.recbole.token_ids import TokenIds, read_ids, write_ids
from gru4recf_dist.recbole.weights import TABLE, Layout
from gru4recf_dist.trainer import Trainer

# RecBole's ids, kept in the run's folder: for the way back.
IDS_FOLDER = "recbole-ids"


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Write the run's folder; `config.yaml`, which makes it one, comes last."""
    arguments = _parse(argv)
    for override in arguments.overrides:
        if override.startswith(("model.", "data=", "run_dir=")):
            raise UserError(f"'{override}': is told by the checkpoint, --data and --run")
    typed_yaml.use_storage(Config, arguments.overrides)
    config_url = storage.join(arguments.run, "config.yaml")
    if storage.list_names(arguments.run):
        raise UserError(f"--run: {arguments.run} is not empty")
    checkpoint = read_checkpoint(arguments.checkpoint)
    manifest = read_manifest(arguments.data)
    config = _configuration(arguments, checkpoint, manifest)
    ids = _ids(arguments, checkpoint)
    with process_ranks.running("cpu", config.timeout_seconds) as ranks:
        layout = _write_run(config, checkpoint, manifest, ids, ranks)
    write_ids(storage.join(arguments.run, IDS_FOLDER), ids)
    storage.write_bytes(config_url, typed_yaml.dump(config).encode())
    _report(arguments, checkpoint, manifest, layout)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gru4recf_dist.import_recbole", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, metavar="MODEL.pth", help="file or URL, as RecBole wrote it")
    parser.add_argument("--data", required=True, metavar="DATA", help="prepared data set, folder or URL")
    parser.add_argument("--run", "--run-dir", required=True, metavar="RUN_DIR", help="folder or URL to make")
    origin = parser.add_mutually_exclusive_group()
    origin.add_argument("--ids", metavar="FOLDER", help="items.json and features.json, or NAME-SequentialDataset.pth")
    origin.add_argument("--recbole-data", metavar="FOLDER", help="the files that RecBole read, NAME/NAME.inter")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the run, such as table.optimizer=adagrad")
    return parser.parse_intermixed_args(argv)


def _configuration(arguments: argparse.Namespace, checkpoint: RecBoleCheckpoint, manifest: Manifest) -> Config:
    """The run's: RecBole's settings, and ours where RecBole has none."""
    setting = checkpoint.setting
    model: dict[str, Any] = {
        "embedding_size": setting("embedding_size", int),
        "hidden_size": setting("hidden_size", int),
        "num_layers": setting("num_layers", int),
        "dropout": setting("dropout_prob", (int, float)),
        "fusion": "item_only",
        "event_features": [],
    }
    if checkpoint.model == "GRU4RecF":
        names = setting("selected_features", list)
        model |= {"fusion": "concat_output", "features": names, "pooling": setting("pooling_mode", str)}
        _check_floats(checkpoint, manifest, names)
    longest, rate = setting("MAX_ITEM_LIST_LENGTH", int), setting("learning_rate", (int, float))
    content = {
        "data": arguments.data,
        "run_dir": arguments.run,
        # A batch takes as many sessions of every stream.
        "batch_size": max(Config.model_fields["batch_size"].default, manifest.streams),
        "model": model,
        "loss": {"name": "full_softmax"},
        "optimizer": {"lr": rate},
        "table": {"lr": rate},
        "loader": {"max_length": longest, "context": min(LoaderConfig().context, longest - 1)},
    }
    try:
        typed_yaml.validated(Config, content, [])
    except UserError as error:
        raise UserError(f"{checkpoint.source}: its configuration: {error}") from error
    return typed_yaml.validated(Config, content, arguments.overrides)


def _check_floats(checkpoint: RecBoleCheckpoint, manifest: Manifest, names: list[str]) -> None:
    """Floats scale an embedding, so that they must be the same numbers on both sides."""
    settings = checkpoint.settings
    normalized = settings.get("normalize_field") or []
    for feature in (manifest.feature(name) for name in names):
        if feature.kind != "float":
            continue
        if feature.mean is not None:
            raise UserError(
                f"--data: its feature '{feature.name}' is standardized, which RecBole's is not: prepare it anew"
            )
        if feature.name in (settings.get("discretization") or {}):
            raise UserError(f"{checkpoint.source}: '{feature.name}' was discretized by RecBole: prepare it as a token")
        if settings.get("normalize_all") or feature.name in normalized:
            raise UserError(
                f"{checkpoint.source}: '{feature.name}' was normalized by RecBole, which has no counterpart"
            )


def _ids(arguments: argparse.Namespace, checkpoint: RecBoleCheckpoint) -> TokenIds:
    if arguments.ids is not None:
        return read_ids(arguments.ids)
    if arguments.recbole_data is not None:
        names = checkpoint.settings.get("selected_features") if checkpoint.model == "GRU4RecF" else []
        return ids_of_files(arguments.recbole_data, names, checkpoint.settings)
    if checkpoint.ids is None:
        raise UserError(f"{checkpoint.source}: does not tell which row is which item: give --ids or --recbole-data")
    return checkpoint.ids


def _write_run(
    config: Config, checkpoint: RecBoleCheckpoint, manifest: Manifest, ids: TokenIds, ranks: Ranks
) -> Layout:
    """Write the checkpoint of step 0, from which training could also go on."""
    for name, tensor in checkpoint.weights.items():
        if not tensor.isfinite().all():
            raise UserError(f"{checkpoint.source}: '{name}' has a value that is not finite")
    specs = recommender.feature_specs(config.model, manifest)
    vocabularies = {
        spec.name: read_vocabulary(config.data, manifest.feature(spec.name))
        for spec in specs
        if spec.kind in ("token", "token_seq")
    }
    layout = Layout(config.model, specs, read_item_tokens(config.data, manifest), vocabularies, ids)
    trainer = Trainer(config, ranks)
    state = trainer.engine.state_dict()
    shapes = {name.removeprefix("encoder."): tensor.shape for name, tensor in state.items()}
    table = trainer.model.table
    shapes[TABLE] = table.weight.shape
    weights = layout.to_ours(checkpoint.weights, shapes, checkpoint.source)
    table.weight.copy_(weights.pop(TABLE))
    for name, tensor in weights.items():
        state[f"encoder.{name}"] = tensor.to(state[f"encoder.{name}"].dtype)
    trainer.engine.load_state_dict(state)
    tables = trainer.model.tables
    commit = {"table_steps": tables.steps, "world_size": 1, "state": trainer.state_dict()}
    trainer.checkpoints.write(0, state_tensors(trainer.engine, tables), commit, best=True, ranks=ranks)
    return layout


def _report(arguments: argparse.Namespace, checkpoint: RecBoleCheckpoint, manifest: Manifest, layout: Layout) -> None:
    """Say on stderr what was taken over and what was not."""
    lines = [f"{checkpoint.model} of {manifest.items} items: {arguments.run}"]
    others = len(layout.items.others)
    if others:
        lines.append(f"{others} items of RecBole's have no event in {arguments.data} and were left out")
    for name, rows in layout.values.items():
        if len(rows.others):
            lines.append(f"'{name}': {len(rows.others)} values that no training item has became one, their mean")
    features = checkpoint.settings["selected_features"] if checkpoint.model == "GRU4RecF" else []
    without = {row["feature"]: row["items_without"] for row in manifest.report if "items_without" in row}
    for feature in (manifest.feature(name) for name in features):
        if feature.kind == "float" and without.get(feature.name):
            lines.append(
                f"'{feature.name}': {without[feature.name]} items have none, which is 0 here; RecBole took the mean"
            )
    if checkpoint.skipped:
        lines.append(f"not run, and but for plain data not read: {', '.join(checkpoint.skipped)}")
    lines.append("the state of RecBole's optimizer was left out")
    print("\n".join(lines), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

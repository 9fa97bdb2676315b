"""The training program: `torchrun train.py [--check] [--config FILE] [key=value ...]`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from gru4recf_dist import config as configuration
from gru4recf_dist import recommender, trained_run, warm_start
from gru4recf_dist.checkpoint_commits import newest_step
from gru4recf_dist.config import Config
from gru4recf_dist.data import assignment, storage
from gru4recf_dist.data.shard_format import MANIFEST, file_url
from gru4recf_dist.errors import UserError, exits_cleanly
from gru4recf_dist.parallel import ranks as process_ranks
from gru4recf_dist.parallel.deepspeed_settings import deepspeed_settings
from gru4recf_dist.trainer import Trainer, check_run_folder

# sysexits.h's EX_TEMPFAIL: stopped by a signal, to be started again. torchrun would take it for a failure of this rank
# and kill the others; there a run that can go on is told from a finished one by its result.json.
EXIT_STOPPED = 0 if "TORCHELASTIC_RUN_ID" in os.environ else 75


@exits_cleanly
def main(argv: list[str] | None = None, default_config: Path | None = None) -> int:
    """Train, or only check with ``--check``.

    Args:
        argv: the command line; default: this process's.
        default_config: the recipe that is used without ``--config``.
    """
    arguments = _parse(argv)
    path = arguments.config or (str(default_config) if default_config else None)
    config = configuration.load(path, arguments.overrides)
    if not storage.exists(storage.join(config.data, MANIFEST)):
        hint = "; `make quickstart` fetches and prepares one" if not arguments.config else ""
        raise UserError(f"data: no prepared data set at {config.data}{hint}")
    if arguments.check:
        print(check(config))
        return 0
    with process_ranks.running(config.device, config.timeout_seconds) as ranks:
        result = Trainer(config, ranks).train()
    return EXIT_STOPPED if result is None else 0


def check(config: Config) -> str:
    """Validate configuration, data set and run folder without starting ranks; returns what to print.

    Raises:
        UserError: something does not fit.
    """
    newest = newest_step(storage.join(config.run_dir, "checkpoints"))
    manifest = trained_run.read_data(config, newest)
    assignment.check_sizes(manifest.streams, config.batch_size, world=1)
    specs = recommender.feature_specs(config.model, manifest)
    if config.engine.name == "deepspeed":
        deepspeed_settings(config, world=1)
    check_run_folder(config, newest is not None)
    if config.init_from is not None and newest is None:
        warm_start.find(config, manifest)
    features = [manifest.feature(spec.name) for spec in specs]
    parts = [manifest.popularity, *(part for feature in features for part in (feature.values, feature.indptr) if part)]
    _check_presence(config.data, parts, "a part of the data set")
    for split, info in manifest.splits.items():
        _check_presence(config.data, [shard.url for shard in info.shards], f"the manifest lists this {split} shard")
    train = manifest.splits["train"]
    return (
        f"ok: {manifest.name}, {manifest.items} items, {train.sessions} training sessions in {manifest.streams} "
        f"streams (at most {manifest.streams} ranks), run folder {config.run_dir}"
    )


def _check_presence(data: str, names: list[str], role: str) -> None:
    """Raise `UserError` if one of the data set's files is not there; one listing a folder, not a request a file."""
    listings: dict[str, set[str]] = {}
    for name in names:
        url = file_url(data, name)
        folder, _, file = url.rpartition("/")
        if folder not in listings:
            listings[folder] = set(storage.list_names(folder))
        if file not in listings[folder]:
            raise UserError(f"{url}: {role}, and it is not there")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__)
    parser.add_argument("--config", help="a recipe, such as configs/beauty.yaml (path or URL)")
    parser.add_argument("--check", action="store_true", help="validate everything, start nothing; exit 0 or 2")
    process_ranks.add_launcher_argument(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    sys.exit(main())

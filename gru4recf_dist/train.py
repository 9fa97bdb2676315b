"""The training program: `torchrun train.py [--check | --finished] [--config FILE] [key=value ...]`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from gru4recf_dist import config as configuration
from gru4recf_dist import recommender, stopping, trained_run, warm_start
from gru4recf_dist.checkpoint_commits import newest_step
from gru4recf_dist.config import Config
from gru4recf_dist.data import assignment, storage
from gru4recf_dist.data.shard_format import MANIFEST, file_url
from gru4recf_dist.errors import UserError, exits_cleanly
from gru4recf_dist.parallel import ranks as process_ranks
from gru4recf_dist.parallel.deepspeed_settings import deepspeed_settings
from gru4recf_dist.parallel.ranks import from_each, from_first
from gru4recf_dist.run_folder import check_run_folder
from gru4recf_dist.trainer import RESULT, Trainer

# sysexits.h's EX_TEMPFAIL: stopped by a signal, to be started again. torchrun would take it for a failure of this rank
# and kill the others; there `--finished` tells a run that can go on from a finished one.
EXIT_STOPPED = 0 if "TORCHELASTIC_RUN_ID" in os.environ else 75
# Of `--finished`. Not 1 or 2: a crash or a configuration error must not be taken for "go on".
EXIT_UNFINISHED = 3


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
    if arguments.finished and is_finished(config):
        print(_finished_line(config))
        return 0
    if arguments.check or arguments.finished:
        print(check(config))
        return EXIT_UNFINISHED if arguments.finished else 0

    def keep(name: str, content: bytes) -> None:
        storage.write_bytes(storage.join(config.run_dir, name), content)

    with process_ranks.running(config.device, config.timeout_seconds, keep) as ranks:
        stopping.everyone_is_here()
        # Rank 0 decides: what a shared file system shows to different machines may differ for a while.
        if from_first(ranks, lambda: is_finished(config)):
            if ranks.is_first:
                print(_finished_line(config))
            return 0
        result = Trainer(config, ranks).train()
        is_wish = result is None and any(from_each(ranks, stopping.is_announced))
    if result is None and not is_wish:
        stopping.leave_end_to_launcher()
    return EXIT_STOPPED if result is None else 0


def is_finished(config: Config) -> bool:
    """Whether the run folder holds the whole result of this very configuration, so that there is nothing left to do."""
    result, settings = (storage.join(config.run_dir, name) for name in (RESULT, "config.yaml"))
    if not (storage.exists(result) and storage.exists(settings)):
        return False
    measured = storage.read_json(result)
    if config.evaluation.baselines and "test" in measured and "baselines" not in measured:
        return False
    try:
        return configuration.load_stored(settings, []) == config
    except UserError:
        # Of another version of this program.
        return False


def _finished_line(config: Config) -> str:
    return f"finished: {config.run_dir} holds the result of this run, nothing to do"


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
    of_events = recommender.used_event_features(config.model, manifest)
    vocabularies = [feature.vocabulary for feature in of_events if feature.vocabulary is not None]
    parts = [
        manifest.popularity,
        *vocabularies,
        *(part for feature in features for part in (feature.values, feature.indptr) if part),
    ]
    _check_presence(config.data, parts, "a part of the data set")
    for split, info in manifest.splits.items():
        _check_presence(config.data, [shard.url for shard in info.shards], f"the manifest lists this {split} shard")
    train = manifest.splits["train"]
    return (
        f"ok: {manifest.name}, {manifest.items} items, {train.sessions} training sessions in {manifest.streams} "
        f"streams (at most {manifest.streams} ranks), run folder {config.run_dir} "
        f"({'no checkpoint' if newest is None else f'newest checkpoint: step {newest}'})"
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
    parser.add_argument(
        "--finished",
        action="store_true",
        help="start nothing, tell by the exit status: 0 the run has finished, "
        f"{EXIT_UNFINISHED} something is left to do and all is valid, 2 something is not",
    )
    process_ranks.add_launcher_argument(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    sys.exit(main())

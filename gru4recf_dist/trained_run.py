"""A finished run's model, loaded from its folder for evaluation or recommendation."""

from __future__ import annotations

import argparse

from gru4recf_dist import config as configuration
from gru4recf_dist import recommender
from gru4recf_dist.checkpoint import Checkpoints
from gru4recf_dist.config import Config
from gru4recf_dist.data import storage
from gru4recf_dist.data.shard_format import Manifest, read_manifest
from gru4recf_dist.errors import UserError
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.recommender import Recommender


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--run RUN_DIR``, and the same as ``--run-dir``.

    torchrun on Python 3.11 looks for its own options among the program's and stops at `--run`, which could be short
    for its `--run-path`: there, `--run-dir`, or a `--` before `--run`, is understood.
    """
    parser.add_argument("--run", "--run-dir", required=True, metavar="RUN_DIR", help="folder or URL of a run")


def read_config(run_dir: str, overrides: list[str]) -> Config:
    """The configuration that a run was trained with.

    Raises:
        UserError: there is no run, or an override is wrong.
    """
    url = storage.join(run_dir, "config.yaml")
    if not storage.exists(url):
        raise UserError(f"--run: {run_dir} is not the folder of a run (it has no config.yaml)")
    # Not as an override: OmegaConf would read a folder called 2024 as a number.
    return configuration.load(url, overrides, training=False).model_copy(update={"run_dir": run_dir})


def load_model(config: Config, ranks: Ranks) -> tuple[Recommender, Manifest]:
    """The model of the run's best checkpoint; of the newest, if none was marked best.

    Raises:
        UserError: the run has no complete checkpoint, or its data set is gone.
    """
    checkpoints = Checkpoints(config.run_dir, ranks)
    newest, best = checkpoints.newest(), checkpoints.best()
    if newest is None:
        raise UserError(f"--run: {config.run_dir} has no complete checkpoint")
    manifest = read_manifest(config.data)
    model = recommender.build(config, manifest, ranks, training=False)
    checkpoints.load(newest if best is None else best, None, model.encoder, model.table)
    return model, manifest

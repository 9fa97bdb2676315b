"""An earlier run, by its folder: its configuration, its best checkpoint, its model for evaluation or recommendation."""

from __future__ import annotations

import argparse

from gru4recf_dist import config as configuration
from gru4recf_dist import recommender, typed_yaml
from gru4recf_dist.checkpoint import Checkpoints
from gru4recf_dist.checkpoint_commits import best_step, newest_step, read_commit
from gru4recf_dist.config import Config
from gru4recf_dist.data import storage
from gru4recf_dist.data.shard_format import Manifest, read_manifest
from gru4recf_dist.errors import UserError
from gru4recf_dist.parallel.ranks import Ranks, from_first
from gru4recf_dist.recommender import Recommender


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--run RUN_DIR``, and the same as ``--run-dir``.

    torchrun on Python 3.11 looks for its own options among the program's and stops at `--run`, which could be short
    for its `--run-path`: there, `--run-dir`, or a `--` before `--run`, is understood.
    """
    parser.add_argument("--run", "--run-dir", required=True, metavar="RUN_DIR", help="folder or URL of a run")


def read_config(run_dir: str, overrides: list[str], key: str = "--run") -> Config:
    """The configuration that a run was trained with.

    Args:
        key: what ``run_dir`` was given as, for the error.

    Raises:
        UserError: there is no run, or an override is wrong.
    """
    # The run itself may lie where only they lead.
    typed_yaml.use_storage(Config, overrides)
    url = storage.join(run_dir, "config.yaml")
    if not storage.exists(url):
        raise UserError(f"{key}: {run_dir} is not the folder of a run (it has no config.yaml)")
    # Not as an override: OmegaConf would read a folder called 2024 as a number.
    return configuration.load_stored(url, overrides).model_copy(update={"run_dir": run_dir})


def chosen_step(run_dir: str, ranks: Ranks | None, key: str = "--run") -> int:
    """Step of the run's best checkpoint; of the newest undamaged one, if none was marked best.

    Args:
        ranks: those that look for damage together, all of them; None: only `commit.json` is looked at.

    Raises:
        UserError: the run has no complete checkpoint, or the one to take is damaged.
    """
    if ranks is not None:
        step = Checkpoints(run_dir, ranks).chosen()
    else:
        folder = storage.join(run_dir, "checkpoints")
        best = best_step(folder)
        step = newest_step(folder) if best is None else best
    if step is None:
        raise UserError(f"{key}: {run_dir} has no complete checkpoint")
    return step


def read_data(config: Config, step: int | None) -> Manifest:
    """The data set in the state that the run's checkpoint of ``step`` was made with; without a step, as it is now.

    A data set that was appended to keeps the manifests of its earlier states. Of a data set that did not grow from the
    run's, the current state is given.

    Raises:
        UserError: as `read_manifest`.
    """
    if step is None:
        return read_manifest(config.data)
    state = read_commit(storage.join(config.run_dir, "checkpoints"), step)["state"]
    return read_manifest(config.data, state["training_data"])


def load_model(config: Config, ranks: Ranks) -> tuple[Recommender, Manifest]:
    """The model of the run's `chosen_step`, and the data set as it was then.

    Raises:
        UserError: as `chosen_step`; or the run's data set is gone.
    """
    step = chosen_step(config.run_dir, ranks)
    manifest = from_first(ranks, lambda: read_data(config, step))
    model = recommender.build(config, manifest, ranks, training=False)
    state = Checkpoints(config.run_dir, ranks).load(step, None, model.encoder, model.tables)
    model.encoder.take_part(state.get("present_subnets"))
    return model, manifest

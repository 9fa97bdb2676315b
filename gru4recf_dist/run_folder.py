"""Whether a run folder can take a run: it can be written, and its checkpoints are of the same model and order."""

from __future__ import annotations

from gru4recf_dist.checkpoint import weight_settings
from gru4recf_dist.config import Config, load_stored
from gru4recf_dist.data import storage
from gru4recf_dist.errors import UserError


def check_run_folder(config: Config, has_checkpoint: bool) -> None:
    """Whether the run folder can take this run.

    Raises:
        UserError: it cannot be written; or it holds checkpoints and ``resume`` is ``never``, or they are of another
            model.
    """
    if not storage.is_writable(config.run_dir):
        raise UserError(f"run_dir: {config.run_dir} is not a folder that can be written")
    if not has_checkpoint:
        return
    if config.resume == "never":
        raise UserError(f"run_dir: {config.run_dir} holds checkpoints; choose another folder, or resume=auto")
    before, now = (
        # A position in the epoch means nothing in another order, nor does what was trained until then.
        {
            "seed": each.seed,
            "loader.shuffle_window": each.loader.shuffle_window,
            **{f"training.{key}": value for key, value in each.training},
            **weight_settings(each),
        }
        for each in (load_stored(storage.join(config.run_dir, "config.yaml"), []), config)
    )
    for key, old in before.items():
        if old != now[key]:
            raise UserError(
                f"{key}: {now[key]!r}, but the checkpoints in {config.run_dir} were made with {old!r}; "
                "choose another run_dir"
            )

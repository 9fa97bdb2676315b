"""Look at a step that was not finite: `python -m gru4recf_dist.replay --run RUN_DIR --step N [key=value ...]`.

The step's batch is trained on again, with the weights of the run's newest checkpoint. Nothing in the run folder
changes. Under torchrun, with as many ranks as the run had, dropout is the same too; one rank replays what all had, in
torch's anomaly mode, which names the operation whose backward was the first to give NaN.
"""

from __future__ import annotations

import argparse
import sys

import torch

from gru4recf_dist import trained_run
from gru4recf_dist.broken_steps import FOLDER, load_batches
from gru4recf_dist.data import storage
from gru4recf_dist.errors import exits_cleanly, first_line
from gru4recf_dist.parallel import ranks as process_ranks
from gru4recf_dist.schedule import factor
from gru4recf_dist.trainer import Trainer


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Print the loss and what is not finite, or where in backward it first was not."""
    parser = argparse.ArgumentParser(prog="gru4recf_dist.replay", description=__doc__.partition("\n")[0])
    trained_run.add_run_argument(parser)
    parser.add_argument("--step", type=int, required=True, help=f"one of those in RUN_DIR/{FOLDER}")
    process_ranks.add_launcher_argument(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as precision=fp64 or loss.negatives=64")
    arguments = parser.parse_intermixed_args(argv)
    config = trained_run.read_config(arguments.run, arguments.overrides)
    with process_ranks.running(config.device, config.timeout_seconds) as ranks:
        packed = load_batches(storage.join(arguments.run, f"{FOLDER}/step-{arguments.step}"), ranks)
        trainer = Trainer(config, ranks)
        prepared = trainer.ahead.of(packed)
        scale = factor(config.schedule, arguments.step - 1, trainer.total_steps, trainer.progress.rate_drops)
        say = print if ranks.is_first else (lambda text: None)
        say(
            f"step {arguments.step} with the weights after step {trainer.progress.step}: "
            f"{sum(batch.sessions for batch in packed)} sessions, {sum(batch.events for batch in packed)} events here"
        )
        # An operation that raises on one rank would leave the others waiting.
        with torch.autograd.set_detect_anomaly(ranks.world == 1):
            try:
                done = trainer.step(prepared, arguments.step, scale, stop=False)
            except RuntimeError as error:
                if "returned nan" not in str(error):
                    raise
                say(f"backward: {first_line(error)}")
                return
        say(f"loss a target: {done.loss / max(done.targets, 1.0):.6g}; gradient norm: {float(done.gradient_norm):.6g}")
        if done.broken is None:
            say("all is finite, with these weights: the newest checkpoint is of an earlier step than the one before")
        else:
            print(f"rank {ranks.rank}: not finite: {', '.join(done.broken) or 'nothing here'}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

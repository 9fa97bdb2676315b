"""Evaluate a trained run: `torchrun ... -m gru4recf_dist.evaluate --run RUN_DIR [--split test] [key=value ...]`."""

from __future__ import annotations

import argparse
import json
import sys

from gru4recf_dist import trained_run
from gru4recf_dist.data import storage
from gru4recf_dist.errors import UserError, exits_cleanly
from gru4recf_dist.evaluation.evaluator import Evaluator
from gru4recf_dist.parallel import ranks as process_ranks
from gru4recf_dist.parallel.node_arrays import NodeArrays
from gru4recf_dist.table.negatives import read_popularity


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Write the metrics to `RUN_DIR/eval-SPLIT.json` and print them as one JSON object, the last line."""
    parser = argparse.ArgumentParser(prog="gru4recf_dist.evaluate", description=__doc__)
    trained_run.add_run_argument(parser)
    parser.add_argument("--split", choices=("valid", "test"), default="test")
    process_ranks.add_launcher_argument(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as evaluation.ks=[20]")
    arguments = parser.parse_intermixed_args(argv)
    config = trained_run.read_config(arguments.run, arguments.overrides)
    with process_ranks.running(config.device, config.timeout_seconds) as ranks:
        model, manifest = trained_run.load_model(config, ranks)
        if not manifest.splits[arguments.split].sessions:
            raise UserError(f"--split: {config.data} has no session in its {arguments.split} split")
        popularity = read_popularity(config.data, manifest, NodeArrays(ranks))
        metrics = Evaluator(config, manifest, popularity, ranks).evaluate(model, arguments.split)
        if ranks.is_first:
            storage.write_json(storage.join(arguments.run, f"eval-{arguments.split}.json"), metrics)
            print(json.dumps(metrics), flush=True)


if __name__ == "__main__":
    sys.exit(main())

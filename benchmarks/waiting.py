"""The share of the training step that is spent waiting for data, as the trainer logs it (`data/wait_share`).

python -m benchmarks.waiting (data=URL | --s3) [--source DATA --events 10000000] [--config configs/beauty.yaml]
    [--ranks 1] [--steps 2400] [--skip 300] [key=value ...]

With `--source`, a prepared data set, the one at `data=` (any fsspec URL, an S3 server's for example) is made first, if
it is not there: the same streams, the training sessions repeated until there are `--events` events. Put the server's
address and credentials into the environment, as for training. With `--s3` a server of its own, SeaweedFS, is started on
this machine, and ends with the benchmark.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile

from benchmarks.measuring import launch, print_table
from benchmarks.repeated_data import write_repeated
from gru4recf_dist import config as configuration
from gru4recf_dist.data import storage
from gru4recf_dist.data.shard_format import MANIFEST, read_manifest
from gru4recf_dist.errors import UserError, exits_cleanly


@exits_cleanly
def main() -> None:
    """Print the table."""
    arguments = _parse()
    with contextlib.ExitStack() as until_end:
        if arguments.s3:
            arguments.overrides.append(f"data={_own_server(until_end)}")
        _measure(arguments)


def _own_server(until_end: contextlib.ExitStack) -> str:
    """Start an S3 server, which this process and those that it starts find in the environment; a place on it."""
    try:
        from tests.support.s3 import BUCKET, running_server
    except ImportError as error:
        raise UserError("--s3 needs the packages of the tests: pip install -e '.[dev]'") from error
    os.environ.update(until_end.enter_context(running_server()).environment)
    return f"s3://{BUCKET}/waiting"


def _measure(arguments: argparse.Namespace) -> None:
    config = configuration.load(arguments.config, arguments.overrides)
    data = config.data
    if arguments.source and not storage.exists(storage.join(data, MANIFEST)):
        write_repeated(arguments.source, data, arguments.events)
    manifest = read_manifest(data)
    # Streams fill a whole window at a time: between two fillings nothing is read, and waiting would say nothing.
    per_stream = config.batch_size // manifest.streams
    fillings = [steps * per_stream // config.loader.shuffle_window for steps in (arguments.skip, arguments.steps)]
    if fillings[0] == fillings[1]:
        raise UserError(
            f"no shard is read in steps {arguments.skip + 1} to {arguments.steps}: give more --steps, "
            f"or a loader.shuffle_window below {config.loader.shuffle_window}"
        )
    with tempfile.TemporaryDirectory() as folder:
        logged = _train(arguments, f"{folder}/run")
    steady = [line for line in logged if line["step"] > arguments.skip and "data/wait_share" in line]
    if not steady:
        raise UserError(f"--skip {arguments.skip}: no log line is left of {arguments.steps} steps")
    shares = [line["data/wait_share"] for line in steady]
    lines = [["", "median", "mean", "most"]]
    lines.append(
        ["share of waiting", *(f"{100 * of(shares):.2f} %" for of in (statistics.median, statistics.mean, max))]
    )
    rates = [line["perf/events_per_second"] for line in steady]
    lines.append(["events/s", *(f"{of(rates):,.0f}" for of in (statistics.median, statistics.mean, max))])
    first = f"steps {arguments.skip + 1} to {arguments.steps}, {arguments.ranks} ranks"
    first += f", every stream filled {fillings[1] - fillings[0]} times"
    print_table(f"{data}: {manifest.splits['train'].events:,} events; {first}", lines)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.waiting", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/beauty.yaml")
    parser.add_argument("--s3", action="store_true", help="on an S3 server that is started for it; needs --source")
    parser.add_argument("--source", metavar="DATA", help="a prepared data set whose sessions are repeated")
    parser.add_argument("--events", type=int, default=10_000_000, help="training events of the repeated data set")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--skip", type=int, default=300, help="first steps that do not count")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    if arguments.s3 and not arguments.source:
        raise UserError("--s3 needs --source: there is nothing on a server that is started now")
    return arguments


def _train(arguments: argparse.Namespace, run_dir: str) -> list[dict]:
    """The lines of metrics.jsonl of a run of ``arguments.steps`` steps without evaluation in between."""
    settings = [
        f"run_dir={run_dir}",
        f"max_steps={arguments.steps}",
        "max_epochs=null",
        "evaluation.every_epochs=null",
        "evaluation.baselines=false",
        "monitoring.progress=false",
    ]
    given = ["--config", arguments.config, *arguments.overrides, *settings]
    finished = launch(arguments.ranks, "gru4recf_dist.train", *given, stdout=subprocess.DEVNULL)
    if finished.returncode:
        raise SystemExit(finished.returncode)
    return [json.loads(line) for line in storage.read_bytes(f"{run_dir}/metrics.jsonl").splitlines()]


if __name__ == "__main__":
    sys.exit(main())

"""What it gains that ranks talk while they compute: a training step as it is, and with all of that in line.

python -m benchmarks.overlap [--ranks 2] [--delay-ms 0 2 5] [--steps 60] [--skip 10] [--rounds 3] [--items 100000]
    [--events 400000] [key=value ...]

In line, a rank waits where it begins a collective, and ids are exchanged at the start of their step. `--delay-ms`: no
collective arrives before so much time has passed, as over a network; who waits for it sleeps. Only the encoder's
gradients, which DDP sends, are not delayed, and travel beside backward in both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future

import torch.distributed as dist

from benchmarks import synthetic_events
from benchmarks.catalog import SETTINGS
from benchmarks.measuring import launch, print_table
from benchmarks.step_times import step_seconds
from gru4recf_dist import config as configuration
from gru4recf_dist.errors import exits_cleanly
from gru4recf_dist.parallel import collectives
from gru4recf_dist.parallel import ranks as process_ranks
from gru4recf_dist.trainer import Trainer

KINDS = ("in line", "overlapped")


@exits_cleanly
def main() -> None:
    """Print the table; with ``--worker`` be one rank of a measurement."""
    arguments = _parse()
    if arguments.worker:
        _measure(arguments)
        return
    lines = [["ms later", *(f"{kind}, ms a step" for kind in KINDS), "overlapped / in line"]]
    with tempfile.TemporaryDirectory() as folder:
        synthetic_events.write_dataset(f"{folder}/data", arguments.events, arguments.items)
        for delay in arguments.delay_ms:
            rounds = [[_run(arguments, folder, kind, delay) for kind in KINDS] for _ in range(arguments.rounds)]
            times = [1000 * statistics.median(side) for side in zip(*rounds, strict=True)]
            ratio = statistics.median(overlapped / in_line for in_line, overlapped in rounds)
            lines.append([f"{delay:g}", *(f"{each:.1f}" for each in times), f"{ratio:.2f}"])
    print_table(f"{arguments.ranks} ranks, D = 64, K = 2048", lines)


def _run(arguments: argparse.Namespace, folder: str, kind: str, delay_ms: float) -> float:
    given = [f"--worker={kind}", f"--delay-ms={delay_ms}", f"--steps={arguments.steps}", f"--skip={arguments.skip}"]
    given += [*SETTINGS, *arguments.overrides, f"data={folder}/data", f"run_dir={folder}/run"]
    done = launch(
        arguments.ranks, "benchmarks.overlap", *given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _measure(arguments: argparse.Namespace) -> None:
    """One rank: the median of its steps, in seconds."""
    config = configuration.load(None, arguments.overrides)
    with process_ranks.running("cpu", timeout_seconds=300) as ranks:
        trainer = Trainer(config, ranks)
        in_line = arguments.worker == "in line"
        if in_line:
            trainer.ahead._thread = _AtResult()
        _delay(arguments.delay_ms[0] / 1000, in_line)
        seconds = step_seconds(trainer, arguments.steps, arguments.skip)
    if ranks.is_first:
        print(json.dumps(statistics.median(seconds)), flush=True)


def _delay(seconds: float, in_line: bool) -> None:
    """From now on collectives arrive ``seconds`` after they have begun at the earliest."""

    def later(function: Callable) -> Callable:
        def begun(*arguments, async_op: bool = False, **named):
            work = _Late(function(*arguments, async_op=True, **named), time.monotonic() + seconds)
            if in_line or not async_op:
                work.wait()
            return work if async_op else None

        return begun

    dist.all_to_all_single, dist.all_reduce = later(dist.all_to_all_single), later(dist.all_reduce)
    collectives.all_gather_single = later(collectives.all_gather_single)


class _Late:
    """A collective that does not arrive before ``due``."""

    def __init__(self, work: dist.Work, due: float) -> None:
        self._work, self._due = work, due

    def wait(self) -> None:
        self._work.wait()
        time.sleep(max(0.0, self._due - time.monotonic()))


class _AtResult:
    """In the place of a thread: what it is given is done when its result is asked for."""

    def submit(self, function: Callable, *arguments) -> Future:
        future = Future()
        ask = future.result

        def result():
            if not future.done():
                future.set_result(function(*arguments))
            return ask()

        future.result = result
        return future


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.overlap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--delay-ms", type=float, nargs="+", default=[0, 2, 5])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--skip", type=int, default=10, help="first steps that do not count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--events", type=int, default=400_000)
    parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    sys.exit(main())

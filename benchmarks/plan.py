"""What the planner says that a training step takes, beside what it takes.

python -m benchmarks.plan [--ranks 1 2] [--cases NAME ...] [--items 100000] [--events 400000] [--rounds 8] [--steps 8]
    [key=value ...]

In every round the ranks measure the machine as `gru4recf_dist.plan --measure` does, and then train a few steps: so both
meet the same load. Medians of all rounds are printed, and the planned parts of a step in ms. "CPU ms" is what rank 0's
threads computed: where a step takes much longer, it waited, for other processes or for other ranks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import closing

from benchmarks import synthetic_events
from benchmarks.catalog import SETTINGS
from benchmarks.measuring import launch, print_table
from gru4recf_dist import plan
from gru4recf_dist.errors import exits_cleanly
from gru4recf_dist.parallel import ranks as process_ranks
from gru4recf_dist.planning import speed
from gru4recf_dist.planning.workload import expected_counts
from gru4recf_dist.steps_ahead import PreparedStep
from gru4recf_dist.trainer import Trainer

CASES = {
    "few negatives": ("batch_size=256", "loss.negatives=256", "model.hidden_size=64"),
    "many negatives": ("batch_size=256", "loss.negatives=8192", "model.hidden_size=64"),
    "wide encoder": ("batch_size=512", "loss.negatives=2048", "model.hidden_size=256"),
    "wide rows": ("batch_size=1024", "loss.negatives=1024", "model.embedding_size=256", "model.hidden_size=64"),
    "BPR, in batch": ("batch_size=256", "loss.name=bpr", "loss.negatives=2048", "loss.in_batch=all"),
    "BPR-max, in batch": ("batch_size=256", "loss.name=bpr_max", "loss.negatives=2048", "loss.in_batch=all"),
    "full softmax": ("batch_size=64", "loss.name=full_softmax", "model.hidden_size=64"),
}


@exits_cleanly
def main() -> None:
    """Print the table; with ``--folder`` be one rank of a measurement."""
    arguments = _parse()
    if arguments.folder:
        _measure(arguments)
        return
    lines = [["", "ranks", "planned ms", "measured ms", "CPU ms", "planned / measured", "of which"]]
    with tempfile.TemporaryDirectory() as folder:
        synthetic_events.write_dataset(f"{folder}/data", arguments.events, arguments.items)
        for ranks in arguments.ranks:
            for case in arguments.cases:
                lines.append(_line(case, ranks, _rounds(arguments, ranks, case, folder)))
    print_table(f"{arguments.items:,} items", lines)


def _line(case: str, ranks: int, rounds: list[dict]) -> list[str]:
    parts = {name: statistics.median(each["planned"][name] for each in rounds) for name in rounds[0]["planned"]}
    planned = statistics.median(sum(each["planned"].values()) for each in rounds)
    measured, computed = (statistics.median(each[name] for each in rounds) for name in ("measured", "computed"))
    shown = ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in parts.items() if seconds)
    ratio = statistics.median(sum(each["planned"].values()) / each["measured"] for each in rounds)
    times = [f"{1000 * seconds:.1f}" for seconds in (planned, measured, computed)]
    return [case, str(ranks), *times, f"{ratio:.2f}", shown]


def _rounds(arguments: argparse.Namespace, ranks: int, case: str, folder: str) -> list[dict]:
    given = [f"--folder={folder}", f"--rounds={arguments.rounds}", f"--steps={arguments.steps}"]
    given += [*SETTINGS, *CASES[case], *arguments.overrides]
    done = launch(ranks, "benchmarks.plan", *given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _measure(arguments: argparse.Namespace) -> None:
    """One rank: the parts of a step as planned in each round, and the median of its steps; in seconds."""
    with process_ranks.running("cpu", timeout_seconds=300) as ranks:
        given = plan.parse([*arguments.overrides, f"--data={arguments.folder}/data", f"--gpus={ranks.world}"])
        workload = plan.workload_of(given)
        config = workload.config.model_copy(update={"run_dir": f"{arguments.folder}/run"})
        counts, trainer, rounds = expected_counts(workload), Trainer(config, ranks), []
        machine = speed.Machine(ranks_per_node=ranks.world)
        with closing(_batches(trainer)) as batches:
            for _ in range(arguments.rounds):
                seconds = speed.step_seconds(workload, counts, speed.measure(machine, ranks, config.model.hidden_size))
                # The first ones of a round still wait for memory that the measurement has displaced.
                taken = [_timed(lambda: trainer.update(next(batches))) for _ in range(2 + arguments.steps)][2:]
                measured, computed = (statistics.median(each) for each in zip(*taken, strict=True))
                rounds.append({"planned": seconds, "measured": measured, "computed": computed})
        # Of the step that was prepared and not made.
        trainer.ahead.settle()
    if ranks.is_first:
        print(json.dumps(rounds), flush=True)


def _batches(trainer: Trainer) -> Generator[PreparedStep]:
    """Of one epoch after the other."""
    while True:
        with trainer.ahead.rest_of_epoch(trainer.loader) as batches:
            yield from batches


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds that ``work`` took, and those of the processor in all threads."""
    started, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started, time.process_time() - used


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--events", type=int, default=400_000)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8, help="of a round")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    sys.exit(main())

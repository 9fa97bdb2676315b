"""Step time and memory of a rank under each engine, ZeRO stage, precision and accumulation.

python -m benchmarks.engines [--ranks 2] [--steps 120] [--skip 20] [--rounds 3] [--only NAME ...]
    [--config configs/beauty.yaml] [key=value ...]

Each contender trains by the same recipe in processes of its own; they take turns, and the median round counts. Time is
of a step from `--skip` on, memory the most that a rank holds (of the whole process on the CPU, of what torch allocated
on a GPU). Settings such as `model.hidden_size=512` apply to all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile

from benchmarks.measuring import ONLY_STEPS, launch, print_table
from gru4recf_dist.data import storage
from gru4recf_dist.errors import UserError, exits_cleanly

_ZERO = "engine.deepspeed.zero_optimization"
CONTENDERS = {
    "ddp": (),
    **{f"deepspeed, stage {stage}": ("engine.name=deepspeed", f"{_ZERO}.stage={stage}") for stage in range(4)},
    "deepspeed, stage 2, offloaded": (
        "engine.name=deepspeed",
        f"{_ZERO}.stage=2",
        f"{_ZERO}.offload_optimizer.device=cpu",
    ),
    "ddp, 4 micro-batches": ("accumulation=4",),
    "ddp, bf16": ("precision=bf16",),
    "deepspeed, stage 2, bf16": ("engine.name=deepspeed", f"{_ZERO}.stage=2", "precision=bf16"),
}
SETTINGS = (*ONLY_STEPS, "monitoring.log_every_steps=10")


@exits_cleanly
def main() -> None:
    """Print the table."""
    arguments = _parse()
    names = arguments.only or list(CONTENDERS)
    for name in names:
        if name not in CONTENDERS:
            raise UserError(f"--only: '{name}' is none of: {'; '.join(CONTENDERS)}")
    with tempfile.TemporaryDirectory() as folder:
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for number in range(arguments.rounds):
            for name in names:
                run_dir = f"{folder}/{number}-{names.index(name)}"
                measured[name].append(_run(arguments, run_dir, CONTENDERS[name]))
    times = {name: statistics.median(seconds for seconds, _ in rounds) for name, rounds in measured.items()}
    memory = {name: max(gib for _, gib in rounds) for name, rounds in measured.items()}
    first = times[names[0]]
    lines = [["", "ms a step", f"x {names[0]}", "GiB a rank"]]
    lines += [
        [name, f"{1000 * times[name]:.1f}", f"{times[name] / first:.2f}", f"{memory[name]:.2f}"] for name in names
    ]
    print_table(f"{arguments.ranks} ranks, {' '.join([arguments.config, *arguments.overrides])}", lines)


def _run(arguments: argparse.Namespace, run_dir: str, settings: tuple[str, ...]) -> tuple[float, float]:
    """Seconds of a step and GiB of the largest rank, of one run."""
    given = ["--config", arguments.config, *SETTINGS, *settings, *arguments.overrides]
    given += [f"run_dir={run_dir}", f"max_steps={arguments.steps}"]
    done = launch(arguments.ranks, "gru4recf_dist.train", *given, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(done.stderr.decode())
    lines = [json.loads(line) for line in storage.read_bytes(f"{run_dir}/metrics.jsonl").splitlines()]
    steady = [line for line in lines if line["step"] > arguments.skip and "perf/step_seconds" in line]
    return statistics.median(line["perf/step_seconds"] for line in steady), steady[-1]["perf/peak_memory_gib"]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.engines", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--skip", type=int, default=20, help="first steps that do not count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--config", default="configs/beauty.yaml")
    parser.add_argument("--only", action="append", metavar="NAME", help="a contender; can be given several times")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    sys.exit(main())

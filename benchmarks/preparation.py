"""Raw events in a file to a data set, with DuckDB: events a second, peak memory, and the share of each step.

python -m benchmarks.preparation [--events 20000000] [--format csv|parquet] [--log FILE] [key=value ...]

The log is synthetic (Zipf items, sessions that lie interleaved); `--log` keeps it, or takes it if it is there. Keys are
those of the recipe: `memory_limit_gib=2` and `threads=2` unless given.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType

from benchmarks.measuring import print_table
from data_prep.prepare import prepare
from data_prep.recipe import Recipe
from gru4recf_dist import typed_yaml
from gru4recf_dist.errors import exits_cleanly
from gru4recf_dist.frames import current_frames

DEFAULTS = ("memory_limit_gib=2", "threads=2")
PACKAGE = str(Path(__file__).parents[1] / "data_prep")
SAMPLE_SECONDS = 0.01
POLL_SECONDS = 0.05
GIB = 1 << 30
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# Steps below this share are joined in one line.
SMALLEST_SHARE = 0.01


@exits_cleanly
def main() -> None:
    """Print the table."""
    arguments = _parse()
    if arguments.worker:
        _worker(arguments.overrides)
        return
    with tempfile.TemporaryDirectory() as folder:
        log = arguments.log or f"{folder}/log.{arguments.format}"
        if not os.path.exists(log):
            # In a process of its own, so that its memory is not taken for that of the preparation.
            made = [sys.executable, "-m", "benchmarks.synthetic_events", log, str(arguments.events)]
            subprocess.run(made, check=True)
        keys = [f"source={log}", f"output={folder}/data", f"input.format={log.rsplit('.', 1)[-1]}", "name=synthetic"]
        measured = _run([*keys, "split.method=temporal", *DEFAULTS, *arguments.overrides])
        size = os.path.getsize(log)
    events, seconds = measured["events"], measured["seconds"]
    cpu = measured["cpu_seconds"]
    lines = [["", "seconds", "share", "most memory"]]
    lines.append(
        ["end to end", f"{seconds:.1f}", f"{events / seconds:,.0f} events/s", f"{measured['peak'] / GIB:.2f} GiB"]
    )
    # On a machine that does other work too, this is the figure that stays.
    lines.append(["processor time", f"{cpu:.1f}", f"{events / cpu:,.0f} events/s", ""])
    steps = sorted(measured["steps"].items(), key=lambda step: -step[1])
    small = sum(taken for _, taken in steps if taken < SMALLEST_SHARE * seconds)
    shown = [(name, taken) for name, taken in steps if taken >= SMALLEST_SHARE * seconds]
    for name, taken in shown:
        most = f"{measured['resident'][name] / GIB:.2f} GiB"
        lines.append([f"  {name}", f"{taken:.1f}", f"{100 * taken / seconds:.1f} %", most])
    lines.append(["  the rest", f"{small:.1f}", f"{100 * small / seconds:.1f} %", ""])
    print_table(f"{events:,} events, {size / GIB:.2f} GiB of {log.rsplit('.', 1)[-1]}", lines)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.preparation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=20_000_000)
    parser.add_argument("--format", choices=("csv", "parquet"), default="csv")
    parser.add_argument("--log", metavar="FILE", help="where the log is kept, or lies already (.csv or .parquet)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args()


def _run(overrides: list[str]) -> dict:
    """Prepare in a process of its own: what it measured, and the most memory that it and its children had."""
    command = [sys.executable, "-m", "benchmarks.preparation", "--worker", *overrides]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    # getrusage would count what this process had when it forked; a process's own high-water mark does not.
    peaks: dict[int, int] = {}
    while process.poll() is None:
        for pid in _tree(process.pid):
            peaks[pid] = max(peaks.get(pid, 0), _high_water(pid))
        time.sleep(POLL_SECONDS)
    if process.returncode:
        # A process that a signal ended (the kernel out of memory, say) has said nothing itself.
        ended = f"by signal {-process.returncode}" if process.returncode < 0 else f"with code {process.returncode}"
        raise SystemExit(f"error: the preparation ended {ended}")
    # The worker prints one line, which fits the pipe's buffer.
    return {**json.loads(process.stdout.read()), "peak": sum(peaks.values())}


def _tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    pids = [pid]
    for parent in pids:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{parent}/task"):
                pids += map(int, Path(f"/proc/{parent}/task/{task}/children").read_text().split())
    return pids


def _high_water(pid: int) -> int:
    """Most resident bytes that a process has had; 0 if it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return 0


class _StepClock(threading.Thread):
    """Which step of the preparation runs, looked up from outside: the steps need not know that they are timed.

    Attributes:
        seconds: of each step.
        resident: most resident bytes of this process that were seen in each step.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seconds: collections.Counter[str] = collections.Counter()
        self.resident: dict[str, int] = {}
        self._main = threading.main_thread().ident
        self._ended = threading.Event()

    def run(self) -> None:
        before = time.perf_counter()
        while not self._ended.wait(SAMPLE_SECONDS):
            step = _step_of(current_frames()[self._main])
            now = time.perf_counter()
            self.seconds[step] += now - before
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES
            self.resident[step] = max(self.resident.get(step, 0), resident)
            before = now

    def stop(self) -> None:
        self._ended.set()
        self.join()


def _step_of(frame: FrameType | None) -> str:
    """The method that the preparation is in, and the table that its engine makes there if it makes one."""
    frames = []
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE) and not frame.f_code.co_name.startswith("<"):
            frames.append(frame)
        frame = frame.f_back
    names = [frame.f_code.co_name for frame in reversed(frames)]
    if "run" not in names:
        return names[-1] if names else "start"
    below = list(reversed(frames))[names.index("run") + 1 :]
    parts = [_named(frame) for frame in below[:1]]
    parts += [_named(frame) for frame in below[1:] if frame.f_code.co_name in ("keep", "stage", "batches", "row")][-1:]
    return ": ".join(parts) or "run"


def _named(frame: FrameType) -> str:
    name = frame.f_locals.get("name")
    return frame.f_code.co_name.strip("_") + (f" {name}" if isinstance(name, str) else "")


def _worker(overrides: list[str]) -> None:
    recipe = typed_yaml.load(Recipe, None, overrides)
    clock = _StepClock()
    started = time.perf_counter()
    clock.start()
    # What a C library prints would be no JSON.
    with contextlib.redirect_stdout(io.StringIO()):
        report = prepare(recipe)
    clock.stop()
    seconds = time.perf_counter() - started
    events = next(row["events"] for row in report.rows if row["step"] == "read")
    measured = {"events": events, "seconds": seconds, "cpu_seconds": time.process_time()}
    print(json.dumps({**measured, "steps": clock.seconds, "resident": clock.resident}))


if __name__ == "__main__":
    sys.exit(main())

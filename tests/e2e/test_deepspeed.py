"""DeepSpeed as a user meets it: its launcher, offloading, its figures and its FLOPS profiler."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import struct
import subprocess
import sys
import sysconfig
import termios
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.e2e.test_main_job import ENVIRONMENT, ROOT, SIZES, program
from tests.support.synthetic import random_sessions, write_dataset

pytestmark = pytest.mark.e2e
SHORT = [*SIZES, "max_epochs=null", "max_steps=12", "evaluation.baselines=false", "monitoring.profile_step=3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(str(folder), random_sessions(0, 80, items=30), random_sessions(1, 9, 30), random_sessions(2, 9, 30))
    return folder


def launched_by_deepspeed(*arguments: object, hosts: Path) -> subprocess.CompletedProcess:
    """Run a program under the `deepspeed` launcher on the hosts of a hostfile."""
    scripts = Path(sysconfig.get_path("scripts"))
    # Each node starts its own processes: reaching others by ssh is for a cluster.
    alone = ["--no_ssh", "--node_rank", 0, "--master_addr", "127.0.0.1", "--master_port", 29000 + os.getpid() % 1000]
    command = [scripts / "deepspeed", "--hostfile", hosts, *alone, *arguments]
    environment = {**ENVIRONMENT, "DS_ACCELERATOR": "cpu", "PATH": f"{scripts}:{os.environ['PATH']}"}
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )


def scalars(run: Path) -> dict[str, list]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A run on 2 ranks that the `deepspeed` launcher started, with the optimizer offloaded."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "hosts").write_text("localhost slots=2\n")
    options = ["engine.name=deepspeed", "engine.deepspeed.zero_optimization.stage=2"]
    options += ["engine.deepspeed.zero_optimization.offload_optimizer.device=cpu"]
    done = launched_by_deepspeed(
        "train.py", f"data={data}", f"run_dir={folder / 'run'}", *SHORT, *options, hosts=folder / "hosts"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run", done


def test_the_deepspeed_launcher_starts_a_run_of_its_ranks(run, data, tmp_path):
    folder, _ = run
    result = json.loads((folder / "result.json").read_text())
    assert (result["world_size"], result["steps"]) == (2, 12)
    plain = program("train.py", f"data={data}", f"run_dir={tmp_path}", *SHORT, "model.dropout=0.1", ranks=2)
    assert plain.returncode == 0, plain.stderr
    # The offloaded optimizer makes DDP's updates.
    reference = json.loads((tmp_path / "result.json").read_text())
    assert result["test"] == pytest.approx(reference["test"], abs=1e-6)


def on_terminal(*arguments: object) -> str:
    """What a program, run in one process, shows on a terminal."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, 250, 0, 0))
    command = [sys.executable, *map(str, arguments)]
    started = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    shown = b""
    # The other end is closed when the program has ended.
    with contextlib.suppress(OSError):
        while part := os.read(ours, 1 << 16):
            shown += part
    os.close(ours)
    assert started.wait() == 0, shown
    return shown.decode()


def test_both_engines_show_throughput_and_memory_beside_the_progress_bar(data, tmp_path):
    for engine, figures in (("ddp", []), ("deepspeed", ["deepspeed/memory_gib=", "deepspeed/sessions_per_second="])):
        places = (f"data={data}", f"run_dir={tmp_path / engine}", f"engine.name={engine}")
        shown = on_terminal("train.py", *places, *SHORT, "evaluation.every_epochs=null")
        assert all(name in shown for name in ("loss=", "events_per_s=", "gib=", *figures))


def test_its_figures_stand_beside_those_that_every_engine_has(run):
    folder, _ = run
    shown = scalars(folder)
    for name in ("perf/events_per_second", "perf/peak_memory_gib", "perf/deepspeed/sessions_per_second"):
        assert shown[name][-1].value > 0, name
    assert "perf/deepspeed/memory_gib" in shown


def test_its_profiler_counts_the_encoders_operations_at_the_step_that_was_asked_for(run):
    folder, done = run
    (flops,), (macs,) = (scalars(folder)[f"perf/profile/encoder_{name}"] for name in ("flops", "macs"))
    assert flops.step == 3 and flops.value > 2 * macs.value > 0
    assert re.search(r"step 3: the encoder's forward on rank 0: \S+ FLOP in", done.stderr)


def test_the_launcher_is_understood_by_evaluation_and_recommendation_too(run, tmp_path):
    folder, _ = run
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    (tmp_path / "in.jsonl").write_text('{"items": ["i3"]}\n')
    evaluated = launched_by_deepspeed(
        "--module", "gru4recf_dist.evaluate", "--run", folder, "--split", "test", hosts=tmp_path / "hosts"
    )
    assert evaluated.returncode == 0, evaluated.stderr[-3000:]
    result = json.loads((folder / "result.json").read_text())
    assert json.loads((folder / "eval-test.json").read_text())["test"] == result["test"]

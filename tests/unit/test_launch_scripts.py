"""The launch scripts of a node: the command lines that they would run, seen by stand-ins, and one real meeting."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.checkout import ROOT, STUBS, Checkout

SCRIPTS = ["launch/torchrun_node.sh", "launch/train.sbatch", "launch/evaluate.sbatch", ".ci/run"]


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_syntax(script):
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
    assert os.access(ROOT / script, os.X_OK)


def test_node_checks_then_starts_torchrun(checkout):
    finished = checkout.run(
        "torchrun_node.sh", "--config", "a b.yaml", "seed=1", NNODES="4", RDZV_ENDPOINT="host0:29500", RDZV_ID="job"
    )
    assert finished.returncode == 0, finished.stderr
    assert [called for called, _, _ in checkout.records()] == ["python", "torchrun"]
    assert checkout.calls("python") == [["train.py", "--check", "--config", "a b.yaml", "seed=1"]]
    assert checkout.calls("torchrun") == [
        [
            *("--nnodes=4", "--nproc-per-node=2", "--max-restarts=0"),
            *("--rdzv-backend=c10d", "--rdzv-endpoint=host0:29500", "--rdzv-id=job"),
            *("train.py", "--config", "a b.yaml", "seed=1"),
        ]
    ]
    assert checkout.records()[-1][2]["OMP_NUM_THREADS"] == "1"


def test_node_rank_needs_the_static_rendezvous(checkout):
    checkout.run("torchrun_node.sh", NNODES="2", RDZV_ENDPOINT="host0:29500", NODE_RANK="1", MAX_RESTARTS="3")
    (arguments,) = checkout.calls("torchrun")
    assert {"--rdzv-backend=static", "--node-rank=1", "--max-restarts=3"} <= set(arguments)


def test_one_node_needs_no_endpoint(checkout):
    assert checkout.run("torchrun_node.sh").returncode == 0
    (arguments,) = checkout.calls("torchrun")
    assert {"--nnodes=1", "--rdzv-endpoint=127.0.0.1:0"} <= set(arguments)


def test_ranks_default_to_the_number_of_gpus(checkout):
    counts = STUBS["python"].replace("import os, sys\n", "import os, sys\nif sys.argv[1] == '-c':\n    print(8)\n", 1)
    checkout.write_program("python", counts)
    assert checkout.run("torchrun_node.sh", NPROC_PER_NODE="").returncode == 0
    assert "--nproc-per-node=8" in checkout.calls("torchrun")[0]


@pytest.mark.parametrize("script", ["torchrun_node.sh", "train.sbatch"])
def test_configuration_error_starts_nothing(checkout, script):
    finished = (checkout.sbatch if script == "train.sbatch" else lambda **e: checkout.run(script, **e))(
        CHECK_STATUS="2"
    )
    assert finished.returncode == 2
    assert {called for called, _, _ in checkout.records()} == {"python"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NNODES": "2"}, "error: RDZV_ENDPOINT must be given (HOST:PORT) when NNODES is 2"),
        ({"NNODES": "2", "RDZV_ENDPOINT": "host0"}, "error: RDZV_ENDPOINT: must be HOST:PORT (got 'host0')"),
        ({"VENV": "nowhere"}, "error: VENV: nowhere is not a virtual environment with torchrun in it"),
    ],
)
def test_wrong_environment_is_one_clear_line(checkout, environment, message):
    finished = checkout.run("torchrun_node.sh", **environment)
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert line.startswith(message)
    assert checkout.records() == []


def test_exit_status_is_torchruns(checkout):
    assert checkout.run("torchrun_node.sh", TORCHRUN_STATUS="7").returncode == 7


def test_another_program_runs_without_a_check(checkout):
    assert checkout.run("torchrun_node.sh", "--run-dir", "runs/x", MODULE="gru4recf_dist.evaluate").returncode == 0
    assert checkout.calls("python") == []
    (arguments,) = checkout.calls("torchrun")
    assert arguments[-4:] == ["-m", "gru4recf_dist.evaluate", "--run-dir", "runs/x"]


def test_the_number_of_nodes_may_change(checkout):
    settings = {"NNODES": "1:4", "MAX_RESTARTS": "3", "RDZV_ENDPOINT": "n1:1", "RDZV_CONF": "last_call_timeout=5"}
    checkout.run("torchrun_node.sh", **settings)
    (arguments,) = checkout.calls("torchrun")
    assert {"--nnodes=1:4", "--max-restarts=3", "--rdzv-conf=last_call_timeout=5"} <= set(arguments)


# Torchrun, which dies of a signal that it does not ignore, with a rank that notes what it gets.
TORCHRUN_WITH_A_RANK = f"""#!{sys.executable}
import subprocess, sys
rank = subprocess.Popen([sys.executable, "train.py"])
sys.exit(rank.wait())
"""
RANK = """
import os, signal, sys, time
if "--check" in sys.argv:
    sys.exit()
seen = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: seen.append(number))
open("started", "w").close()
while not seen:
    time.sleep(0.02)
open(f"saved-{int(seen[0])}-{os.path.exists(os.environ['GRU4RECF_STOP_FILE'])}", "w").close()
"""
# Torchrun, which handles SIGINT even where its shell has it ignored, as shells do for what they start in background.
PATIENT_TORCHRUN = f"""#!{sys.executable}
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
open("started", "w").close()
time.sleep(60)
"""


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_script_reaches_the_ranks_and_not_torchrun(checkout, number):
    checkout.write_program("torchrun", TORCHRUN_WITH_A_RANK)
    (checkout.folder / "train.py").write_text(RANK)
    node = subprocess.Popen(["bash", "launch/torchrun_node.sh"], cwd=checkout.folder, env=checkout.environment)
    wait_for(checkout.folder / "started")
    node.send_signal(number)
    assert node.wait(timeout=30) == 0
    # Whoever starts too late for the signal finds the file.
    assert (checkout.folder / f"saved-{int(number)}-True").exists()


# The check of the configuration lasts until the test lets it end; all else is Python.
PYTHON_THAT_CHECKS_FOR_LONG = f"""#!{sys.executable}
import os, sys, time
if "--check" not in sys.argv:
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
open("checking", "w").close()
while not os.path.exists("go"):
    time.sleep(0.02)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_from_before_torchrun_is_not_lost(checkout, number):
    checkout.write_program("python", PYTHON_THAT_CHECKS_FOR_LONG)
    checkout.write_program("torchrun", TORCHRUN_WITH_A_RANK)
    (checkout.folder / "train.py").write_text(
        "import os\nopen(f\"saved-{os.path.exists(os.environ['GRU4RECF_STOP_FILE'])}\", 'w')"
    )
    node = subprocess.Popen(["bash", "launch/torchrun_node.sh"], cwd=checkout.folder, env=checkout.environment)
    wait_for(checkout.folder / "checking")
    # As SLURM does: to every process.
    for process in (*psutil.Process(node.pid).children(recursive=True), node):
        process.send_signal(number)
    (checkout.folder / "go").touch()
    assert node.wait(timeout=30) == 0
    assert (checkout.folder / "saved-True").exists()


@pytest.mark.parametrize("before", ["import contextlib", "    torchrun = subprocess"])
def test_a_signal_while_torchrun_is_being_started_is_not_lost(checkout, before):
    checkout.write_program("torchrun", TORCHRUN_WITH_A_RANK)
    wait_for_note = (
        "import os, time\nwhile not os.path.exists(os.environ['GRU4RECF_STOP_FILE']):\n    time.sleep(0.02)\n"
    )
    (checkout.folder / "train.py").write_text(wait_for_note)
    script = checkout.folder / "launch" / "stoppable.py"
    waits = ["import pathlib", 'pathlib.Path("starting").touch()']
    waits += ['while not pathlib.Path("go").exists():', "    time.sleep(0.02)"]
    indent = before[: len(before) - len(before.lstrip())]
    assert script.read_text().count(f"\n{before}") == 1
    script.write_text(script.read_text().replace(before, "\n".join([*(indent + line for line in waits), before])))
    command = [sys.executable, "launch/stoppable.py", f"{checkout.folder}/venv/bin/torchrun"]
    node = subprocess.Popen(command, cwd=checkout.folder, env=checkout.environment)
    wait_for(checkout.folder / "starting")
    node.send_signal(signal.SIGUSR1)
    (checkout.folder / "go").touch()
    assert node.wait(timeout=30) == 0


def test_on_a_full_disk_signals_are_passed_on(checkout):
    checkout.write_program("torchrun", TORCHRUN_WITH_A_RANK)
    (checkout.folder / "train.py").write_text(RANK)
    script = checkout.folder / "launch" / "stoppable.py"
    script.write_text(script.read_text().replace("stop_file.touch()", 'raise OSError(28, "No space left on device")'))
    command = ["bash", "launch/torchrun_node.sh"]
    node = subprocess.Popen(command, cwd=checkout.folder, env={**checkout.environment, "CHECK": "no"})
    wait_for(checkout.folder / "started")
    node.send_signal(signal.SIGTERM)
    assert node.wait(timeout=30) == 0
    assert (checkout.folder / f"saved-{int(signal.SIGTERM)}-False").exists()


def test_an_evaluation_does_not_mind_the_signal_for_a_checkpoint(checkout):
    checkout.write_program("torchrun", PATIENT_TORCHRUN.replace("time.sleep(60)", "time.sleep(1)"))
    environment = {**checkout.environment, "MODULE": "gru4recf_dist.evaluate"}
    node = subprocess.Popen(["bash", "launch/torchrun_node.sh"], cwd=checkout.folder, env=environment)
    wait_for(checkout.folder / "started")
    node.send_signal(signal.SIGUSR1)
    assert node.wait(timeout=30) == 0


def test_a_second_signal_makes_torchrun_give_up(checkout):
    checkout.write_program("torchrun", PATIENT_TORCHRUN)
    script = checkout.folder / "launch" / "stoppable.py"
    # On a busy machine it takes longer to find the ranks than the next signal takes to come.
    slow = script.read_text().replace("found = []", "found = []\n    time.sleep(0.15)")
    script.write_text(slow.replace("COPIES_SECONDS = 10.0", "COPIES_SECONDS = 0.2"))
    node = subprocess.Popen(
        ["bash", "launch/torchrun_node.sh"], cwd=checkout.folder, env=checkout.environment, stderr=subprocess.DEVNULL
    )
    wait_for(checkout.folder / "started")
    while node.poll() is None:
        node.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    # It ended by SIGINT: not by itself, and not because the launcher broke.
    assert node.returncode == 128 + signal.SIGINT


def test_torchrun_ends_with_the_script(checkout):
    checkout.write_program("torchrun", PATIENT_TORCHRUN)
    node = subprocess.Popen(["bash", "launch/torchrun_node.sh"], cwd=checkout.folder, env=checkout.environment)
    wait_for(checkout.folder / "started")
    (torchrun,) = psutil.Process(node.pid).children()
    node.kill()
    node.wait()
    # It is this machine's init that it waits for, if for anything.
    deadline = time.monotonic() + 30
    while torchrun.is_running() and torchrun.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.dist
@pytest.mark.parametrize("node_rank", [False, True])
def test_two_nodes_meet(checkout, node_rank):
    """With the real torchrun: both nodes on this machine, one rank each, agree on the world and add their ranks."""
    (checkout.folder / "train.py").write_text(
        "import sys\n"
        "if '--check' in sys.argv: raise SystemExit\n"
        "import datetime, os, torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo', timeout=datetime.timedelta(seconds=20))\n"
        "total = torch.tensor([dist.get_rank() + 1])\n"
        "dist.all_reduce(total)\n"
        "print(f'rank={dist.get_rank()} node={os.environ[\"GROUP_RANK\"]} total={total.item()} {sys.argv[1:]}')\n"
        # Without these, a rank that ends while its threads are still connected aborts now and then.
        "dist.barrier()\n"
        "dist.destroy_process_group()\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    bin_folder = Path(sys.executable).parent
    environment = {
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "VENV": "",
        "NNODES": "2",
        "NPROC_PER_NODE": "1",
        "RDZV_ENDPOINT": f"127.0.0.1:{port}",
    }
    nodes = [
        subprocess.Popen(
            ["bash", "launch/torchrun_node.sh", "seed=1"],
            cwd=checkout.folder,
            env={**environment, **({"NODE_RANK": str(rank)} if node_rank else {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [node.communicate(timeout=120) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], outputs
    lines = [stdout.strip() for stdout, _ in outputs]
    expected = [f"rank={rank} node={rank} total=3 ['seed=1']" for rank in range(2)]
    assert (lines if node_rank else sorted(lines)) == expected

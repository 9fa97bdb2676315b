"""Launch scripts: the command lines that they would run, seen by stand-ins, and one real meeting of two nodes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ["launch/torchrun_node.sh", "launch/train.sbatch", "launch/evaluate.sbatch", ".ci/run"]

# Writes one line of JSON per call: the program's name, its arguments, and the variables that matter.
RECORDER = f"""#!{sys.executable}
import json, os, sys
name = os.path.basename(sys.argv[0])
environment = {{key: os.environ.get(key) for key in ("OMP_NUM_THREADS", "NNODES")}}
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([name, sys.argv[1:], environment]) + "\\n")
"""
STUBS = {
    "torchrun": RECORDER + 'sys.exit(int(os.environ.get("TORCHRUN_STATUS", "0")))\n',
    # The run is unfinished before torchrun, and then what FINISHED says.
    "python": f"""#!{sys.executable}
import os, sys
if sys.argv[1] == "launch/stoppable.py":
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
has_run = os.path.exists(os.environ["CALLS"]) and '"torchrun"' in open(os.environ["CALLS"]).read()
"""
    + RECORDER
    + """
finished = os.environ.get("FINISHED", "0") if has_run else "3"
sys.exit(int(os.environ.get("CHECK_STATUS") or (finished if "--finished" in sys.argv else "0")))
""",
    # The two nodes of the job are this machine, one after the other. `srun ... true` asks whether they live.
    "srun": RECORDER + "import subprocess\n"
    "if sys.argv[-1] == 'true':\n    sys.exit(int(os.environ.get('PROBE_STATUS', '0')))\n"
    "command = sys.argv[sys.argv.index('launch/torchrun_node.sh'):]\n"
    "sys.exit(max(subprocess.run(command).returncode for node in range(2)))\n",
    "scontrol": RECORDER
    + """
if sys.argv[1:3] == ["show", "hostnames"]:
    print("n1", "n2", sep="\\n")
if sys.argv[1:3] == ["show", "job"]:
    print(f"JobId=4321 JobName=x JobState={os.environ.get('STATE', 'RUNNING Reason=None')} Dependency=(null)")
""",
}


class Checkout:
    """A folder with the launch scripts, and an environment in `venv/` whose programs only record their calls."""

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.copytree(ROOT / "launch", folder / "launch")
        (folder / "train.py").touch()
        (folder / "venv" / "bin").mkdir(parents=True)
        for name, text in STUBS.items():
            self.write_program(name, text)
        self.environment = {
            "PATH": f"{folder}/venv/bin:{os.environ['PATH']}",
            "VENV": "venv",
            "CALLS": str(folder / "calls"),
            "NPROC_PER_NODE": "2",
        }

    def write_program(self, name: str, text: str) -> None:
        path = self.folder / "venv" / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        command = ["bash", f"launch/{script}", *arguments]
        variables = {**self.environment, **environment}
        return subprocess.run(command, cwd=self.folder, env=variables, capture_output=True, text=True, timeout=60)

    def sbatch(self, *arguments: str, script: str = "train.sbatch", **environment: str) -> subprocess.CompletedProcess:
        """Run the job as SLURM would on two nodes."""
        slurm = {
            "SLURM_JOB_ID": "4321",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_SUBMIT_DIR": str(self.folder),
        }
        return self.run(script, *arguments, **slurm, **environment)

    def calls(self, name: str) -> list[list[str]]:
        """The arguments of every call of a program, in order."""
        return [arguments for called, arguments, _ in self.records() if called == name]

    def records(self) -> list:
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_syntax(script):
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
    assert os.access(ROOT / script, os.X_OK)


# --- torchrun_node.sh


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
open(f"saved-{int(seen[0])}-{os.path.exists(os.environ['STOP_FILE'])}", "w").close()
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


def test_a_second_signal_makes_torchrun_give_up(checkout):
    patient = f"#!{sys.executable}\nimport time\nopen('started', 'w').close()\ntime.sleep(60)\n"
    checkout.write_program("torchrun", patient)
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


# --- train.sbatch


def test_job_runs_one_torchrun_a_node(checkout):
    finished = checkout.sbatch("--config", "configs/x.yaml", "seed=1", SLURM_CPUS_PER_TASK="6")
    assert finished.returncode == 0, finished.stderr
    asked = ["train.py", "--finished", "--config", "configs/x.yaml", "seed=1"]
    assert checkout.calls("python") == [asked, asked]
    assert checkout.calls("scontrol") == [["show", "hostnames", "n[1-2]"]]
    (srun,) = checkout.calls("srun")
    assert srun[: srun.index("launch/torchrun_node.sh")] == [
        *("--ntasks-per-node=1", "--cpus-per-task=6", "--cpu-bind=none", "--kill-on-bad-exit=1"),
        *("--open-mode=append", "--output=runs/slurm/%j-%N.log"),
    ]
    node = [
        *("--nnodes=2", "--nproc-per-node=2", "--max-restarts=0"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=n1:24321", "--rdzv-id=4321-0"),
        *("train.py", "--config", "configs/x.yaml", "seed=1"),
    ]
    assert checkout.calls("torchrun") == [node, node]
    assert (checkout.folder / "runs" / "slurm").is_dir()


def test_job_that_was_requeued_meets_under_another_name(checkout):
    checkout.sbatch(SLURM_RESTART_COUNT="3", RDZV_PORT="29501")
    assert {"--rdzv-id=4321-3", "--rdzv-endpoint=n1:29501"} <= set(checkout.calls("torchrun")[0])


def test_failure_of_a_rank_is_the_jobs_and_is_not_requeued(checkout):
    assert checkout.sbatch(TORCHRUN_STATUS="7").returncode == 7
    assert ["requeue", "4321"] not in checkout.calls("scontrol")


def test_job_whose_ranks_fail_because_a_node_is_gone_is_requeued(checkout):
    finished = checkout.sbatch(TORCHRUN_STATUS="7", PROBE_STATUS="1")
    assert checkout.calls("scontrol")[-1] == ["requeue", "4321"]
    assert "a node was lost (status 7), back into the queue" in finished.stdout


def test_job_that_has_finished_is_not_started_again(checkout):
    finished = checkout.sbatch("--config", "x.yaml", CHECK_STATUS="0")
    assert finished.returncode == 0
    assert checkout.calls("python") == [["train.py", "--finished", "--config", "x.yaml"]]
    assert {called for called, _, _ in checkout.records()} == {"python"}


def test_job_that_stopped_at_a_checkpoint_queues_again(checkout):
    finished = checkout.sbatch(FINISHED="3")
    assert finished.returncode == 0, finished.stderr
    assert checkout.calls("scontrol")[-1] == ["requeue", "4321"]


@pytest.mark.parametrize(
    ("state", "requeued"),
    [
        ("RUNNING Reason=None", True),
        ("COMPLETING Reason=TimeLimit", True),
        ("COMPLETING Reason=None", False),
        ("PENDING Reason=BeginTime", False),
    ],
)
def test_job_that_a_signal_ended_queues_again_unless_slurm_has_decided(checkout, state, requeued):
    # As from SLURM: to every process, the batch script among them.
    stub = "import os, signal, subprocess\nos.kill(os.getppid(), signal.SIGTERM)\n"
    checkout.write_program("srun", STUBS["srun"].replace("import subprocess\n", stub))
    finished = checkout.sbatch(TORCHRUN_STATUS="7", STATE=state)
    assert finished.returncode == 7, finished.stderr
    assert checkout.calls("scontrol").count(["requeue", "4321"]) == requeued


@pytest.mark.parametrize(
    ("script", "state", "requeued"),
    [
        ("train.sbatch", "COMPLETING Reason=TimeLimit", True),
        # By scancel, or by one who wants a checkpoint; what becomes of it is seen when the ranks have ended.
        ("train.sbatch", "COMPLETING Reason=None", False),
        ("train.sbatch", "RUNNING Reason=None", False),
        # It would begin anew, and reach its limit again.
        ("evaluate.sbatch", "COMPLETING Reason=TimeLimit", False),
    ],
)
def test_job_out_of_time_queues_again_before_its_ranks_end(checkout, script, state, requeued):
    # Ranks that do not end by SIGTERM; here they do when the job is back in the queue, or has had the time for it.
    stub = """
import os, signal, time
os.kill(os.getppid(), signal.SIGTERM)
deadline = time.monotonic() + float(os.environ["PATIENCE"])
while '"requeue"' not in open(os.environ["CALLS"]).read() and time.monotonic() < deadline:
    time.sleep(0.02)
with open(os.environ["CALLS"], "a") as calls:
    calls.write('["the ranks ended", [], {}]\\n')
sys.exit(7)
"""
    checkout.write_program("srun", RECORDER + "if sys.argv[-1] == 'true':\n    sys.exit()\n" + stub)
    assert checkout.sbatch(script=script, STATE=state, PATIENCE="30" if requeued else "1").returncode == 7
    calls = [[name, *arguments] for name, arguments, _ in checkout.records()]
    before = calls[: calls.index(["the ranks ended"])]
    assert (["scontrol", "requeue", "4321"] in before) == requeued
    assert calls.count(["scontrol", "requeue", "4321"]) == (requeued or "RUNNING" in state)


def test_job_submitted_elsewhere_says_so(checkout):
    for script in ("train.sbatch", "evaluate.sbatch"):
        finished = checkout.run(script, SLURM_SUBMIT_DIR="/")
        assert finished.returncode == 2
        assert "submit from the folder that holds train.py" in finished.stderr


def test_evaluation_shares_the_nodes_with_training(checkout):
    assert checkout.sbatch("--run-dir", "runs/x", script="evaluate.sbatch").returncode == 0
    assert checkout.calls("python") == []
    first, second = checkout.calls("torchrun")
    assert first == second
    assert {"--nnodes=2", "--rdzv-endpoint=n1:24321", "--rdzv-id=4321-0"} <= set(first)
    assert first[-4:] == ["-m", "gru4recf_dist.evaluate", "--run-dir", "runs/x"]

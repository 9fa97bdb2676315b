"""The jobs of SLURM: what they would run on their nodes, seen by stand-ins, and when they queue again."""

from __future__ import annotations

import signal

import pytest

from tests.support.checkout import RECORDER, STUBS, Checkout


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)


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


def test_job_whose_launcher_could_not_take_the_signal_yet_is_requeued(checkout):
    checkout.sbatch(TORCHRUN_STATUS=str(128 + signal.SIGUSR1))
    assert checkout.calls("scontrol")[-1] == ["requeue", "4321"]


def attempt(checkout, **environment: str) -> tuple[int, bool, bool, str]:
    """An attempt of a job whose ranks fail, and whose nodes cannot be asked why: its exit status, whether it started
    ranks, whether it went back into the queue, and its error.
    """
    (checkout.folder / "calls").unlink(missing_ok=True)
    finished = checkout.sbatch(**{"TORCHRUN_STATUS": "7", "PROBE_STATUS": "1", "MAX_REQUEUES": "2", **environment})
    started, requeued = bool(checkout.calls("torchrun")), ["requeue", "4321"] in checkout.calls("scontrol")
    return finished.returncode, started, requeued, finished.stderr


def test_job_that_makes_no_checkpoint_is_not_requeued_for_ever(checkout):
    for step in ("no checkpoint", "no checkpoint", "step 5", "step 5"):
        assert attempt(checkout, NEWEST=step)[:3] == (7, True, True)
    *what, error = attempt(checkout, NEWEST="step 5")
    assert what == [1, False, False]
    assert error.startswith("error: back from the queue 2 times without a new checkpoint (MAX_REQUEUES): not started")
    # By hand, when what kept it has been repaired.
    assert attempt(checkout, NEWEST="step 5")[:3] == (7, True, True)


def test_what_is_said_before_the_step_is_no_step(checkout):
    for step in range(4):
        said = {"SAID": "a warning, in every attempt\n", "NEWEST": f"step {step}"}
        assert attempt(checkout, **said)[:3] == (7, True, True)


def test_job_that_must_never_be_requeued_runs_once(checkout):
    assert attempt(checkout, MAX_REQUEUES="0")[:3] == (7, True, False)
    # Put back by SLURM.
    assert attempt(checkout, MAX_REQUEUES="0", SLURM_RESTART_COUNT="1")[:3] == (7, True, False)
    # Stopped ahead of its time limit.
    stopped = attempt(checkout, MAX_REQUEUES="0", TORCHRUN_STATUS="0", FINISHED="3")
    assert stopped[:3] == (75, True, False)


def test_job_whose_storage_does_not_answer_queues_again(checkout):
    silent = {"CHECK_STATUS": "2", "SLURM_RESTART_COUNT": "1"}
    assert attempt(checkout, **silent, STATE="COMPLETING Reason=None")[:3] == (2, False, False)
    assert attempt(checkout, **silent)[:3] == (2, False, True)
    # It answered; what was before counts no more.
    assert attempt(checkout, SLURM_RESTART_COUNT="2")[:3] == (7, True, True)
    for _ in range(2):
        assert attempt(checkout, **silent)[:3] == (2, False, True)
    *what, error = attempt(checkout, **silent)
    assert what == [2, False, False]
    assert error.startswith("error: back from the queue 2 times without an answer")
    # In the first attempt it is the configuration.
    assert attempt(checkout, CHECK_STATUS="2")[:3] == (2, False, False)


@pytest.mark.parametrize(("cpus", "warns"), [("1", True), ("2", False)])
def test_job_with_fewer_cores_than_ranks_says_so(checkout, cpus, warns):
    finished = checkout.sbatch(SLURM_CPUS_ON_NODE=cpus)
    assert ("warning: 1 CPU for 2 ranks of a node" in finished.stdout) == warns


def test_job_that_has_finished_is_not_started_again(checkout):
    finished = checkout.sbatch("--config", "x.yaml", CHECK_STATUS="0")
    assert finished.returncode == 0
    assert checkout.calls("python") == [["train.py", "--finished", "--config", "x.yaml"]]
    assert {called for called, _, _ in checkout.records()} == {"python"}


def test_job_that_stopped_at_a_checkpoint_queues_again(checkout):
    finished = checkout.sbatch(FINISHED="3")
    assert finished.returncode == 0, finished.stderr
    assert checkout.calls("scontrol")[-1] == ["requeue", "4321"]


@pytest.mark.parametrize(("state", "requeued"), [("RUNNING Reason=None", True), ("COMPLETING Reason=None", False)])
def test_job_that_does_not_know_whether_it_has_finished_is_not_taken_for_complete(checkout, state, requeued):
    finished = checkout.sbatch(FINISHED="2", STATE=state)
    assert finished.returncode == 2
    assert "it is not known whether the run has finished (status 2)" in finished.stdout
    assert checkout.calls("scontrol").count(["requeue", "4321"]) == requeued


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

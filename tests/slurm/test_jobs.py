"""The batch scripts on a real SLURM cluster: jobs that are interrupted in every way end as if they had not been."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from gru4recf_dist.checkpoint_commits import read_commit
from gru4recf_dist.config import Config
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.trainer import Trainer
from tests.support.ranks import run_ranks
from tests.support.slurm import GPUS, Cluster, Job, running_cluster
from tests.support.synthetic import random_sessions, write_dataset
from tests.support.training import final_state, logged_lines, small_config, train, whole

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

SESSIONS, EPOCHS, WORLD = random_sessions(0, 5120, items=50, longest=6), 2, 2
STEPS = EPOCHS * len(SESSIONS) // 16
OPTIONS = (
    "max_steps=null",
    f"max_epochs={EPOCHS}",
    "model.dropout=0.3",
    "loader.shuffle_window=64",
    "monitoring.log_every_steps=10",
    "checkpoint.every_epochs=null",
    "checkpoint.every_steps=40",
)
IS_UNDER_WAY = 100


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as cluster:
        yield cluster


@dataclass(frozen=True)
class Run:
    """A run that is to be trained by jobs."""

    cluster: Cluster
    data: Path
    folder: Path

    @property
    def arguments(self) -> list[str]:
        """Of train.py."""
        return _arguments(small_config(self.data, self.folder, *OPTIONS))

    def submit(self, nodes: str) -> Job:
        """Submit it to two nodes, such as `n[1-2]`."""
        return self.cluster.submit("launch/train.sbatch", *self.arguments, options=(f"--nodelist={nodes}",))

    @property
    def search_path(self) -> str:
        """Where jobs look for programs."""
        return self.cluster.environment["PATH"]

    @property
    def steps(self) -> list[int]:
        """The steps of all log lines about training, in their order."""
        return [line["step"] for line in logged_lines(self.folder) if "train/lr" in line]

    def is_under_way(self) -> bool:
        """Whether it has made steps and checkpoints, and has many steps before it."""
        return max(self.steps, default=0) >= IS_UNDER_WAY


def _arguments(config: Config) -> list[str]:
    """``config`` as a recipe: the jobs read it from a file."""
    from gru4recf_dist import typed_yaml

    path = Path(config.run_dir).with_suffix(".yaml")
    path.write_text(typed_yaml.dump(config))
    return ["--config", str(path)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("slurm") / "data"
    others = (random_sessions(seed, 16, 50) for seed in (1, 2))
    write_dataset(str(folder), SESSIONS, *others, shard_sessions=1000, block_sessions=100)
    return folder


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The final state of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return whole(run_ranks(WORLD, train, folder, small_config(data, folder / "run", *OPTIONS)))


# Each interrupts a job and sees it to its end. Lanes run side by side, the first two on two nodes each.


def signalled(run: Run) -> Job:
    job = run.submit("n[1-2]")
    job.wait_for(run.is_under_way)
    # As SLURM does at `--signal`, only now: to every process of the job's step.
    run.cluster.command("scancel", "--signal=USR1", job.number)
    job.wait()
    return job


def preempted(run: Run) -> Job:
    job = run.submit("n[1-2]")
    job.wait_for(run.is_under_way)
    urgent = run.cluster.submit(
        options=("--partition=urgent", "--nodes=2", "--nodelist=n[1-2]", "--exclusive", "--wrap=sleep 2")
    )
    assert urgent.wait() == "COMPLETED"
    job.wait()
    return job


def node_lost(run: Run) -> Job:
    job = run.submit("n[3-4]")
    job.wait_for(run.is_under_way)
    run.cluster.power_off("n4")
    # The ranks on the other node fail at once; the controller misses the daemon only after a while.
    job.wait_for(lambda: job.show("Restarts") == "1")
    # Before that, what it still wants to end on the node would meet the job's next attempt there.
    job.wait_for(lambda: run.cluster.node_state("n4").startswith("down"))
    run.cluster.start_node("n4")
    job.wait()
    return job


def cancelled(run: Run) -> Job:
    job = run.submit("n[1-2]")
    job.wait_for(lambda: bool(run.steps))
    run.cluster.command("scancel", job.number)
    job.wait()
    return job


def out_of_time(run: Run) -> Job:
    job = run.submit("n[3-4]")
    job.wait_for(run.is_under_way)
    # 120 s before the limit the ranks get SIGUSR1; SLURM looks twice a minute, and they would have finished by then.
    with job.frozen() as ranks:
        assert len(ranks) == WORLD
        hours, minutes, _ = map(int, job.show("RunTime").split(":"))
        run.cluster.command("scontrol", "update", f"jobid={job.number}", f"timelimit={hours * 60 + minutes + 2}")
        notes = [Path(rank.environ()["GRU4RECF_STOP_FILE"]) for rank in ranks]
        job.wait_for(lambda: all(note.exists() for note in notes))
    job.wait_for(lambda: job.show("Restarts") == "1")
    # The limit stays with the job.
    run.cluster.command("scontrol", "update", f"jobid={job.number}", "timelimit=30")
    job.wait()
    return job


# In torchrun's place: ranks that do not stop, whatever signal they get, and go on sleeping until they are killed.
_DOES_NOT_STOP = """#!/bin/sh
[ -z "$SLURM_RESTART_COUNT" ] || exec {torchrun} "$@"
trap '' TERM USR1
exec sleep 600
"""


def not_stopped_in_time(run: Run) -> Job:
    programs = run.data.parent / "programs"
    programs.mkdir()
    (programs / "torchrun").write_text(_DOES_NOT_STOP.format(torchrun=shutil.which("torchrun", path=run.search_path)))
    (programs / "torchrun").chmod(0o755)
    # A minute is the shortest limit. The signal ahead of it is of no use here, and must not come before torchrun.
    options = ("--nodelist=n3", "--time=1", "--signal=USR1@5", f"--export=ALL,PATH={programs}:{run.search_path}")
    job = run.cluster.submit("launch/train.sbatch", *run.arguments, "max_steps=20", options=options)
    job.wait_for(lambda: job.show("Restarts") == "1")
    run.cluster.command("scontrol", "update", f"jobid={job.number}", "timelimit=30")
    job.wait()
    return job


# The last one mostly waits, beside a job on its node; so it has a lane of its own.
LANES: list[list[Callable[[Run], Job]]] = [
    [signalled, preempted, cancelled],
    [out_of_time, node_lost],
    [not_stopped_in_time],
]


@pytest.fixture(scope="module")
def interrupted(cluster, data) -> Iterator[dict[str, tuple[Run, Future[Job]]]]:
    """Every kind of interruption, under way: the run and, as soon as it has ended, the job."""
    over = threading.Event()
    with ThreadPoolExecutor(len(LANES)) as pool:
        runs = {kind.__name__: Run(cluster, data, data.parent / kind.__name__) for lane in LANES for kind in lane}
        futures: dict[str, Future[Job]] = {kind.__name__: Future() for lane in LANES for kind in lane}

        def work(lane: list[Callable[[Run], Job]]) -> None:
            for kind in lane:
                try:
                    if over.is_set():
                        return
                    futures[kind.__name__].set_result(kind(runs[kind.__name__]))
                except BaseException as error:
                    futures[kind.__name__].set_exception(error)

        for lane in LANES:
            pool.submit(work, lane)
        yield {name: (runs[name], futures[name]) for name in runs}
        over.set()
        cluster.command("scancel", "--user=root")


def final_state_of(ranks: Ranks, config: Config) -> dict[str, torch.Tensor]:
    """What the run's last checkpoint holds."""
    trainer = Trainer(config, ranks)
    assert trainer.progress.step == STEPS
    return final_state(trainer)


@pytest.mark.parametrize("kind", ["signalled", "out_of_time", "preempted", "node_lost"])
def test_an_interrupted_job_goes_on_and_ends_bit_equal(kind, interrupted, undisturbed, data, tmp_path):
    run, future = interrupted[kind]
    job = future.result()
    assert (job.show("JobState"), job.show("Restarts")) == ("COMPLETED", "1"), job.story
    if kind != "node_lost":
        # The ranks were asked, and stopped at a checkpoint: no step was made twice.
        assert "stopped by a signal, back into the queue" in job.output
        assert job.story.count("stopped by a signal after step") == 1, job.story
    result = json.loads((run.folder / "result.json").read_text())
    assert (result["steps"], result["epochs"], result["world_size"]) == (STEPS, EPOCHS, WORLD)
    # Every session once an epoch, in the steps that count: all their events.
    progress = read_commit(str(run.folder / "checkpoints"), STEPS)["state"]["progress"]
    assert progress["trained_events"] == EPOCHS * sum(map(len, SESSIONS))
    assert run.steps == sorted(set(run.steps)) and run.steps[-1] == STEPS
    states = whole(run_ranks(WORLD, final_state_of, tmp_path, small_config(data, run.folder, *OPTIONS)))
    assert states.keys() == undisturbed.keys()
    for name, tensor in undisturbed.items():
        assert torch.equal(states[name], tensor), name


def test_a_job_whose_ranks_do_not_stop_by_the_time_limit_comes_back(interrupted):
    run, future = interrupted["not_stopped_in_time"]
    job = future.result()
    assert (job.show("JobState"), job.show("Restarts")) == ("COMPLETED", "1"), job.story
    assert job.output.count("back into the queue") == job.output.count("out of time, back into the queue") == 1
    result = json.loads((run.folder / "result.json").read_text())
    assert (result["steps"], result["world_size"]) == (20, 1)


def test_a_configuration_error_is_not_requeued(cluster, data):
    wrong = [f"data={data}", f"run_dir={data.parent}/wrong", "max_epoch=3"]
    job = cluster.submit("launch/train.sbatch", *wrong, options=("--nodes=1",))
    assert job.wait() == "FAILED"
    assert (job.show("ExitCode"), job.show("Restarts")) == ("2:0", "0")
    assert job.output == "error: unknown key 'max_epoch'; did you mean 'max_epochs'?\n"


def test_a_cancelled_job_does_not_come_back(interrupted):
    _, future = interrupted["cancelled"]
    job = future.result()
    assert (job.show("JobState"), job.show("Restarts")) == ("CANCELLED", "0"), job.story


def test_a_finished_run_is_not_started_again_and_is_evaluated(interrupted):
    run, future = interrupted["signalled"]
    future.result()
    # All four nodes with all their GPUs, as the README has it; the ranks are one a node, as there is no real GPU.
    every_gpu = ("--nodes=4", f"--gpus-per-node={GPUS}")
    again = run.cluster.submit("launch/train.sbatch", *run.arguments, options=every_gpu)
    evaluation = run.cluster.submit("launch/evaluate.sbatch", "--run-dir", run.folder, options=("--nodes=2",))
    assert again.wait() == "COMPLETED", again.story
    assert again.output == f"finished: {run.folder} holds the result of this run, nothing to do\n"
    assert evaluation.wait() == "COMPLETED", evaluation.story
    metrics = json.loads((run.folder / "eval-test.json").read_text())
    result = json.loads((run.folder / "result.json").read_text())
    assert metrics == {name: result[name] for name in ("test", "test_excluding_seen")}
    assert json.dumps(metrics) in evaluation.story


def test_four_nodes_with_all_their_gpus_train(cluster, data):
    # A new run, submitted as the README has it. NPROC_PER_NODE, which is 1 here, says how many ranks a node has: eight
    # would have a GPU each, but no cores.
    run = Run(cluster, data, data.parent / "four-nodes")
    as_documented = ("--nodes=4", f"--gpus-per-node={GPUS}", "--cpus-per-task=4")
    job = cluster.submit("launch/train.sbatch", *run.arguments, "max_steps=2", options=as_documented)
    assert job.wait() == "COMPLETED", job.story
    assert job.show("NumNodes") == "4" and f"gpu:{GPUS}" in job.show("TresPerNode")
    result = json.loads((run.folder / "result.json").read_text())
    assert (result["steps"], result["world_size"]) == (2, 4)
    assert "attempt 0 on n[1-4]" in job.output and "warning" not in job.output
    assert {log.name for log in (cluster.folder / "logs").glob(f"{job.number}-*.log")} == {
        f"{job.number}-n{number}.log" for number in range(1, 5)
    }

"""Processes of a run are killed at random; what it ends with is, bit by bit, what an undisturbed run ends with.

CHAOS_EVENTS   how many are killed (3)
CHAOS_SEED     decides which, and when (0)
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gru4recf_dist import typed_yaml
from gru4recf_dist.checkpoint_commits import newest_step, read_commit
from gru4recf_dist.config import Config
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.trainer import Trainer
from tests.support.chaos import ChaosRun
from tests.support.ranks import run_ranks
from tests.support.synthetic import random_sessions, write_dataset
from tests.support.training import final_state, logged_lines, small_config, train

EVENTS = int(os.environ.get("CHAOS_EVENTS", "3"))
SEED = int(os.environ.get("CHAOS_SEED", "0"))
pytestmark = [
    pytest.mark.chaos,
    pytest.mark.e2e,
    pytest.mark.dist,
    pytest.mark.clock,
    pytest.mark.timeout(240 + 30 * EVENTS),
]

WORLD = 2
STEPS_PER_EPOCH = 20
# An epoch for each event, so that they come in any part of one, and some in which the run may come to its end.
EPOCHS = EVENTS + 4
SESSIONS = random_sessions(0, STEPS_PER_EPOCH * 16, items=200, longest=6)
OPTIONS = (
    "max_steps=null",
    f"max_epochs={EPOCHS}",
    "evaluation.every_epochs=1",
    "early_stopping.patience=null",
    "checkpoint.every_epochs=null",
    "checkpoint.every_steps=5",
)
KINDS = ("a rank", "torchrun", "a loader worker", "a rank in a checkpoint")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chaos") / "data"
    write_dataset(str(folder), SESSIONS, random_sessions(1, 40, 200), random_sessions(2, 40, 200), items=200)
    return folder


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> Path:
    """Run folder of a run that nobody touched, without loader workers or torchrun."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_ranks(WORLD, train, folder, small_config(data, folder / "run", *OPTIONS))
    return folder / "run"


@pytest.fixture
def run(data, tmp_path) -> Iterator[ChaosRun]:
    config = small_config(data, tmp_path / "run", *OPTIONS, "loader.workers=1")
    (tmp_path / "config.yaml").write_text(typed_yaml.dump(config))
    # The ranks are started anew by torchrun, and the whole run again when that is used up.
    run = ChaosRun(tmp_path, max_restarts=2)
    try:
        yield run
    finally:
        run.kill_everything()


def plan(events: int, seed: int) -> list[tuple[str, int, int]]:
    """What is killed, on which rank, and after which step: each kind equally often, one in each epoch."""
    chosen = random.Random(seed)
    kinds: list[str] = []
    while len(kinds) < events:
        kinds += chosen.sample(KINDS, len(KINDS))
    return [
        (kind, chosen.randrange(WORLD), epoch * STEPS_PER_EPOCH + chosen.randrange(STEPS_PER_EPOCH))
        for epoch, kind in enumerate(kinds[:events])
    ]


def strike(run: ChaosRun, kind: str, rank: int) -> None:
    """Kill what ``kind`` says, at once and without warning."""
    if kind == "a rank in a checkpoint":
        victim = run.wait_for(lambda: run.rank(rank))
        before = run.unfinished_checkpoints()
        run.wait_for(lambda: run.unfinished_checkpoints().items() - before.items(), poll_seconds=0.001)
    else:
        finders = {
            "a rank": lambda: run.rank(rank),
            "torchrun": run.torchrun,
            "a loader worker": lambda: run.loader_worker(rank),
        }
        victim = run.wait_for(finders[kind])
    victim.kill()
    print(f"    step {run.newest_step()}: killed {victim.pid}; not committed: {[*run.unfinished_checkpoints()]}")
    if kind == "torchrun":
        run.wait_for(lambda: run.status is not None, while_running=False)
        assert run.status == 137, run.last_words()
        # Its ranks end with it, and with them their workers: else two runs would write into the folder.
        run.wait_for(lambda: not run.processes(), while_running=False)


def states_of_last_checkpoints(ranks: Ranks, configs: list[Config]) -> list[dict[str, torch.Tensor]]:
    return [final_state(Trainer(config, ranks)) for config in configs]


def logged_steps(folder: Path) -> dict[int, tuple[float, ...]]:
    """By step, what its last line says about the course of training."""
    names = ("train/loss", "train/gradient_norm", "table/gradient_norm", "train/epoch")
    return {line["step"]: tuple(line[name] for name in names) for line in logged_lines(folder) if "train/lr" in line}


def committed_state(folder: Path) -> dict:
    checkpoints = str(folder / "checkpoints")
    state = read_commit(checkpoints, newest_step(checkpoints))["state"]
    del state["progress"]["trained_seconds"]
    # Without fp16 there is none, and it counts the steps of one start.
    del state["loss_scale"]
    return state


def test_whatever_is_killed_the_run_ends_as_if_nothing_had_been(run, data, undisturbed, tmp_path):
    print(f"CHAOS_SEED={SEED} CHAOS_EVENTS={EVENTS}")
    run.start()
    for number, (kind, rank, step) in enumerate(plan(EVENTS, SEED), start=1):
        if run.status is not None:
            run.start()
        print(f"event {number}, start {run.starts}: kill {kind} (rank {rank}) after step {step}", flush=True)
        while run.newest_step() < step:
            # The event before may have been the one too many for torchrun.
            run.wait_for(lambda step=step: run.newest_step() >= step or run.status, while_running=False)
            if run.status is not None:
                assert run.status != 0, "the run ended before all was killed that should be"
                run.start()
        strike(run, kind, rank)
    run.wait_for(lambda: run.status is not None, while_running=False)
    while run.status != 0:
        # Nothing but what was killed may end it.
        assert run.starts <= EVENTS, run.last_words()
        run.start()
        run.wait_for(lambda: run.status is not None, while_running=False)
    run.wait_for(lambda: not run.processes(), while_running=False)

    folders = (tmp_path / "run", undisturbed)
    configs = [small_config(data, folder, *OPTIONS) for folder in folders]
    ((weights, expected_weights),) = run_ranks(1, states_of_last_checkpoints, tmp_path, configs)
    for name, tensor in expected_weights.items():
        assert torch.equal(weights[name], tensor), name
    result, expected = (json.loads((folder / "result.json").read_text()) for folder in folders)
    assert {"valid", "test"} <= result.keys()
    for each in (result, expected):
        del each["events_per_second"]
    assert result == expected
    state = committed_state(tmp_path / "run")
    assert state == committed_state(undisturbed)
    # No session is longer than what the RNNs see at once: each event counts once an epoch.
    assert state["progress"]["trained_events"] == EPOCHS * sum(map(len, SESSIONS))
    steps = logged_steps(tmp_path / "run")
    assert steps == logged_steps(undisturbed)
    assert [*steps] == [*range(1, EPOCHS * STEPS_PER_EPOCH + 1)]

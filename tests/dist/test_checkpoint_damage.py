"""Checkpoints that are damaged, interrupted, or refused by the disk: what is used in their place, and what is said."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from gru4recf_dist import trained_run
from gru4recf_dist.checkpoint_commits import DamagedCheckpoint, best_step, complete_steps, read_commit
from gru4recf_dist.config import Config
from gru4recf_dist.data import storage
from gru4recf_dist.errors import UserError
from gru4recf_dist.evaluation.evaluator import Evaluator
from gru4recf_dist.monitoring import Monitor
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.parallel.whereabouts import HERE
from gru4recf_dist.trainer import Trainer
from tests.dist.test_resume import train_until
from tests.support.ranks import RankFailed, run_ranks
from tests.support.synthetic import random_sessions, write_dataset
from tests.support.training import final_state, small_config, train, whole

pytestmark = pytest.mark.dist
EVERY_TWO = ("checkpoint.every_epochs=null", "checkpoint.every_steps=2")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(str(folder), random_sessions(0, 41, items=30), random_sessions(1, 9, 30), random_sessions(2, 9, 30))
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory, data):
    """Run folder of two ranks ended after step 7, with checkpoints of steps 4 and 6, and the unbroken run's end."""
    folder = tmp_path_factory.mktemp("killed")
    unbroken = run_ranks(2, train, folder, small_config(data, folder / "unbroken", *EVERY_TWO, "max_steps=9"))
    run_ranks(2, train_until, folder, small_config(data, folder / "run", *EVERY_TWO, "max_steps=9"), 7)
    assert complete_steps(str(folder / "run/checkpoints")) == [4, 6]
    return folder / "run", whole(unbroken)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def scramble(path: Path) -> None:
    path.write_bytes(os.urandom(200))


def without_checksum(path: Path) -> None:
    commit = json.loads(path.read_text())
    del commit["checksum"]
    path.write_text(json.dumps(commit))


def resume_with_log(ranks: Ranks, config: Config) -> tuple[int, dict[str, torch.Tensor], list[str]]:
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    logging.getLogger("gru4recf_dist").addHandler(Listener())
    trainer = Trainer(config, ranks)
    first = trainer.progress.step
    trainer.train()
    return first, final_state(trainer), said


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("__0_0.distcp", truncate, "were written"),
        ("__1_0.distcp", Path.unlink, "no such file"),
        ("__1_0.distcp", flip, "its sha256 is not that of what was written"),
        (".metadata", truncate, "were written"),
        (".metadata", Path.unlink, "no such file"),
        (".metadata", flip, "its sha256"),
        ("commit.json", scramble, "not valid JSON"),
        ("commit.json", truncate, "not valid JSON"),
        ("commit.json", without_checksum, "has no checksum"),
    ],
)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(tmp_path, data, killed, name, damage, says):
    folder = tmp_path / "run"
    shutil.copytree(killed[0], folder)
    damaged = folder / "checkpoints/step-00000006" / name
    damage(damaged)
    config = small_config(data, folder, *EVERY_TWO, "max_steps=9")
    resumed = run_ranks(2, resume_with_log, tmp_path, config)
    assert [first for first, _, _ in resumed] == [4, 4]
    # Rank 0 alone speaks, once.
    ((line,), nothing) = [said for _, _, said in resumed]
    assert nothing == [] and "\n" not in line
    assert f"{damaged}: " in line and says in line
    state = whole([state for _, state, _ in resumed])
    for key, tensor in killed[1].items():
        assert torch.equal(state[key], tensor), key
    # The damaged one has been written anew, then pruned like any other.
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000008", "step-00000009"]


def test_any_flipped_byte_of_a_commit_is_noticed(tmp_path, killed):
    shutil.copytree(killed[0] / "checkpoints", tmp_path, dirs_exist_ok=True)
    expected = read_commit(str(tmp_path), 6)
    path = tmp_path / "step-00000006/commit.json"
    content = path.read_bytes()
    noticed = 0
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            # White space, or a digit behind those that a float has, may say the same.
            assert read_commit(str(tmp_path), 6) == expected
        except DamagedCheckpoint:
            noticed += 1
    assert noticed > len(content) // 7 // 2


def test_without_any_undamaged_checkpoint_there_is_one_error(tmp_path, data, killed):
    folder = tmp_path / "run"
    shutil.copytree(killed[0], folder)
    for path in (folder / "checkpoints").glob("*/__0_0.distcp"):
        flip(path)
    config = small_config(data, folder, *EVERY_TWO, "max_steps=9")
    with pytest.raises(RankFailed, match=r"UserError: .*checkpoints: every checkpoint is damaged"):
        run_ranks(2, train, tmp_path, config)
    # Nothing was removed: a person may want to look.
    assert complete_steps(str(folder / "checkpoints")) == [4, 6]


def _finish_with_damaged_best(ranks: Ranks, config: Config, best: int) -> None:
    trainer = Trainer(config, ranks)
    flip(Path(config.run_dir, f"checkpoints/step-{best:08d}/__0_0.distcp"))
    trainer.train()


def _load_model(ranks: Ranks, config: Config) -> str:
    with pytest.raises(UserError) as caught:
        trained_run.load_model(config, ranks)
    return str(caught.value)


def test_a_damaged_best_checkpoint_is_refused_and_at_the_end_of_training_replaced(tmp_path, data):
    settings = ("max_steps=7", "table.lr=3", "optimizer.lr=3", "evaluation.every_steps=2", *EVERY_TWO)
    config = small_config(data, tmp_path / "run", *settings)
    best = 4
    run_ranks(1, _train_with_figures, tmp_path, config, {2: 0.1, best: 0.3, 6: 0.2, 7: 0.2})
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["best_step"] == best
    run_ranks(1, _finish_with_damaged_best, tmp_path, config, best)
    replaced = json.loads((tmp_path / "run/result.json").read_text())
    assert replaced["best_step"] is None and replaced["valid"] != result["valid"]
    for said in run_ranks(2, _load_model, tmp_path, config):
        assert f"step-{best:08d}/__0_0.distcp: its sha256" in said and "\n" not in said
    shutil.rmtree(tmp_path / f"run/checkpoints/step-{best:08d}")
    # As the line said.
    run_ranks(1, _loads, tmp_path, config)


def _loads(ranks: Ranks, config: Config) -> None:
    trained_run.load_model(config, ranks)


# Storage that refuses


def _train_with_a_full_disk(ranks: Ranks, config: Config, full: range) -> tuple[list[str], str | None]:
    """Train while the last rank's disk takes no file of more than 2000 bytes for checkpoints of the steps ``full``.

    Returns:
        what was said, and the error that training ended with.
    """
    said: list[str] = []
    Monitor.say = lambda monitor, text: said.append(text)
    trainer = Trainer(config, ranks)
    write = trainer.checkpoints.write

    def write_to_disk(step, *arguments):
        if ranks.rank == ranks.world - 1:
            limit = 2000 if step in full else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return write(step, *arguments)

    trainer.checkpoints.write = write_to_disk
    try:
        trainer.train()
    except UserError as error:
        return said, str(error)
    return said, None


@pytest.mark.parametrize("mode", ["true", "false"])
def test_a_run_goes_on_while_its_disk_is_full_and_ends_after_too_many_failures(tmp_path, data, mode):
    settings = (f"checkpoint.async={mode}", "model.embedding_size=64", *EVERY_TWO, "checkpoint.max_failures=2")
    config = small_config(data, tmp_path / "passing", *settings, "max_steps=9")
    (said, first), (_, second) = run_ranks(2, _train_with_a_full_disk, tmp_path, config, range(4, 6))
    assert first is None and second is None
    warnings = [line for line in said if line.startswith("warning")]
    assert len(warnings) == 1 and "of step 4" in warnings[0] and "failure 1 of at most 2" in warnings[0]
    assert "__1_0.distcp: cannot be written (File too large)" in warnings[0]
    folder = tmp_path / "passing/checkpoints"
    assert complete_steps(str(folder)) == [8, 9]
    assert not list(folder.rglob("*.tmp")) and len(list(folder.iterdir())) == 2

    config = small_config(data, tmp_path / "lasting", *settings, "max_steps=9")
    (said, first), (_, second) = run_ranks(2, _train_with_a_full_disk, tmp_path, config, range(4, 100))
    assert first == second and first.endswith("2 in a row (checkpoint.max_failures)") and "\n" not in first
    folder = tmp_path / "lasting/checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]
    # Of the last one, too, when it is the first to fail: what was trained would be lost.
    config = small_config(data, tmp_path / "last", *settings, "max_steps=9")
    (_, first), (_, second) = run_ranks(2, _train_with_a_full_disk, tmp_path, config, range(9, 10))
    assert first == second and "step-00000009/__1_0.distcp: cannot be written" in first
    assert not (tmp_path / "last/result.json").exists()


def _give_figures(figures: dict[int, float]) -> None:
    """Validation gives these figures, by step, from now on in this process."""
    evaluate = Evaluator.evaluate

    def given(evaluator, model, split, *more):
        found, step = evaluate(evaluator, model, split, *more), HERE.step
        is_asked = split == "valid" and step in figures
        return {**found, "valid": {**found["valid"], "ndcg@10": figures[step]}} if is_asked else found

    Evaluator.evaluate = given


def _train_with_figures(ranks: Ranks, config: Config, figures: dict[int, float]) -> None:
    _give_figures(figures)
    train(ranks, config)


def _train_and_lose_the_best(ranks: Ranks, config: Config) -> tuple[float, int | None]:
    """Train with given validation figures, and a full disk for the checkpoint of the best one."""
    _give_figures({2: 0.1, 4: 0.3, 6: 0.2, 8: 0.15, 9: 0.15})
    _train_with_a_full_disk(ranks, config, range(4, 5))
    progress = read_commit(str(config.run_dir) + "/checkpoints", 9)["state"]["progress"]
    return progress["best"], best_step(str(config.run_dir) + "/checkpoints")


@pytest.mark.parametrize("mode", ["true", "false"])
def test_a_best_checkpoint_that_could_not_be_written_is_not_the_best_so_far(tmp_path, data, mode):
    evaluations = ("evaluation.every_steps=2", f"checkpoint.async={mode}", "model.embedding_size=64", "max_steps=9")
    config = small_config(data, tmp_path / "run", *EVERY_TWO, *evaluations)
    assert run_ranks(2, _train_and_lose_the_best, tmp_path, config) == [(0.2, 6)] * 2


def test_time_and_size_of_every_checkpoint_are_logged(killed):
    lines = [json.loads(line) for line in (killed[0].parent / "unbroken/metrics.jsonl").read_text().splitlines()]
    figures = {line["step"]: line for line in lines if "checkpoint/seconds" in line}
    assert sorted(figures) == [2, 4, 6, 8, 9]
    folder = killed[0].parent / "unbroken/checkpoints/step-00000009"
    written = sum(path.stat().st_size for path in folder.iterdir() if path.name != "commit.json")
    assert figures[9]["checkpoint/gib"] * 2**30 == pytest.approx(written)
    assert all(line["checkpoint/wait_seconds"] > 0 for line in figures.values())


def _die_while_writing(ranks: Ranks, config: Config, step: int) -> None:
    """Train, and be killed in the middle of the background write of ``step``, with training a step further."""
    trainer = Trainer(config, ranks)
    write_atomic = storage.open_atomic
    begun, trained_on = threading.Event(), threading.Event()

    @contextlib.contextmanager
    def open_and_die(url):
        with write_atomic(url) as stream:
            if f"step-{step:08d}/__" in url:
                stream.write(b"half of it")
                stream.flush()
                begun.set()
                assert trained_on.wait(10)
                os.kill(os.getpid(), signal.SIGKILL)
            yield stream

    storage.open_atomic = open_and_die
    update = trainer.update

    def update_beside(batches):
        if trainer.progress.step == step:
            assert begun.wait(10)
            done = update(batches)
            trained_on.set()
            return done
        return update(batches)

    trainer.update = update_beside
    trainer.train()


def test_a_kill_in_the_middle_of_a_background_write_leaves_the_earlier_one_in_use(tmp_path, data, killed):
    config = small_config(data, tmp_path / "run", *EVERY_TWO, "max_steps=9")
    with pytest.raises(RankFailed):
        run_ranks(2, _die_while_writing, tmp_path, config, 4)
    folder = tmp_path / "run/checkpoints"
    assert complete_steps(str(folder)) == [2] and list((folder / "step-00000004").glob("*.tmp"))
    resumed = run_ranks(2, resume_with_log, tmp_path, config)
    assert [(first, said) for first, _, said in resumed] == [(2, [])] * 2
    state = whole([state for _, state, _ in resumed])
    for key, tensor in killed[1].items():
        assert torch.equal(state[key], tensor), key
    assert not list(folder.rglob("*.tmp"))


def test_both_ways_of_writing_give_the_same_checkpoints(tmp_path, data):
    for mode in ("true", "false"):
        config = small_config(data, tmp_path / mode, *EVERY_TWO, "max_steps=4", f"checkpoint.async={mode}")
        run_ranks(2, train, tmp_path, config)
    for step in (2, 4):
        tensors = []
        for mode in ("true", "false"):
            file = tmp_path / "whole.pt"
            dcp_to_torch_save(tmp_path / mode / f"checkpoints/step-{step:08d}", file)
            tensors.append(torch.load(file))
        assert tensors[0].keys() == tensors[1].keys() and "table.weight" in tensors[0]
        for name, tensor in tensors[0].items():
            assert torch.equal(tensor, tensors[1][name]), (step, name)

"""Damaged shards: skipped and counted, or named; and checkpoints that storage does not take."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gru4recf_dist.checkpoint_commits import complete_steps
from gru4recf_dist.config import Config, LoaderConfig
from gru4recf_dist.data.blocks import Block
from gru4recf_dist.data.shard_format import POPULARITY, Manifest
from gru4recf_dist.data.streams import SessionLoader
from gru4recf_dist.errors import UserError
from gru4recf_dist.monitoring import Monitor
from gru4recf_dist.parallel.ranks import Ranks, from_first
from gru4recf_dist.trainer import Trainer
from tests.dist.test_resume import resume, train_until
from tests.dist.test_world_size_equality import ADAM, relative_error
from tests.support.ranks import RankFailed, run_ranks
from tests.support.synthetic import random_sessions, write_dataset
from tests.support.training import final_state, small_config, train, whole

pytestmark = pytest.mark.dist

# 47 sessions, 16 a step: 3 steps an epoch.
TRAIN, VALID, TEST = random_sessions(0, 47, items=30), random_sessions(1, 9, 30), random_sessions(2, 9, 30)
SMALL_SHARDS = {"shard_sessions": 2, "block_sessions": 1}
SKIP = ("max_steps=6", "loader.on_bad_shard=skip", "precision=fp64", *ADAM)
# By number among the split's shards; the second is the first one of stream 1, the fourth the last of stream 7.
DAMAGED = {"train": {0: "flipped", 3: "missing", 10: "truncated", 23: "longer"}, "valid": {1: "flipped"}, "test": {}}


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "flipped":
        path.write_bytes(content[:700] + bytes([content[700] ^ 1]) + content[701:])
    else:
        path.write_bytes(content[:-512] if kind == "truncated" else content + bytes(512))


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("good")
    return folder, write_dataset(str(folder), TRAIN, VALID, TEST, **SMALL_SHARDS)


@pytest.fixture(scope="module")
def bad(good, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad") / "data"
    shutil.copytree(good[0], folder)
    for split, shards in DAMAGED.items():
        for number, kind in shards.items():
            damage(folder / good[1].splits[split].shards[number].url, kind)
    return folder


def lost(manifest: Manifest, split: str = "train") -> set[int]:
    """The sessions of the damaged shards, as `write_dataset` deals them out."""
    shards = manifest.splits[split].shards
    chosen = [shards[number] for number in DAMAGED[split]]
    if split != "train":
        return {2 * shard.stream + place for shard in chosen for place in range(shard.sessions)}
    parts = {shard.url: int(shard.url[-10:-4]) for shard in chosen}
    return {
        shard.stream + manifest.streams * (2 * parts[shard.url] + place)
        for shard in chosen
        for place in range(shard.sessions)
    }


def train_and_listen(ranks: Ranks, config: Config) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The final weights, and what a person was told."""
    said: list[str] = []
    say = Monitor.say
    Monitor.say = lambda monitor, text: said.append(text) if monitor.enabled else None
    try:
        trainer = Trainer(config, ranks)
        trainer.train()
    finally:
        Monitor.say = say
    return final_state(trainer), said


def run(world: int, tmp_path: Path, data: Path, name: str, *overrides: str):
    """A run's final weights, what it said, and its folder."""
    folder = tmp_path / name
    results = run_ranks(world, train_and_listen, tmp_path, small_config(data, folder, *SKIP, *overrides))
    return whole([state for state, _ in results]), results[0][1], folder


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("world", [1, 2, 8])
def test_the_order_of_all_other_sessions_stays(good, bad, world):
    gone = lost(good[1])
    assert len(gone) == 7

    def epochs(data: Path, on_bad_shard: str) -> list[list[int]]:
        config = small_config(data, "unused", f"loader.on_bad_shard={on_bad_shard}").loader
        loaders = [SessionLoader(str(data), good[1], config, 16, 0, rank, world) for rank in range(world)]
        steps = [[block.sessions.tolist() for _ in range(2) for block in loader] for loader in loaders]
        return [[number for part in step for number in part] for step in zip(*steps, strict=True)]

    expected = [[number for number in batch if number not in gone] for batch in epochs(good[0], "fail")]
    # A session that is lost has no number.
    assert [[number for number in batch if number >= 0] for batch in epochs(bad, "skip")] == expected


@pytest.fixture(scope="module")
def two_ranks(bad, tmp_path_factory):
    return run(
        2, tmp_path_factory.mktemp("two"), bad, "run", "monitoring.tensorboard=true", "evaluation.every_epochs=1"
    )


def test_lost_sessions_are_counted_everywhere_a_person_looks(good, two_ranks):
    _, said, folder = two_ranks
    train_lost, valid_lost = len(lost(good[1])), len(lost(good[1], "valid"))
    assert (train_lost, valid_lost) == (7, 2)
    result = json.loads((folder / "result.json").read_text())
    # Two epochs, each of which misses them.
    assert result["sessions_lost"] == 2 * train_lost
    assert result["valid"]["sessions_lost"] == result["valid_excluding_seen"]["sessions_lost"] == valid_lost
    assert result["test"]["sessions_lost"] == 0
    assert said[-1] == f"damaged shards were skipped, sessions lost: {2 * train_lost} (train), {valid_lost} (valid)"
    lines = [line["data/sessions_lost"] for line in logged(folder) if "data/sessions_lost" in line]
    assert len(lines) == 6 and lines == sorted(lines)
    assert (lines[2], lines[5]) == (train_lost, 2 * train_lost)
    assert [line["eval/valid/sessions_lost"] for line in logged(folder) if "eval/valid/sessions_lost" in line] == [2, 2]
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("data/sessions_lost")] == lines
    assert [event.value for event in events.Scalars("eval/valid/sessions_lost")] == [valid_lost, valid_lost]


def test_weights_are_those_of_a_run_in_which_the_lost_sessions_have_no_target(good, two_ranks, tmp_path):
    gone, gone_valid = lost(good[1]), lost(good[1], "valid")
    # A session of one event predicts nothing.
    sessions = [session[:1] if number in gone else session for number, session in enumerate(TRAIN)]
    valid = [session[:1] if number in gone_valid else session for number, session in enumerate(VALID)]
    reference = tmp_path / "reference"
    write_dataset(str(reference), sessions, valid, TEST, items=30, **SMALL_SHARDS)
    shutil.copy(good[0] / POPULARITY, reference / POPULARITY)
    expected, _, folder = run(2, tmp_path, reference, "run", "evaluation.every_epochs=1")
    state, _, skipped = two_ranks
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
    ours, theirs = (json.loads((each / "result.json").read_text()) for each in (skipped, folder))
    for split in ("valid", "test"):
        assert {**ours[split], "sessions_lost": 0} == theirs[split]


def test_one_rank_loses_the_same_and_learns_the_same(bad, two_ranks, tmp_path):
    state, said, folder = run(1, tmp_path, bad, "run", "evaluation.every_epochs=1")
    reference, reference_said, reference_folder = two_ranks
    for name, tensor in reference.items():
        assert relative_error(state[name], tensor) < 1e-10, name
    assert said[-1] == reference_said[-1]
    key = "data/sessions_lost"
    assert [line[key] for line in logged(folder) if key in line] == [
        line[key] for line in logged(reference_folder) if key in line
    ]
    ours, theirs = (json.loads((each / "result.json").read_text()) for each in (folder, reference_folder))
    assert (ours["valid"], ours["test"]) == (theirs["valid"], theirs["test"])


def epoch(data: Path, manifest: Manifest, workers: int, on_bad_shard: str = "skip") -> list[Block]:
    config = LoaderConfig(on_bad_shard=on_bad_shard, workers=workers, shuffle_window=8)
    return list(SessionLoader(str(data), manifest, config, 16, 0, 0, 1))


def test_loader_workers_lose_the_same(good, bad):
    expected = epoch(bad, good[1], workers=0)
    assert sum(int((block.lengths == 0).sum()) for block in expected) == 7
    for block, reference in zip(epoch(bad, good[1], workers=2), expected, strict=True):
        for name, column in reference.columns().items():
            np.testing.assert_array_equal(block.columns()[name], column)


def test_loader_workers_name_shard_and_reason(good, bad):
    shard = good[1].splits["train"].shards[0].url
    with pytest.raises(UserError) as caught:
        epoch(bad, good[1], workers=1, on_bad_shard="fail")
    assert str(caught.value).startswith(f"{bad}/{shard}: ") and "sha256" in str(caught.value)


@pytest.mark.parametrize("step", [1, 4])
def test_a_resumed_run_has_lost_as_much_and_ends_bit_equal(bad, two_ranks, tmp_path, step):
    checkpoints = ("checkpoint.every_epochs=null", f"checkpoint.every_steps={step}")
    config = small_config(bad, tmp_path / "run", *SKIP, *checkpoints)
    run_ranks(2, train_until, tmp_path, config, step)
    assert complete_steps(str(tmp_path / "run" / "checkpoints")) == [step]
    resumed = run_ranks(2, resume, tmp_path, config)
    assert [first for first, _ in resumed] == [step] * 2
    state = whole([state for _, state in resumed])
    for name, tensor in two_ranks[0].items():
        assert torch.equal(state[name], tensor), name
    assert json.loads((tmp_path / "run" / "result.json").read_text())["sessions_lost"] == 14


def test_a_split_that_is_lost_as_a_whole_leaves_nothing_to_measure(good, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(good[0], data)
    for split in ("train", "test"):
        for number, shard in enumerate(good[1].splits[split].shards):
            damage(data / shard.url, ("flipped", "missing", "truncated", "longer")[number % 4])
    _, said, folder = run(2, tmp_path, data, "run", "max_steps=4", "evaluation.baselines=true")
    result = json.loads((folder / "result.json").read_text())
    # An epoch of 3 steps, and one of the next one's, of 16 sessions.
    assert result["sessions_lost"] == 47 + 16
    assert (result["test"]["sessions_lost"], result["test"]["targets"]) == (9, 0)
    assert said[-1].endswith("sessions lost: 63 (train), 9 (test)")


@pytest.mark.parametrize(
    ("split", "number", "reason"),
    [
        ("train", 0, "its sha256 is not the manifest's"),
        ("train", 3, "no such file"),
        ("train", 10, "truncated"),
        ("train", 23, "longer"),
        ("valid", 1, "its sha256"),
    ],
)
def test_without_skip_the_run_ends_with_shard_and_reason(good, tmp_path, split, number, reason):
    data = tmp_path / "data"
    shutil.copytree(good[0], data)
    shard = good[1].splits[split].shards[number].url
    damage(data / shard, DAMAGED[split][number])
    with pytest.raises(RankFailed, match=rf"DamagedFile: {data}/{shard}: {reason}"):
        run_ranks(2, train, tmp_path, small_config(data, tmp_path / "run", "max_steps=3"))


# Checkpoints


def _error_of_save(ranks: Ranks, config: Config) -> str:
    """The error with which training ends when a file stands where its checkpoints should go."""
    trainer = Trainer(config, ranks)
    if ranks.is_first:
        Path(config.run_dir).mkdir()
        Path(config.run_dir, "checkpoints").write_bytes(b"")
    from_first(ranks, lambda: None)
    with pytest.raises(UserError) as caught:
        trainer.train()
    return str(caught.value)


def test_a_checkpoint_that_cannot_be_written_is_the_same_line_on_every_rank(good, tmp_path):
    config = small_config(good[0], tmp_path / "run", "max_steps=1")
    first, second = run_ranks(2, _error_of_save, tmp_path, config)
    assert first == second
    assert first.startswith(f"{tmp_path}/run/checkpoints/step-00000001: ") and "\n" not in first


def _error_on_a_full_disk(ranks: Ranks, config: Config) -> str:
    """The error with which training ends when one rank's disk takes no file of more than 2000 bytes."""
    trainer = Trainer(config, ranks)
    if not ranks.is_first:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    with pytest.raises(UserError) as caught:
        trainer.train()
    return str(caught.value)


def test_a_full_disk_of_one_rank_is_the_same_line_on_every_rank(good, tmp_path):
    config = small_config(good[0], tmp_path / "run", "max_steps=1", "model.embedding_size=64")
    first, second = run_ranks(2, _error_on_a_full_disk, tmp_path, config)
    assert first == second
    assert first.endswith(".distcp: cannot be written (File too large)") and "\n" not in first
    assert complete_steps(str(tmp_path / "run" / "checkpoints")) == []
    assert not list((tmp_path / "run").rglob("*.tmp"))


def _fail_on_first(ranks: Ranks) -> str:
    try:
        from_first(ranks, lambda: 1 // 0)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_a_bug_on_the_first_rank_ends_the_others_at_once(tmp_path):
    assert run_ranks(3, _fail_on_first, tmp_path) == [
        "ZeroDivisionError: integer division or modulo by zero",
        *["UserError: rank 0 ended with ZeroDivisionError"] * 2,
    ]

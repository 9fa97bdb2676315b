"""Runs that start from the weights of an earlier one, on a data set that has grown."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from gru4recf_dist import train as train_program
from gru4recf_dist import warm_start
from gru4recf_dist.checkpoint_commits import best_step
from gru4recf_dist.config import Config
from gru4recf_dist.data.shard_format import Feature, Manifest, read_manifest, write_manifest
from gru4recf_dist.errors import UserError
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.trainer import Trainer
from tests.dist.test_resume import train_until
from tests.dist.test_world_size_equality import relative_error
from tests.support.ranks import RankFailed, run_ranks
from tests.support.synthetic import random_sessions, write_dataset
from tests.support.training import final_state, small_config, train, whole

pytestmark = pytest.mark.dist

# Rows of each vocabulary before and after; `brand` has the values of `category`, and lies behind it in one parameter.
OLD_SIZES = {"category": 6, "brand": 7, "tags": 9}
NEW_SIZES = {"category": 8, "brand": 9, "tags": 14}
TOKENS = "feature_embed_layer.token_embedding_table.item.embedding.weight"
TAGS = "feature_embed_layer.token_seq_embedding_table.item.0.weight"
DIM = 8


def write_grown(folder, train: list[np.ndarray], items: int, sizes: dict[str, int], ancestors: list[str]) -> Manifest:
    """A data set of ``train`` whose vocabularies have ``sizes`` rows."""
    held_out = random_sessions(1, 9, items)
    manifest = write_dataset(str(folder), train, held_out, held_out, items=items)
    category = manifest.feature("category")
    features = [*manifest.features, Feature(name="brand", kind="token", size=1, values=category.values)]
    features = [each.model_copy(update={"size": sizes.get(each.name, each.size)}) for each in features]
    manifest = manifest.model_copy(update={"features": features, "ancestors": ancestors})
    write_manifest(str(folder), manifest)
    return manifest


def write_both(folder, old_items: int, new_items: int) -> None:
    before, added = random_sessions(0, 41, old_items), random_sessions(5, 16, new_items)
    old = write_grown(folder / "old", before, old_items, OLD_SIZES, [])
    write_grown(folder / "new", [*before, *added], new_items, NEW_SIZES, ["0" * 64, old.training_digest])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """`old`, `new`, and `run`: 7 steps on `old` by one rank, the last of which is the best."""
    folder = tmp_path_factory.mktemp("data")
    write_both(folder, 30, 47)
    run_ranks(1, train, folder, small_config(folder / "old", folder / "run", "max_steps=7"))
    return folder


def start(ranks: Ranks, config: Config) -> tuple[int, int, dict[str, torch.Tensor]]:
    """A trainer as it is before its first step: (step, the table's step count, its state)."""
    trainer = Trainer(config, ranks)
    return trainer.progress.step, trainer.table.optimizer.steps, final_state(trainer)


def expected_rows(name: str, old: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
    """``fresh`` with the rows of ``old`` at their places, written out by hand."""
    expected = fresh.clone()
    if TOKENS in name:
        # category: rows 0 to 5 of 8; brand: rows 0 to 6 of 9, which begin at 8.
        expected[0:6], expected[8:15] = old[0:6], old[6:13]
    else:
        expected[: len(old)] = old
    return expected


@pytest.mark.parametrize(
    ("items", "saved_world", "worlds", "extra", "now"),
    [
        ((30, 47), 2, (1, 3), (), ()),
        # 5 rows on 4 ranks are 2, 2, 1, 0; 7 rows on 5 ranks are 2, 2, 2, 1, 0.
        ((4, 6), 4, (5, 2), ("table.optimizer=rowwise_adagrad", "optimizer.name=sgd"), ()),
        ((4, 40), 3, (4,), ("table.optimizer=adagrad", "precision=fp64"), ()),
        ((30, 30), 1, (2,), ("table.optimizer=sgd", "optimizer.name=adamw"), ()),
        ((30, 47), 2, (2,), (), ("engine.name=deepspeed",)),
    ],
    ids=["2-to-1-and-3", "empty-ranks", "many-new-rows", "no-new-rows", "ddp-to-deepspeed"],
)
def test_old_rows_are_kept_to_the_bit_and_new_ones_are_fresh(tmp_path, items, saved_world, worlds, extra, now):
    write_both(tmp_path, *items)
    config = small_config(tmp_path / "old", tmp_path / "run", "max_steps=7", *extra)
    old = whole(run_ranks(saved_world, train, tmp_path, config))
    ((_, _, fresh),) = run_ranks(1, start, tmp_path, small_config(tmp_path / "new", tmp_path / "fresh", *extra))

    for world in worlds:
        config = small_config(tmp_path / "new", tmp_path / f"on-{world}", f"init_from={tmp_path / 'run'}", *extra, *now)
        results = run_ranks(world, start, tmp_path, config)
        assert [(step, table_steps) for step, table_steps, _ in results] == [(0, 7)] * world
        state = whole([state for _, _, state in results])
        assert state.keys() == fresh.keys() == old.keys()
        for name, tensor in state.items():
            if old[name].dim() and len(old[name]) < len(tensor):
                assert name.startswith("table.") or TOKENS in name or TAGS in name
                expected = expected_rows(name, old[name], fresh[name])
            else:
                expected = old[name]
            assert torch.equal(tensor, expected), name
    # What the comparison rests on: there is something to keep, and something new.
    assert not torch.equal(old["table.weight"], fresh["table.weight"][: len(old["table.weight"])])
    assert len(fresh[f"encoder.{TOKENS}"]) == 17
    assert len(fresh["table.weight"]) == items[1] + 1


GROUPED = (
    "model.fusion=parallel",
    "model.output_bias=true",
    "model.hidden_size=6",
    "model.feature_groups=[[brand,price],[tags,category]]",
    "training.strategy=alternating",
)


def test_output_tables_and_grouped_vocabularies_grow_too(tmp_path):
    write_both(tmp_path, 30, 47)
    old = whole(
        run_ranks(2, train, tmp_path, small_config(tmp_path / "old", tmp_path / "run", "max_steps=7", *GROUPED))
    )
    ((_, _, fresh),) = run_ranks(1, start, tmp_path, small_config(tmp_path / "new", tmp_path / "fresh", *GROUPED))
    config = small_config(tmp_path / "new", tmp_path / "warm", f"init_from={tmp_path / 'run'}", *GROUPED)
    results = run_ranks(3, start, tmp_path, config)
    # 3 steps an epoch, and the item subnet's turn was the first.
    assert [table_steps for _, table_steps, _ in results] == [3] * 3
    state = whole([state for _, _, state in results])
    assert state.keys() == fresh.keys() == old.keys()
    for name, tensor in state.items():
        # Every group has one field of tokens at most: what is old comes first, and what is new behind it.
        rows = len(old[name]) if tensor.dim() else None
        assert torch.equal(tensor[:rows] if tensor.dim() else tensor, old[name]), name
        assert not tensor.dim() or torch.equal(tensor[rows:], fresh[name][rows:]), name
    grown = {name for name, tensor in state.items() if tensor.shape != old[name].shape}
    tables = {"table", "output_item", "output_feature_0", "output_feature_1", "output_bias"}
    assert {f"{table}.weight" for table in tables} < grown and len([name for name in grown if "embed" in name]) >= 3


def losses(run_dir) -> list[float]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_training_goes_on_alike_on_any_number_of_ranks(tmp_path, data):
    rates = ("table.lr=0.02", "optimizer.lr=0.02")
    run_ranks(1, train, tmp_path, small_config(data / "old", tmp_path / "run", "max_steps=30", *rates))
    states = []
    for world, folder in ((1, "one"), (3, "three")):
        config = small_config(data / "new", tmp_path / folder, f"init_from={tmp_path / 'run'}", *rates)
        states.append(whole(run_ranks(world, train, tmp_path, config)))
    for name, tensor in states[0].items():
        assert relative_error(states[1][name], tensor) < 1e-5, name
    run_ranks(1, train, tmp_path, small_config(data / "new", tmp_path / "cold", "max_steps=1"))
    warm = losses(tmp_path / "one")
    assert np.isfinite(warm).all()
    assert np.mean(warm[-5:]) < np.mean(warm[:5])
    # What was learned helps: from nothing, the first loss is higher.
    assert warm[0] < losses(tmp_path / "cold")[0]


def test_a_resumed_run_goes_on_from_its_own_checkpoint(tmp_path, data):
    origin = tmp_path / "origin"
    shutil.copytree(data / "run", origin)
    settings = (f"init_from={origin}", "max_steps=9", "checkpoint.every_steps=4", "checkpoint.every_epochs=null")
    unbroken = run_ranks(1, train, tmp_path, small_config(data / "new", tmp_path / "unbroken", *settings))
    broken = small_config(data / "new", tmp_path / "broken", *settings)
    run_ranks(1, train_until, tmp_path, broken, 6)
    shutil.rmtree(origin)
    ((step, table_steps, _),) = run_ranks(1, start, tmp_path, broken)
    assert (step, table_steps) == (4, 11)
    resumed = run_ranks(1, train, tmp_path, broken)
    for name, tensor in unbroken[0].items():
        assert torch.equal(resumed[0][name], tensor), name


def test_the_best_checkpoint_is_taken_or_else_the_newest(tmp_path, data):
    manifest = read_manifest(str(data / "new"))
    evaluated = ("evaluation.every_steps=2", "checkpoint.every_steps=1", "checkpoint.every_epochs=null")
    # So large a rate that the second evaluation is no better than the first.
    config = small_config(data / "old", tmp_path / "run", "max_steps=7", "table.lr=3", "optimizer.lr=3", *evaluated)
    run_ranks(1, train, tmp_path, config)
    best = best_step(str(tmp_path / "run" / "checkpoints"))
    assert best < 7
    config = small_config(data / "new", tmp_path / "warm", f"init_from={tmp_path / 'run'}")
    assert warm_start.find(config, manifest).step == best
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{best:08d}")
    assert warm_start.find(config, manifest).step == 7


def _warm_start_on_memory(ranks: Ranks, name: str) -> tuple[bool, int]:
    """All in one process: its memory is the object storage."""
    url = f"memory://{name}"
    sessions = random_sessions(0, 41, items=30)
    old = write_dataset(f"{url}/old", sessions)
    new = write_dataset(f"{url}/new", [*sessions, *random_sessions(5, 16, items=35)], items=35)
    # No feature's vocabulary has grown, the items have.
    write_manifest(f"{url}/new", new.model_copy(update={"ancestors": [old.training_digest]}))
    kept = train(ranks, small_config(f"{url}/old", f"{url}/run", "max_steps=3"))["table.weight"]
    _, _, state = start(ranks, small_config(f"{url}/new", f"{url}/warm", f"init_from={url}/run"))
    return torch.equal(state["table.weight"][:31], kept), len(state["table.weight"])


def test_the_earlier_run_may_be_a_url(tmp_path):
    assert run_ranks(1, _warm_start_on_memory, tmp_path, tmp_path.name) == [(True, 36)]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.embedding_size=16", "model.embedding_size: 16, but .* was trained with 8"),
        ("model.num_layers=2", "model.num_layers: 2"),
        ("model.fusion=item_only", "model.fusion: 'item_only'"),
        ("model.pooling=max", "model.pooling: 'max'"),
        ("model.features=[category,tags]", r"model.features: category \(token\), tags \(token_seq\), but"),
        ("precision=fp64", "precision: 'fp64 weights'"),
        ("table.optimizer=adagrad", "table.optimizer: 'adagrad'"),
        ("optimizer.name=sgd", "optimizer.name: 'sgd'"),
    ],
)
def test_another_model_is_refused_by_the_key_that_differs(tmp_path, data, override, says):
    config = small_config(data / "new", tmp_path / "warm", f"init_from={data / 'run'}", override)
    with pytest.raises(UserError, match=says):
        warm_start.find(config, read_manifest(str(data / "new")))


def test_all_features_and_their_names_are_the_same_model(tmp_path, data):
    named = "model.features=[category,brand,image,price,tags]"
    config = small_config(data / "new", tmp_path / "warm", f"init_from={data / 'run'}", named)
    assert warm_start.find(config, read_manifest(str(data / "new"))).step == 7


@pytest.mark.parametrize(
    ("sizes", "says"),
    [({"tags": 5}, "'tags' has size 5, but .* size 9"), ({"image": 4}, "'image' has size 4, but .* size 3")],
)
def test_a_vocabulary_that_shrank_and_a_vector_of_another_size_are_refused(tmp_path, data, sizes, says):
    manifest = read_manifest(str(data / "new"))
    changed = [each.model_copy(update={"size": sizes.get(each.name, each.size)}) for each in manifest.features]
    config = small_config(data / "new", tmp_path / "warm", f"init_from={data / 'run'}")
    with pytest.raises(UserError, match=f"model.features: {says}"):
        warm_start.find(config, manifest.model_copy(update={"features": changed}))


def test_a_data_set_that_did_not_grow_from_the_old_one_is_refused_on_every_rank(tmp_path, data):
    write_grown(tmp_path / "other", random_sessions(0, 57, 47), 47, NEW_SIZES, ["0" * 64])
    config = small_config(tmp_path / "other", tmp_path / "warm", f"init_from={data / 'run'}")
    with pytest.raises(RankFailed, match=r"UserError: init_from: .* was not made from by appending"):
        run_ranks(2, start, tmp_path, config)


def test_check_looks_at_the_earlier_run(tmp_path, data, capsys):
    def check(origin) -> tuple[int, str]:
        config = small_config(data / "new", tmp_path / "warm", f"init_from={origin}")
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(json.dumps(config.model_dump(mode="json")))
        code = train_program.main(["--check", "--config", str(recipe)])
        return code, capsys.readouterr().err

    assert check(data / "run") == (0, "")
    assert check(data / "old") == (
        2,
        f"error: init_from: {data / 'old'} is not the folder of a run (it has no config.yaml)\n",
    )
    (tmp_path / "begun").mkdir()
    shutil.copy(data / "run" / "config.yaml", tmp_path / "begun")
    assert check(tmp_path / "begun") == (2, f"error: init_from: {tmp_path / 'begun'} has no complete checkpoint\n")

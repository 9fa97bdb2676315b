"""Models of every fusion as plain torch modules: the scores of the distributed one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from gru4recf_dist import export, exported, trained_run
from gru4recf_dist.config import Config
from gru4recf_dist.data.batches import pack_histories
from gru4recf_dist.data.shard_format import read_manifest, write_manifest
from gru4recf_dist.errors import UserError
from gru4recf_dist.evaluation.topk import top_k
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.recommend_input import SessionReader, to_block
from tests.support.ranks import run_ranks
from tests.support.synthetic import random_sessions, write_dataset
from tests.support.training import small_config, train

pytestmark = pytest.mark.dist
ITEMS = 30
GROUPS = "model.feature_groups=[[tags,category],[price],[image]]"
# An epoch has 3 steps: only the item subnet has come in.
RESIDUAL = ("training.strategy=residual", "training.epochs_per_phase=2")
CASES = {
    "item_only": ("model.output_bias=true", "model.output_table=untied", "model.event_features=[type]"),
    "feature_only": ("model.output_bias=true", "model.features=[price,tags]"),
    "concat_input": ("model.num_layers=2", "model.feature_sizes={category: 3, gap: 2}"),
    "concat_output": ("model.output_table=untied", "model.output_bias=true"),
    "concat_output-groups": (GROUPS, "model.score=cosine", "model.learn_temperature=true"),
    "weighted_sum": ("model.hidden_size=6", "model.event_input=items"),
    "parallel": (
        GROUPS,
        "model.hidden_size=6",
        "model.output_bias=true",
        "model.score=cosine",
        "model.temperature=0.2",
    ),
    "parallel-tied": ("model.output_table=tied", "model.event_features=[]"),
    "parallel-residual": RESIDUAL,
    "shared_w": ("model.hidden_size=6", "model.feature_pooling={tags: max}"),
    "interaction": ("model.hidden_size=6", "precision=bf16"),
}
SESSIONS = [
    {"items": ["item-3"], "times": [5.0]},
    {
        "items": ["item-1", "item-2", "item-2", "never seen", "item-9"],
        "events": {"type": ["type-2", None, "type-4", "type-3", "new"], "price": [1.5, None, 0.0, 2.0, -3.0]},
        "times": [1, 2, 2.5, 9, 40],
    },
    # Longer than loader.max_length.
    {"items": [f"item-{1 + i % ITEMS}" for i in range(9)]},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """With an item price that is missing here and there."""
    folder = str(tmp_path_factory.mktemp("data"))
    held_out = random_sessions(1, 9, ITEMS)
    manifest = write_dataset(folder, random_sessions(0, 41, ITEMS), held_out, held_out, ITEMS, event_features=True)
    price = manifest.feature("price")
    values = np.load(f"{folder}/{price.values}")
    values[5:9] = np.nan
    np.save(f"{folder}/{price.values}", values)
    features = [each.model_copy(update={"missing": each.name == "price"}) for each in manifest.features]
    write_manifest(folder, manifest.model_copy(update={"features": features}))
    return folder


def _train_and_score(ranks: Ranks, configs: dict[str, Config]) -> dict[str, tuple[list, list]]:
    """Of each: the items by falling score after each session, and the scores."""
    found = {}
    for name, config in configs.items():
        train(ranks, config)
        model, manifest = trained_run.load_model(config, ranks)
        reader = SessionReader(config.data, manifest, model.event_features)
        block = to_block(list(reader.sessions([("", line) for line in SESSIONS])))
        batch = pack_histories(block, config.loader.max_length, model.event_features)
        queries = model.encode(batch.items, batch.batch_sizes, batch.event_features)[batch.positions]
        ids, scores = top_k(queries, ITEMS, model.candidates, tile_rows=7)
        found[name] = [reader.index.tokens(row.numpy()) for row in ids], scores.tolist()
    return found


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> tuple[dict[str, Path], dict[str, tuple[list, list]]]:
    """A run of each case, on 2 ranks, and what it scores."""
    folder = tmp_path_factory.mktemp("runs")
    given = {name: (f"model.fusion={name.partition('-')[0]}", *case) for name, case in CASES.items()}
    settings = ("max_steps=3", "table.lr=0.1", "optimizer.lr=0.02")
    configs = {name: small_config(data, folder / name, *settings, *case) for name, case in given.items()}
    return {name: folder / name for name in CASES}, run_ranks(2, _train_and_score, folder, configs)[0]


def export_run(run: Path, folder: Path, *arguments: str) -> Path:
    assert export.main([f"--run={run}", "--format=torch", f"--output={folder}", *arguments]) == 0
    return folder


@pytest.mark.parametrize("name", CASES)
def test_the_exported_model_scores_as_the_distributed_one(runs, name, tmp_path):
    folder, (items, scores) = export_run(runs[0][name], tmp_path / "out"), runs[1][name]
    model = exported.load(str(folder))
    found = model.scores(SESSIONS)
    assert found.shape == (len(SESSIONS), ITEMS) and found.dtype == torch.float64
    tokens = model.tokens(range(ITEMS))
    for row, best, values in zip(found.tolist(), items, scores, strict=True):
        expected = dict(zip(best, values, strict=True))
        assert dict(zip(tokens, row, strict=True)) == pytest.approx(expected, rel=0, abs=1e-6)
        assert max(values) - min(values) > 1e-3
    best = model.recommend(SESSIONS, k=5)
    for row, tokens_found, values in zip(best, items, scores, strict=True):
        assert [score for _, score in row] == pytest.approx(values[:5], rel=0, abs=1e-6)
        # Scores that differ by less than rounding may change places.
        assert len(set(tokens_found[:6]) & {token for token, _ in row}) == 5


def test_sessions_may_be_lists_unknown_items_are_left_out_and_seen_ones_on_request(runs, tmp_path):
    model = exported.load(str(export_run(runs[0]["parallel-tied"], tmp_path / "out")))
    sessions = [["item-4", "item-7"], ["never seen"], ["item-4", "never seen", "item-7"], []]
    found = model.scores(sessions)
    assert torch.equal(found[0], found[2]) and found[[1, 3]].isnan().all() and found[0].isfinite().all()
    one, none, *_ = model.recommend(sessions, k=100)
    assert len(one) == ITEMS and none == [] and [score for _, score in one] == sorted(found[0].tolist(), reverse=True)
    others = model.recommend(sessions, k=100, exclude_seen=True)[0]
    assert others == [pair for pair in one if pair[0] not in ("item-4", "item-7")]
    assert model.recommend([]) == [] and model.scores([]).shape == (0, ITEMS)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_equal_scores_are_ordered_by_id(runs, tmp_path):
    model = exported.load(str(export_run(runs[0]["item_only"], tmp_path / "out")))
    model.output_embedding["output"].weight.zero_()
    bias = model.output_embedding["output_bias"].weight
    bias.zero_()
    bias[20] = 1.0
    best = [token for token, _ in model.recommend([["item-1"]], k=4)[0]]
    assert best == model.tokens([19, 0, 1, 2])


def test_padded_sessions_with_event_features_are_encoded_as_packed_ones(runs, tmp_path):
    model = exported.load(str(export_run(runs[0]["item_only"], tmp_path / "out")))
    items, kinds = torch.tensor([[3, 4, 5], [7, 0, 0]]), torch.tensor([[2, 0, 4], [3, 0, 0]])
    padded = model(items, torch.tensor([3, 1]), {"type": kinds})
    packed = model.encode(torch.tensor([3, 7, 4, 5]), torch.tensor([2, 1, 1]), {"type": torch.tensor([2, 3, 0, 4])})
    torch.testing.assert_close(padded, packed[[3, 1]])


def test_the_folder_holds_plain_data_only_and_needs_neither_run_nor_data_set(runs, data, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    run = tmp_path / "run"
    shutil.copytree(runs[0]["shared_w"], run)
    folder = export_run(run, tmp_path / "out", f"data={copy}")
    shutil.rmtree(copy)
    shutil.rmtree(run)
    moved = folder.rename(tmp_path / "elsewhere")
    model = exported.load(str(moved))
    assert model.scores(SESSIONS).isfinite().all()
    weights = torch.load(moved / "weights.pt", weights_only=True)
    assert weights.keys() == dict(model.named_parameters()).keys()
    # It is a data set of its own, without sessions.
    manifest = read_manifest(str(moved))
    assert manifest.items == ITEMS and not any(split.sessions for split in manifest.splits.values())
    assert all((moved / name).exists() for name in manifest.files)


def test_what_is_wrong_with_a_folder_is_one_line(runs, tmp_path, capsys):
    folder = export_run(runs[0]["item_only"], tmp_path / "out")
    arguments = [f"--run={runs[0]['item_only']}", "--format=torch", f"--output={folder}"]
    capsys.readouterr()
    assert export.main(arguments) == 2
    assert f"--output: {folder} is not empty" in capsys.readouterr().err
    assert export.main([*arguments[:2], f"--output={tmp_path}/new", "--ids=x"]) == 2
    assert "--ids: only --format recbole has ids of its own" in capsys.readouterr().err

    def error() -> str:
        with pytest.raises(UserError) as caught:
            exported.load(str(folder))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    model = exported.load(str(folder))
    for wrong in ("item-1", {"events": {}}, 5):
        with pytest.raises(UserError, match="session 1: must be a list of tokens, or a dictionary"):
            model.scores([["item-1"], wrong])
    with pytest.raises(UserError, match=r"session 0: events.colour: no such event feature"):
        model.scores([{"items": ["item-1"], "events": {"colour": ["red"]}}])
    weights = (folder / "weights.pt").read_bytes()
    (folder / "weights.pt").write_bytes(weights[:1000])
    assert f"{folder}/weights.pt: not the weights of this model" in error()
    torch.save({"a": torch.zeros(1)}, folder / "weights.pt")
    assert f"{folder}/weights.pt: not the weights of this model" in error()
    settings = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**settings, "model": {"fusion": "none"}}))
    assert f"{folder}/model.json: not the settings of a model" in error()
    (folder / "model.json").write_text(json.dumps({**settings, "format": 2}))
    assert f"{folder}/model.json: not a model that this program exported in format 1" in error()
    (folder / "model.json").unlink()
    assert f"{folder}/model.json" in error()

"""What cannot be taken over from RecBole: one clear line, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gru4recf_dist import import_recbole
from gru4recf_dist.data.shard_format import read_manifest, write_manifest
from gru4recf_dist.recbole.checkpoint_files import RecBoleCheckpoint, read_checkpoint
from tests.recbole.test_import import scores_of


@pytest.fixture
def run_import(recbole, tmp_path, capsys):
    """Import into `run`; the last line of what it says and its status."""

    def run(checkpoint: Path | str, *arguments: str, data: Path = recbole / "data") -> tuple[int, str]:
        given = [f"--checkpoint={checkpoint}", f"--data={data}", f"--run={tmp_path}/run", *arguments]
        status = import_recbole.main(given)
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return status, said

    return run


def changed(source: Path, target: Path, settings: dict | None = None, weights: dict | None = None) -> Path:
    """A checkpoint of plain data like another, but for some settings and weights; without the data set."""
    original: RecBoleCheckpoint = read_checkpoint(str(source))
    plain = {key: value for key, value in original.settings.items() if type(value) in (int, float, str, list, dict)}
    state = OrderedDict({**original.weights, **(weights or {})})
    torch.save({"config": plain | (settings or {}), "state_dict": state}, target)
    return target


def test_without_ids_gru4rec_does_not_tell_its_items(recbole, run_import, tmp_path):
    status, said = run_import(recbole / "checkpoints" / "none-1.pth")
    assert status == 2 and "does not tell which row is which item: give --ids or --recbole-data" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "SASRec"}, "holds a model 'SASRec'; only GRU4Rec and GRU4RecF can be read"),
        ({"embedding_size": 7}, "has shape [61, 6]; by its configuration and the ids of"),
        ({"hidden_size": 9}, "has shape [15, 6]; by its configuration"),
        ({"num_layers": 2}, "has no weight 'item_gru_layers.weight_ih_l1'"),
        ({"hidden_size": "big"}, "its configuration has no usable 'hidden_size' (got 'big')"),
        ({"hidden_size": True}, "its configuration has no usable 'hidden_size'"),
        ({"dropout_prob": 1.5}, "its configuration: model.dropout: input should be less than 1"),
        ({"pooling_mode": "last"}, "its configuration: model.pooling:"),
        ({"selected_features": ["price", "tags", "colour"]}, "the data set has no feature 'colour'"),
        ({"selected_features": ["price", "tags"]}, "'feature_gru_layers.weight_ih_l0' has shape [15, 18]"),
        ({"normalize_field": ["price"]}, "'price' was normalized by RecBole"),
        ({"normalize_all": True}, "'price' was normalized by RecBole"),
        ({"discretization": {"price": {"method": "LD"}}}, "'price' was discretized by RecBole"),
    ],
)
def test_settings_that_do_not_fit(settings, message, recbole, run_import, tmp_path):
    checkpoint = changed(recbole / "checkpoints" / "trained-features.pth", tmp_path / "model.pth", settings)
    status, said = run_import(checkpoint, f"--ids={recbole}/ids")
    assert status == 2 and message in said.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_sizes_that_do_not_fit_the_ids(recbole, run_import, tmp_path):
    items = json.loads((recbole / "ids" / "items.json").read_text())
    shutil.copytree(recbole / "ids", tmp_path / "ids")
    (tmp_path / "ids" / "items.json").write_text(json.dumps([*items, "one more"]))
    status, said = run_import(recbole / "checkpoints" / "trained-items.pth", f"--ids={tmp_path}/ids")
    assert status == 2
    assert f"'item_embedding.weight' has shape [61, 6]; by its configuration and the ids of {tmp_path}/ids" in said
    (tmp_path / "ids" / "items.json").write_text(json.dumps([*items[:-1], items[1]]))
    status, said = run_import(recbole / "checkpoints" / "trained-items.pth", f"--ids={tmp_path}/ids")
    assert status == 2 and f"'{items[1]}' has two ids, 1 and 60" in said
    (tmp_path / "ids" / "items.json").write_text(json.dumps([*items[:-1], "another"]))
    status, said = run_import(recbole / "checkpoints" / "trained-items.pth", f"--ids={tmp_path}/ids")
    assert status == 2 and f"the item '{items[-1]}' of the data set is not there (1 of 60 are not)" in said
    assert not (tmp_path / "run").exists()


def test_a_weight_that_is_not_finite(recbole, run_import, tmp_path):
    broken = {"dense.bias": torch.tensor([0.0, float("nan"), 0, 0, 0, 0])}
    checkpoint = changed(recbole / "checkpoints" / "trained-items.pth", tmp_path / "model.pth", weights=broken)
    status, said = run_import(checkpoint, f"--ids={recbole}/ids")
    assert status == 2 and "model.pth: 'dense.bias' has a value that is not finite" in said


def test_a_standardized_float_is_another_number(recbole, run_import, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(recbole / "data", data)
    manifest = read_manifest(str(data))
    features = [
        each.model_copy(update={"mean": 1.0, "deviation": 2.0}) if each.kind == "float" else each
        for each in manifest.features
    ]
    write_manifest(str(data), manifest.model_copy(update={"features": features}))
    status, said = run_import(recbole / "checkpoints" / "trained-features.pth", data=data)
    assert status == 2 and "its feature 'price' is standardized" in said


def test_settings_of_the_checkpoint_cannot_be_overridden(recbole, run_import):
    status, said = run_import(recbole / "checkpoints" / "trained-features.pth", "model.score=cosine")
    assert status == 2 and "'model.score=cosine': is told by the checkpoint" in said
    status, said = run_import(recbole / "checkpoints" / "trained-features.pth", "table.optimiser=sgd")
    assert status == 2 and "did you mean 'table.optimizer'?" in said


def test_a_folder_that_holds_something_is_left_alone(recbole, run_import, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").touch()
    status, said = run_import(recbole / "checkpoints" / "trained-features.pth")
    assert status == 2 and f"--run: {tmp_path}/run is not empty" in said
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes"]


def test_what_recbole_has_beyond_the_data_set_is_left_out_and_counted(recbole, run_import, tmp_path):
    original = read_checkpoint(str(recbole / "checkpoints" / "trained-features.pth"))
    items, features = original.ids.items, original.ids.features
    # Two items more, and of the tags one that no item has.
    weights = {
        "item_embedding.weight": torch.cat([original.weights["item_embedding.weight"], torch.full((2, 6), 9.0)]),
        "feature_embed_layer.token_seq_embedding_table.item.0.weight": torch.cat(
            [original.weights["feature_embed_layer.token_seq_embedding_table.item.0.weight"], torch.full((1, 6), 9.0)]
        ),
    }
    checkpoint = changed(recbole / "checkpoints" / "trained-features.pth", tmp_path / "model.pth", weights=weights)
    ids = tmp_path / "ids"
    ids.mkdir()
    (ids / "items.json").write_text(json.dumps([*items, "x", "y"]))
    (ids / "features.json").write_text(json.dumps({**features, "tags": [*features["tags"], "t99"]}))
    status, said = run_import(checkpoint, f"--ids={ids}")
    assert status == 0
    assert "2 items of RecBole's have no event in" in said
    assert "'tags': 1 values that no training item has became one, their mean" in said
    scores = scores_of(tmp_path / "run", [["p127", "p138"]], tmp_path)[0]
    assert len(scores) == 60 and "x" not in scores


def test_floats_that_are_missing_are_mentioned(recbole, run_import, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(recbole / "data", data)
    manifest = read_manifest(str(data))
    report = [row | {"items_without": 3} if row.get("feature") == "price" else row for row in manifest.report]
    write_manifest(str(data), manifest.model_copy(update={"report": report}))
    status, said = run_import(recbole / "checkpoints" / "trained-features.pth", data=data)
    assert status == 0 and "'price': 3 items have none, which is 0 here; RecBole took the mean" in said


def test_a_value_that_recbole_does_not_know(recbole, run_import, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(recbole / "data", data)
    vocabulary = data / read_manifest(str(data)).feature("brand").vocabulary
    table = pq.read_table(vocabulary)
    pq.write_table(pa.table({"id": table["id"], "token": ["new", *table["token"].to_pylist()[1:]]}), vocabulary)
    status, said = run_import(recbole / "checkpoints" / "trained-features.pth", data=data)
    assert status == 2 and "(the data set in it): the value of 'brand' 'new' of the data set is not there" in said

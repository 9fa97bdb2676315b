"""Models that were trained here, as RecBole reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from gru4recf_dist import export
from gru4recf_dist.data.shard_format import read_manifest, write_manifest
from gru4recf_dist.parallel import ranks as process_ranks
from gru4recf_dist.recbole.atomic_files import ids_of_files
from gru4recf_dist.trainer import Trainer
from tests.recbole.exported_model import ExportedModel
from tests.recbole.test_import import scores_of
from tests.support.synthetic import random_sessions, write_dataset
from tests.support.training import small_config

SESSIONS = [["p127", "p138"], ["p114"], ["p109", "p124", "p134", "p141", "p159", "p136", "p120", "p102"]]


def train_run(data: Path, run: Path, *overrides: str) -> Path:
    settings = ["max_steps=12", "evaluation.every_epochs=1", "checkpoint.async=false", *overrides]
    Trainer(small_config(data, run, *settings), process_ranks.start("cpu")).train()
    return run


@pytest.fixture(scope="module")
def described(tmp_path_factory) -> str:
    """A data set with event features, a float with missing values and a token."""
    data = str(tmp_path_factory.mktemp("described"))
    manifest = write_dataset(data, random_sessions(0, 40, 20), [], random_sessions(1, 9, 20), 20, event_features=True)
    features = {feature.name: feature for feature in manifest.features}
    values = [f"b{number}" for number in range(2, features["category"].size)]
    pq.write_table(pa.table({"id": range(2, 2 + len(values)), "token": values}), f"{data}/brand.parquet")
    brand = features["category"].model_copy(update={"name": "brand", "vocabulary": "brand.parquet"})
    price = features["price"].model_copy(update={"missing": True})
    write_manifest(data, manifest.model_copy(update={"features": [brand, price]}))
    return data


def export_run(run: Path, folder: Path, *arguments: str) -> Path:
    assert export.main([f"--run={run}", "--format=recbole", f"--output={folder}", *arguments]) == 0
    return folder


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.temperature=0.5"],
        ["model.learn_temperature=true", "model.temperature=0.3", "model.pooling=sum", "model.num_layers=2"],
        ["model.features=[price,brand]", "model.pooling=max"],
        ["model.features=[tags]", "model.pooling=max"],
        ["model.fusion=item_only", "model.temperature=2"],
    ],
)
def test_scores_stay_what_they_were(overrides, recbole, tmp_path):
    run = train_run(recbole / "data", tmp_path / "run", *overrides)
    folder = export_run(run, tmp_path / "out")
    model = ExportedModel(folder)
    items, vocabularies = model.ids()
    assert items == json.loads((folder / "items.json").read_text()) and len(items) == 61
    assert vocabularies == json.loads((folder / "features.json").read_text())
    # The same by the code that finds the ids of RecBole's own files.
    name = model.settings["dataset"]
    ids = ids_of_files(str(folder / name), list(model.columns), model.settings)
    assert (ids.items, ids.features) == (items, vocabularies)
    for session, scores in zip(SESSIONS, scores_of(run, SESSIONS, tmp_path), strict=True):
        # RecBole keeps the last MAX_ITEM_LIST_LENGTH events of a session, as loader.max_length does.
        assert model.scores(session) == pytest.approx(scores, rel=0, abs=1e-5)
        assert max(scores.values()) - min(scores.values()) > 0.01


def test_with_the_ids_of_a_recbole_data_set_rows_stand_in_its_order(recbole, tmp_path):
    run = train_run(recbole / "data", tmp_path / "run")
    own, given = export_run(run, tmp_path / "own"), export_run(run, tmp_path / "given", f"--ids={recbole}/ids")
    assert sorted(path.name for path in given.iterdir()) == [
        "features.json", "items.json", "model.pth", "recbole.yaml"
    ]  # fmt: skip
    for name in ("items.json", "features.json"):
        assert json.loads((given / name).read_text()) == json.loads((recbole / "ids" / name).read_text())
    tables, features = [], []
    for folder in (own, given):
        weights = torch.load(folder / "model.pth", weights_only=True)["state_dict"]
        items = json.loads((folder / "items.json").read_text())
        tables.append(dict(zip(items, weights["item_embedding.weight"].tolist(), strict=True)))
        brands = json.loads((folder / "features.json").read_text())["brand"]
        rows = weights["feature_embed_layer.token_embedding_table.item.embedding.weight"].tolist()
        features.append(dict(zip(brands, rows, strict=True)))
    assert list(tables[0]) != list(tables[1]) and tables[0] == tables[1]
    assert list(features[0]) != list(features[1]) and features[0] == features[1]


def test_tokens_that_recboles_files_cannot_hold_are_encoded(recbole, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(recbole / "data", data)
    manifest = read_manifest(str(data))
    changes = {
        manifest.tokens: {"p127": "NA", "p114": 'a "b"\t\nc', "p109": "größer"},
        manifest.feature("brand").vocabulary: {"b1": "null", "b2": "two words"},
        manifest.feature("tags").vocabulary: {"t1": "two words", "t2": "[PAD]"},
    }
    for name, renamed in changes.items():
        table = pq.read_table(data / name)
        tokens = [renamed.get(token, token) for token in table["token"].to_pylist()]
        pq.write_table(pa.table({"id": table["id"], "token": tokens}), data / name)
    run = train_run(data, tmp_path / "run")
    folder = export_run(run, tmp_path / "out")
    assert "5 tokens that RecBole's files cannot hold are percent-encoded" in capsys.readouterr().err
    model = ExportedModel(folder)
    encoded = {"NA": "%4E%41", 'a "b"\t\nc': "".join(f"%{byte:02X}" for byte in b'a "b"\t\nc')}
    assert set(encoded.values()) | {"größer"} <= set(model.items)
    assert {"%6E%75%6C%6C", "two words"} <= set(model.vocabularies["brand"])
    assert {"%74%77%6F%20%77%6F%72%64%73", "%5B%50%41%44%5D"} <= set(model.vocabularies["tags"])
    assert model.ids()[0] == json.loads((folder / "items.json").read_text())
    session = ["NA", "größer", 'a "b"\t\nc']
    expected = scores_of(run, [session], tmp_path)[0]
    found = model.scores([encoded.get(token, token) for token in session])
    assert found == pytest.approx({encoded.get(token, token): s for token, s in expected.items()}, rel=0, abs=1e-5)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.score=cosine"], "model.score: RecBole has nothing like 'cosine', so the scores would be others"),
        (["model.fusion=parallel"], "model.fusion: RecBole has no 'parallel' (it has concat_output and item_only)"),
        (
            ["model.feature_sizes={brand: 3}"],
            "model.feature_sizes: RecBole embeds every feature in embedding_size (8), so {'brand': 3} has no "
            "counterpart: train without it",
        ),
        (
            ["model.features=[brand,price]"],
            "model.features: 'price' has missing values, for which RecBole has no vector: prepare the data with "
            "flag_missing: false, or train without it",
        ),
        (
            ["model.features=[brand]"],
            "model.event_features: RecBole has none ('type', 'price', 'gap' here): train with model.event_features=[]",
        ),
        (
            ["model.features=[brand]", "model.event_features=[gap]"],
            "model.event_features: RecBole has none ('gap' here): train with model.event_features=[]",
        ),
    ],
)
def test_what_recbole_cannot_express_is_one_line_that_names_the_key(described, overrides, says, tmp_path, capsys):
    run = train_run(described, tmp_path / "run", "max_steps=1", *overrides)
    capsys.readouterr()
    assert export.main([f"--run={run}", "--format=recbole", f"--output={tmp_path}/out"]) == 2
    assert capsys.readouterr().err == f"error: {says}\n"
    assert not (tmp_path / "out").exists()


def test_without_what_recbole_lacks_the_same_data_set_is_exported(described, tmp_path):
    # The size is the one that the feature has anyway; RecBole's dropout is that of item rows.
    settings = [
        "model.features=[brand]",
        "model.event_features=[]",
        "model.feature_sizes={brand: 8}",
        "model.dropout=0.3",
    ]
    run = train_run(described, tmp_path / "run", "max_steps=1", *settings, "model.dropout_embedding=0.1")
    folder = export_run(run, tmp_path / "out")
    assert yaml.safe_load((folder / "recbole.yaml").read_text())["dropout_prob"] == 0.1


def test_a_weight_that_recbole_lacks_is_named(recbole, tmp_path, capsys, monkeypatch):
    run = train_run(recbole / "data", tmp_path / "run")
    load = export.trained_run.load_model

    def with_another_weight(*arguments):
        model, manifest = load(*arguments)
        model.encoder.gate = torch.nn.Parameter(torch.zeros(2))
        return model, manifest

    monkeypatch.setattr(export.trained_run, "load_model", with_another_weight)
    assert export.main([f"--run={run}", "--format=recbole", f"--output={tmp_path}/out"]) == 2
    assert "the weight 'gate' has no counterpart in RecBole's GRU4RecF" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_vector_has_no_counterpart(recbole, tmp_path, capsys):
    write_dataset(str(tmp_path / "data"), random_sessions(0, 40, 20), [], random_sessions(1, 9, 20), items=20)
    run = train_run(tmp_path / "data", tmp_path / "run")
    arguments = ["--format=recbole", f"--output={tmp_path}/out", f"--run={run}"]
    assert export.main(arguments) == 2
    assert "model.features: RecBole has nothing like 'image', a vector" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_settings_of_training_only_are_mentioned(recbole, tmp_path, capsys):
    run = train_run(recbole / "data", tmp_path / "run", "model.dropout=0.1", "model.dropout_hidden=0.2")
    export_run(run, tmp_path / "out")
    assert (
        "model.dropout_hidden: RecBole has none; it matters only if training goes on there" in capsys.readouterr().err
    )


def test_wrong_arguments_are_one_clear_line(recbole, tmp_path, capsys):
    assert export.main(["--format=recbole", f"--output={tmp_path}/out", f"--run={tmp_path}"]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    run = train_run(recbole / "data", tmp_path / "run", "model.fusion=item_only")
    capsys.readouterr()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert export.main(["--format=recbole", f"--output={tmp_path}/full", f"--run={run}"]) == 2
    assert f"--output: {tmp_path}/full is not empty" in capsys.readouterr().err
    (tmp_path / "ids").mkdir()
    (tmp_path / "ids" / "items.json").write_text(json.dumps(["[PAD]", "p127"]))
    given = ["--format=recbole", f"--output={tmp_path}/out", f"--run={run}", f"--ids={tmp_path}/ids"]
    assert export.main(given) == 2
    assert f"{tmp_path}/ids: the item 'p" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

"""Item features from raw files to the encoder: every kind and source, prepared, read by two ranks and trained with."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gru4recf_dist.config import Config
from gru4recf_dist.data.shard_format import read_manifest
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.recommender import build
from gru4recf_dist.table.partition import route
from tests.support.ranks import run_ranks
from tests.support.training import small_config, train
from tests.unit.data_prep.prepared import Prepared, run, write_csv

pytestmark = pytest.mark.dist
ITEMS = [f"i{n}" for n in range(20)]
NAMES = ["brand", "tags", "price", "whole", "listed", "array", "text"]


@pytest.fixture(scope="module")
def raw() -> dict[str, dict]:
    """Values of every item, None where it has none."""
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((3, len(ITEMS), 2)).astype(np.float32)
    return {
        item: {
            "brand": None if n == 3 else f"b{n % 6 if n > 2 else 'seldom'}",
            "tags": [f"t{k}" for k in range(n % 4)],
            "price": None if n % 5 == 0 else float(n),
            "whole": float(n),
            "listed": None if n == 4 else vectors[0, n],
            "array": None if n == 5 else vectors[1, n],
            "text": None if n == 6 else vectors[2, n],
        }
        for n, item in enumerate(ITEMS)
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory, raw) -> str:
    folder = tmp_path_factory.mktemp("shop")
    generator = np.random.default_rng(1)
    write_csv(folder / "events.csv", [(f"s{n // 6}", ITEMS[generator.integers(20)], n) for n in range(600)])
    table = {
        "item_id": ITEMS,
        **{name: [values[name] for values in raw.values()] for name in ("brand", "tags", "price", "whole")},
        "listed": [None if v["listed"] is None else v["listed"].tolist() for v in raw.values()],
    }
    pq.write_table(pa.table(table), folder / "items.parquet")
    texts = {item: values["text"] for item, values in raw.items() if values["text"] is not None}
    write_csv(
        folder / "texts.csv", [(i, "|".join(map(repr, v.tolist()))) for i, v in texts.items()], "item_id,embedding"
    )
    arrays = {item: values["array"] for item, values in raw.items() if values["array"] is not None}
    np.save(folder / "array.npy", np.stack(list(arrays.values())))
    (folder / "rows.txt").write_text("\n".join(arrays))
    features = [
        {"name": "brand", "kind": "token", "min_count": 3},
        {"name": "tags", "kind": "token_seq"},
        {"name": "price", "kind": "float", "standardize": True},
        {"name": "whole", "kind": "float"},
        {"name": "listed", "kind": "vector"},
        {"name": "array", "npy": "array.npy", "npy_items": "rows.txt"},
        {"name": "text", "kind": "vector", "column": "embedding", "separator": "|", "table": "texts"},
    ]
    run(
        {"source": str(folder), "output": str(folder / "data"), "features": features, "streams": 8},
        input={"format": "csv", "files": ["events.csv"]},
        items={"file": "items.parquet", "format": "parquet"},
        item_tables={"texts": {"file": "texts.csv"}},
    )
    return str(folder / "data")


def config_of(data: str, run_dir: str) -> Config:
    own = ("model.feature_sizes={price: 3, brand: 2, listed: 5}", "model.feature_pooling={tags: max}")
    return small_config(data, run_dir, *own, "max_steps=6", "batch_size=16")


def looked_up(ranks: Ranks, config: Config) -> dict[str, torch.Tensor]:
    """Every item's features, as the encoder gets them."""
    manifest = read_manifest(config.data)
    model = build(config, manifest, ranks)
    routing = route(model.table.partition, torch.arange(manifest.items + 1))
    features = model.features.lookup(model.table.exchange(routing))
    width = sum({"price": 3, "brand": 2, "listed": 5}.get(name, 8) for name in NAMES)
    assert model.encoder.feature_embed_layer(features).shape == (manifest.items + 1, width)
    return features


def test_every_value_reaches_the_encoder(tmp_path, data, raw):
    prepared = Prepared(data)
    features = {feature["name"]: feature for feature in prepared.manifest["features"]}
    words = {}
    for name in ("brand", "tags"):
        table = pq.read_table(f"{data}/{features[name]['vocabulary']}").to_pydict()
        words[name] = {0: None, 1: "unknown", **dict(zip(table["id"], table["token"], strict=True))}
    prices = [v["price"] for v in raw.values() if v["price"] is not None]
    brands = Counter(values["brand"] for values in raw.values())
    assert set(brands.values()) >= {2, 3} and (prepared.popularity[1:] > 0).all()
    assert features["price"]["missing"] and not features["whole"]["missing"]
    for found in run_ranks(2, looked_up, tmp_path, config_of(data, "none")):
        for item, values in raw.items():
            row = prepared.ids[item]
            frequent = values["brand"] is None or brands[values["brand"]] >= 3
            assert words["brand"][int(found["brand"][row])] == (values["brand"] if frequent else "unknown")
            assert [words["tags"][int(tag)] for tag in found["tags"][row] if tag] == values["tags"]
            if values["price"] is None:
                assert found["price"][row].isnan()
            else:
                expected = (values["price"] - np.mean(prices)) / np.std(prices)
                assert float(found["price"][row]) == pytest.approx(expected, rel=1e-5)
            assert float(found["whole"][row]) == values["whole"]
            for name in ("listed", "array", "text"):
                vector = np.zeros(2) if values[name] is None else values[name]
                np.testing.assert_allclose(found[name][row].numpy(), vector, rtol=1e-6)


def test_they_are_trained_with(tmp_path, data):
    config = config_of(data, str(tmp_path / "run"))
    before = run_ranks(1, parameters, tmp_path, config_of(data, str(tmp_path / "fresh")))[0]
    after = run_ranks(2, train, tmp_path, config)[0]
    moved = {
        name: before[name]
        for name in before
        if name.startswith("feature_embed_layer") and not torch.equal(after[f"encoder.{name}"], before[name])
    }
    assert len(moved) == len([name for name in before if name.startswith("feature_embed_layer")]) == 8
    # Values that few items have share a row that training sees.
    unknown = "feature_embed_layer.sized_token_tables.0.weight"
    assert (after[f"encoder.{unknown}"][1] != before[unknown][1]).all()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/lr" in line]
    assert len(losses) == 6 and np.isfinite(losses).all()


def parameters(ranks: Ranks, config: Config) -> dict[str, torch.Tensor]:
    encoder = build(config, read_manifest(config.data), ranks).encoder
    return {name: parameter.detach().clone() for name, parameter in encoder.named_parameters()}

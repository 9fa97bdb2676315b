"""The sharded feature store against the arrays in the data set's files."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gru4recf_dist.config import TableConfig
from gru4recf_dist.data.shard_format import Manifest, read_manifest
from gru4recf_dist.errors import UserError
from gru4recf_dist.table.feature_store import FeatureStore
from gru4recf_dist.table.item_table import ShardedItemTable
from gru4recf_dist.table.partition import route
from tests.support.ranks import run_ranks
from tests.support.synthetic import random_sessions, write_dataset

pytestmark = pytest.mark.dist
NAMES = ["image", "category", "tags", "price"]
FILES = "items/features"


def _write(tmp_path, items: int) -> Manifest:
    return write_dataset(str(tmp_path / "data"), random_sessions(0, 10, items), items=items)


def _asked(rank: int, rows: int, pattern: str) -> list[int]:
    """Ids that a rank asks for. Some patterns ask some owners, or every one, for nothing."""
    if pattern == "everything":
        return list(range(rows))
    if pattern == "repeated":
        return np.random.default_rng((rank, rows)).integers(0, rows, 7).tolist()
    if pattern == "first row only":
        return [0]
    return [rows - 1, 0] if rank == 0 else []


PATTERNS = ["everything", "repeated", "first row only", "one rank only"]


def _lookup(ranks, data: str, names: list[str]) -> list[dict[str, torch.Tensor]]:
    """Per pattern, the features of this rank's ids as they were asked for."""
    manifest = read_manifest(data)
    rows = manifest.items + 1
    table = ShardedItemTable(rows, 2, ranks, TableConfig(), seed=0)
    store = FeatureStore(data, manifest, names, ranks)
    found = []
    for pattern in PATTERNS:
        routing = route(table.partition, torch.tensor(_asked(ranks.rank, rows, pattern), dtype=torch.int64))
        features = store.lookup(table.exchange(routing))
        found.append({name: values[routing.inverse[0]] for name, values in features.items()})
    return found


def _of_files(folder, ids: list[int]) -> dict[str, np.ndarray]:
    """The features of ``ids``, read from the files of the whole catalog by numpy."""
    arrays = {name: np.load(folder / FILES / f"{name}.npy") for name in (*NAMES, "tags.indptr")}
    bounds = arrays["tags.indptr"]
    tags = np.zeros((len(ids), int(np.diff(bounds).max())), np.int64)
    for place, item in enumerate(ids):
        values = arrays["tags"][bounds[item] : bounds[item + 1]]
        tags[place, : len(values)] = values
    return {"tags": tags, **{name: arrays[name][ids] for name in ("category", "price", "image")}}


@pytest.mark.parametrize(("world", "items"), [(1, 9), (2, 9), (4, 9), (4, 1), (4, 4)])
def test_every_kind_equals_the_files(tmp_path, world, items):
    """At 4 ranks 2, 5 and 10 rows leave ranks without any row, one short or all with some."""
    _write(tmp_path, items)
    results = run_ranks(world, _lookup, tmp_path, str(tmp_path / "data"), NAMES)
    for rank, found in enumerate(results):
        for pattern, features in zip(PATTERNS, found, strict=True):
            assert list(features) == NAMES
            expected = _of_files(tmp_path / "data", _asked(rank, items + 1, pattern))
            for name, values in features.items():
                assert values.dtype == (torch.int64 if name in ("category", "tags") else torch.float32)
                # Bit for bit, and in the shape that the encoder takes.
                np.testing.assert_array_equal(
                    values.numpy(), expected[name], err_msg=f"{pattern}, {name}", strict=False
                )
                assert values.numpy().shape == expected[name].shape


def test_no_features_need_no_exchange(tmp_path):
    _write(tmp_path, 9)
    (found,) = run_ranks(1, _lookup, tmp_path, str(tmp_path / "data"), [])
    assert found == [{}] * len(PATTERNS)


# -- files that do not fit the manifest -------------------------------------------------------------------------------

ITEMS = 9


def _rank(rank: int, world: int, device: str = "cpu"):
    return SimpleNamespace(rank=rank, world=world, device=torch.device(device))


def _save(path, array) -> None:
    np.save(path, array, allow_pickle=True)


def _change(name: str, change):
    """A damage: replace a file's array."""

    def damage(folder):
        path = folder / f"{name}.npy"
        _save(path, change(np.load(path)))
        return path.name

    return damage


def _missing(folder):
    (folder / "price.npy").unlink()
    return "price.npy"


def _truncated(folder):
    path = folder / "image.npy"
    path.write_bytes(path.read_bytes()[:-4])
    return path.name


def _no_npy(folder):
    (folder / "category.npy").write_bytes(b"not an array at all, only some text")
    return "category.npy"


def _with(array: np.ndarray, place: int, value) -> np.ndarray:
    array[place] = value
    return array


DAMAGES = {
    "missing file": _missing,
    "truncated": _truncated,
    "no npy file": _no_npy,
    "pickled objects": _change("category", lambda a: a.astype(object)),
    "wrong type": _change("price", lambda a: a.astype(np.float64)),
    "token of another type": _change("category", lambda a: a.astype(np.int64)),
    "too few rows": _change("price", lambda a: a[:-1]),
    "too many rows": _change("price", lambda a: np.append(a, a)),
    "float with two columns": _change("price", lambda a: np.stack([a, a], axis=1)),
    "vector of another size": _change("image", lambda a: np.concatenate([a, a], axis=1)),
    "vector without columns": _change("image", lambda a: a[:, 0].copy()),
    "column by column": _change("image", np.asfortranarray),
    "token beyond its table": _change("category", lambda a: _with(a, -1, 6)),
    "negative token": _change("category", lambda a: _with(a, -1, -1)),
    "token_seq value beyond its table": _change("tags", lambda a: _with(a, -1, 9)),
    "negative token_seq value": _change("tags", lambda a: _with(a, -1, -1)),
    "bounds that descend": _change("tags.indptr", lambda a: _with(a, -2, a[-1] + 2)),
    "bounds too far apart": _change("tags.indptr", lambda a: _with(a, -2, a[-2] - 4)),
    "bounds beyond the values": _change("tags.indptr", lambda a: _with(a, slice(-2, None), a[-1] + 3)),
    "bounds that start below zero": _change("tags.indptr", lambda a: a - 2),
    "infinite number": _change("price", lambda a: _with(a, -1, np.inf)),
    "missing number where none is missing": _change("price", lambda a: _with(a, -1, np.nan)),
    "vector with a missing number": _change("image", lambda a: _with(a, -1, np.nan)),
    "too few bounds": _change("tags.indptr", lambda a: a[:-1]),
    "too few values": _change("tags", lambda a: a[:-1]),
}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_file_that_does_not_fit_the_manifest_is_named(tmp_path, damage, world):
    manifest = _write(tmp_path, ITEMS)
    name = damage(tmp_path / "data" / FILES)
    with pytest.raises(UserError) as failure:
        for rank in range(world):
            FeatureStore(str(tmp_path / "data"), manifest, NAMES, _rank(rank, world))
    # Bounds and values are one feature: either file may be blamed.
    assert name in str(failure.value) or name.replace(".indptr", "") in str(failure.value)
    assert "\n" not in str(failure.value)


def test_an_unknown_feature_is_refused_with_the_known_ones(tmp_path):
    manifest = _write(tmp_path, ITEMS)
    with pytest.raises(UserError, match=r"no feature 'colour'.*category, tags, price, image"):
        FeatureStore(str(tmp_path / "data"), manifest, ["colour"], _rank(0, 1))


@pytest.mark.parametrize("rank", range(4))
def test_all_of_a_rank_lies_on_its_device_also_where_it_has_no_rows(tmp_path, rank):
    manifest = _write(tmp_path, 2)
    store = FeatureStore(str(tmp_path / "data"), manifest, NAMES, _rank(rank, 4, "meta"))
    for column in store._columns:
        for tensor in (column.values, column.indptr):
            assert tensor is None or tensor.device.type == "meta", column.feature.name

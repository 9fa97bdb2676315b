"""Arrays that the ranks of a node share: one rank fills them, all see them, nothing stays behind."""

from __future__ import annotations

import os
import tempfile

import numpy as np
import pytest

from gru4recf_dist.errors import UserError
from gru4recf_dist.parallel.node_arrays import NodeArrays
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist


def _share(ranks, folder: str) -> tuple[list[list], list[int], bool, str, list[str]]:
    tempfile.tempdir = folder
    allocate, called = NodeArrays(ranks), []

    def fill(numbers: np.ndarray, halves: np.ndarray) -> None:
        called.append(ranks.rank)
        numbers[:], halves[:] = range(5), [0.5, 1.5]

    def refuse(numbers: np.ndarray) -> None:
        raise UserError("popularity.npy: damaged")

    arrays = allocate([(5, np.int32), (2, np.float64)], fill)
    with pytest.raises(UserError) as error:
        allocate([(3, np.int64)], refuse)
    writeable = any(array.flags.writeable for array in arrays)
    return [array.tolist() for array in arrays], called, writeable, str(error.value), os.listdir(folder)


@pytest.mark.parametrize("world", [1, 3])
def test_one_rank_fills_what_all_map_and_its_error_is_everyones(tmp_path, world):
    folder = tmp_path / "temporary"
    folder.mkdir()
    results = run_ranks(world, _share, tmp_path, str(folder))
    assert [called for _, called, *_ in results] == [[0], *[[]] * (world - 1)]
    for arrays, _, writeable, error, _ in results:
        assert arrays == [[0, 1, 2, 3, 4], [0.5, 1.5]]
        assert not writeable
        assert error == "popularity.npy: damaged"
    assert os.listdir(folder) == []

"""What RecBole 1.2.1 left (`make_fixtures.py`), and the same events as this project prepares them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from data_prep.prepare import prepare
from data_prep.recipe import Recipe
from gru4recf_dist import typed_yaml
from gru4recf_dist.parallel import ranks as process_ranks

ARCHIVE = Path(__file__).with_name("fixtures.tar.xz")


@pytest.fixture(scope="session")
def recbole(tmp_path_factory) -> Path:
    """The unpacked archive, and in its folder `data` the prepared data set."""
    folder = tmp_path_factory.mktemp("recbole")
    shutil.unpack_archive(ARCHIVE, folder)
    recipe = {
        "name": "shop",
        "source": str(folder / "shop"),
        "output": str(folder / "data"),
        "input": {"format": "recbole", "session": "user_id"},
        "split": {"method": "leave_one_out"},
        "features": [{"name": "tags"}, {"name": "price"}, {"name": "brand"}],
    }
    prepare(typed_yaml.validated(Recipe, recipe, []))
    return folder


@pytest.fixture(autouse=True)
def no_group_stays():
    """A program that ends with an error inside of its process group leaves it."""
    yield
    process_ranks.stop()

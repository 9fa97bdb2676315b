"""A preparation that ends while it writes to S3 leaves no manifest, and can be run again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.s3 import BUCKET
from tests.support.s3_runs import program, write_raw_events, write_recipe

pytestmark = pytest.mark.s3

# Writes a few shards, then ends as the first argument says; the rest are the program's own.
ENDS_EARLY = """
import os, signal, sys
import data_prep.writer as writer
from data_prep.__main__ import main

write_shard, written = writer.write_shard, []

def write_few(*arguments):
    if len(written) == 5:
        if sys.argv[1] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(28, "no space left", "somewhere")
    written.append(arguments)
    return write_shard(*arguments)

writer.write_shard = write_few
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    write_raw_events(folder)
    return folder


@pytest.fixture(scope="module")
def prepared(s3, raw, tmp_path_factory) -> str:
    """Where on S3 a whole preparation of ``raw`` lies."""
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    write_recipe(recipe, str(raw), f"s3://{BUCKET}/before")
    done = program("-m", "data_prep", "--config", recipe, environment=s3.environment)
    assert (done.returncode, done.stderr) == (0, "")
    return f"{BUCKET}/before"


@pytest.mark.parametrize("end", ["killed", "failed"])
def test_no_manifest_is_left_and_another_run_works(s3, raw, prepared, tmp_path, end):
    data = f"{BUCKET}/broken/{end}/data"
    write_recipe(tmp_path / "recipe.yaml", str(raw), f"s3://{data}")
    command = ("--config", tmp_path / "recipe.yaml")
    files = s3.files()

    def found(folder: str) -> dict[str, bytes]:
        # The server goes on to show the folder itself.
        return {name.removeprefix(folder): files.cat_file(name) for name in files.find(folder) if name != folder}

    # Over an earlier preparation: its manifest must not stand beside other shards.
    whole = found(prepared)
    files.pipe({f"{data}{name}": content for name, content in whole.items()})
    broken = program("-c", ENDS_EARLY, end, *command, "seed=1", environment=s3.environment)
    left = found(data)
    assert "/manifest.json" not in left
    if end == "killed":
        assert broken.returncode == -9 and left
    else:
        assert (broken.returncode, broken.stderr) == (2, "error: somewhere: no space left\n")
        assert not left
    again = program("-m", "data_prep", *command, environment=s3.environment)
    assert (again.returncode, again.stderr) == (0, "")
    after = found(data)
    assert after.keys() == whole.keys()
    # The manifest has the recipe in it, and with that the place.
    assert {name for name in after if after[name] != whole[name]} == {"/manifest.json"}

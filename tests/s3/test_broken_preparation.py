"""A preparation that ends while it writes to S3 leaves no manifest, and can be run again."""

from __future__ import annotations

import json

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


@pytest.mark.parametrize("end", ["killed", "failed"])
def test_no_manifest_is_left_and_another_run_works(s3, tmp_path, end):
    write_raw_events(tmp_path / "raw")
    base = f"{BUCKET}/broken/{end}"
    write_recipe(tmp_path / "recipe.yaml", str(tmp_path / "raw"), f"s3://{base}/data")
    command = ("--config", tmp_path / "recipe.yaml")
    files = s3.files()

    def prepare() -> dict[str, bytes]:
        done = program("-m", "data_prep", *command, environment=s3.environment)
        assert (done.returncode, done.stderr) == (0, "")
        return {name: files.cat_file(name) for name in files.find(f"{base}/data")}

    whole = prepare()
    # The second time over what the first has written: its manifest must not stand beside other shards.
    broken = program("-c", ENDS_EARLY, end, *command, "seed=1", environment=s3.environment)
    # The server goes on to show the folder itself.
    left = set(files.find(f"{base}/data")) - {f"{base}/data"}
    assert f"{base}/data/manifest.json" not in left
    if end == "killed":
        assert broken.returncode == -9 and left
    else:
        assert (broken.returncode, broken.stderr) == (2, "error: somewhere: no space left\n")
        assert not left
    again = prepare()
    assert json.loads(again[f"{base}/data/manifest.json"]) == json.loads(whole[f"{base}/data/manifest.json"])
    assert again == whole

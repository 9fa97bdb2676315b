"""An append that ends while it writes to S3 leaves the data set as it was, and can be run again."""

from __future__ import annotations

import pytest

from tests.s3.test_broken_preparation import ENDS_EARLY
from tests.support.s3 import BUCKET
from tests.support.s3_runs import program, write_raw_events, write_recipe

pytestmark = pytest.mark.s3


@pytest.mark.parametrize("end", ["killed", "failed"])
def test_the_data_set_stays_and_another_append_gives_what_a_local_one_gives(s3, tmp_path, end):
    raw, folder = tmp_path / "raw", f"{BUCKET}/append/{end}/data"
    write_raw_events(raw)
    # The second day: other users, and other products for a third of them.
    (raw / "events-2.csv").write_text((raw / "events.csv").read_text().replace("\nu", "\nv").replace(",p1", ",new1"))
    for name, output in (("remote", f"s3://{folder}"), ("local", f"{tmp_path}/data")):
        write_recipe(tmp_path / f"{name}.yaml", str(raw), output)
    files = s3.files()

    def run(*start: str, where: str = "remote"):
        command = ("--config", tmp_path / f"{where}.yaml", "split={method: temporal}", "streams=8")
        if "--append" in start:
            command = (*command, "input.files=[events-2.csv]")
        return program(*start, *command, environment=s3.environment)

    def found() -> dict[str, bytes]:
        return {name.removeprefix(f"{folder}/"): files.cat_file(name) for name in files.find(folder) if name != folder}

    for where in ("remote", "local"):
        assert run("-m", "data_prep", where=where).returncode == 0
    before = found()
    broken = run("-c", ENDS_EARLY, end, "--append")
    if end == "killed":
        left = found()
        assert broken.returncode == -9 and left.keys() > before.keys()
        assert {name: left[name] for name in before} == before
    else:
        assert (broken.returncode, broken.stderr) == (2, "error: somewhere: no space left\n")
        assert found() == before
    for where in ("remote", "local"):
        assert run("-m", "data_prep", "--append", where=where).stderr == ""
    after = found()
    local = {str(path.relative_to(tmp_path / "data")): path for path in (tmp_path / "data").rglob("*")}
    local = {name: path.read_bytes() for name, path in local.items() if path.is_file()}
    assert after.keys() == local.keys()
    assert after.keys() - before.keys() > {"items/tokens-1.parquet", "items/features/shelf.values-1.npy"}
    assert {name for name in after if after[name] != local[name]} == {
        name for name in after if name.startswith("manifest")
    }

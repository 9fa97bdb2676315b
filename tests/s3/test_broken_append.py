"""An append that ends while it writes to S3 leaves the data set as it was, and can be run again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_prep.output_lock import LOCK
from gru4recf_dist.data import filesystems, storage
from gru4recf_dist.data.storage_config import StorageConfig
from tests.s3.test_broken_preparation import ENDS_EARLY
from tests.support.s3 import BUCKET
from tests.support.s3_runs import program, write_raw_events, write_recipe

pytestmark = pytest.mark.s3


OPTIONS = ("split={method: temporal}", "streams=8")
SECOND_DAY = "input.files=[events-2.csv]"


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> tuple[Path, dict[str, bytes], dict[str, bytes]]:
    """The folder of the raw events; what a data set of the first day has, and what it has with the second."""
    folder = tmp_path_factory.mktemp("local")
    write_raw_events(folder / "raw")
    # The second day: other users, and other products for a third of them.
    first = (folder / "raw/events.csv").read_text()
    (folder / "raw/events-2.csv").write_text(first.replace("\nu", "\nv").replace(",p1", ",new1"))
    write_recipe(folder / "recipe.yaml", str(folder / "raw"), f"{folder}/data")
    found = []
    for start in ((), ("--append", SECOND_DAY)):
        command = ("-m", "data_prep", "--config", folder / "recipe.yaml", *OPTIONS)
        done = program(*command, *start, environment={})
        assert (done.returncode, done.stderr) == (0, "")
        found.append(_contents(folder / "data"))
    return folder / "raw", *found


def test_of_several_who_create_a_file_at_once_one_succeeds(s3):
    options = {"key": s3.key, "secret": s3.secret, "endpoint_url": s3.endpoint}
    region = {"client_kwargs": {"region_name": "us-east-1"}}
    filesystems.configure(StorageConfig(options={"s3": {**options, **region}}))
    for number in range(4):
        url = f"s3://{BUCKET}/append/locks/{number}"
        with ThreadPoolExecutor(4) as pool:
            created = list(pool.map(lambda name, url=url: storage.create(url, name), [b"a", b"b", b"c", b"d"]))
        assert sum(created) == 1
        assert storage.read_bytes(url) == b"abcd"[created.index(True) :][:1]


@pytest.mark.parametrize("end", ["killed", "failed"])
def test_the_data_set_stays_and_another_append_gives_what_a_local_one_gives(s3, local, tmp_path, end):
    raw, before, appended = local
    folder = f"{BUCKET}/append/{end}/data"
    files = s3.files()
    files.pipe({f"{folder}/{name}": content for name, content in before.items()})
    write_recipe(tmp_path / "recipe.yaml", str(raw), f"s3://{folder}")

    def append(*start: str):
        command = ("--append", "--config", tmp_path / "recipe.yaml", *OPTIONS, SECOND_DAY)
        return program(*start, *command, environment=s3.environment)

    def found() -> dict[str, bytes]:
        return {name.removeprefix(f"{folder}/"): files.cat_file(name) for name in files.find(folder) if name != folder}

    broken = append("-c", ENDS_EARLY, end)
    left = found()
    if end == "killed":
        assert broken.returncode == -9 and left.keys() > before.keys()
        assert {name: left[name] for name in before} == before
        # The next one sees that its owner is gone.
        assert LOCK in left
    else:
        assert (broken.returncode, broken.stderr) == (2, "error: somewhere: no space left\n")
        assert left == before
    assert append("-m", "data_prep").stderr == ""
    after = found()
    assert after.keys() == appended.keys()
    assert after.keys() - before.keys() > {"items/tokens-1.parquet", "items/features/shelf.values-1.npy"}
    # The manifest has the recipe in it, and with that the place.
    assert {name for name in after if after[name] != appended[name]} == {"manifest.json"}

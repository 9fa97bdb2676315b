"""The section `storage`: credentials on the command line, time-outs, and the local cache."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests.s3.epoch import read_epoch
from tests.support.s3 import BUCKET, S3, running_fault_proxy
from tests.support.s3_runs import SHORT, program, together, write_raw_events, write_recipe
from tests.support.synthetic import random_sessions, write_dataset

pytestmark = pytest.mark.s3
SESSIONS = 400
# Empty values count as none: whatever the environment of these tests has.
NOTHING = {name: "" for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")} | {
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
PATIENT = ("storage.attempts=8", "storage.backoff_seconds=0.05")


def _options(s3: S3) -> list[str]:
    given = {"key": s3.key, "secret": s3.secret, "endpoint_url": s3.endpoint}
    return [f"storage.options.s3.{name}={value}" for name, value in given.items()]


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> str:
    """A data set in a local folder."""
    folder = tmp_path_factory.mktemp("data")
    write_dataset(str(folder), random_sessions(0, SESSIONS, items=30), shard_sessions=4, block_sessions=2)
    return str(folder)


def _copied(local: str, s3: S3, name: str) -> str:
    s3.files().put(f"{local}/", f"{BUCKET}/{name}/data/", recursive=True)
    return f"s3://{BUCKET}/{name}/data"


def _epoch(data: str, workers: int, *overrides: str) -> list[int]:
    done = program("-m", "tests.s3.epoch", data, workers, *overrides, environment=NOTHING)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_credentials_on_the_command_line_serve_every_program_and_are_written_nowhere(s3, tmp_path):
    base = f"s3://{BUCKET}/options"
    write_raw_events(tmp_path / "raw")
    (tmp_path / "in.jsonl").write_text(json.dumps({"items": ["p3"]}) + "\n")
    s3.files().put(f"{tmp_path}/", f"{BUCKET}/options/", recursive=True)
    write_recipe(tmp_path / "recipe.yaml", f"{base}/raw", f"{base}/data")
    run = ("--run", f"{base}/run")
    said = b""
    for commands in (
        [("-m", "data_prep", "--config", tmp_path / "recipe.yaml")],
        # The workers of the loader are other processes: they must find the options too.
        [("train.py", f"data={base}/data", f"run_dir={base}/run", *SHORT, "max_epochs=1", "loader.workers=2")],
        [
            ("-m", "gru4recf_dist.evaluate", *run),
            ("-m", "gru4recf_dist.recommend", *run, "--input", f"{base}/in.jsonl", "--output", f"{base}/out.jsonl"),
        ],
    ):
        for done in together(((*command, *_options(s3)), NOTHING) for command in commands):
            assert done.returncode == 0, done.stderr
            said += (done.stdout + done.stderr).encode()
    files = s3.files()
    places = {"output": said} | {name: files.cat_file(name) for name in files.find(f"{BUCKET}/options")}
    assert f"{BUCKET}/options/out.jsonl" in places and f"{BUCKET}/options/run/config.yaml" in places
    for place, content in places.items():
        for secret in (s3.key, s3.secret, s3.endpoint.removeprefix("http://")):
            assert secret.encode() not in content, (place, secret)


@pytest.mark.parametrize("workers", [0, 2])
def test_requests_that_never_end_are_given_up_and_made_again(local, s3, workers):
    name = f"stalls-{workers}"
    remote = _copied(local, s3, name)
    # Longer than the program may take as a whole.
    with running_fault_proxy(s3, seed=17, stall_seconds=600, shares={"stall": 0.03}) as proxy:
        sessions = _epoch(remote, workers, *_options(proxy), *PATIENT, "storage.timeout_seconds=1")
        assert proxy.faults(name)["stall"]
    assert sessions == read_epoch(local, 0)


def test_a_cached_shard_is_not_asked_for_again(local, s3, faulty_s3, tmp_path):
    remote = _copied(local, s3, "cached")
    cache = (f"storage.cache_folder={tmp_path / 'cache'}", "storage.cache_gib=1")

    def shards_read() -> int:
        lines = faulty_s3.requests("cached/data/train/")
        return sum(line["method"] == "GET" for line in lines)

    sessions = _epoch(remote, 0, *_options(faulty_s3), *PATIENT, *cache)
    first = shards_read()
    assert first >= SESSIONS / 4
    assert _epoch(remote, 2, *_options(faulty_s3), *PATIENT, *cache) == sessions == read_epoch(local, 0)
    assert shards_read() == first
    # What was cut short in between is not taken for the shard.
    kept = {path.name: path for path in Path(tmp_path / "cache").iterdir() if path.suffix != ".lock"}
    assert kept and all(hashlib.sha256(path.read_bytes()).hexdigest() == name for name, path in kept.items())

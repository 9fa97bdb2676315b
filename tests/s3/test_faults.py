"""Reading and training while one request in twenty fails, and resuming: the same as when nothing fails, bit for bit."""

from __future__ import annotations

import hashlib
import json
import random

import pytest

from gru4recf_dist.config import Config
from gru4recf_dist.monitoring import Monitor
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.trainer import Trainer
from tests.dist.test_resume import OPTIONS, STEPS, resume, train_until
from tests.s3.epoch import read_epoch
from tests.support.ranks import run_ranks
from tests.support.s3 import BUCKET, S3, FaultyS3, running_fault_proxy
from tests.support.s3_runs import assert_equal_tensors, in_environment, program
from tests.support.synthetic import random_sessions, write_dataset
from tests.support.training import small_config, train, whole

pytestmark = pytest.mark.s3
SESSIONS = 600
# Small shards: many requests.
SHARDS = {"streams": 8, "shard_sessions": 4, "block_sessions": 2}


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> str:
    """A data set in a local folder."""
    folder = tmp_path_factory.mktemp("data")
    valid, test = random_sessions(1, 20, 30), random_sessions(2, 20, 30)
    write_dataset(str(folder), random_sessions(0, SESSIONS, items=30), valid, test, **SHARDS)
    return str(folder)


def _copied(local: str, s3: S3, name: str) -> str:
    """The data set on S3, at a place of the test's own: then its faults do not depend on other tests."""
    s3.files().put(f"{local}/", f"{BUCKET}/{name}/data/", recursive=True)
    return f"s3://{BUCKET}/{name}/data"


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_under_faults_delivers_every_session_exactly_once(local, s3, faulty_s3, workers):
    name = f"epoch-{workers}"
    remote = _copied(local, s3, name)
    finished = program("-m", "tests.s3.epoch", remote, workers, environment=faulty_s3.environment)
    assert finished.returncode == 0, finished.stderr
    sessions = json.loads(finished.stdout)
    assert sorted(sessions) == list(range(SESSIONS))
    assert sessions == read_epoch(local, 0)
    assert len(faulty_s3.faults(name)) >= 3


_READ = """
import hashlib, sys
from gru4recf_dist.data import storage
for url in sys.argv[1:]:
    with storage.open_read(url) as stream:
        print(hashlib.sha256(stream.read()).hexdigest())
"""


def test_a_broken_connection_is_gone_on_with_at_its_byte(s3):
    contents = [random.Random(number).randbytes(1 << 20) for number in range(20)]
    files = s3.files()
    for number, content in enumerate(contents):
        files.pipe_file(f"{BUCKET}/broken/{number}", content)
    urls = [f"s3://{BUCKET}/broken/{number}" for number in range(len(contents))]
    with running_fault_proxy(s3, seed=17, stall_seconds=0, shares={"truncate": 0.3}) as proxy:
        finished = program("-c", _READ, *urls, environment=proxy.environment)
        asked = [line for line in proxy.requests("broken") if line["method"] == "GET"]
    assert finished.stdout.split() == [hashlib.sha256(content).hexdigest() for content in contents], finished.stderr
    broken = {line["path"] for line in asked if line["fault"] == "truncate"}
    gone_on_with = {line["path"] for line in asked if not line["range"].startswith("bytes=0-")}
    assert broken and gone_on_with == broken


def test_training_under_faults_ends_with_the_weights_of_a_run_without(local, tmp_path, s3, faulty_s3):
    remote = _copied(local, s3, "training")
    settings = ("max_steps=null", "max_epochs=1", "checkpoint.every_steps=5", "evaluation.every_epochs=1")
    quiet = run_ranks(2, train, tmp_path, small_config(local, tmp_path / "run", *settings))
    config = small_config(remote, f"s3://{BUCKET}/training/run", *settings)
    faulty = run_ranks(2, in_environment, tmp_path, faulty_s3.environment, train, config)
    assert_equal_tensors(whole(faulty), whole(quiet))
    assert len(faulty_s3.faults("training")) >= 3
    writes = [line for line in faulty_s3.requests("training/run") if line["method"] in ("PUT", "POST", "DELETE")]
    assert any(line["fault"] for line in writes)
    result = json.loads(faulty_s3.files().cat_file(f"{BUCKET}/training/run/result.json"))
    expected = json.loads((tmp_path / "run/result.json").read_text())
    assert [result[name] for name in ("steps", "valid", "test")] == [
        expected[name] for name in ("steps", "valid", "test")
    ]


def train_denied(ranks: Ranks, config: Config, s3: FaultyS3) -> list[str]:
    """Train while the checkpoint of step 4 cannot be written; returns what was said."""
    said: list[str] = []
    Monitor.say = lambda monitor, text: said.append(text)
    s3.deny_writes("run/checkpoints/step-00000004/__")
    try:
        Trainer(config, ranks).train()
    finally:
        s3.deny_writes("")
    return said


def test_a_checkpoint_that_s3_refuses_is_reported_and_training_goes_on(local, tmp_path, faulty_s3):
    remote = _copied(local, faulty_s3, "refused")
    often = ("max_steps=9", "checkpoint.every_epochs=null", "checkpoint.every_steps=2", "checkpoint.keep_last=9")
    config = small_config(remote, f"s3://{BUCKET}/refused/run", *often)
    (said,) = run_ranks(1, in_environment, tmp_path, faulty_s3.environment, train_denied, config, faulty_s3)
    warnings = [line for line in said if line.startswith("warning")]
    assert len(warnings) == 1 and "the checkpoint, of step 4, was not written, failure 1 of at most 3" in warnings[0]
    assert "step-00000004/__0_0.distcp: " in warnings[0] and "\n" not in warnings[0]
    found = faulty_s3.files().glob(f"{BUCKET}/refused/run/checkpoints/*/commit.json")
    assert [path.split("/")[-2][-1] for path in sorted(found)] == ["2", "6", "8", "9"]
    assert not faulty_s3.files().glob(f"{BUCKET}/refused/run/checkpoints/step-00000004/*")
    assert faulty_s3.faults("refused")["deny"] > 0


def test_a_run_on_s3_resumed_in_mid_epoch_ends_bit_equal_to_an_unbroken_one(local, tmp_path, s3):
    remote = _copied(local, s3, "resumed")
    unbroken = run_ranks(2, train, tmp_path, small_config(local, tmp_path / "unbroken", *OPTIONS, *STEPS))
    config = small_config(remote, f"s3://{BUCKET}/resumed/run", *OPTIONS, *STEPS)
    # Steps 8 and 9 are made, logged, and lost.
    run_ranks(2, in_environment, tmp_path, s3.environment, train_until, config, 9)
    resumed = run_ranks(2, in_environment, tmp_path, s3.environment, resume, config)
    assert [first for first, _ in resumed] == [7, 7]
    assert_equal_tensors(whole([state for _, state in resumed]), whole(unbroken))
    lines = s3.files().cat_file(f"{BUCKET}/resumed/run/metrics.jsonl").splitlines()
    logged = [line["step"] for line in map(json.loads, lines) if "train/lr" in line]
    assert logged == list(range(1, 14))

"""A run folder on object storage, watched by TensorBoard where it lies."""

from __future__ import annotations

import pytest

from gru4recf_dist import tensorboard_log
from gru4recf_dist.config import MonitoringConfig
from gru4recf_dist.growing_file import GrowingFile
from gru4recf_dist.monitoring import Monitor
from gru4recf_dist.run_description import RunDescription
from tests.support.s3 import BUCKET
from tests.support.tensorboard import serving

pytestmark = pytest.mark.s3
# Without it s3fs lists a folder once, and TensorBoard sees nothing of what comes later.
NO_LISTINGS_CACHE = {"FSSPEC_S3": '{"use_listings_cache": false}'}
DESCRIPTION = RunDescription({"seed": 7}, {}, {"data": "some sessions"})


def _monitor(run_dir: str, first_step: int) -> Monitor:
    return Monitor(MonitoringConfig(progress=False), run_dir, DESCRIPTION, True, first_step, 100)


def test_tensorboard_on_s3_follows_a_run_over_its_restart(s3, monkeypatch):
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(GrowingFile, "rewrite_seconds", 0.0)
    # Objects of a few events each.
    monkeypatch.setattr(tensorboard_log, "LONGEST_UPLOAD_BYTES", 300)
    folder, run = f"s3://{BUCKET}/watched", "run/tensorboard"
    killed = _monitor(f"{folder}/run", 0)
    for step in range(1, 9):
        killed.scalars(step, {"train/loss": float(step)})
    killed.flush()
    names = [name.rsplit("/", 1)[-1] for name in s3.files().ls(f"{BUCKET}/watched/{run}")]
    assert len(names) > 2 and names == sorted(names)
    with serving(folder, "auto", {**s3.environment, **NO_LISTINGS_CACHE}) as server:
        expected = [(step, float(step)) for step in range(1, 9)]
        server.wait_until(lambda: server.curve(run, "train/loss"), lambda curve: curve == expected)
        resumed = _monitor(f"{folder}/run", 4)
        for step in range(5, 11):
            resumed.scalars(step, {"train/loss": 100.0 + step})
        resumed.close()
        expected = [(step, float(step + 100 * (step > 4))) for step in range(1, 11)]
        server.wait_until(lambda: server.curve(run, "train/loss"), lambda curve: curve == expected)
        assert server.texts(run) == {"data": [(0, "<p>some sessions</p>")]}
        assert [row["hparams"] for row in server.session_groups()] == [{"seed": 7.0}]
    # One that is started now sees the same.
    with serving(folder, "auto", {**s3.environment, **NO_LISTINGS_CACHE}) as server:
        server.wait_until(lambda: server.curve(run, "train/loss"), lambda curve: curve == expected)

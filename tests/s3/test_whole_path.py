"""Raw events to recommendations with everything on S3, against the same on local files: equal bit for bit."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.ranks import run_ranks
from tests.support.s3 import BUCKET
from tests.support.s3_runs import (
    SHORT,
    assert_equal_tensors,
    checkpoint_tensors,
    in_environment,
    main_of,
    program,
    write_raw_events,
    write_recipe,
)

pytestmark = pytest.mark.s3
SESSIONS = [{"session": "a", "items": ["p3", "p4"]}, {"items": []}, {"items": ["p7", "never-seen"], "note": 1}]


def _whole_path(base: str, recipe: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    """Prepare, train on two ranks, evaluate, recommend: from ``base``/raw to ``base``."""
    write_recipe(recipe, f"{base}/raw", f"{base}/data")
    prepared = program("-m", "data_prep", "--config", recipe, environment=environment)
    assert (prepared.returncode, prepared.stderr) == (0, "")
    run = f"{base}/run"
    for module, *arguments in (
        ("gru4recf_dist.train", f"data={base}/data", f"run_dir={run}", *SHORT),
        ("gru4recf_dist.evaluate", "--run", run),
        ("gru4recf_dist.recommend", "--run", run, "--input", f"{base}/in.jsonl", "--output", f"{base}/out.jsonl"),
    ):
        run_ranks(2, in_environment, tmp_path, environment, main_of, module, *arguments)


@pytest.fixture(scope="module")
def places(s3, tmp_path_factory) -> tuple[Path, Path]:
    """Two folders: the local run, and a copy of what the run on S3 left there."""
    folder = tmp_path_factory.mktemp("places")
    local, remote = folder / "local", folder / "remote"
    write_raw_events(local / "raw")
    (local / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in SESSIONS))
    files = s3.files()
    files.put(f"{local}/", f"{BUCKET}/whole/", recursive=True)
    runs = [
        (str(local), folder / "local.yaml", tmp_path_factory.mktemp("local"), {}),
        (f"s3://{BUCKET}/whole", folder / "s3.yaml", tmp_path_factory.mktemp("remote"), s3.environment),
    ]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda run: _whole_path(*run), runs))
    files.get(f"{BUCKET}/whole/", f"{remote}/", recursive=True)
    return local, remote


def _names(folder: Path) -> set[str]:
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    # TensorBoard puts time, host and process into the names of its files.
    return {name for name in names if "/tensorboard/" not in name}


def test_the_same_files_are_there_and_nothing_half_written(places):
    local, remote = places
    assert _names(remote) == _names(local)
    assert not [name for name in _names(remote) if "tmp" in name]


def test_data_sets_are_equal_byte_for_byte(places):
    local, remote = places
    manifests = []
    for place in places:
        manifest = json.loads((place / "data/manifest.json").read_text())
        manifest["recipe"] |= {"source": None, "output": None}
        manifests.append(manifest)
    assert manifests[0] == manifests[1]
    shards = sorted((local / "data").rglob("*.tar"))
    assert len(shards) > 20
    for shard in [*shards, *(local / "data").rglob("*.npy")]:
        assert (remote / shard.relative_to(local)).read_bytes() == shard.read_bytes(), shard


def test_results_weights_and_recommendations_are_equal_bit_for_bit(places, tmp_path):
    local, remote = places
    results = [json.loads((place / "run/result.json").read_text()) for place in places]
    assert [result.pop("events_per_second") > 0 for result in results] == [True, True]
    assert results[0] == results[1]
    assert {"valid", "test", "test_excluding_seen", "baselines"} <= results[0].keys()
    last = f"run/checkpoints/step-{results[0]['steps']:08d}"
    assert_equal_tensors(*(checkpoint_tensors(place / last, tmp_path) for place in places))
    for name in ("run/eval-test.json", "out.jsonl"):
        assert (remote / name).read_text() == (local / name).read_text()
    assert len((remote / "out.jsonl").read_text().splitlines()) == len(SESSIONS)


def test_curves_are_equal(places):
    logged = []
    for place in places:
        lines = [json.loads(line) for line in (place / "run/metrics.jsonl").read_text().splitlines()]
        # A checkpoint is logged when it has been written, which is later on S3.
        logged.append([(line["step"], line["train/loss"]) for line in lines if "checkpoint/seconds" not in line])
    assert logged[0] == logged[1]
    curves = [EventAccumulator(str(place / "run/tensorboard")).Reload() for place in places]
    for tag in ("train/loss", "eval/valid/ndcg@10", "eval/when_finished/test/ndcg@10"):
        shown = [[(event.step, event.value) for event in curve.Scalars(tag)] for curve in curves]
        assert shown[0] and shown[0] == shown[1], tag

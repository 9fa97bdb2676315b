"""The benchmarks run as their descriptions say: small, for their tables' shape only."""

from __future__ import annotations

import pytest

from tests.e2e.test_main_job import SIZES, program
from tests.support.synthetic import random_sessions, write_dataset

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        (["benchmarks", "--steps", "2"], ["shards to packed batches", "training step", "evaluation"]),
        (
            [
                "benchmarks.engines",
                "--ranks=1",
                "--rounds=1",
                "--steps=12",
                "--skip=2",
                "--only=ddp",
                "--only=ddp, bf16",
            ],
            ["ddp ", "ddp, bf16"],
        ),
    ],
    ids=["overview", "engines"],
)
def test_a_benchmark_prints_its_table(tmp_path, arguments, rows):
    data = tmp_path / "data"
    write_dataset(str(data), random_sessions(0, 80, items=30), random_sessions(1, 9, 30), random_sessions(2, 9, 30))
    (tmp_path / "recipe.yaml").write_text("{}\n")
    places = ["--config", tmp_path / "recipe.yaml", f"data={data}", f"run_dir={tmp_path / 'run'}"]
    done = program("-m", *arguments, *places, *SIZES)
    assert done.returncode == 0, done.stderr
    for row in rows:
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(row)][:1]
        assert any(character.isdigit() for character in line)


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        (
            ["benchmarks.kernels", "--rounds=1", "--sessions=4", "--items=500", "--negatives=8"],
            [
                "product",
                "encoder, item path",
                "sampled softmax",
                "encoder (both paths) and loss",
                "evaluation's counting",
            ],
        ),
        (
            ["benchmarks.bias", "--items=50", "--events=20", "--draws=2", "--negatives", "8"],
            ["popularity ", "log_uniform, half in batch", "uniform ", "sum of q over the items, uniform"],
        ),
    ],
    ids=["kernels", "bias"],
)
def test_a_benchmark_without_a_data_set_prints_its_table(arguments, rows):
    done = program("-m", *arguments)
    assert done.returncode == 0, done.stderr
    for row in rows:
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(row)][:1]
        assert any(character.isdigit() for character in line)

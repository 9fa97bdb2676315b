"""The benchmark of what a step sends: against its own count of the least, on a data set of preparation's id order."""

from __future__ import annotations

import numpy as np
import pytest

from tests.e2e.test_main_job import program
from tests.support.synthetic import random_sessions, write_dataset

pytestmark = pytest.mark.e2e


def test_a_step_sends_at_most_a_tenth_more_than_the_least(tmp_path):
    order = np.random.default_rng(9).permutation(4000) + 1
    sessions = [order[session - 1].astype(np.int32) for session in random_sessions(0, 1100, items=4000)]
    write_dataset(str(tmp_path / "data"), sessions, sessions[:9], sessions[:9], items=4000)
    (tmp_path / "recipe.yaml").write_text("{}\n")
    sizes = ["batch_size=512", "model.embedding_size=16", "model.hidden_size=16", "device=cpu"]
    arguments = ["--config", tmp_path / "recipe.yaml", f"data={tmp_path / 'data'}", *sizes]
    done = program("-m", "benchmarks.wire", "--ranks=4", "--steps=2", *arguments)
    assert done.returncode == 0, done.stderr
    ratios = {line[:28].strip(): line.split()[-1] for line in done.stdout.splitlines()[2:]}
    assert {"ids", "rows", "row_gradients", "features", "negatives", "negative_gradients"} <= set(ratios)
    for purpose, ratio in ratios.items():
        # What the exchanges need to know of each other has no counterpart in the least.
        assert ratio == "-" if purpose in ("counts", "loss") else 1.0 <= float(ratio) <= 1.1, purpose
    assert float(ratios["ids"]) == float(ratios["rows"]) == 1.0

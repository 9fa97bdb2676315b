"""A rank that is killed before the ranks have met: the others do not keep torchrun from starting all of them anew."""

from __future__ import annotations

import json

import pytest

from gru4recf_dist import typed_yaml
from tests.support.chaos import ChaosRun
from tests.support.synthetic import random_sessions, write_dataset
from tests.support.training import small_config

pytestmark = [pytest.mark.e2e, pytest.mark.dist, pytest.mark.clock]


def test_ranks_that_wait_for_one_that_was_killed_end_by_themselves(tmp_path):
    write_dataset(str(tmp_path / "data"), random_sessions(0, 512, items=50), random_sessions(1, 16, 50))
    config = small_config(tmp_path / "data", tmp_path / "run", "max_steps=4")
    (tmp_path / "config.yaml").write_text(typed_yaml.dump(config))
    run = ChaosRun(tmp_path, max_restarts=1)
    try:
        run.start()
        victim = run.wait_for(lambda: run.rank(1))
        other = run.wait_for(lambda: run.rank(0))
        # It has caught the signals: what comes after takes seconds.
        run.wait_for(lambda: other.num_threads() > 1)
        victim.kill()
        run.wait_for(lambda: run.status is not None, while_running=False)
    finally:
        run.kill_everything()
    assert run.status == 0, run.last_words()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 4
    # Else torchrun gives a rank 30 s, and then says this.
    assert "forcefully exiting" not in run.last_words()

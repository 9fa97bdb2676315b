"""A rank's memory at two sizes of the catalog: rows, row state, features, and nothing else that grows with it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from gru4recf_dist.checkpoint_blocks import BLOCK_BYTES
from tests.dist.table_memory import DIM
from tests.support.synthetic import random_sessions, write_dataset

pytestmark = pytest.mark.dist

SMALL, LARGE = 500_000, 2_000_000
# float32 rows and row-wise Adagrad's one float; the features of `write_dataset`: a token, a float, a vector of three,
# row bounds and on average 1.5 tags; and what is mapped from a file: popularity, and two int32 of the sampler.
TABLE_BYTES = 4 * DIM + 4
FEATURE_BYTES = 4 + 4 + 12 + 8 + 6
MAPPED_BYTES = 8 + 4 + 4
# A second copy of the rows would be 96 MB, a bool for each value 24 MB.
SPARE_BYTES = 16 << 20


def _peaks(folder, items: int, checkpoints: str) -> dict[str, int]:
    train, held_out = random_sessions(0, 41, 300), random_sessions(1, 9, 300)
    write_dataset(str(folder / "data"), train, held_out, held_out, items=items)
    command = [sys.executable, "-m", "tests.dist.table_memory", str(folder), checkpoints]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize(("checkpoints", "copies"), [("waiting", 0), ("async", 1)])
def test_nothing_but_rows_and_their_state_grows_with_the_catalog(tmp_path, checkpoints, copies):
    small, large = (_peaks(tmp_path / str(items), items, checkpoints) for items in (SMALL, LARGE))
    allowed = (LARGE - SMALL) * ((1 + copies) * TABLE_BYTES + FEATURE_BYTES + MAPPED_BYTES) + SPARE_BYTES
    # The blocks of a second thread are in an arena of its own.
    allowed += copies * 2 * BLOCK_BYTES
    grown = {phase: large[phase] - small[phase] for phase in small}
    assert max(grown.values()) < allowed, (grown, allowed)
    # The measurement sees the table at all.
    assert min(grown.values()) > (LARGE - SMALL) * TABLE_BYTES

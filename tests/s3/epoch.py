"""`python -m tests.s3.epoch DATA WORKERS [key=value ...]`: print the sessions of one epoch, in their order, as JSON."""

from __future__ import annotations

import json
import sys

from gru4recf_dist import config as configuration
from gru4recf_dist.data.shard_format import read_manifest
from gru4recf_dist.data.streams import SessionLoader


def read_epoch(data: str, workers: int, *overrides: str) -> list[int]:
    """The numbers of an epoch's sessions in the order in which one rank gets them."""
    settings = [f"data={data}", "run_dir=unused", "batch_size=16", f"loader.workers={workers}", *overrides]
    config = configuration.load(None, settings)
    loader = SessionLoader(data, read_manifest(data), config.loader, config.batch_size, config.seed, rank=0, world=1)
    return [int(number) for block in loader for number in block.sessions]


if __name__ == "__main__":
    print(json.dumps(read_epoch(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])))

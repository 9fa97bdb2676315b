"""`python -m tests.s3.epoch DATA WORKERS [key=value ...]`: print the sessions of one epoch, in their order, as JSON."""

from __future__ import annotations

import json
import sys

from gru4recf_dist import config as configuration
from gru4recf_dist.data.shard_format import read_manifest
from gru4recf_dist.data.streams import SessionLoader


def main(data: str, workers: str, *overrides: str) -> None:
    settings = [f"data={data}", "run_dir=unused", "batch_size=16", f"loader.workers={workers}", *overrides]
    config = configuration.load(None, settings)
    loader = SessionLoader(data, read_manifest(data), config.loader, config.batch_size, config.seed, rank=0, world=1)
    print(json.dumps([int(number) for block in loader for number in block.sessions]))


if __name__ == "__main__":
    main(*sys.argv[1:])

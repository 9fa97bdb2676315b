"""Local shards to packed batches in one process, beside plain reading and other loaders.

python -m benchmarks.loading [--events 6000000] [--peer-events 250000] [--rounds 5] [--alone] [data=DATA]

Rates are events a second of one thread, the median of rounds in which all take turns. The peers (in an environment of
their own, `.venv-peers`) read the first sessions of the same data set: padded batches, sessions shuffled.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time

import numpy as np
import torch

from benchmarks import synthetic_events
from benchmarks.measuring import interleaved, packed_events, print_table
from benchmarks.peers import PeerLoaders
from gru4recf_dist.config import LoaderConfig
from gru4recf_dist.data import storage
from gru4recf_dist.data.shard_format import Manifest, read_manifest
from gru4recf_dist.data.shards import read_blocks
from gru4recf_dist.data.streams import SessionLoader
from gru4recf_dist.errors import UserError, exits_cleanly

BATCH_SIZES = (128, 512, 2048)
PEER_BATCH_SIZE = 512
PEER_TITLES = {
    "webdataset": "WebDataset, one session a sample",
    "mds": "mosaicml-streaming, MDS",
    "parquet": "DataLoader over Parquet row groups",
}


@exits_cleanly
def main() -> None:
    """Print the table."""
    arguments = _parse()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = arguments.data or f"{folder}/data"
        manifest = read_manifest(data) if arguments.data else synthetic_events.write_dataset(data, arguments.events)
        events = manifest.splits["train"].events
        sizes = [size for size in BATCH_SIZES if size % manifest.streams == 0]
        contenders = {"plain read() of the same bytes": lambda: _plain_read(data, manifest)}
        for size in sizes:
            contenders[f"this project, {size} sessions a batch"] = lambda size=size: _ours(data, manifest, size)
        if arguments.alone:
            rates = interleaved(contenders, arguments.rounds)
        else:
            _write_peer_sessions(data, manifest, folder, arguments.peer_events)
            with PeerLoaders(folder, PEER_BATCH_SIZE) as peers:
                for name in peers.names:
                    title = f"{PEER_TITLES[name]}, {PEER_BATCH_SIZE} a batch"
                    contenders[title] = lambda name=name: peers.rate(name)
                rates = interleaved(contenders, arguments.rounds)
    slowest = next((rate for title, rate in rates.items() if title.startswith(PEER_TITLES["webdataset"])), None)
    reading = next(iter(rates.values()))
    lines = [["", "events/s", "of plain read()", *(["x WebDataset"] if slowest else [])]]
    lines += [
        [title, f"{rate:,.0f}", f"{100 * rate / reading:.2f} %", *([f"{rate / slowest:.1f}"] if slowest else [])]
        for title, rate in rates.items()
    ]
    streams = f"{manifest.splits['train'].sessions:,} sessions in {manifest.streams} streams"
    print_table(f"{events:,} events, {streams}", lines)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.loading", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=6_000_000, help="of the synthetic data set")
    parser.add_argument("--peer-events", type=int, default=250_000, help="what the peers read of it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--alone", action="store_true", help="without the peers, which need an environment of their own"
    )
    parser.add_argument("data", nargs="?", metavar="data=DATA", help="a prepared data set in place of a synthetic one")
    arguments = parser.parse_args()
    if arguments.data is not None:
        key, _, arguments.data = arguments.data.partition("=")
        if key != "data" or not storage.is_local(arguments.data):
            raise UserError("the only key is data=FOLDER, a local data set")
    return arguments


def _plain_read(data: str, manifest: Manifest) -> float:
    started = time.perf_counter()
    for shard in manifest.splits["train"].shards:
        with open(storage.local_path(storage.join(data, shard.url)), "rb") as stream:
            stream.read()
    return manifest.splits["train"].events / (time.perf_counter() - started)


def _ours(data: str, manifest: Manifest, batch_size: int) -> float:
    config = LoaderConfig()
    loader = SessionLoader(data, manifest, config, batch_size, seed=0, rank=0, world=1)
    started = time.perf_counter()
    return packed_events(loader, config) / (time.perf_counter() - started)


def _write_peer_sessions(data: str, manifest: Manifest, folder: str, events: int) -> None:
    """The first sessions of the data set, as the two arrays that the peers start from."""
    items, lengths, count = [], [], 0
    shards, features = manifest.splits["train"].shards, manifest.event_features
    blocks = (block for shard in shards for block in read_blocks(data, shard, manifest.items, event_features=features))
    for block in blocks:
        items.append(block.items)
        lengths.append(block.lengths)
        count += len(block.items)
        if count >= events:
            break
    np.save(f"{folder}/items.npy", np.concatenate(items))
    np.save(f"{folder}/lengths.npy", np.concatenate(lengths))


if __name__ == "__main__":
    sys.exit(main())

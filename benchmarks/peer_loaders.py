"""Other ways to load the same sessions. Runs in the peers' own environment, so it imports nothing of this project.

    python peer_loaders.py FOLDER BATCH_SIZE

FOLDER holds `items.npy` and `lengths.npy`. The formats are written first; then each line of the input names a loader,
and a JSON object with the events and seconds of one epoch is printed for it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import webdataset as wds
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset

if torch.version.cuda is None and not metadata.version("torchvision").endswith("+cpu"):
    # streaming imports torchvision, whose CUDA build does not import beside a CPU torch unless these are declared.
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import streaming

SESSIONS_PER_SHARD = 16384
ROW_GROUP_SESSIONS = 1024
SHUFFLE_SESSIONS = 4096


def collate(sessions: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded inputs and targets, the least that a training step needs."""
    padded = pad_sequence([torch.from_numpy(np.array(session)) for session in sessions], batch_first=True)
    return padded[:, :-1], padded[:, 1:]


def write_webdataset(folder: str, sessions: list[np.ndarray]) -> None:
    os.makedirs(folder)
    with wds.ShardWriter(f"{folder}/%06d.tar", maxcount=SESSIONS_PER_SHARD, verbose=0) as writer:
        for number, session in enumerate(sessions):
            writer.write({"__key__": f"{number:09d}", "items.npy": session})


def read_webdataset(folder: str, batch_size: int) -> Iterable:
    urls = sorted(f"{folder}/{name}" for name in os.listdir(folder))
    dataset = wds.WebDataset(urls, shardshuffle=len(urls)).shuffle(SHUFFLE_SESSIONS)
    # `only`: nothing but arrays is decoded.
    dataset = dataset.decode(only=["items.npy"]).to_tuple("items.npy")
    dataset = dataset.batched(batch_size, collation_fn=lambda rows: collate([row[0] for row in rows]))
    return wds.WebLoader(dataset, batch_size=None, num_workers=0)


def write_mds(folder: str, sessions: list[np.ndarray]) -> None:
    with streaming.MDSWriter(out=folder, columns={"items": "ndarray:int32"}, progress_bar=False) as writer:
        for session in sessions:
            writer.write({"items": session})


def read_mds(folder: str, batch_size: int) -> Iterable:
    dataset = streaming.StreamingDataset(local=folder, shuffle=True, batch_size=batch_size)
    return DataLoader(dataset, batch_size, collate_fn=lambda rows: collate([row["items"] for row in rows]))


def write_parquet(folder: str, sessions: list[np.ndarray]) -> None:
    os.makedirs(folder)
    table = pa.table({"items": pa.array(sessions, pa.list_(pa.int32()))})
    pq.write_table(table, f"{folder}/sessions.parquet", row_group_size=ROW_GROUP_SESSIONS)


class ParquetSessions(IterableDataset):
    """Row groups in a random order, their sessions shuffled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __iter__(self):
        file = pq.ParquetFile(self.path)
        generator = np.random.default_rng()
        for group in generator.permutation(file.num_row_groups):
            rows = file.read_row_group(int(group)).column("items").to_numpy()
            yield from rows[generator.permutation(len(rows))]


def read_parquet(folder: str, batch_size: int) -> Iterable:
    return DataLoader(ParquetSessions(f"{folder}/sessions.parquet"), batch_size, collate_fn=collate)


LOADERS: dict[str, tuple[Callable, Callable]] = {
    "webdataset": (write_webdataset, read_webdataset),
    "mds": (write_mds, read_mds),
    "parquet": (write_parquet, read_parquet),
}


def main(folder: str, batch_size: int) -> None:
    torch.set_num_threads(1)
    items, lengths = (np.load(f"{folder}/{name}.npy") for name in ("items", "lengths"))
    sessions = np.split(items, np.cumsum(lengths)[:-1])
    for name, (write, _) in LOADERS.items():
        write(f"{folder}/{name}", sessions)
    print(json.dumps({"written": list(LOADERS)}), flush=True)
    for line in sys.stdin:
        name = line.strip()
        started = time.perf_counter()
        rows = 0
        for inputs, _ in LOADERS[name][1](f"{folder}/{name}", batch_size):
            rows += len(inputs)
        seconds = time.perf_counter() - started
        if rows != len(lengths):
            raise SystemExit(f"{name} gave {rows} sessions of {len(lengths)}")
        print(json.dumps({"events": len(items), "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

"""Synthetic click logs of realistic shape: Zipf items, geometric session lengths. Made in chunks, never all at once."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from data_prep import writer
from gru4recf_dist.data import storage
from gru4recf_dist.data.shard_format import POPULARITY, Manifest, SplitInfo, write_manifest

MEAN_LENGTH, LONGEST = 8, 200
ITEMS = 1_000_000
ZIPF_EXPONENT = 1.1
# Sessions made at a time.
CHUNK_SESSIONS = 1 << 17
SECONDS_BETWEEN_SESSIONS = 0.05


def sessions(events: int, seed: int = 0, items: int = ITEMS) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunks of sessions, together about ``events`` events: items int32 [E] and lengths int32 [n], at least 2 each."""
    generator = np.random.default_rng(seed)
    mass = np.cumsum(np.arange(1, items + 1, dtype=np.float64) ** -ZIPF_EXPONENT)
    left = round(events / MEAN_LENGTH)
    while left:
        count = min(left, CHUNK_SESSIONS)
        left -= count
        # A geometric variable starts at 1; two events are the least that have a target.
        lengths = np.minimum(1 + generator.geometric(1 / (MEAN_LENGTH - 1), count), LONGEST).astype(np.int32)
        draws = generator.random(int(lengths.sum())) * mass[-1]
        yield np.searchsorted(mass, draws).astype(np.int32) + 1, lengths


def write_dataset(
    data: str, events: int, items: int = ITEMS, used: int | None = None, is_test: bool = False
) -> Manifest:
    """A data set of training sessions alone, with as many streams as preparation would choose.

    Args:
        items: N.
        used: how many of them occur, at equal distances; default: as many as are drawn. The same ``used`` gives the
            same sessions in a catalog of any size.
        is_test: the same sessions are test sessions too, of which the last event is the target.
    """
    used = used or items
    chunks = [((each - 1) * (items // used) + 1, lengths) for each, lengths in sessions(events, items=used)]
    ids, lengths = (np.concatenate([chunk[i] for chunk in chunks]) for i in (0, 1))
    storage.write_npy(storage.join(data, POPULARITY), np.bincount(ids, minlength=items + 1).astype(np.int64))
    streams = writer.choose_streams(len(lengths))
    numbers = np.arange(len(lengths))
    by_stream = numbers[np.argsort(numbers % streams, kind="stable")]
    arriving = pa.record_batch({"number": np.repeat(by_stream, lengths), "item": ids})
    settings = {"streams": streams, "shard_sessions": 65536, "block_sessions": 1024, "last_event_only": False}
    train = writer.split_info(list(writer.write_shards(iter([arriving]), data=data, split="train", **settings)))
    empty = SplitInfo(sessions=0, events=0, targets=0, shards=[])
    test = empty
    if is_test:
        shards = [shard.model_copy(update={"targets": shard.sessions}) for shard in train.shards]
        test = train.model_copy(update={"targets": train.sessions, "shards": shards})
    protocol = "leave_one_out" if is_test else "every_position"
    splits = {"train": train, "valid": empty, "test": test}
    manifest = Manifest(name="synthetic", seed=0, items=items, streams=streams, protocol=protocol, splits=splits)
    write_manifest(data, manifest)
    return manifest


def write_log(path: str, events: int) -> None:
    """A raw log as `.csv` or `.parquet`: columns session_id, item_id (text) and timestamp, in the order of time."""
    schema = pa.schema({"session_id": pa.string(), "item_id": pa.string(), "timestamp": pa.int64()})
    write = pq.ParquetWriter(path, schema) if path.endswith(".parquet") else pa_csv.CSVWriter(path, schema)
    first = 0
    generator = np.random.default_rng(1)
    with write:
        for items, lengths in sessions(events):
            numbers = np.repeat(np.arange(first, first + len(lengths)), lengths)
            pauses = generator.exponential(60.0, len(items))
            elapsed = np.cumsum(pauses)
            starts = np.cumsum(lengths) - lengths
            within = elapsed - np.repeat(elapsed[starts], lengths)
            times = (numbers * SECONDS_BETWEEN_SESSIONS + within).astype(np.int64)
            # Sessions of a chunk lie interleaved, as in a log; only between chunks is the order not that of time.
            order = np.argsort(times, kind="stable")
            columns = [pa.array(numbers[order]), pa.array(items[order]), pa.array(times[order] + 1_700_000_000)]
            table = pa.table(columns, names=schema.names).cast(schema)
            write.write_table(table)
            first += len(lengths)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=write_log.__doc__)
    parser.add_argument("path")
    parser.add_argument("events", type=int)
    given = parser.parse_args()
    write_log(given.path, given.events)

"""Outputs: the same bytes every time, whole or not at all, on any storage, readable by plain webdataset."""

import hashlib
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset

from data_prep import writer
from gru4recf_dist.data.shard_format import read_manifest
from gru4recf_dist.errors import UserError
from tests.unit.data_prep.prepared import Prepared, random_rows, run, write_csv

CSV = {"input": {"format": "csv"}}


def files_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "manifest.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture
def raw(tmp_path):
    return str(write_csv(tmp_path / "raw/events.csv", random_rows(2)))


def test_same_bytes_whatever_the_threads(tmp_path, raw):
    write_csv(tmp_path / "items.csv", [(f"i{n}", f"v{n % 7}", n / 3) for n in range(41)], "item_id,v,f")
    features = [{"name": "v", "kind": "token"}, {"name": "f", "kind": "float", "standardize": True}]
    for name, threads in (("one", 1), ("four", 4)):
        run(
            {"source": raw, "output": str(tmp_path / name), "features": features, "threads": threads, "streams": 4},
            items={"file": str(tmp_path / "items.csv")},
            **CSV,
        )
    one = files_of(tmp_path / "one")
    assert len(one) > 8
    assert one == files_of(tmp_path / "four")


def test_checksums_and_counts_of_the_manifest_are_those_of_the_shards(tmp_path, raw):
    run({"source": raw, "output": str(tmp_path / "out"), "streams": 2, "shard_sessions": 9}, **CSV)
    data = Prepared(tmp_path / "out")
    manifest = read_manifest(str(tmp_path / "out"))
    for split, info in manifest.splits.items():
        assert info.sessions == len(data.sessions(split))
        assert info.events == sum(len(tokens) for _, _, tokens, _ in data.sessions(split))
        for shard in info.shards:
            content = data.bytes(shard.url)
            assert (len(content), hashlib.sha256(content).hexdigest()) == (shard.bytes, shard.sha256)


def test_plain_webdataset_reads_the_shards(tmp_path, raw):
    run({"source": raw, "output": str(tmp_path / "out"), "streams": 2}, **CSV)
    urls = sorted(str(path) for path in (tmp_path / "out/train").glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    events = np.concatenate([sample["items.npy"] for sample in samples])
    assert len(events) == sum(int(sample["lengths.npy"].sum()) for sample in samples)
    data = Prepared(tmp_path / "out")
    assert np.bincount(events, minlength=len(data.popularity)).tolist() == data.popularity.tolist()


def test_memory_urls_in_and_out(tmp_path, raw):
    base = f"memory://{uuid.uuid4().hex}"
    with fsspec.open(f"{base}/raw/events.csv", "wb") as stream:
        stream.write(Path(raw).read_bytes())
    run({"source": f"{base}/raw", "output": f"{base}/out"}, **CSV)
    run({"source": f"file://{raw}", "output": f"file://{tmp_path}/out"}, **CSV)
    remote, local = Prepared(f"{base}/out"), Prepared(tmp_path / "out")
    for split in ("train", "valid", "test"):
        assert remote.sessions(split) == local.sessions(split)
    # A second preparation leaves nothing of the first.
    run({"source": f"{base}/raw/*.csv", "output": f"{base}/out", "shard_sessions": 5},
        input={"format": "csv", "files": [f"{base}/raw/*.csv"]})  # fmt: skip
    names = {shard["url"] for split in ("train", "valid", "test") for shard in Prepared(f"{base}/out").shards(split)}
    fs, path = fsspec.core.url_to_fs(f"{base}/out")
    found = {name.rpartition("/out/")[2] for name in fs.find(path) if name.endswith(".tar")}
    assert found == names


def test_an_earlier_data_set_survives_a_failure(tmp_path, raw, monkeypatch):
    run({"source": raw, "output": str(tmp_path / "out")}, **CSV)
    before = files_of(tmp_path / "out")
    listing = sorted(path.name for path in tmp_path.iterdir())

    def full_disk(*args, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_shard", full_disk)
    with pytest.raises(OSError, match="No space"):
        run({"source": raw, "output": str(tmp_path / "out"), "seed": 2}, **CSV)
    assert files_of(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == listing


def test_a_failed_upload_leaves_no_data_set(raw, monkeypatch):
    base = f"memory://{uuid.uuid4().hex}"
    run({"source": raw, "output": base}, **CSV)
    original, written = writer.write_shard, []

    def fails_second_time(*args, **more):
        written.append(args)
        if len(written) == 2:
            raise OSError("connection lost")
        return original(*args, **more)

    monkeypatch.setattr(writer, "write_shard", fails_second_time)
    with pytest.raises(OSError, match="connection lost"):
        run({"source": raw, "output": base}, **CSV)
    fs, path = fsspec.core.url_to_fs(base)
    assert fs.find(path) == []


def test_replaces_a_data_set_but_nothing_else(tmp_path, raw):
    run({"source": raw, "output": str(tmp_path / "out"), "streams": 4}, **CSV)
    run({"source": raw, "output": str(tmp_path / "out"), "streams": 2}, **CSV)
    assert len(list((tmp_path / "out/train").iterdir())) == 2
    (tmp_path / "out/thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"output: .*holds 'thesis.tex', which is no part of a data set"):
        run({"source": raw, "output": str(tmp_path / "out")}, **CSV)
    assert (tmp_path / "out/thesis.tex").read_text() == "years of work"
    assert (tmp_path / "out/manifest.json").exists()


def test_through_a_link_the_folder_it_points_to_is_replaced(tmp_path, raw):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    run({"source": raw, "output": str(tmp_path / "link")}, **CSV)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk/manifest.json").exists()


def test_writer_cuts_batches_anywhere(tmp_path):
    """Sessions that straddle batches, streams and shards come out whole."""
    import pyarrow as pa

    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 9, 60)
    numbers = np.concatenate([np.arange(0, 60, 4), np.arange(1, 60, 4), np.arange(2, 60, 4), np.arange(3, 60, 4)])
    events = {
        "number": np.repeat(numbers, lengths),
        "item": rng.integers(1, 9, lengths.sum()),
    }
    for rows in (1, 3, 7, 1000):
        batches = (
            pa.record_batch({name: column[start : start + rows] for name, column in events.items()})
            for start in range(0, int(lengths.sum()), rows)
        )
        folder = tmp_path / str(rows)
        settings = {"streams": 4, "shard_sessions": 4, "block_sessions": 3, "last_event_only": False}
        info = writer.split_info(list(writer.write_shards(batches, data=str(folder), split="train", **settings)))
        assert (info.sessions, info.events) == (60, lengths.sum())
        assert [shard.sessions for shard in info.shards] == [4, 4, 4, 3] * 4
        assert files_of(folder) == files_of(tmp_path / "1")

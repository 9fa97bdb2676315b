"""Fetching MovieLens-100k, with a real pip and a wheel of our own in place of the package index."""

from __future__ import annotations

import hashlib
import zipfile

import pytest

from data_prep import fetch_ml100k
from gru4recf_dist.errors import UserError

CONTENTS = {"ml-100k.inter": b"user_id:token\titem_id:token\n1\t2\n", "ml-100k.item": b"item_id:token\n2\n"}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is the only place where pip looks; it holds a wheel whose checksums are the expected ones."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "recbole-1.2.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in CONTENTS.items():
            archive.writestr(f"recbole/dataset_example/ml-100k/{name}", content)
        archive.writestr("recbole-1.2.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: recbole\nVersion: 1.2.1\n")
        archive.writestr("recbole-1.2.1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("recbole-1.2.1.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(fetch_ml100k, "WHEEL_SHA256", sha256(wheel.read_bytes()))
    monkeypatch.setattr(fetch_ml100k, "FILES_SHA256", {name: sha256(text) for name, text in CONTENTS.items()})
    return folder


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def test_fetches_both_files_and_nothing_else(index, tmp_path, capsys):
    output = tmp_path / "raw" / "ml-100k"
    assert fetch_ml100k.main(["--output", str(output)]) == 0
    assert files(output) == CONTENTS
    (line,) = capsys.readouterr().out.splitlines()
    assert "GroupLens" in line


def test_does_nothing_when_both_files_are_there(index, tmp_path, monkeypatch):
    for name, content in CONTENTS.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(fetch_ml100k, "_download", None)
    assert fetch_ml100k.fetch(str(tmp_path)) is False


def test_replaces_a_damaged_file(index, tmp_path):
    output = tmp_path / "ml-100k"
    assert fetch_ml100k.fetch(str(output)) is True
    (output / "ml-100k.item").write_bytes(b"half of")
    assert fetch_ml100k.fetch(str(output)) is True
    assert files(output) == CONTENTS


def test_wrong_checksum_of_the_wheel_writes_nothing(index, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_ml100k, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(UserError, match=r"recbole==1\.2\.1: wrong checksum"):
        fetch_ml100k.fetch(str(tmp_path / "ml-100k"))
    assert files(tmp_path / "ml-100k") == {}


def test_wrong_checksum_of_one_file_writes_nothing(index, tmp_path, monkeypatch):
    monkeypatch.setitem(fetch_ml100k.FILES_SHA256, "ml-100k.item", "0" * 64)
    with pytest.raises(UserError, match=r"ml-100k\.item: wrong checksum"):
        fetch_ml100k.fetch(str(tmp_path / "ml-100k"))
    assert files(tmp_path / "ml-100k") == {}


def test_failed_download_is_one_clear_line(index, tmp_path, capsys):
    for path in index.iterdir():
        path.unlink()
    assert fetch_ml100k.main(["--output", str(tmp_path / "ml-100k")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: cannot download recbole==1.2.1 with pip, is there a network? (ERROR: ")

"""Fetch MovieLens-100k as RecBole atomic files: ``python -m data_prep.fetch_ml100k --output data/raw/ml-100k``.

The files lie in the wheel of RecBole 1.2.1, which is taken from the package index that pip is set up for, so it works
wherever the project could be installed. They are fetched, never committed: GroupLens allows use for research, not
redistribution or commercial use without permission (https://files.grouplens.org/datasets/movielens/ml-100k-README.txt).
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from gru4recf_dist.data import storage
from gru4recf_dist.errors import UserError, exits_cleanly

REQUIREMENT = "recbole==1.2.1"
WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
FOLDER_IN_WHEEL = "recbole/dataset_example/ml-100k"
FILES_SHA256 = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
}
TERMS = (
    "MovieLens-100k is GroupLens's: for research, no redistribution (https://grouplens.org/datasets/movielens/100k/)"
)


def fetch(output: str) -> bool:
    """Put ``ml-100k.inter`` and ``ml-100k.item`` into the folder ``output``, each whole or not at all.

    Returns:
        False if both were there already with the right checksum, and nothing was done.

    Raises:
        UserError: the download failed, or a checksum is wrong.
    """
    if all(_is_there(storage.join(output, name), sha256) for name, sha256 in FILES_SHA256.items()):
        return False
    with tempfile.TemporaryDirectory() as folder:
        wheel = _download(Path(folder))
        _check(REQUIREMENT, wheel.read_bytes(), WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            contents = {name: archive.read(f"{FOLDER_IN_WHEEL}/{name}") for name in FILES_SHA256}
    # All are checked before one is written.
    for name, content in contents.items():
        _check(name, content, FILES_SHA256[name])
    for name, content in contents.items():
        storage.write_bytes(storage.join(output, name), content)
    return True


def _is_there(url: str, sha256: str) -> bool:
    return storage.exists(url) and hashlib.sha256(storage.read_bytes(url)).hexdigest() == sha256


def _check(name: str, content: bytes, sha256: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise UserError(f"{name}: wrong checksum, SHA-256 is {found}, not {sha256}; nothing was written")


def _download(folder: Path) -> Path:
    """Download the wheel with this Python's pip, which knows the machine's index, proxy and certificates."""
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
    command = [*pip, "--no-deps", "--only-binary=:all:", "--dest", str(folder), REQUIREMENT]
    finished = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if finished.returncode or len(wheels) != 1:
        # pip's last line sums up, but "no matching distribution" is all that it says without a network: add what to do.
        last_line = (finished.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"cannot download {REQUIREMENT} with pip, is there a network? ({last_line})")
    return wheels[0]


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    """Fetch to ``--output`` and say on one line what was done."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.fetch_ml100k", description=__doc__.partition(":")[0])
    parser.add_argument("--output", required=True, help="folder (or fsspec URL) that gets ml-100k.inter and .item")
    output = parser.parse_args(arguments).output
    print(f"{output}: {'fetched' if fetch(output) else 'is there already'}. {TERMS}")


if __name__ == "__main__":
    raise SystemExit(main())

"""The environments of the peers: other projects to compare with, which are no dependencies of this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
# torch is pinned to what this project's own environment has: the same tensors, and no second CUDA build.
PACKAGES = ("mosaicml-streaming==0.13.0", "webdataset==1.0.2", "pyarrow==26.0.1", "torch==2.13.0")


def python(folder: str = ".venv-peers", packages: Sequence[str] = PACKAGES, alone: Sequence[str] = ()) -> str:
    """The interpreter of an environment of peers; it is made if it is not there (1 to 2 GB).

    Args:
        folder: its name, below the project's root.
        packages: what is installed, as pip takes it.
        alone: what is installed after that without what it depends on.
    """
    environment = ROOT / folder
    interpreter, complete = environment / "bin" / "python", environment / ".installed"
    wanted = "\n".join([*packages, *alone])
    if not complete.exists() or complete.read_text() != wanted:
        print(f"installing the peers into {folder}: this takes minutes", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        pip = [str(interpreter), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *packages], check=True)
        if alone:
            subprocess.run([*pip, "--no-deps", *alone], check=True)
        complete.write_text(wanted)
    return str(interpreter)


def requirements(name: str) -> list[str]:
    """The pinned packages of a requirements file beside this module."""
    lines = (ROOT / "benchmarks" / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def environment_of_peers() -> dict[str, str]:
    """Variables for a program of theirs: one thread, and nothing of this project to import.

    Safe path: modules here are called like the projects that they measure.
    """
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "PYTHONSAFEPATH": "1"}


class PeerLoaders:
    """`peer_loaders.py` as a process that answers: it stays up, so that its loaders can take turns with ours."""

    def __init__(self, folder: str, batch_size: int) -> None:
        script = str(ROOT / "benchmarks" / "peer_loaders.py")
        self._process = subprocess.Popen(
            [python(), script, folder, str(batch_size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment_of_peers(),
        )
        self.names = self._answer()["written"]

    def __enter__(self) -> PeerLoaders:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()

    def rate(self, name: str) -> float:
        """Events a second of one epoch with the loader ``name``."""
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        return answer["events"] / answer["seconds"]

    def _answer(self) -> dict:
        # A library that prints, prints to the same pipe; only JSON objects are answers.
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit("error: the peers' process has ended")

"""The environment of the peers: other projects to compare with, which are no dependencies of this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / ".venv-peers"
# torch is pinned to what this project's own environment has: the same tensors, and no second CUDA build.
PACKAGES = ("mosaicml-streaming==0.13.0", "webdataset==1.0.2", "pyarrow==26.0.1", "torch==2.13.0")


def python() -> str:
    """The peers' interpreter; the environment is made if it is not there (2 GB)."""
    interpreter, complete = ENVIRONMENT / "bin" / "python", ENVIRONMENT / ".installed"
    wanted = "\n".join(PACKAGES)
    if not complete.exists() or complete.read_text() != wanted:
        print(f"installing the peers into {ENVIRONMENT.name}: this takes minutes", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        subprocess.run([str(interpreter), "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        complete.write_text(wanted)
    return str(interpreter)


class PeerLoaders:
    """`peer_loaders.py` as a process that answers: it stays up, so that its loaders can take turns with ours."""

    def __init__(self, folder: str, batch_size: int) -> None:
        script = str(ROOT / "benchmarks" / "peer_loaders.py")
        self._process = subprocess.Popen(
            [python(), script, folder, str(batch_size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
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

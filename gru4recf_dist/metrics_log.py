"""`metrics.jsonl`: one JSON object a line, which anything can read while the run goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable

from gru4recf_dist.data import storage
from gru4recf_dist.growing_file import GrowingFile


class MetricsLog:
    """The lines of a run, over all its restarts. Every one has `step` and `train/loss`.

    Args:
        keep: by step and names, whether a line that an interrupted run left stays.
        warn: as `GrowingFile`.
    """

    def __init__(self, url: str, keep: Callable[[int, Iterable[str]], bool], warn: Callable[[str], None]) -> None:
        kept: list[bytes] = []
        self._loss: float | None = None
        for line in storage.read_bytes(url).splitlines() if storage.exists(url) else ():
            values = _parsed(line)
            if values is not None and keep(values["step"], values.keys() - {"step"}):
                kept.append(line + b"\n")
                self._loss = values.get("train/loss", self._loss)
        self._file = GrowingFile(url, b"".join(kept), warn)

    def append(self, step: int, values: dict[str, float]) -> None:
        """Add a line; one without `train/loss` repeats the last. What is not finite is null: JSON has no NaN."""
        self._loss = values.get("train/loss", self._loss)
        line = {"step": step, "train/loss": self._loss, **values}
        finite = {name: value if value is None or math.isfinite(value) else None for name, value in line.items()}
        self._file.append(json.dumps(finite, allow_nan=False).encode() + b"\n")

    def finish(self, step: int, metrics: dict[str, float]) -> None:
        """Add what the run is judged by, and close."""
        self.append(step, metrics)
        self.close()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _parsed(line: bytes) -> dict | None:
    """A process that was killed may have left half a line at the end, a machine that lost power zeros."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and isinstance(values.get("step"), int) else None

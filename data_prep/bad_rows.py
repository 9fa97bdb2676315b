"""Rows that cannot become events: collected with file, line and reason, kept in `quarantine.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any

QUARANTINE = "quarantine.jsonl"


class BadRows:
    """The lines that a reader could not turn into rows at all (those it could are judged by the engine).

    Attributes:
        left_out: how many good rows the recipe does not ask for; no record is kept of these.
    """

    def __init__(self) -> None:
        self.left_out = 0
        self._records: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._records)

    def add(self, file: str, line: int, reason: str, values: dict[str, Any]) -> None:
        self._records.append({"file": file, "line": line, "reason": reason, "values": values})


def write_record(stream: IO[bytes], record: dict[str, Any]) -> None:
    """One JSON object a line: file, line, reason, values (as they stand in the file)."""
    stream.write(json.dumps(record, ensure_ascii=False, default=str).encode() + b"\n")

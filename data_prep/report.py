"""The table of what every step left over: printed at the end and kept in the manifest."""

from __future__ import annotations

from typing import Any

from gru4recf_dist.errors import UserError

COUNTS = ("sessions", "events", "items")


class Report:
    """Collects one row a step. Counts are those *after* the step; a row's predecessor has those before."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, step: str, counts: dict[str, Any], may_be_empty: bool = False, **more: Any) -> None:
        """Record a step.

        Raises:
            UserError: it left no events and is not one that may; the line names the step and how many events came in.
        """
        if not counts["events"] and not may_be_empty:
            before = next((row["events"] for row in reversed(self.rows)), 0)
            reason = f" ({more['note']})" if more.get("note") else ""
            raise UserError(f"no events left after the step '{step}': {before} came in{reason}")
        self.rows.append({"step": step, **{name: counts.get(name) for name in COUNTS}, **more})

    def add_feature(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def table(self) -> str:
        """Aligned plain text."""
        steps = [row for row in self.rows if "step" in row]
        lines = [["step", *COUNTS, "removed events", ""]]
        before: int | None = None
        for row in steps:
            is_split = "targets" in row
            removed = "" if before is None or is_split else _number(before - row["events"])
            lines.append([row["step"], *(_number(row[name]) for name in COUNTS), removed, _note(row)])
            before = row["events"] if not is_split else before
        text = _aligned(lines, {0, len(lines[0]) - 1})
        features = [row for row in self.rows if "feature" in row]
        if features:
            lines = [["feature", "kind", "size", "longest", "items without"]]
            for row in features:
                numbers = (_number(row[key]) for key in ("size", "longest", "items_without"))
                lines.append([row["feature"], row["kind"], *numbers])
            text += "\n\n" + _aligned(lines, {0, 1})
        event_features = [row for row in self.rows if "event_feature" in row]
        if event_features:
            lines = [["event feature", "kind", "size", "training events without"]]
            for row in event_features:
                lines.append(
                    [row["event_feature"], row["kind"], *(_number(row[k]) for k in ("size", "events_without"))]
                )
            text += "\n\n" + _aligned(lines, {0, 1})
        return text


def _note(row: dict[str, Any]) -> str:
    parts = [row["note"]] if row.get("note") else []
    if "targets" in row:
        parts.append(f"{_number(row['targets'])} targets")
    if row.get("untrained_targets") is not None:
        share = f"{100 * row['untrained_share']:.2f} %"
        parts.append(f"{_number(row['untrained_targets'])} ({share}) of items without training events")
    return ", ".join(parts)


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _aligned(lines: list[list[str]], text_columns: set[int]) -> str:
    """Columns in line: texts to the left, numbers to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = []
    for line in lines:
        cells = []
        for column, (cell, width) in enumerate(zip(line, widths, strict=True)):
            is_text = column in text_columns
            cells.append(cell.ljust(width) if is_text else cell.rjust(width))
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)

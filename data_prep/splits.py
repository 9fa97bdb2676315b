"""Which events are trained on and which are held out.

Every split is a table of whole stored sessions: history and target(s), with the columns of the placed events and
`stored`: how many events of the session are stored in this split.
"""

from __future__ import annotations

from datetime import UTC, datetime

import ibis
import ibis.expr.types as ir

from data_prep.engine import MICROSECONDS, Engine
from data_prep.recipe import Split
from data_prep.sources import TEST, TRAIN, VALID
from gru4recf_dist.data.shard_format import SPLITS
from gru4recf_dist.errors import UserError

# A session needs an event to train on, one to validate with and one to test with.
SHORTEST_HELD_OUT = 3


def leave_one_out(placed: ir.Table) -> dict[str, ir.Table]:
    """The last event is the test target, the one before it the valid target, what precedes them is trained on.

    The test history includes the valid event. A session of fewer than 3 events is too short to hold anything out:
    all of it is trained on, and it is in neither valid nor test.
    """
    held_out = placed.length >= SHORTEST_HELD_OUT
    stored = {
        "train": ibis.ifelse(held_out, placed.length - 2, placed.length),
        "valid": ibis.ifelse(held_out, placed.length - 1, 0),
        "test": ibis.ifelse(held_out, placed.length, 0),
    }
    return {name: placed.mutate(stored=count).filter(placed.place < count) for name, count in stored.items()}


def last_events(placed: ir.Table) -> ir.Table:
    """One row a session: when it ends, and the ordinal of the event it ends with."""
    last = placed.filter(placed.place == placed.length - 1)
    return last.select("session", "part", "time", "ordinal")


def by_share(engine: Engine, ends: ir.Table, shares: dict[str, float]) -> dict[str, ir.Table]:
    """Sessions ordered by (time of the last event, file, line), cut from the end into ``shares``.

    A share is rounded to the nearest whole number of sessions. What is left over is called `train`.
    """
    total = engine.row(ends.agg(sessions=ends.session.count()))["sessions"]
    ranked = engine.ranked("ranked_ends", ends, "rank", [ends.time, ends.ordinal])
    parts: dict[str, ir.Table] = {}
    stop = total
    for name, share in reversed(shares.items()):
        start = stop - round(total * share)
        parts[name] = ranked.filter((ranked.rank >= start) & (ranked.rank < stop))
        stop = start
    return {"train": ranked.filter(ranked.rank < stop), **parts}


def by_bounds(ends: ir.Table, valid_from: float, test_from: float) -> dict[str, ir.Table]:
    """Sessions whose last event is before ``valid_from``, before ``test_from``, or later."""
    return {
        "train": ends.filter(ends.time < valid_from),
        "valid": ends.filter((ends.time >= valid_from) & (ends.time < test_from)),
        "test": ends.filter(ends.time >= test_from),
    }


def bound(key: str, value: float | str, time_format: str) -> float | int:
    """A recipe's time or date in the unit of the events' times.

    Raises:
        UserError: it is not a date though times are dates, or not a number though they are numbers.
    """
    if time_format != "datetime":
        try:
            return float(value) if time_format == "number" else int(value)
        except ValueError as error:
            raise UserError(f"{key}: must be a number like the time column, not '{value}'") from error
    try:
        moment = datetime.fromisoformat(str(value).replace("Z", "+00:00"))
    except ValueError as error:
        raise UserError(f"{key}: must be a date such as 2024-05-31 or 2024-05-31T12:00, not '{value}'") from error
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    difference = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (difference.days * 86400 + difference.seconds) * MICROSECONDS + difference.microseconds


def split(
    engine: Engine, placed: ir.Table, settings: Split, time_format: str, valid_given: bool
) -> dict[str, ir.Table]:
    """The events of train, valid and test (a session may be in several under `leave_one_out`).

    Args:
        placed: events with `place` and `length`.
        valid_given: `files`: there are valid files, so that none is cut from training.
    """
    if settings.method == "leave_one_out":
        return leave_one_out(placed)
    ends = last_events(placed)
    if settings.method == "files":
        training = ends.filter(ends.part == TRAIN)
        parts = {"train": training, "valid": ends.filter(ends.part == VALID)}
        if not valid_given:
            parts = by_share(engine, training, {"valid": settings.valid_share})
        parts["test"] = ends.filter(ends.part == TEST)
    elif settings.valid_from is not None and settings.test_from is not None:
        bounds = [bound(f"split.{key}", getattr(settings, key), time_format) for key in ("valid_from", "test_from")]
        if bounds[0] >= bounds[1]:
            raise UserError("split.valid_from must be before split.test_from")
        parts = by_bounds(ends, *bounds)
    else:
        parts = by_share(engine, ends, {"valid": settings.valid_share, "test": settings.test_share})
    numbered = [part.select("session", split=ibis.literal(SPLITS.index(name), "int8")) for name, part in parts.items()]
    # Joined once: every event is in one split only.
    assigned = engine.keep("assigned", placed.join(ibis.union(*numbered), "session"))
    return {
        name: assigned.filter(assigned.split == number).mutate(stored=assigned.length)
        for number, name in enumerate(SPLITS)
    }

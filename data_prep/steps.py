"""The preparation's steps as dataframe expressions: each takes a table and gives one, whatever engine runs them.

An *event* has `ordinal` (its place in the input, unique), `part` (which files it came from), `session` and `item`
(codes: the ordinal of the first event that has them) and `time`.
"""

from __future__ import annotations

from collections.abc import Sequence

import ibis
import ibis.expr.datatypes as dt
import ibis.expr.types as ir

from data_prep.engine import Engine, finite
from data_prep.sources import TRAIN


def judged(engine: Engine, raw: ir.Table, time_format: str) -> ir.Table:
    """Raw rows with `parsed` (the time as a number) and `reason`: why a row is bad, null for a good one."""
    time = raw.time
    if not isinstance(time.type(), dt.String):
        parsed = time
    elif time_format == "datetime":
        parsed = engine.microseconds(time)
    elif time_format == "integer":
        # Engines round "1.5" when they cast it.
        parsed = ibis.ifelse(time.re_search(r"^\s*[+-]?[0-9]+\s*\z"), time, ibis.null("string")).try_cast("int64")
    else:
        parsed = engine.number(time)
    if isinstance(parsed.type(), dt.Floating):
        parsed = ibis.ifelse(finite(parsed), parsed, ibis.null("float64"))

    def absent(column: ir.Column) -> ir.BooleanValue:
        empty = column == "" if isinstance(column.type(), dt.String) else ibis.literal(False)
        return column.isnull() | empty

    within = {}
    if "within" in raw.columns:
        number = engine.number(raw.within)
        within = {"parsed_within": ibis.ifelse(finite(number), number, ibis.null("float64"))}
    without_place = [(ibis._[name].isnull(), "time_within is not a number") for name in within]
    return raw.mutate(parsed=parsed, **within).mutate(
        reason=ibis.cases(
            (absent(raw.session), "session missing"),
            (absent(raw.item), "item missing"),
            (absent(raw.time), "time missing"),
            (ibis._.parsed.isnull(), f"time is not a {time_format}"),
            *without_place,
            else_=ibis.null("string"),
        )
    )


def ordered_within(engine: Engine, good: ir.Table) -> ir.Table:
    """Events numbered anew, so that `time_within` comes before file and line wherever times are equal."""
    return engine.ranked("ranked_within", good, "ordinal", [good.parsed_within, good.ordinal])


def deduplicated(good: ir.Table) -> ir.Table:
    """The first of the events that agree in session, item and time."""
    within = ["parsed_within"] if "parsed_within" in good.columns else []
    first = good.group_by("part", "session", "item", "parsed", *within).agg(ordinal=good.ordinal.min())
    return good.semi_join(first, "ordinal")


def codes(good: ir.Table, column: str, *by: str) -> ir.Table:
    """A code for every value of ``column`` (within ``by``): the ordinal of its first event."""
    return good.group_by(*by, column).agg(code=good.ordinal.min())


def coded(good: ir.Table, sessions: ir.Table, items: ir.Table) -> ir.Table:
    """Events with codes in place of text: everything after this handles integers only."""
    joined = good.join(sessions, ["part", "session"]).rename(session_code="code")
    joined = joined.join(items, "item").rename(item_code="code")
    return joined.select("ordinal", "part", session="session_code", item="item_code", time="parsed")


def cut_by_gap(events: ir.Table, gap: float) -> ir.Table:
    """Events of users, with the number of the session within the user: a pause longer than ``gap`` starts one."""
    previous = events.time.lag().over(group_by=["part", "session"], order_by=["time", "ordinal"])
    starts = events.mutate(starts=((events.time - previous) > gap).fill_null(False).cast("int64"))
    number = starts.starts.cumsum(group_by=["part", "session"], order_by=["time", "ordinal"])
    return starts.mutate(number=number).drop("starts")


def gap_sessions(numbered: ir.Table, users: ir.Table) -> ir.Table:
    """The sessions cut from users: their code, and `key`: user, colon, number."""
    first = numbered.group_by("part", "session", "number").agg(code=numbered.ordinal.min())
    named = first.join(users.select("part", user="session", session="code"), ["part", "session"])
    return named.mutate(key=named.user + ":" + named.number.cast("string"))


def with_gap_sessions(numbered: ir.Table, sessions: ir.Table, event_features: Sequence[str] = ()) -> ir.Table:
    """Events whose `session` is the code of the session cut from the user."""
    joined = numbered.join(sessions.select("part", "session", "number", "code"), ["part", "session", "number"])
    return joined.select("ordinal", "part", "item", "time", *event_features, session="code")


def without_short(events: ir.Table, shortest: int) -> ir.Table:
    """Events of sessions of at least ``shortest`` events."""
    lengths = events.group_by("session").agg(events=events.count())
    return events.semi_join(lengths.filter(lengths.events >= shortest), "session")


def without_rare(events: ir.Table, support: int, exempt: ir.Table | None) -> ir.Table:
    """Training events of items with at least ``support`` of them; events of given valid and test files stay.

    Args:
        exempt: `item` (codes) of the items that stay however few events they have.
    """
    training = events.filter(events.part == TRAIN)
    counts = training.group_by("item").agg(events=training.count())
    frequent = counts.filter(counts.events >= support).select("item")
    if exempt is not None:
        frequent = frequent.union(exempt)
    return training.semi_join(frequent, "item").union(events.filter(events.part != TRAIN))


def k_core(
    engine: Engine, events: ir.Table, support: int, shortest: int, exempt: ir.Table | None = None
) -> tuple[ir.Table, int]:
    """Drop rare items and short sessions again and again until neither is left; also the number of rounds.

    Args:
        exempt: as of `without_rare`.
    """
    before = _count(engine, events)
    rounds = 0
    while True:
        rounds += 1
        filtered = without_short(without_rare(events, support, exempt), shortest)
        kept = engine.keep(f"core_{rounds}", filtered)
        if rounds > 1:
            engine.drop(f"core_{rounds - 1}")
        events, after = kept, _count(engine, kept)
        if after == before:
            return events, rounds
        before = after


def _count(engine: Engine, events: ir.Table) -> int:
    return engine.row(events.agg(events=events.count()))["events"]


def placed(events: ir.Table) -> ir.Table:
    """Events with their `place` in the session, from 0, by (time, file, line), and the session's `length`."""
    order = ibis.window(group_by="session", order_by=["time", "ordinal"])
    return events.mutate(
        place=ibis.row_number().over(order).cast("int64"),
        length=events.count().over(ibis.window(group_by="session")).cast("int64"),
    )


def totals(events: ir.Table) -> ir.Table:
    """How many sessions, events and items there are."""
    # The first events of sessions are counted where they are known: cheaper than distinct sessions.
    sessions = (events.place == 0).sum().fill_null(0) if "place" in events.columns else events.session.nunique()
    return events.agg(sessions=sessions.cast("int64"), events=events.count(), items=events.item.nunique())

"""Pseudo-random orders that are the same on every engine: ids of items, numbers of sessions."""

from __future__ import annotations

import ibis
import ibis.expr.types as ir


def _order(seed: int, token: ir.StringColumn) -> ir.StringColumn:
    """md5 of `seed:token` in hexadecimal: not a popularity order, so that contiguous row shards carry equal load."""
    return (ibis.literal(f"{seed}:") + token).hexdigest("md5")


def catalog(splits: dict[str, ir.Table], items: ir.Table, seed: int) -> ir.Table:
    """Every item of any split: `item` (code), `token`, `id` from 1 on, `popularity` (its training events)."""
    used = [events.select("item") for events in splits.values()]
    distinct = ibis.union(*used).distinct()
    named = distinct.join(items.select(token="item", item="code"), "item")
    digests = named.mutate(digest=_order(seed, named.token))
    id_ = ibis.row_number().over(order_by=[digests.digest, digests.token]).cast("int64") + 1
    numbered = digests.mutate(id=id_).drop("digest")
    train = splits["train"]
    counts = train.group_by("item").agg(popularity=train.count())
    joined = numbered.left_join(counts, "item")
    return joined.select("item", "token", "id", popularity=joined.popularity.fill_null(0).cast("int64"))


def session_numbers(events: ir.Table, sessions: ir.Table, seed: int) -> ir.Table:
    """The split's sessions numbered from 0 in the order of md5 of `seed:key`; ties by key, then by first event.

    Args:
        events: of one split.
        sessions: `code` and `key` of every session.
    """
    first_events = events.filter(events.place == 0).select("session")
    present = sessions.select("key", session="code").semi_join(first_events, "session")
    digests = present.mutate(digest=_order(seed, present.key))
    order = [digests.digest, digests.key, digests.session]
    return digests.mutate(number=ibis.row_number().over(order_by=order).cast("int64")).select("session", "number")


def numbered_events(events: ir.Table, numbers: ir.Table, catalog: ir.Table, streams: int) -> ir.Table:
    """What the writer needs, in its order: stream by stream, session by session, event by event."""
    joined = events.join(numbers, "session").join(catalog.select("item", "id"), "item")
    table = joined.select("number", "place", "time", item="id", stream=joined.number % streams)
    return table.order_by("stream", "number", "place").select("stream", "number", "item", "time")

"""Pseudo-random orders that are the same on every engine: ids of items, numbers of sessions."""

from __future__ import annotations

from collections.abc import Sequence

import ibis
import ibis.expr.types as ir

from data_prep.engine import Engine


def _order(seed: int, token: ir.StringColumn) -> ir.StringColumn:
    """md5 of `seed:token` in hexadecimal: not a popularity order, so that contiguous row shards carry equal load."""
    return (ibis.literal(f"{seed}:") + token).hexdigest("md5")


def catalog(
    engine: Engine, splits: dict[str, ir.Table], items: ir.Table, seed: int, known: ir.Table | None, known_items: int
) -> ir.Table:
    """Every item of any split: `item` (code), `token`, `id` from 1 on, `popularity` (its training events).

    Args:
        known: `token`, `id` and `popularity` of the ``known_items`` items that a data set has already. They keep their
            ids, the others get those that follow; popularity is the sum. None: there is no data set yet.
    """
    used = [events.select("item") for events in splits.values()]
    distinct = ibis.union(*used).distinct()
    named = distinct.join(items.select(token="item", item="code"), "item")
    fresh = named if known is None else named.anti_join(known, "token")
    digests = fresh.mutate(digest=_order(seed, fresh.token))
    ranked = engine.ranked("ranked_items", digests, "rank", [digests.digest, digests.token])
    numbered = ranked.select("item", "token", id=ranked.rank + 1 + known_items, before=ibis.literal(0, "int64"))
    if known is not None:
        there = named.join(known, "token").rename(before="popularity")
        numbered = numbered.union(there.select("item", "token", "id", "before"))
    train = splits["train"]
    counts = train.group_by("item").agg(added=train.count())
    joined = numbered.left_join(counts, "item")
    popularity = joined.before + joined.added.fill_null(0).cast("int64")
    return joined.select("item", "token", "id", popularity=popularity)


def session_numbers(
    engine: Engine, split: str, events: ir.Table, sessions: ir.Table, seed: int, first: int = 0
) -> ir.Table:
    """The split's sessions numbered from ``first`` in the order of md5 of `seed:key`; ties by key, then by first event.

    Args:
        events: of the split called ``split``.
        sessions: `code` and `key` of every session.
    """
    first_events = events.filter(events.place == 0).select("session")
    present = sessions.select("key", session="code").semi_join(first_events, "session")
    digests = present.mutate(digest=_order(seed, present.key))
    order = [digests.digest, digests.key, digests.session]
    ranked = engine.ranked(f"ranked_{split}", digests, "rank", order)
    return ranked.select("session", number=ranked.rank + first)


def numbered_events(
    events: ir.Table,
    numbers: ir.Table,
    catalog: ir.Table,
    streams: int,
    shard_sessions: int,
    first: int = 0,
    event_features: Sequence[str] = (),
) -> ir.Table:
    """What the writer needs: each event's `number` (of its session), `place`, `time`, `item` (id), and where it goes.

    Columns of ``event_features`` stay as they are.

    Session n is in stream n mod ``streams``; ``shard_sessions`` that follow each other there make a `shard`, counted
    from session number ``first`` on.
    """
    joined = events.join(numbers, "session").join(catalog.select("item", "id"), "item")
    number = joined.number
    shard = (number - first) // (streams * shard_sessions)
    named = ("number", "place", "time", *event_features)
    return joined.select(*named, item="id", stream=number % streams, shard=shard)

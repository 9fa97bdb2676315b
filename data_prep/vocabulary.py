"""Pseudo-random orders that are the same on every engine: ids of items, numbers of sessions."""

from __future__ import annotations

import ibis
import ibis.expr.types as ir

from data_prep.engine import Engine


def _order(seed: int, token: ir.StringColumn) -> ir.StringColumn:
    """md5 of `seed:token` in hexadecimal: not a popularity order, so that contiguous row shards carry equal load."""
    return (ibis.literal(f"{seed}:") + token).hexdigest("md5")


def catalog(engine: Engine, splits: dict[str, ir.Table], items: ir.Table, seed: int) -> ir.Table:
    """Every item of any split: `item` (code), `token`, `id` from 1 on, `popularity` (its training events)."""
    used = [events.select("item") for events in splits.values()]
    distinct = ibis.union(*used).distinct()
    named = distinct.join(items.select(token="item", item="code"), "item")
    digests = named.mutate(digest=_order(seed, named.token))
    ranked = engine.ranked("ranked_items", digests, "rank", [digests.digest, digests.token])
    numbered = ranked.mutate(id=ranked.rank + 1).drop("digest", "rank")
    train = splits["train"]
    counts = train.group_by("item").agg(popularity=train.count())
    joined = numbered.left_join(counts, "item")
    return joined.select("item", "token", "id", popularity=joined.popularity.fill_null(0).cast("int64"))


def session_numbers(engine: Engine, split: str, events: ir.Table, sessions: ir.Table, seed: int) -> ir.Table:
    """The split's sessions numbered from 0 in the order of md5 of `seed:key`; ties by key, then by first event.

    Args:
        events: of the split called ``split``.
        sessions: `code` and `key` of every session.
    """
    first_events = events.filter(events.place == 0).select("session")
    present = sessions.select("key", session="code").semi_join(first_events, "session")
    digests = present.mutate(digest=_order(seed, present.key))
    order = [digests.digest, digests.key, digests.session]
    return engine.ranked(f"ranked_{split}", digests, "number", order).select("session", "number")


def numbered_events(
    events: ir.Table, numbers: ir.Table, catalog: ir.Table, streams: int, shard_sessions: int
) -> ir.Table:
    """What the writer needs: each event's `number` (of its session), `place`, `time`, `item` (id), and where it goes.

    Session n is number n // ``streams`` of stream n mod ``streams``; ``shard_sessions`` of them make a `shard`.
    """
    joined = events.join(numbers, "session").join(catalog.select("item", "id"), "item")
    number = joined.number
    return joined.select(
        "number", "place", "time", item="id", stream=number % streams, shard=number // (streams * shard_sessions)
    )

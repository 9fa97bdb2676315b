"""Orders that are the same on every engine, and even out the load of ranks: ids of items, numbers of sessions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_

import ibis
import ibis.expr.types as ir

from data_prep.engine import Engine

# A place among the items fits in as many.
_PLACE_BITS = 31


def _order(seed: int, token: ir.StringColumn) -> ir.StringColumn:
    """md5 of `seed:token` in hexadecimal: not a popularity order, so that contiguous row shards carry equal load."""
    return (ibis.literal(f"{seed}:") + token).hexdigest("md5")


def _reversed_bits(place: ir.IntegerColumn) -> ir.IntegerColumn:
    """The bits of ``place`` in the other order (van der Corput's sequence).

    Of numbers in this order every stretch has its share of each stretch of places.
    """
    return reduce(or_, (((place >> bit) & 1) << (_PLACE_BITS - 1 - bit) for bit in range(_PLACE_BITS)))


def catalog(
    engine: Engine,
    splits: dict[str, ir.Table],
    items: ir.Table,
    seed: int,
    known: ir.Table | None,
    known_items: int,
    item_order: str = "md5",
) -> ir.Table:
    """Every item of any split: `item` (code), `token`, `id` from 1 on, `popularity` (its training events).

    Args:
        known: `token`, `id` and `popularity` of the ``known_items`` items that a data set has already. They keep their
            ids, the others get those that follow; popularity is the sum. None: there is no data set yet.
        item_order: of new ids. `md5`, of seed and token; or `balanced`, in which every rank's rows hold items of every
            popularity alike, by these splits' training events, whatever the number of ranks.
    """
    used = [events.select("item") for events in splits.values()]
    distinct = ibis.union(*used).distinct()
    named = distinct.join(items.select(token="item", item="code"), "item")
    train = splits["train"]
    counts = train.group_by("item").agg(added=train.count())
    fresh = named if known is None else named.anti_join(known, "token")
    ordered = fresh.mutate(digest=_order(seed, fresh.token))
    order = [ordered.digest, ordered.token]
    if item_order == "balanced":
        counted = ordered.left_join(counts, "item").select("item", "token", "digest", added=ibis._.added.fill_null(0))
        falling = [ibis.desc(counted.added), counted.digest, counted.token]
        ordered = engine.ranked("items_by_popularity", counted, "place", falling)
        order = [_reversed_bits(ordered.place)]
    ranked = engine.ranked("ranked_items", ordered, "rank", order)
    numbered = ranked.select("item", "token", id=ranked.rank + 1 + known_items, before=ibis.literal(0, "int64"))
    if known is not None:
        there = named.join(known, "token").rename(before="popularity")
        numbered = numbered.union(there.select("item", "token", "id", "before"))
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

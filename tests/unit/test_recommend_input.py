"""Sessions to recommend for, as lines of JSON: ids, event features, and what is wrong with a line."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest

from gru4recf_dist.data.batches import pack_histories
from gru4recf_dist.errors import UserError
from gru4recf_dist.recommend_input import Session, SessionReader, to_block
from tests.support.synthetic import EVENT_FEATURES, random_sessions, write_dataset

KIND, PRICE, GAP = EVENT_FEATURES


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data"))
    return folder, write_dataset(folder, random_sessions(0, 20, 9), event_features=True)


def read(data, *lines: dict, features=EVENT_FEATURES) -> tuple[list[Session], SessionReader]:
    reader = SessionReader(*data, features)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    return list(reader.read(io.BytesIO(text.encode()), "in.jsonl")), reader


def test_values_are_encoded_as_in_preparation(data):
    line = {
        "items": ["item-3", "item-1", "item-2", "item-1"],
        "events": {"type": ["type-2", None, "type-4", "never seen"], "price": [3, None, "5", -1.0]},
        "times": [10, 10.5, 15, 25],
        "user": "u",
    }
    (session,), reader = read(data, line)
    assert session.line == line and session.items.tolist() == [3, 1, 2, 1]
    assert session.event_features["type"].tolist() == [2, 0, 4, 1]
    # Mean 3 and deviation 2; the bounds of the buckets are 1 and 10.
    np.testing.assert_array_equal(session.event_features["price"], np.array([0, np.nan, 1, -2], np.float32))
    assert session.event_features["gap"].tolist() == [1, 2, 3, 4]
    assert (reader.counts.unknown_values, reader.counts.unknown_tokens, reader.counts.sessions) == (1, 0, 1)
    for feature in EVENT_FEATURES:
        assert session.event_features[feature.name].dtype == feature.dtype


def test_what_is_not_given_is_missing(data):
    (bare, partly), _ = read(data, {"items": ["item-3", "item-1"]}, {"items": ["item-3", "item-1"], "times": [1, None]})
    assert bare.event_features["type"].tolist() == [0, 0] and np.isnan(bare.event_features["price"]).all()
    # That an event is a session's first is known without its time.
    assert bare.event_features["gap"].tolist() == partly.event_features["gap"].tolist() == [1, 0]


def test_the_event_of_an_unknown_item_goes_with_it(data):
    line = {
        "items": ["item-3", "gone", "item-2", 5],
        "events": {"type": ["type-2", "type-3", "type-4", "type-2"]},
        "times": [0, 5, 9.5, 30],
    }
    (session,), reader = read(data, line)
    assert session.items.tolist() == [3, 2] and session.event_features["type"].tolist() == [2, 4]
    # The gap is counted from the known item before.
    assert session.event_features["gap"].tolist() == [1, 3]
    assert reader.counts.unknown_tokens == 2


def test_sessions_without_a_known_item_and_the_padding_pack_with_others(data):
    sessions, reader = read(data, {"items": []}, {"items": ["gone"], "times": [1]}, {"items": ["item-1"]})
    assert [len(session.items) for session in sessions] == [0, 0, 1] and reader.counts.empty_sessions == 2
    batch = pack_histories(to_block([reader.padding(), sessions[2]]), 50, EVENT_FEATURES)
    assert batch.items.tolist() == [0, 1]
    assert batch.event_features["gap"].tolist() == [0, 1] and batch.event_features["type"].tolist() == [0, 0]


def test_dates_are_iso_text_or_seconds(data):
    gap = GAP.model_copy(update={"dates": True})
    text = ["2024-05-31T10:00:00Z", "2024-05-31 12:00:00.5+02:00", "2024-05-31T10:00:05.5", "2024-06-01"]
    lines = [{"items": ["item-1"] * 4, "times": times} for times in (text, [100, 100.5, 105.5, 90000])]
    for session in read(data, *lines, features=[gap])[0]:
        assert session.event_features == {"gap": pytest.approx([1, 2, 3, 4])}


def test_keys_that_the_model_does_not_use_may_hold_anything(data):
    line = {"items": ["item-1"], "events": "none", "times": "now"}
    (session,), _ = read(data, line, features=[])
    assert session.event_features == {} and session.line == line
    (session,), _ = read(data, {**line, "events": {"price": 3}}, features=[KIND])
    assert session.event_features["type"].tolist() == [0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"events": []}, "in.jsonl:1: 'events' must be an object of lists, by the name of the event feature"),
        ({"events": {"type": ["a"]}}, "in.jsonl:1: events.type must be a list of 2 values, one for each item"),
        ({"events": {"price": 3}}, "in.jsonl:1: events.price must be a list of 2 values"),
        ({"events": {"price": [1, "x"]}}, 'in.jsonl:1: events.price: "x" is not a number'),
        ({"events": {"price": [1, [2]]}}, "in.jsonl:1: events.price: [2] is not a number"),
        (
            {"events": {"typ": ["a", "b"]}},
            "in.jsonl:1: events.typ: no such event feature (there are: type, price, gap)",
        ),
        ({"times": [1]}, "in.jsonl:1: times must be a list of 2 values"),
        ({"times": [1, "noon"]}, 'in.jsonl:1: times: "noon" is not a number'),
    ],
)
def test_wrong_lines_are_one_clear_error(data, more, message):
    with pytest.raises(UserError) as error:
        read(data, {"items": ["item-1", "item-2"], **more})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_wrong_date_is_named(data):
    gap = GAP.model_copy(update={"dates": True})
    with pytest.raises(UserError, match=r'in\.jsonl:1: times: "2024-13-01" is not a date'):
        read(data, {"items": ["item-1"], "times": ["2024-13-01"]}, features=[gap])

"""Event features: encoding of raw values, packing, and the encoder against a padded model of torch's own modules."""

from __future__ import annotations

import bisect
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn.utils.rnn import pad_packed_sequence, pad_sequence

from gru4recf_dist import recommender
from gru4recf_dist.config import ModelConfig
from gru4recf_dist.data import columns
from gru4recf_dist.data.batches import pack_histories, pack_micro_batches, pack_queries, pack_training
from gru4recf_dist.data.blocks import Block
from gru4recf_dist.data.event_columns import EventFeature, gap_buckets, log_edges, scaled
from gru4recf_dist.model.encoder import SessionEncoder
from gru4recf_dist.model.features import FeatureSpec
from gru4recf_dist.model.subnets import event_subnet, subnet_of_parameter
from tests.support.synthetic import EVENT_FEATURES, event_values, random_sessions, write_dataset

D, H = 4, 6


# -- raw values -------------------------------------------------------------------------------------------------------


def _gap(edges: list[float], dates: bool = False) -> EventFeature:
    return EventFeature(name="gap", kind="time_gap", size=len(edges) + 3, edges=edges, dates=dates)


def test_gaps_fall_into_the_bucket_between_their_bounds():
    edges = [1.0, 10.0, 100.0]
    generator = np.random.default_rng(0)
    lengths = np.array([1, 5, 2, 9, 3])
    times = [np.cumsum(generator.choice([0, 0.5, 1, 9.99, 10, 99, 100, 1e6], n)) for n in lengths]
    expected = []
    for session in times:
        gaps = [b - a for a, b in pairwise(session)]
        expected += [1, *(2 + bisect.bisect_right(edges, gap) for gap in gaps)]
    found = gap_buckets(_gap(edges), np.concatenate(times), lengths)
    assert found.dtype == np.int32 and found.tolist() == expected and set(expected) == {1, 2, 3, 4, 5}


def test_gaps_of_large_whole_times_are_exact_and_those_of_dates_are_in_seconds():
    start = 1_700_000_000_000_000_000  # nanoseconds: a float64 tells no two of them apart that are 100 from each other
    times = np.array([start, start + 99, start + 199, start + 300])
    assert gap_buckets(_gap([100.0, 101.0]), times, np.array([4])).tolist() == [1, 2, 3, 4]
    micro = np.array([0, 999_999, 2_000_000], np.int64)
    assert gap_buckets(_gap([1.0], dates=True), micro, np.array([3])).tolist() == [1, 2, 3]


def test_unknown_times_give_unknown_gaps():
    times = np.array([5.0, math.nan, 7.0, 8.0, math.nan, 9.0])
    assert gap_buckets(_gap([100.0]), times, np.array([4, 2])).tolist() == [1, 0, 0, 2, 1, 0]
    assert gap_buckets(_gap([1.0]), np.empty(0), np.array([0])).tolist() == []
    # A session that goes back in time.
    assert gap_buckets(_gap([1.0]), np.array([5.0, 3.0]), np.array([2])).tolist() == [1, 2]


def test_numbers_are_scaled_and_what_float32_cannot_hold_is_missing():
    plain = EventFeature(name="a", kind="float", size=1)
    standard = EventFeature(name="a", kind="float", size=1, mean=10.0, deviation=4.0)
    numbers = np.array([12.0, math.nan, -1e300, math.inf])
    for feature, first in ((plain, 12.0), (standard, 0.5)):
        found = scaled(feature, numbers)
        assert found.dtype == np.float32 and found[0] == first and np.isnan(found[1:]).all()


@pytest.mark.parametrize(("bounds", "buckets"), [((1, 1000), 5), ((0.25, 86400), 16), ((1, 2), 2), ((3, 3), 8)])
def test_bounds_rise_by_the_same_factor(bounds, buckets):
    edges = log_edges(*bounds, buckets)
    assert edges[0] == bounds[0] and len(edges) == (1 if bounds[0] == bounds[1] else buckets - 1)
    ratios = [b / a for a, b in pairwise(edges)]
    assert ratios == pytest.approx([(bounds[1] / bounds[0]) ** (1 / max(buckets - 2, 1))] * len(ratios), rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "items"},
        {"name": "../x"},
        {"name": "A"},
        {"name": ""},
        {"kind": "vector"},
        {"size": 0},
        {"size": 7},
        {"edges": [1.0, 1.0]},
        {"edges": [2.0, 1.0]},
        {"edges": [math.nan, 1.0]},
        {"edges": [1.0, math.inf]},
        {"kind": "token", "edges": []},
        {"more": 1},
    ],
    ids=str,
)
def test_what_a_manifest_cannot_say_of_an_event_feature(changes):
    good = {"name": "gap", "kind": "time_gap", "size": 5, "edges": [1.0, 2.0]}
    EventFeature.model_validate(good)
    with pytest.raises(ValidationError):
        EventFeature.model_validate({**good, **changes})


# -- packing ----------------------------------------------------------------------------------------------------------


def _block(lengths: list[int]) -> tuple[Block, list[dict[str, np.ndarray]]]:
    """Sessions whose every event has an item of its own, and their features."""
    items = np.split(np.arange(1, sum(lengths) + 1, dtype=np.int32), np.cumsum(lengths)[:-1])
    values = [event_values(number, session) for number, session in enumerate(items)]
    features = {name: np.concatenate([each[name] for each in values]) for name in values[0]}
    sessions = np.arange(len(lengths), dtype=np.int64)
    return Block(np.concatenate(items), np.array(lengths, np.int32), sessions, event_features=features), values


def _check_features_of_items(items: torch.Tensor, found: dict[str, torch.Tensor], block: Block) -> None:
    """Each packed event has the features of the event that its item belongs to."""
    assert {name: values.dtype for name, values in found.items()} == {
        "type": torch.int64,
        "price": torch.float32,
        "gap": torch.int64,
    }
    for name, values in found.items():
        np.testing.assert_array_equal(values.numpy(), block.event_features[name][items.numpy() - 1])


@pytest.mark.parametrize(("max_length", "context"), [(50, 10), (4, 1), (3, 0), (7, 6)])
def test_packed_events_keep_their_own_features(max_length, context):
    block, _ = _block([1, 13, 2, 5, 1, 9])
    training = pack_training(block, max_length, context, EVENT_FEATURES)
    _check_features_of_items(training.items, training.event_features, block)
    for part in pack_micro_batches(block, 3, max_length, context, EVENT_FEATURES):
        if part.sessions:
            assert part.event_features["type"].shape == part.items.shape
    for every_position in (False, True):
        queries = pack_queries(block, max_length, context, every_position, EVENT_FEATURES)
        _check_features_of_items(queries.items, queries.event_features, block)
    histories = pack_histories(block, max_length, EVENT_FEATURES)
    _check_features_of_items(histories.items, histories.event_features, block)


def test_only_the_wanted_features_are_packed():
    block, _ = _block([3, 4])
    assert list(pack_training(block, 9, 0, EVENT_FEATURES[1:2]).event_features) == ["price"]
    assert pack_training(block, 9, 0).event_features == {}


def test_a_batch_without_a_target_has_one_event_of_known_numbers():
    single, _ = _block([1])
    for block in (single, columns.concatenate([])):
        for batch in (
            pack_training(block, 9, 0, EVENT_FEATURES),
            pack_queries(block, 9, 0, every_position=True, event_features=EVENT_FEATURES),
        ):
            found = {name: (values.dtype, values.tolist()) for name, values in batch.event_features.items()}
            assert found == {"type": (torch.int64, [0]), "price": (torch.float32, [0.0]), "gap": (torch.int64, [0])}


def test_features_stay_with_their_events_when_sessions_are_moved_about():
    block, values = _block([3, 1, 4, 2, 6])
    order = np.array([4, 1, 3])

    def check(moved: Block, numbers: list[int]) -> None:
        assert moved.sessions.tolist() == numbers
        for name, column in moved.event_features.items():
            np.testing.assert_array_equal(column, np.concatenate([values[number][name] for number in numbers]))

    check(columns.select(block, order), [4, 1, 3])
    check(columns.slice_sessions(block, 1, 4), [1, 2, 3])
    lost = Block(np.empty(0, np.int32), np.zeros(2, np.int32), np.full(2, -1, np.int64))
    joined = columns.concatenate([lost, columns.slice_sessions(block, 2, 4), lost])
    np.testing.assert_array_equal(joined.event_features["gap"], np.concatenate([values[2]["gap"], values[3]["gap"]]))
    streams = [columns.slice_sessions(block, 0, 2), columns.slice_sessions(block, 2, 5)]
    for part, numbers in zip(columns.interleave(streams, 1, 3), ([0, 2], [1, 3], [4]), strict=True):
        check(part, numbers)


# -- the encoder ------------------------------------------------------------------------------------------------------

KINDS = {
    "token": FeatureSpec("type", "token", 5),
    "time_gap": FeatureSpec("gap", "token", 5, dim=3),
    "float": FeatureSpec("price", "float", 1, missing=True),
}


class PaddedReference(nn.Module):
    """An item GRU and a feature GRU on padded sessions, of torch's modules; event features go into one of them."""

    def __init__(self, specs: list[FeatureSpec], of_items: bool, with_features: bool) -> None:
        super().__init__()
        self.specs, self.of_items = specs, of_items
        width = sum(spec.dim or D for spec in specs)
        self.tables = nn.ModuleDict(
            {f"of {s.name}": nn.Embedding(s.size, s.dim or D) for s in specs if s.kind == "token"}
        )
        self.slopes = nn.ParameterDict({s.name: torch.zeros(s.dim or D) for s in specs if s.kind == "float"})
        self.missing = nn.ParameterDict({s.name: torch.zeros(s.dim or D) for s in specs if s.kind == "float"})
        self.brands = nn.Embedding(7, D)
        self.item_gru = nn.GRU(D + (width if of_items else 0), H, bias=False, batch_first=True)
        self.feature_gru = None
        if with_features:
            self.feature_gru = nn.GRU(D + (0 if of_items else width), H, bias=False, batch_first=True)
        self.dense = nn.Linear((2 if with_features else 1) * H, D)

    def forward(self, rows: torch.Tensor, brands: torch.Tensor, events: dict[str, torch.Tensor]) -> torch.Tensor:
        """[B, L, D], [B, L], [B, L] each -> [B, L, D]."""
        parts = []
        for spec in self.specs:
            values = events[spec.name]
            if spec.kind == "token":
                parts.append(self.tables[f"of {spec.name}"](values))
                continue
            known = torch.where(values.isnan(), 0.0, values)[..., None] * self.slopes[spec.name]
            parts.append(torch.where(values.isnan()[..., None], self.missing[spec.name], known))
        described = torch.cat(parts, dim=-1)
        items = torch.cat([rows, described], dim=-1) if self.of_items else rows
        hidden = self.item_gru(items)[0]
        if self.feature_gru is not None:
            features = self.brands(brands)
            features = features if self.of_items else torch.cat([features, described], dim=-1)
            hidden = torch.cat([hidden, self.feature_gru(features)[0]], dim=-1)
        return self.dense(hidden)


def _take_over(encoder: SessionEncoder, reference: PaddedReference) -> None:
    """Random values for both, the same: by hand, since nothing is called alike."""
    inputs = encoder.event_inputs.embedding
    pairs = [(encoder.dense_layer.weight, reference.dense.weight), (encoder.dense_layer.bias, reference.dense.bias)]
    grus = [(encoder.item_gru_layers, reference.item_gru)]
    if reference.feature_gru is not None:
        grus.append((encoder.feature_gru_layers, reference.feature_gru))
        brands = encoder.feature_embed_layer.token_embedding_table["item"].embedding.weight
        pairs.append((brands, reference.brands.weight))
    pairs += [(getattr(a, n), getattr(b, n)) for a, b in grus for n in ("weight_ih_l0", "weight_hh_l0")]
    if "of type" in reference.tables:
        pairs.append((inputs.token_embedding_table["item"].embedding.weight, reference.tables["of type"].weight))
    if "of gap" in reference.tables:
        pairs.append((inputs.sized_token_tables[0].weight, reference.tables["of gap"].weight))
    if "price" in reference.slopes:
        pairs.append((inputs.float_embedding_table["item"].embedding.weight, reference.slopes["price"]))
        pairs.append((next(iter(inputs.missing_vectors.values())), reference.missing["price"]))
    assert len(pairs) == len(list(encoder.parameters()))
    generator = torch.Generator().manual_seed(0)
    for ours, theirs in pairs:
        theirs.data.copy_(torch.randn(theirs.shape, generator=generator))
        ours.data.copy_(theirs.data.view(ours.shape))


@pytest.mark.parametrize("kinds", [["token"], ["time_gap"], ["float"], ["token", "time_gap", "float"]], ids="-".join)
@pytest.mark.parametrize(
    ("fusion", "event_input"),
    [("concat_output", "auto"), ("concat_output", "items"), ("item_only", "auto"), ("item_only", "items")],
)
def test_the_packed_encoder_equals_padded_modules_and_so_do_its_gradients(kinds, fusion, event_input):
    config = ModelConfig(fusion=fusion, embedding_size=D, hidden_size=H, dropout=0.0, event_input=event_input)
    specs = [KINDS[kind] for kind in kinds]
    brands = [FeatureSpec("brand", "token", 7)] if fusion == "concat_output" else []
    encoder = SessionEncoder(config, brands, events=specs).double()
    of_items = event_input == "items" or fusion == "item_only"
    # The encoder takes tokens before floats, whatever comes first in the data set.
    reference = PaddedReference(specs, of_items, bool(brands)).double()
    _take_over(encoder, reference)

    block, values = _block([3, 1, 7, 4, 4])
    packed = pack_histories(block, 50, EVENT_FEATURES)
    table = torch.randn(40, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    of_item = torch.arange(40) % 7
    ids, places = torch.unique(packed.items, return_inverse=True)
    queries = encoder(table[ids], {"brand": of_item[ids]}, places, packed.batch_sizes, packed.event_features)

    sessions = np.split(block.items.astype(np.int64), np.cumsum(block.lengths)[:-1])
    padded = pad_sequence([torch.from_numpy(session) for session in sessions], batch_first=True)
    events = {
        name: pad_sequence([torch.from_numpy(each[name]).to(torch.float64 if name == "price" else torch.int64)
                            for each in values], batch_first=True)
        for name in ("type", "price", "gap")
    }  # fmt: skip
    expected = reference(table[padded], of_item[padded], events)
    # The sequences of a packed batch stand in the order of falling length.
    order = np.argsort(-block.lengths, kind="stable")
    layout = nn.utils.rnn.PackedSequence(queries, packed.batch_sizes)
    ours, lengths = pad_packed_sequence(layout, batch_first=True)
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    torch.testing.assert_close(ours[mask], expected[order][mask], rtol=1e-12, atol=1e-12)

    weights = torch.randn(mask.sum(), D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (ours[mask] * weights).sum().backward()
    ours_gradient, table.grad = table.grad, None
    (expected[order][mask] * weights).sum().backward()
    torch.testing.assert_close(ours_gradient, table.grad, rtol=1e-10, atol=1e-12)
    theirs = sorted(float(parameter.grad.norm()) for parameter in reference.parameters() if parameter.grad is not None)
    mine = sorted(float(parameter.grad.norm()) for parameter in encoder.parameters())
    assert mine == pytest.approx(theirs, rel=1e-10) and all(norm > 0 for norm in mine)


def test_an_encoder_without_event_features_is_the_one_it_was():
    specs = [FeatureSpec("brand", "token", 7)]
    torch.manual_seed(0)
    plain = SessionEncoder(ModelConfig(), specs)
    torch.manual_seed(0)
    other = SessionEncoder(ModelConfig(event_input="items"), specs, events=[])
    assert list(plain.state_dict()) == list(other.state_dict())
    assert not any(name.startswith("event_inputs") for name in plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))


def test_dropout_of_features_acts_on_event_features_too():
    config = ModelConfig(
        fusion="item_only", embedding_size=D, hidden_size=H, dropout=0.5, dropout_embedding=0.0, dropout_feature=0.5
    )
    encoder = SessionEncoder(config, [], events=[KINDS["token"]])
    inputs = torch.ones(2000, D)
    torch.manual_seed(0)
    noisy = encoder.event_inputs.beside("item", inputs, {"type": torch.full((2000,), 3)})
    assert torch.equal(noisy[:, :D], inputs)
    assert abs(float((noisy[:, D:] == 0).float().mean()) - 0.5) < 0.03


@pytest.mark.parametrize(
    ("fusion", "auto", "items", "features"),
    [
        ("concat_output", "feature", "item", "feature"),
        ("weighted_sum", "feature", "item", "feature"),
        ("parallel", "feature", "item", "feature"),
        ("item_only", "item", "item", None),
        ("concat_input", "item", "item", None),
        ("feature_only", "feature", None, "feature"),
    ],
)
def test_the_subnet_that_sees_event_features(fusion, auto, items, features):
    for event_input, expected in (("auto", auto), ("items", items), ("features", features)):
        config = ModelConfig(fusion=fusion, event_input=event_input)
        assert event_subnet(config) == expected
        assert subnet_of_parameter(config, "event_inputs.embedding.missing_vectors.0") == expected
    if fusion == "weighted_sum":
        grouped = ModelConfig(fusion=fusion, feature_groups=[["a"], ["b"]])
        assert event_subnet(grouped) == "feature_0"


def test_values_of_events_that_training_may_never_meet_start_at_zero(tmp_path):
    manifest = write_dataset(str(tmp_path), random_sessions(0, 20, 9), event_features=True)
    config = ModelConfig(fusion="item_only", embedding_size=D, hidden_size=H)
    encoder = SessionEncoder(config, [], events=recommender.event_specs(config, manifest))
    table = encoder.event_inputs.embedding.token_embedding_table["item"].embedding.weight
    # Rows 0 to 4 are those of `type`, none and unknown first; 5 on those of `gap`: not known, first event, buckets.
    assert (table == 0).all(dim=1).nonzero()[:, 0].tolist() == [0, 1, 5]

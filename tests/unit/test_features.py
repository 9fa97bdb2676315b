"""Embedding of item features against loops over items, values and fields."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from gru4recf_dist.config import ModelConfig
from gru4recf_dist.model.encoder import SessionEncoder
from gru4recf_dist.model.features import FeatureEmbedding, FeatureSpec, kept_rows, new_parameters

D = 3
COLOUR = FeatureSpec("colour", "token", 4)
BRAND = FeatureSpec("brand", "token", 7)
TAGS = FeatureSpec("tags", "token_seq", 6)
WORDS = FeatureSpec("words", "token_seq", 5)
PRICE = FeatureSpec("price", "float", 1)
AGE = FeatureSpec("age", "float", 1)
IMAGE = FeatureSpec("image", "vector", 2)
VALUES = {
    "colour": torch.tensor([0, 3, 1, 2]),
    "brand": torch.tensor([0, 6, 6, 1]),
    "tags": torch.tensor([[0, 0, 0], [1, 5, 0], [4, 4, 2], [3, 0, 0]]),
    "words": torch.tensor([[0], [4], [0], [1]]),
    "price": torch.tensor([0.0, -1.5, 2.0, 0.25]),
    "age": torch.tensor([1.0, 0.0, 3.0, -2.0]),
    "image": torch.tensor([[0.0, 0.0], [1.0, -2.0], [0.5, 0.5], [3.0, 1.0]]),
}


def _embedding(specs: list[FeatureSpec], pooling: str = "mean") -> FeatureEmbedding:
    embedding = FeatureEmbedding(specs, D, pooling).double()
    generator = np.random.default_rng(0)
    for parameter in embedding.parameters():
        parameter.data = torch.from_numpy(generator.standard_normal(parameter.shape))
    return embedding


def test_fields_are_concatenated_as_token_then_token_seq_then_float_then_vector():
    mixed = [IMAGE, PRICE, TAGS, COLOUR, AGE, WORDS, BRAND]
    embedding = _embedding(mixed)
    state = embedding.state_dict()
    tokens = state["token_embedding_table.item.embedding.weight"]
    tags, words = (state[f"token_seq_embedding_table.item.{n}.weight"] for n in (0, 1))
    floats = state["float_embedding_table.item.embedding.weight"]
    (image,) = (weight for name, weight in state.items() if name.startswith("vector_projection."))
    assert [len(table) for table in (tokens, tags, words, floats)] == [4 + 7, 6, 5, 2]
    assert embedding.width == 7 * D

    output = embedding(VALUES)
    assert output.shape == (4, 7 * D)
    for item in range(4):
        real = [int(tag) for tag in VALUES["tags"][item] if tag]
        pooled = sum((tags[tag] for tag in real), torch.zeros(D).double()) / (len(real) + 1e-8)
        word = int(VALUES["words"][item, 0])
        parts = [
            tokens[int(VALUES["colour"][item])],
            # The second token field's rows follow the first's in the one table.
            tokens[4 + int(VALUES["brand"][item])],
            pooled,
            words[word] / (1 + 1e-8) if word else torch.zeros(D).double(),
            float(VALUES["price"][item]) * floats[0],
            float(VALUES["age"][item]) * floats[1],
            image @ VALUES["image"][item].double(),
        ]
        torch.testing.assert_close(output[item], torch.cat(parts), rtol=1e-14, atol=1e-14)


def test_fields_of_one_kind_keep_the_order_they_are_given_in():
    one, other = _embedding([COLOUR, BRAND]), _embedding([BRAND, COLOUR])
    rows = one.state_dict()["token_embedding_table.item.embedding.weight"]
    assert torch.equal(one(VALUES)[1], torch.cat([rows[3], rows[4 + 6]]))
    assert torch.equal(other(VALUES)[1], torch.cat([rows[6], rows[7 + 3]]))


@pytest.mark.parametrize("pooling", ["mean", "sum", "max"])
def test_pooling_looks_at_the_real_values_only_and_counts_repeated_ones(pooling):
    embedding = _embedding([TAGS], pooling)
    table = embedding.state_dict()["token_seq_embedding_table.item.0.weight"]
    reduce = {
        "mean": lambda rows: rows.sum(dim=0) / (len(rows) + 1e-8),
        "sum": lambda rows: rows.sum(dim=0),
        "max": lambda rows: rows.max(dim=0).values,
    }[pooling]
    output = embedding(VALUES)
    for item in (1, 2, 3):
        tags = [int(tag) for tag in VALUES["tags"][item] if tag]
        torch.testing.assert_close(output[item], reduce(table[tags]), rtol=1e-14, atol=1e-14)
    # Without any value RecBole's masks leave zero, or with max the padding row pushed far below every real one.
    nothing = table[0] - 1e9 if pooling == "max" else torch.zeros(D, dtype=torch.float64)
    torch.testing.assert_close(output[0], nothing, rtol=1e-15, atol=0)


@pytest.mark.parametrize("pooling", ["mean", "sum", "max"])
def test_pooling_does_not_depend_on_how_wide_the_padding_is(pooling):
    embedding = _embedding([TAGS], pooling)
    wider = torch.cat([VALUES["tags"], torch.zeros(4, 5, dtype=torch.int64)], dim=1)
    torch.testing.assert_close(embedding({"tags": wider}), embedding(VALUES), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_the_padding_row_of_a_token_seq_gets_no_gradient(pooling):
    embedding = _embedding([TAGS], pooling)
    embedding(VALUES).square().sum().backward()
    gradient = embedding.token_seq_embedding_table["item"][0].weight.grad
    assert not gradient[0].any() and (gradient[1:].abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float_and_vector_values_take_the_type_of_the_weights(dtype):
    embedding = _embedding([PRICE, IMAGE]).to(dtype)
    for given in (torch.float32, torch.float64):
        values = {name: VALUES[name].to(given) for name in ("price", "image")}
        assert embedding(values).dtype == dtype


@pytest.mark.parametrize("name", ["training", "keys", "values", "items", "type", "forward", "x-y_1"])
@pytest.mark.parametrize("kind", ["token", "token_seq", "float", "vector"])
def test_a_feature_may_be_called_like_an_attribute_of_a_module(kind, name):
    values = {"token": [0, 1], "token_seq": [[0, 0], [1, 1]], "float": [0.0, 1.0], "vector": [[0.0, 0.0], [1.0, 1.0]]}
    embedding = FeatureEmbedding([FeatureSpec(name, kind, {"float": 1}.get(kind, 2))], D, "mean")
    assert embedding({name: torch.tensor(values[kind])}).shape == (2, D)


# -- what RecBole does not have ---------------------------------------------------------------------------------------


def test_every_feature_may_have_a_size_and_a_pooling_of_its_own():
    specs = [
        COLOUR,
        replace(BRAND, dim=5),
        FeatureSpec("shade", "token", 4),
        replace(TAGS, dim=2, pooling="max"),
        WORDS,
        replace(PRICE, dim=4),
        AGE,
        replace(IMAGE, dim=1),
    ]
    values = {**VALUES, "shade": VALUES["colour"]}
    embedding = _embedding(specs)
    # One random value each: what stands where is told by looking it up in the parameters of that width.
    sizes = [D, 5, D, 2, D, 4, D, 1]
    assert embedding.width == sum(sizes)
    parts = dict(zip((spec.name for spec in specs), embedding(values).split(sizes, dim=1), strict=True))
    state = embedding.state_dict()
    shared = state["token_embedding_table.item.embedding.weight"]
    assert shared.shape == (4 + 4, D)
    tags, words = (state[f"token_seq_embedding_table.item.{n}.weight"] for n in (0, 1))
    for item in range(4):
        expected = {
            "colour": shared[values["colour"][item]],
            "brand": state["sized_token_tables.0.weight"][values["brand"][item]],
            "shade": shared[4 + values["shade"][item]],
            "words": words[values["words"][item, 0]] * (values["words"][item, 0] != 0),
            "price": values["price"][item].double() * state["sized_float_tables.0.embedding.weight"][0],
            "age": values["age"][item].double() * state["float_embedding_table.item.embedding.weight"][0],
            "image": state["vector_projection.0.weight"] @ values["image"][item].double(),
        }
        real = values["tags"][item][values["tags"][item] != 0]
        if len(real):
            expected["tags"] = tags[real].amax(dim=0)
        for name, value in expected.items():
            torch.testing.assert_close(parts[name][item], value, rtol=1e-7, atol=1e-12)


def test_a_missing_number_has_a_vector_of_its_own_and_breaks_no_gradient():
    specs = [replace(PRICE, missing=True), AGE, replace(FeatureSpec("cost", "float", 1), missing=True, dim=2)]
    embedding = _embedding(specs)
    price = torch.tensor([0.0, torch.nan, 2.0, torch.nan])
    values = {"price": price, "age": VALUES["age"], "cost": torch.tensor([torch.nan, 1.0, 1.0, 1.0])}
    output = embedding(values)
    floats = embedding.float_embedding_table["item"].embedding.weight
    cost = embedding.sized_float_tables[0].embedding.weight
    vectors = dict(embedding.missing_vectors.items())
    assert {name: tuple(vector.shape) for name, vector in vectors.items()} == {"0": (D,), "2": (2,)}
    for item, number in enumerate(price.tolist()):
        expected = vectors["0"] if np.isnan(number) else number * floats[0]
        torch.testing.assert_close(output[item, :D], expected)
        torch.testing.assert_close(output[item, D : 2 * D], VALUES["age"][item].double() * floats[1])
        torch.testing.assert_close(output[item, 2 * D :], vectors["2"] if item == 0 else cost[0])
    output.sum().backward()
    torch.testing.assert_close(vectors["0"].grad, torch.full((D,), 2.0).double())
    torch.testing.assert_close(vectors["2"].grad, torch.ones(2).double())
    torch.testing.assert_close(floats.grad[0], torch.full((D,), 2.0).double())
    torch.testing.assert_close(cost.grad[0], torch.full((2,), 3.0).double())


def test_without_a_missing_number_nothing_differs_from_a_float_that_knows_none():
    torch.manual_seed(0)
    plain = FeatureEmbedding([PRICE, AGE, COLOUR], D, "mean")
    torch.manual_seed(0)
    flagged = FeatureEmbedding([replace(PRICE, missing=True), AGE, COLOUR], D, "mean")
    assert torch.equal(plain(VALUES), flagged(VALUES))
    assert set(flagged.state_dict()) - set(plain.state_dict()) == {"missing_vectors.1"}


@pytest.mark.parametrize("kind", ["token", "sized token", "token_seq"])
def test_a_value_that_training_never_met_adds_nothing_to_what_the_rnn_sees(kind):
    """And nothing else differs from an encoder whose unknown row is random."""
    feature = FeatureSpec("shade", kind.split()[-1], 5, dim=2 if kind.startswith("sized") else None)
    config = ModelConfig(fusion="feature_only", embedding_size=D, hidden_size=4, dropout=0.0)
    encoders = []
    for blank in ((1,), ()):
        torch.manual_seed(3)
        encoders.append(SessionEncoder(config, [COLOUR, replace(feature, blank=blank), PRICE]))
    states = [encoder.state_dict() for encoder in encoders]
    table = next(name for name in states[0] if {
        "token": "token_embedding_table", "sized token": "sized_token", "token_seq": "token_seq_embedding"
    }[kind] in name)  # fmt: skip
    # The two fields share one table; both have a row of unknown values.
    unknown = [1, 4 + 1] if kind == "token" else [1]
    for name in states[0]:
        different = (states[0][name] != states[1][name]).reshape(len(states[0][name]), -1).any(dim=1).nonzero()[:, 0]
        assert different.tolist() == (unknown[-1:] if name == table else []), name
    assert not states[0][table][unknown].any()

    shade = torch.tensor([[1, 1], [1, 0]]) if kind == "token_seq" else torch.tensor([1, 1])
    values = {"colour": torch.tensor([2, 3]), "shade": shade, "price": torch.tensor([0.5, -1.0])}
    inputs = (None, values, torch.tensor([0, 1]), torch.tensor([1, 1]))
    with torch.no_grad():
        before = encoders[0].eval()(*inputs)
        # As if there were no such feature: its columns of the RNN's input weight.
        encoders[0].feature_gru_layers.weight_ih_l0[:, D : D + (feature.dim or D)] = 0.0
        assert torch.equal(encoders[0](*inputs), before)


def test_where_the_rows_of_grown_vocabularies_lie_with_sizes_of_their_own():
    old = [FeatureSpec("a", "token", 3), FeatureSpec("b", "token", 4, dim=2), FeatureSpec("c", "token", 5), PRICE]
    new = [replace(spec, size=spec.size + 2) for spec in old[:3]] + [replace(PRICE, missing=True)]
    places = {name: rows.tolist() for name, rows in kept_rows(old, new).items()}
    assert places == {
        "token_embedding_table.item.embedding.weight": [0, 1, 2, 5, 6, 7, 8, 9],
        "sized_token_tables.0.weight": [0, 1, 2, 3],
    }
    assert new_parameters(old, new) == {"missing_vectors.3"} and new_parameters(old, old) == set()
    assert set(FeatureEmbedding(new, D, "mean").state_dict()) >= {*places, "missing_vectors.3"}

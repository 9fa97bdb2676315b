"""Embedding of item features against loops over items, values and fields."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gru4recf_dist.model.features import FeatureEmbedding, FeatureSpec

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

"""RecBole's four methods of the plain module, against the padded reference and explicit sums over all n columns."""

from __future__ import annotations

import math

import pytest
import torch

from gru4recf_dist.model.gru4recf import ITEM_ID, ITEM_SEQ, ITEM_SEQ_LEN
from tests.unit.test_encoder import MIXED, SPECS, D, H, N, make_model, padded_queries

LENGTHS = [2, 5, 1, 4]
INTERACTION = {
    ITEM_SEQ: torch.tensor([[3, 4, 0, 0, 0], [1, 2, 3, 2, 11], [8, 0, 0, 0, 0], [7, 7, 7, 9, 0]]),
    ITEM_SEQ_LEN: torch.tensor(LENGTHS),
    ITEM_ID: torch.tensor([5, 1, 8, 11]),
}


def _expected_scores(model, interaction=INTERACTION) -> torch.Tensor:
    """[B, n] from the padded reference's output at each session's last event."""
    state = {name: value.detach() for name, value in model.state_dict().items()}
    specs = [SPECS[name] for name in model.feature_names]
    table = state["item_embedding.weight"]
    outputs = padded_queries(state, model.config, specs, table, interaction[ITEM_SEQ])
    last = torch.stack([outputs[i, n - 1] for i, n in enumerate(interaction[ITEM_SEQ_LEN].tolist())])
    if model.config.score == "cosine":
        table = table / table.square().sum(dim=1, keepdim=True).sqrt()
    return last @ table.T


@pytest.fixture(params=[([], "dot"), (MIXED, "dot"), (MIXED, "cosine")], ids=["item_only", "mixed", "cosine"])
def model(request):
    names, score = request.param
    return make_model(names, score=score, temperature=0.5)


def test_forward_gives_the_output_at_the_last_event_of_unsorted_sessions(model):
    output = model(INTERACTION[ITEM_SEQ], INTERACTION[ITEM_SEQ_LEN])
    assert output.shape == (4, D)
    for i, length in enumerate(LENGTHS):
        alone = model(INTERACTION[ITEM_SEQ][i : i + 1, :length], torch.tensor([length]))
        assert alone.shape == (1, D)
        torch.testing.assert_close(output[i], alone[0], rtol=1e-13, atol=1e-13)


def test_what_stands_behind_a_session_does_not_matter(model):
    dirty = INTERACTION[ITEM_SEQ].clone()
    dirty[dirty == 0] = 6
    expected = model(INTERACTION[ITEM_SEQ], INTERACTION[ITEM_SEQ_LEN])
    torch.testing.assert_close(model(dirty, INTERACTION[ITEM_SEQ_LEN]), expected, rtol=1e-13, atol=1e-13)


def test_full_sort_predict_scores_every_row_and_predict_gathers_from_it(model):
    scores = model.full_sort_predict(INTERACTION)
    assert scores.shape == (4, N + 1)
    torch.testing.assert_close(scores, _expected_scores(model), rtol=1e-12, atol=1e-12)
    for item in range(N + 1):
        one = model.predict({**INTERACTION, ITEM_ID: torch.full((4,), item)})
        assert one.shape == (4,)
        torch.testing.assert_close(one, scores[:, item], rtol=1e-12, atol=1e-12)


def test_calculate_loss_is_cross_entropy_over_all_n_columns_with_a_padding_row_that_is_not_zero(model):
    scores = _expected_scores(model)
    total = 0.0
    for row, target in zip(scores.tolist(), INTERACTION[ITEM_ID].tolist(), strict=True):
        total += -math.log(math.exp(row[target]) / sum(math.exp(score) for score in row))
    loss = model.calculate_loss(INTERACTION)
    assert loss.shape == () and loss.item() == pytest.approx(total / 4, rel=1e-12)

    padding = model.item_embedding.weight[0]
    assert bool((padding != 0).all())
    without = -(scores[:, 1:].log_softmax(dim=1)[range(4), INTERACTION[ITEM_ID] - 1]).mean()
    assert loss.item() > without.item() + 1e-3, "leaving the padding column out would be another loss"
    loss.backward()
    assert bool((model.item_embedding.weight.grad[0] != 0).all()), "and the row is pushed away like any candidate"


def test_a_batch_of_one(model):
    one = {name: value[1:2] for name, value in INTERACTION.items()}
    assert model.full_sort_predict(one).shape == (1, N + 1) and model.predict(one).shape == (1,)
    torch.testing.assert_close(model.full_sort_predict(one)[0], _expected_scores(model)[1], rtol=1e-12, atol=1e-12)


def test_parameters_have_recboles_names_and_shapes():
    model = make_model(["price", "tags", "words", "colour", "brand"])
    features = "feature_embed_layer"
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == {
        "item_embedding.weight": (N + 1, D),
        f"{features}.token_embedding_table.item.embedding.weight": (4 + 9, D),
        f"{features}.token_seq_embedding_table.item.0.weight": (6, D),
        f"{features}.token_seq_embedding_table.item.1.weight": (3, D),
        f"{features}.float_embedding_table.item.embedding.weight": (1, D),
        "item_gru_layers.weight_ih_l0": (3 * H, D),
        "item_gru_layers.weight_hh_l0": (3 * H, H),
        "feature_gru_layers.weight_ih_l0": (3 * H, 5 * D),
        "feature_gru_layers.weight_hh_l0": (3 * H, H),
        "dense_layer.weight": (D, 2 * H),
        "dense_layer.bias": (D,),
    }


def test_an_item_only_model_has_no_feature_parameters():
    assert sorted(make_model([]).state_dict()) == [
        "dense_layer.bias",
        "dense_layer.weight",
        "item_embedding.weight",
        "item_gru_layers.weight_hh_l0",
        "item_gru_layers.weight_ih_l0",
    ]


def test_a_state_dict_loads_into_another_instance_with_the_same_scores():
    one, other = make_model(MIXED, seed=1), make_model(MIXED, seed=2)
    assert not torch.equal(one.full_sort_predict(INTERACTION), other.full_sort_predict(INTERACTION))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.full_sort_predict(INTERACTION), other.full_sort_predict(INTERACTION))

"""The packed session encoder against the model written out on padded sessions, from the paper's and RecBole's text."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_packed_sequence, pad_sequence

from gru4recf_dist.config import ModelConfig
from gru4recf_dist.data.batches import pack_training
from gru4recf_dist.model.encoder import SessionEncoder
from gru4recf_dist.model.features import FeatureSpec
from gru4recf_dist.model.gru4recf import ITEM_ID, ITEM_SEQ, ITEM_SEQ_LEN, GRU4RecF
from tests.support.synthetic import to_block

N, D, H = 11, 4, 6
SPECS = {
    "colour": FeatureSpec("colour", "token", 4),
    "brand": FeatureSpec("brand", "token", 9),
    "tags": FeatureSpec("tags", "token_seq", 6),
    "words": FeatureSpec("words", "token_seq", 3),
    "price": FeatureSpec("price", "float", 1),
    "image": FeatureSpec("image", "vector", 3),
}
SESSIONS = [[3], [1, 2, 3, 4, 5, 1, 1], [7, 7], [11, 6, 5, 10], [8, 9], [2, 11, 3, 2, 5, 1, 8]]


def item_features() -> dict[str, torch.Tensor]:
    """Of all n items: tags of 0 to 3 values (items 4 and 8 have none), one of them repeated."""
    generator = np.random.default_rng(5)
    tags = torch.from_numpy(generator.integers(1, 6, (N + 1, 3)))
    tags[0] = tags[4] = tags[8] = 0
    tags[2, 1:] = tags[7, 2:] = 0
    tags[5] = torch.tensor([2, 2, 1])
    words = torch.from_numpy(generator.integers(0, 3, (N + 1, 1)))
    return {
        "colour": torch.from_numpy(generator.integers(0, 4, N + 1)),
        "brand": torch.from_numpy(generator.integers(0, 9, N + 1)),
        "tags": tags,
        "words": words,
        "price": torch.from_numpy(generator.standard_normal(N + 1)),
        "image": torch.from_numpy(generator.standard_normal((N + 1, 3))),
    }


# -- the reference ----------------------------------------------------------------------------------------------------


def padded_queries(
    state: dict[str, torch.Tensor], config: ModelConfig, specs: list[FeatureSpec], rows: torch.Tensor, items
) -> torch.Tensor:
    """Outputs [B, L, D] for padded sessions ``items`` [B, L], without dropout.

    a = GRU_item(E[items]); b = GRU_feature(x); s = W [a; b] + bias.
    """
    hidden = padded_gru(state, "item_gru_layers", config.num_layers, rows[items])
    if specs:
        described = torch.stack([describe(state, config.pooling, specs, item) for item in range(len(rows))])
        other = padded_gru(state, "feature_gru_layers", config.num_layers, described[items])
        hidden = torch.cat([hidden, other], dim=-1)
    output = hidden @ state["dense_layer.weight"].T + state["dense_layer.bias"]
    if config.score == "cosine":
        output = output / output.square().sum(dim=-1, keepdim=True).sqrt()
    return output / torch.exp(state["log_temperature"]) if config.learn_temperature else output / config.temperature


def padded_gru(state, name: str, layers: int, inputs: torch.Tensor) -> torch.Tensor:
    """A GRU without biases, gates in PyTorch's order (reset, update, new), step by step over [B, L, in]."""
    for layer in range(layers):
        from_input, from_hidden = state[f"{name}.weight_ih_l{layer}"], state[f"{name}.weight_hh_l{layer}"]
        hidden = inputs.new_zeros(len(inputs), from_hidden.shape[1])
        outputs = []
        for step in range(inputs.shape[1]):
            reset_in, update_in, new_in = (inputs[:, step] @ from_input.T).chunk(3, dim=1)
            reset_hidden, update_hidden, new_hidden = (hidden @ from_hidden.T).chunk(3, dim=1)
            reset, update = torch.sigmoid(reset_in + reset_hidden), torch.sigmoid(update_in + update_hidden)
            new = torch.tanh(new_in + reset * new_hidden)
            hidden = (1 - update) * new + update * hidden
            outputs.append(hidden)
        inputs = torch.stack(outputs, dim=1)
    return inputs


def describe(state, pooling: str, specs: list[FeatureSpec], item: int) -> torch.Tensor:
    """x of one item: every field embedded to D; token fields first, then token_seq, float, vector."""
    features = item_features()
    prefix = "feature_embed_layer"
    parts = []
    offset = 0
    for spec in specs:
        if spec.kind == "token":
            table = state[f"{prefix}.token_embedding_table.item.embedding.weight"]
            parts.append(table[offset + int(features[spec.name][item])])
            offset += spec.size
    for number, spec in enumerate(spec for spec in specs if spec.kind == "token_seq"):
        table = state[f"{prefix}.token_seq_embedding_table.item.{number}.weight"]
        real = [value for value in features[spec.name][item].tolist() if value]
        if pooling == "max":
            parts.append(table[real].max(dim=0).values if real else table[0] - 1e9)
        elif not real:
            parts.append(torch.zeros(D, dtype=table.dtype))
        else:
            parts.append(table[real].sum(dim=0) / (len(real) + 1e-8 if pooling == "mean" else 1))
    for number, spec in enumerate(spec for spec in specs if spec.kind == "float"):
        table = state[f"{prefix}.float_embedding_table.item.embedding.weight"]
        parts.append(features[spec.name][item] * table[number])
    projections = [value for name, value in state.items() if name.startswith(f"{prefix}.vector_projection.")]
    for number, spec in enumerate(spec for spec in specs if spec.kind == "vector"):
        parts.append(projections[number] @ features[spec.name][item])
    return torch.cat(parts)


# -- the packed encoder -----------------------------------------------------------------------------------------------


def make_model(names: list[str], seed: int = 0, dtype=torch.float64, **config) -> GRU4RecF:
    """A GRU4RecF with random weights, biases included, and the item features above."""
    settings = ModelConfig(
        **{
            "embedding_size": D,
            "hidden_size": H,
            "dropout": 0.0,
            "fusion": "concat_output" if names else "item_only",
            **config,
        }
    )
    torch.manual_seed(seed)
    model = GRU4RecF(settings, N + 1, [SPECS[name] for name in names], item_features())
    model.dense_layer.bias.data.normal_()
    return model.to(dtype)


def encode_packed(model: GRU4RecF, sessions: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The base class's packed forward; (queries [T, D], batch_sizes)."""
    packed = torch.nn.utils.rnn.pack_sequence([torch.tensor(s) for s in sessions], enforce_sorted=False)
    ids, places = torch.unique(packed.data, return_inverse=True)
    features = {name: getattr(model, f"item_feature_{name}")[ids] for name in model.feature_names}
    rows = model.item_embedding.weight[ids]
    return SessionEncoder.forward(model, rows, features, places, packed.batch_sizes), packed


def check_against_padded_reference(names: list[str], **config) -> None:
    model = make_model(names, **config)
    padded = pad_sequence([torch.tensor(session) for session in SESSIONS], batch_first=True)
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    specs = [SPECS[name] for name in names]
    expected = padded_queries(state, model.config, specs, state["item_embedding.weight"], padded)

    queries, packed = encode_packed(model, SESSIONS)
    ours, lengths = pad_packed_sequence(packed._replace(data=queries), batch_first=True)
    assert lengths.tolist() == [len(session) for session in SESSIONS]
    for session, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(ours[session, :length], expected[session, :length], rtol=1e-12, atol=1e-12)


MIXED = ["colour", "brand", "tags", "words", "price", "image"]


@pytest.mark.parametrize("pooling", ["mean", "sum", "max"])
@pytest.mark.parametrize("names", [["tags"], ["tags", "words"], MIXED], ids="-".join)
def test_packed_forward_with_token_seqs_equals_the_padded_reference(names, pooling):
    check_against_padded_reference(names, pooling=pooling)


@pytest.mark.parametrize("names", [["colour"], ["colour", "brand"], ["brand", "colour"], ["price"], ["image"]])
def test_packed_forward_with_one_kind_of_feature_equals_the_padded_reference(names):
    check_against_padded_reference(names)


@pytest.mark.parametrize("score", ["dot", "cosine"])
@pytest.mark.parametrize("names", [[], MIXED], ids=["item_only", "mixed"])
@pytest.mark.parametrize("learn", [False, True], ids=["fixed", "learned"])
def test_packed_forward_equals_the_padded_reference_for_every_score_and_temperature(names, score, learn):
    check_against_padded_reference(names, score=score, temperature=0.2, learn_temperature=learn)


@pytest.mark.parametrize("names", [[], MIXED], ids=["item_only", "mixed"])
def test_packed_forward_with_two_layers_equals_the_padded_reference(names):
    check_against_padded_reference(names, num_layers=2)


def test_the_learned_temperature_starts_at_the_configured_one_and_is_trained():
    fixed, learned = (
        make_model(["tags"], score="cosine", temperature=0.3, learn_temperature=learn, dtype=torch.float32)
        for learn in (False, True)
    )
    learned.load_state_dict(fixed.state_dict(), strict=False)
    ours, _ = encode_packed(learned, SESSIONS)
    torch.testing.assert_close(ours, encode_packed(fixed, SESSIONS)[0])
    ours[0].sum().backward()
    expected = -ours[0].sum().item()
    assert learned.log_temperature.grad.item() == pytest.approx(expected, rel=1e-5) and expected != 0


def test_fusion_with_features_needs_a_feature():
    with pytest.raises(ValueError, match="at least one feature"):
        SessionEncoder(ModelConfig(), [])


# -- all positions at once = every prefix as its own sample -----------------------------------------------------------


@pytest.mark.parametrize("score", ["dot", "cosine"])
@pytest.mark.parametrize("names", [[], MIXED], ids=["item_only", "mixed"])
def test_the_packed_loss_at_every_position_equals_the_loss_of_every_prefix_as_a_sample(names, score):
    sessions = [session for session in SESSIONS if len(session) > 1]
    packed_model, prefix_model = (make_model(names, score=score) for _ in range(2))

    batch = pack_training(to_block([np.array(session) for session in sessions]), max_length=50, context=10)
    assert bool((batch.weights == 1).all())
    ids, places = torch.unique(batch.items, return_inverse=True)
    features = {name: getattr(packed_model, f"item_feature_{name}")[ids] for name in names}
    table = packed_model.item_embedding.weight
    queries = SessionEncoder.forward(packed_model, table[ids], features, places, batch.batch_sizes)
    candidates = torch.nn.functional.normalize(table) if score == "cosine" else table
    packed_loss = torch.nn.functional.cross_entropy(queries @ candidates.T, batch.targets)
    packed_loss.backward()

    samples = [(session[:end], session[end]) for session in sessions for end in range(1, len(session))]
    prefix_loss = prefix_model.calculate_loss(
        {
            ITEM_SEQ: pad_sequence([torch.tensor(prefix) for prefix, _ in samples], batch_first=True),
            ITEM_SEQ_LEN: torch.tensor([len(prefix) for prefix, _ in samples]),
            ITEM_ID: torch.tensor([target for _, target in samples]),
        }
    )
    prefix_loss.backward()

    assert packed_loss.item() == pytest.approx(prefix_loss.item(), rel=1e-13)
    for (name, ours), theirs in zip(packed_model.named_parameters(), prefix_model.parameters(), strict=True):
        assert ours.grad.any(), name
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-13)


# -- dropout ----------------------------------------------------------------------------------------------------------


def _captured_inputs(model: GRU4RecF, sessions: list[list[int]]) -> dict[str, torch.Tensor]:
    """What each layer receives in one forward pass, and the output."""
    captured, handles = {}, []
    for name in ("item_gru_layers", "feature_gru_layers", "dense_layer"):

        def keep(module, inputs, name=name):
            captured[name] = getattr(inputs[0], "data", inputs[0]).detach()

        handles.append(getattr(model, name).register_forward_pre_hook(keep))
    captured["output"] = encode_packed(model, sessions)[0].detach()
    for handle in handles:
        handle.remove()
    return captured


def test_by_default_dropout_acts_on_the_embedded_item_events_and_nowhere_else():
    assert ModelConfig().dropout == 0.3
    model = make_model(MIXED, dropout=ModelConfig().dropout)
    sessions = [[1 + i % N for i in range(start, start + 60)] for start in range(40)]
    model.eval()
    clean = _captured_inputs(model, sessions)
    model.train()
    torch.manual_seed(1)
    noisy = _captured_inputs(model, sessions)
    # The feature path sees what it sees in eval mode; the item path loses 30 % of its values and keeps their sum.
    assert torch.equal(noisy["feature_gru_layers"], clean["feature_gru_layers"])
    dropped = noisy["item_gru_layers"] == 0
    assert abs(float(dropped.double().mean()) - 0.3) < 0.015
    expected = torch.where(dropped, 0.0, clean["item_gru_layers"] / 0.7)
    torch.testing.assert_close(noisy["item_gru_layers"], expected)
    # Every event has a mask of its own, also where an item comes again.
    assert len(torch.unique(dropped[(clean["item_gru_layers"] == clean["item_gru_layers"][0]).all(dim=1)], dim=0)) > 1
    # The dense layer receives both GRUs' outputs as they are.
    assert torch.equal(noisy["dense_layer"][:, H:], clean["dense_layer"][:, H:])
    _, packed = encode_packed(model, sessions)
    outputs = model.item_gru_layers(packed._replace(data=noisy["item_gru_layers"]))
    assert torch.equal(noisy["dense_layer"][:, :H], outputs.data)


def test_dropout_zero_switches_off_every_dropout():
    model = make_model(MIXED, dropout=0.0, dropout_feature=0.5, dropout_hidden=0.5).train()
    trained = _captured_inputs(model, SESSIONS)
    evaluated = _captured_inputs(model.eval(), SESSIONS)
    assert all(torch.equal(trained[name], evaluated[name]) for name in trained)


@pytest.mark.parametrize(
    ("setting", "layer"), [("dropout_feature", "feature_gru_layers"), ("dropout_hidden", "dense_layer")]
)
def test_the_other_dropouts_act_where_they_say(setting, layer):
    model = make_model(MIXED, dropout=0.5, dropout_embedding=0.0, **{setting: 0.5})
    sessions = [[1 + i % N for i in range(30)]] * 20
    clean = _captured_inputs(model.eval(), sessions)
    torch.manual_seed(3)
    noisy = _captured_inputs(model.train(), sessions)
    # Of what is not zero anyway, as the pooled tags of an item without tags are.
    assert abs(float((noisy[layer][clean[layer] != 0] == 0).double().mean()) - 0.5) < 0.03
    torch.testing.assert_close(noisy["item_gru_layers"], clean["item_gru_layers"])


def test_dropout_hidden_acts_between_the_layers_of_every_rnn():
    model = make_model(MIXED, dropout=0.5, dropout_embedding=0.0, dropout_hidden=0.3, num_layers=2)
    assert (model.item_gru_layers.dropout, model.feature_gru_layers.dropout) == (0.3, 0.3)
    assert make_model(MIXED, dropout=0.0, dropout_hidden=0.3, num_layers=2).item_gru_layers.dropout == 0.0


def test_dropout_embedding_takes_the_place_of_dropout():
    sessions = [[1 + i % N for i in range(30)]] * 20
    clean = _captured_inputs(make_model(MIXED).eval(), sessions)["item_gru_layers"]
    for setting, share in ((0.0, 0.0), (0.6, 0.6), (None, 0.2)):
        model = make_model(MIXED, dropout=0.2, dropout_embedding=setting).train()
        torch.manual_seed(3)
        noisy = _captured_inputs(model, sessions)["item_gru_layers"]
        assert float((noisy == 0).double().mean()) == pytest.approx(share, abs=0.03)
        torch.testing.assert_close(noisy, torch.where(noisy == 0, 0.0, clean / (1 - share)))


def test_eval_mode_is_deterministic_and_training_mode_is_not():
    model = make_model(MIXED, dropout=0.5)
    once, again = (encode_packed(model.train(), SESSIONS)[0] for _ in range(2))
    assert not torch.equal(once, again)
    once, again = (encode_packed(model.eval(), SESSIONS)[0] for _ in range(2))
    assert torch.equal(once, again)


# -- initialisation ---------------------------------------------------------------------------------------------------


def test_grus_are_uniform_within_one_over_root_h_and_have_no_biases():
    config = ModelConfig(embedding_size=64, hidden_size=128, num_layers=2)
    torch.manual_seed(0)
    encoder = SessionEncoder(config, [SPECS["tags"], SPECS["price"]])
    bound = 1 / math.sqrt(128)
    shapes = {"item_gru_layers": 64, "feature_gru_layers": 2 * 64}
    for name, width in shapes.items():
        weights = {key: value.detach() for key, value in getattr(encoder, name).named_parameters()}
        assert {key: tuple(value.shape) for key, value in weights.items()} == {
            "weight_ih_l0": (3 * 128, width),
            "weight_hh_l0": (3 * 128, 128),
            "weight_ih_l1": (3 * 128, 128),
            "weight_hh_l1": (3 * 128, 128),
        }
        for weight in weights.values():
            assert 0.99 * bound < weight.abs().max() <= bound
            assert abs(float(weight.mean())) < 0.02 * bound
            # A uniform variable's standard deviation, which a normal one within the same bounds would not have.
            assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_embeddings_and_dense_layers_are_xavier_normal_and_biases_zero():
    config = ModelConfig(embedding_size=64, hidden_size=128)
    sizes = {"token": 300, "token_seq": 500, "vector": 90}
    specs = [FeatureSpec(kind, kind, size) for kind, size in sizes.items()]
    specs += [FeatureSpec(f"float{n}", "float", 1) for n in range(20)] + [FeatureSpec("other", "token", 100)]
    features = {spec.name: torch.zeros(1001) for spec in specs}
    torch.manual_seed(0)
    model = GRU4RecF(config, 1001, specs, features)
    state = model.state_dict()
    fans = {
        "item_embedding.weight": 1001 + 64,
        # Both token fields share one table, so its size is the sum of theirs.
        "feature_embed_layer.token_embedding_table.item.embedding.weight": 400 + 64,
        "feature_embed_layer.token_seq_embedding_table.item.0.weight": 500 + 64,
        "feature_embed_layer.float_embedding_table.item.embedding.weight": 20 + 64,
        "dense_layer.weight": 64 + 256,
    }
    fans |= {name: 90 + 64 for name in state if name.startswith("feature_embed_layer.vector_projection.")}
    assert len(fans) == 6
    for name, fan in fans.items():
        values = state[name]
        assert float(values.std()) == pytest.approx(math.sqrt(2 / fan), rel=0.05), name
        # Normal, not uniform: some values lie beyond what a uniform variable of that deviation can reach.
        assert float(values.abs().max()) > 2.5 * math.sqrt(2 / fan), name
    biases = [name for name in state if "bias" in name]
    assert biases == ["dense_layer.bias"] and not state["dense_layer.bias"].any()
    assert state["item_embedding.weight"][0].abs().min() > 0, "RecBole's padding row is not zero"

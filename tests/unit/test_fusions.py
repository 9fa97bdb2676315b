"""What a fusion consists of, which settings contradict each other, and the single-process module beside plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gru4recf_dist import config as configuration
from gru4recf_dist.config import Config, ModelConfig
from gru4recf_dist.errors import UserError
from gru4recf_dist.model.encoder import SessionEncoder
from gru4recf_dist.model.features import FeatureSpec
from gru4recf_dist.model.fusions import put_together
from gru4recf_dist.model.gru4recf import ITEM_ID, ITEM_SEQ, ITEM_SEQ_LEN, GRU4RecF
from gru4recf_dist.model.subnets import output_parts, subnet_of_parameter, subnet_of_table, subnets
from tests.support.plain_models import FEATURES, PlainModel

N = 17
KINDS = {"category": "token", "tags": "token_seq", "price": "float", "image": "vector"}
SPECS = [FeatureSpec(name, KINDS[name], size) for name, size in FEATURES.items()]
GROUPS = [["tags", "image"], ["category", "price"]]
FUSIONS = ModelConfig.model_fields["fusion"].annotation.__args__


def _load(*overrides: str) -> Config:
    return configuration.load(None, ["data=x", "run_dir=x", *overrides])


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.fusion=parallel", "model.output_table=tied"], "tied with fusion parallel needs hidden_size (128)"),
        (["model.fusion=shared_w", "model.output_table=tied"], "to be embedding_size (64)"),
        (
            ["model.fusion=feature_only", "model.output_table=untied"],
            "output_table cannot be untied",
        ),
        (["model.fusion_weights=[1,1]"], "fusion_weights is not for fusion concat_output (weighted_sum and"),
        (["model.fusion=weighted_sum", "model.fusion_weights=[1]"], "fusion_weights must be 2"),
        (
            ["model.fusion=shared_w", "model.feature_groups=[[a],[b]]", "model.fusion_weights=[1,2]"],
            "fusion_weights must be 3",
        ),
        (["model.fusion=item_only", "model.feature_groups=[[a]]"], "feature_groups is not for fusion item_only"),
        (["model.fusion=concat_input", "model.feature_groups=[[a]]"], "feature_groups is not for fusion concat_input"),
        (["model.feature_groups=[[a],[b,a]]"], "feature_groups names a feature twice"),
        (["model.feature_groups=[[a],[]]"], "model.feature_groups.1"),
        (["model.feature_groups=[]"], "model.feature_groups"),
        (["model.features=[a,b]", "model.feature_groups=[[a]]"], "feature_groups names other features than features"),
        (["model.output_table=shared"], "model.output_table"),
    ],
)
def test_contradictions_are_one_line_that_names_the_key(overrides, says):
    with pytest.raises(UserError) as caught:
        _load(*overrides)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "names", "parts"),
    [
        ({"fusion": "item_only"}, ["item"], [("table", 4, "item")]),
        ({"fusion": "item_only", "output_table": "untied"}, ["item"], [("output", 4, "item")]),
        ({"fusion": "feature_only"}, ["feature"], [("table", 4, "feature")]),
        ({"fusion": "feature_only", "feature_groups": GROUPS}, ["feature_0", "feature_1"], [("table", 4, None)]),
        ({"fusion": "concat_input", "output_bias": True}, ["item"], [("table", 4, "item"), ("output_bias", 1, None)]),
        ({"fusion": "concat_output"}, ["item", "feature"], [("table", 4, None)]),
        (
            {"fusion": "weighted_sum", "output_table": "untied", "feature_groups": GROUPS},
            ["item", "feature_0", "feature_1"],
            [("output", 4, None)],
        ),
        ({"fusion": "shared_w"}, ["item", "feature"], [("output", 6, None)]),
        (
            {"fusion": "interaction", "hidden_size": 4, "output_table": "tied"},
            ["item", "feature"],
            [("table", 4, None)],
        ),
        (
            {"fusion": "parallel", "output_bias": True},
            ["item", "feature"],
            [("output_item", 6, "item"), ("output_feature", 6, "feature"), ("output_bias", 1, None)],
        ),
        (
            {"fusion": "parallel", "hidden_size": 4, "output_table": "tied", "feature_groups": GROUPS},
            ["item", "feature_0", "feature_1"],
            [("table", 4, "item"), ("output_feature_0", 4, "feature_0"), ("output_feature_1", 4, "feature_1")],
        ),
    ],
)
def test_subnets_and_the_tables_that_their_outputs_meet(settings, names, parts):
    config = ModelConfig(**{"embedding_size": 4, "hidden_size": 6, **settings})
    assert subnets(config) == names
    assert [(part.table, part.width, part.subnet) for part in output_parts(config)] == parts
    # As inputs, item rows are the item subnet's whatever else they are.
    assert subnet_of_table(config, "table") == ("item" if "item" in names else parts[0][2])
    for table, _, subnet in parts:
        if table != "table":
            assert subnet_of_table(config, table) == subnet


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("groups", [None, GROUPS])
def test_every_parameter_has_the_subnet_through_which_alone_it_works(fusion, groups):
    """A parameter of a subnet changes nothing once that subnet takes no part; a shared one still does."""
    if groups is not None and fusion in ("item_only", "concat_input"):
        return
    config = ModelConfig(
        fusion=fusion, feature_groups=groups, embedding_size=4, hidden_size=6, dropout=0.0, learn_temperature=True
    )
    torch.manual_seed(0)
    encoder = SessionEncoder(config, [] if fusion == "item_only" else SPECS)
    names = subnets(config)
    inputs = (torch.randn(N, 4), _features(), torch.arange(N), torch.tensor([N]))
    for name, parameter in encoder.named_parameters():
        subnet = subnet_of_parameter(config, name)
        assert subnet in (*names, None)
        assert (subnet is None) == (name.split(".")[0] in ("dense_layer", "fusion_weights", "log_temperature"))
        if subnet is None or len(names) == 1:
            continue
        encoder.take_part([other for other in names if other != subnet])
        before = encoder(*inputs)
        with torch.no_grad():
            parameter += 1.0
        assert torch.equal(encoder(*inputs), before), name
        encoder.take_part(None)
        changed = encoder(*inputs)
        with torch.no_grad():
            parameter -= 1.0
        if not name.endswith("weight_hh_l0"):
            # One event a session: no state comes in.
            assert not torch.equal(encoder(*inputs), changed), name


def test_an_absent_subnet_counts_as_zero_and_as_one_in_a_product():
    one, two = torch.tensor([[2.0, 3.0]]), torch.tensor([[5.0, 7.0]])
    weights = torch.tensor([0.5, 2.0])
    expected = {
        "concat_output": ([[2, 3, 5, 7]], [[0, 0, 5, 7]]),
        "interaction": ([[10, 21]], [[5, 7]]),
        "weighted_sum": ([[11, 15.5]], [[10, 14]]),
        "shared_w": ([[11, 15.5]], [[10, 14]]),
    }
    for fusion, (both, second) in expected.items():
        used = weights if fusion in ("weighted_sum", "shared_w") else None
        assert put_together(fusion, [one, two], used)[0].tolist() == both
        assert put_together(fusion, [None, two], used)[0].tolist() == second
    assert [part.tolist() for part in put_together("parallel", [None, two])] == [[[0, 0]], [[5, 7]]]


# -- the single-process module ----------------------------------------------------------------------------------------


def _features() -> dict[str, torch.Tensor]:
    generator = np.random.default_rng(4)
    tags = torch.from_numpy(generator.integers(0, FEATURES["tags"], (N, 3)))
    return {
        "category": torch.from_numpy(generator.integers(0, FEATURES["category"], N)),
        "tags": tags.sort(dim=1, descending=True).values,
        "price": torch.from_numpy(generator.standard_normal(N).astype(np.float32)),
        "image": torch.from_numpy(generator.standard_normal((N, FEATURES["image"])).astype(np.float32)),
    }


@pytest.mark.parametrize("score", ["dot", "cosine"])
@pytest.mark.parametrize("output_table", ["auto", "untied"])
@pytest.mark.parametrize("groups", [None, GROUPS])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_module_scores_as_plain_torch_does(fusion, groups, output_table, score):
    if (groups is not None and fusion in ("item_only", "concat_input")) or (fusion, output_table) == (
        "feature_only",
        "untied",
    ):
        return
    config = ModelConfig(
        fusion=fusion,
        feature_groups=groups,
        output_table=output_table,
        output_bias=True,
        embedding_size=4,
        hidden_size=6,
        dropout=0.0,
        score=score,
        temperature=0.5,
    )
    torch.manual_seed(1)
    features = _features()
    ours = GRU4RecF(config, N, [] if fusion == "item_only" else SPECS, features).double()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter)
    names = {"item_embedding": "table"}
    state = {}
    for name, value in ours.state_dict().items():
        first, _, rest = name.partition(".")
        state[names[first] + "." + rest if first in names else f"encoder.{name}"] = value
        if first == "output_embedding":
            state[rest] = state.pop(f"encoder.{name}")
    counts = torch.zeros(N, FEATURES["tags"], dtype=torch.float64)
    for item, tags in enumerate(features["tags"].tolist()):
        for tag in filter(None, tags):
            counts[item, tag] += 1
    plain = PlainModel(config, N - 1, {**features, "tags": counts})
    plain.load(state)
    sequences, lengths = torch.tensor([[3, 4, 1, 16], [7, 7, 0, 0], [5, 0, 0, 0]]), torch.tensor([4, 2, 1])
    expected = plain.scores(sequences)[torch.arange(3), lengths - 1]
    interaction = {ITEM_SEQ: sequences, ITEM_SEQ_LEN: lengths, ITEM_ID: torch.tensor([2, 16, 9])}
    torch.testing.assert_close(ours.full_sort_predict(interaction), expected, rtol=1e-11, atol=1e-11)
    one = expected[torch.arange(3), interaction[ITEM_ID]]
    torch.testing.assert_close(ours.predict(interaction), one, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("setting", "place"), [("dropout_hidden", "dense_layer"), ("dropout_output", None)])
def test_dropouts_behind_the_rnns_act_where_they_say(setting, place):
    config = ModelConfig(embedding_size=8, hidden_size=40, dropout=0.5, dropout_embedding=0.0, **{setting: 0.5})
    torch.manual_seed(2)
    encoder = SessionEncoder(config, SPECS)
    seen = []
    if place is not None:
        encoder.get_submodule(place).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    features = _features()
    inputs = (torch.randn(N, 8), features, torch.arange(N).repeat(20), torch.tensor([20 * N]))
    output = encoder.train()(*inputs)
    dropped = seen[0] if place is not None else output
    assert abs(float((dropped == 0).float().mean()) - 0.5) < 0.03
    assert not (encoder.eval()(*inputs) == 0).any()


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("groups", [None, GROUPS])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_documented_numbers_of_parameters_are_those(fusion, groups, layers):
    if groups is not None and fusion in ("item_only", "concat_input"):
        return
    d, h = 4, 6
    config = ModelConfig(fusion=fusion, feature_groups=groups, embedding_size=d, hidden_size=h, num_layers=layers)
    encoder = SessionEncoder(config, [] if fusion == "item_only" else SPECS)

    def gru(width: int) -> int:
        return 3 * h * (width + h) + 6 * h * h * (layers - 1)

    # Vocabularies of 6 and 9, a float, a vector of 3 elements; 4 features in one group, or 2 in each of two.
    embeds = (6 + 9 + 1 + 3) * d
    features = gru(4 * d) if groups is None else 2 * gru(2 * d)
    rnns = 2 if groups is None else 3
    expected = {
        "item_only": (gru(d) + h * d + d, d),
        "feature_only": (embeds + features + (rnns - 1) * h * d + d, d),
        "concat_input": (embeds + gru(d + 4 * d) + h * d + d, d),
        "concat_output": (embeds + gru(d) + features + rnns * h * d + d, d),
        "weighted_sum": (embeds + gru(d) + features + rnns + h * d + d, d),
        "parallel": (embeds + gru(d) + features, d + rnns * h),
        "shared_w": (embeds + gru(d) + features + rnns, d + h),
        "interaction": (embeds + gru(d) + features, d + h),
    }
    tables = {"table": d, **{part.table: part.width for part in output_parts(config)}}
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert (count, sum(tables.values())) == expected[fusion]

"""Rows, names and shapes of weights on both sides, on weights whose values say where they belong."""

from __future__ import annotations

import json

import pytest
import torch

from gru4recf_dist.config import ModelConfig
from gru4recf_dist.errors import UserError
from gru4recf_dist.model.features import FeatureSpec
from gru4recf_dist.recbole.token_ids import TokenIds, read_ids, write_ids
from gru4recf_dist.recbole.weights import TABLE, Layout

D, H = 3, 2
ITEMS = ["", "a", "b", "c"]
VOCABULARIES = {"brand": ["", "", "x", "y"], "shop": ["", "", "s"], "tags": ["", "", "t", "u", "v"]}
SPECS = [
    FeatureSpec("price", "float", 1),
    FeatureSpec("shop", "token", 3),
    FeatureSpec("tags", "token_seq", 5),
    FeatureSpec("brand", "token", 4),
    FeatureSpec("weight", "float", 1),
]
# `q`, `w` and `z` are RecBole's alone.
IDS = TokenIds(
    "ids",
    ["[PAD]", "c", "q", "a", "b"],
    {"brand": ["[PAD]", "z", "y", "x"], "shop": ["[PAD]", "s"], "tags": ["[PAD]", "u", "t", "w", "v", "z"]},
)
TOKENS = "feature_embed_layer.token_embedding_table.item.embedding.weight"
TAGS = "feature_embed_layer.token_seq_embedding_table.item.0.weight"
FLOATS = "feature_embed_layer.float_embedding_table.item.embedding.weight"


def layout(specs=SPECS, ids=IDS, vocabularies=VOCABULARIES, **options) -> Layout:
    config = ModelConfig(embedding_size=D, hidden_size=H, fusion="concat_output" if specs else "item_only")
    return Layout(config, specs, ITEMS, vocabularies, ids, **options)


def rows(*numbers: float) -> torch.Tensor:
    """A row of equal values for each number."""
    return torch.tensor(numbers, dtype=torch.float32)[:, None].expand(-1, D).clone()


def others() -> dict[str, torch.Tensor]:
    """The weights without rows of tokens."""
    torch.manual_seed(0)
    return {
        "item_gru_layers.weight_ih_l0": torch.rand(3 * H, D),
        "item_gru_layers.weight_hh_l0": torch.rand(3 * H, H),
        "feature_gru_layers.weight_ih_l0": torch.rand(3 * H, 5 * D),
        "feature_gru_layers.weight_hh_l0": torch.rand(3 * H, H),
        "dense_layer.weight": torch.rand(D, 2 * H),
        "dense_layer.bias": torch.rand(D),
    }


# RecBole's row of its id i holds 10 i (+ 100 for a second feature, and so on); ours by token what RecBole's holds.
THEIRS = {
    TABLE: rows(0, 10, 20, 30, 40),
    # shop (2 rows there), then brand (4): token fields keep the order in which they were selected.
    TOKENS: rows(0, 10, 100, 110, 120, 130),
    FLOATS: rows(-1, 1, -2, 2),
    TAGS: rows(0, 10, 20, 30, 40, 50),
}
OURS = {
    TABLE: rows(0, 30, 40, 10),
    # Nothing of RecBole's shares the unknown row of `shop`; that of `brand` stands for `z`.
    TOKENS: rows(0, 0, 10, 100, 110, 130, 120),
    FLOATS: rows(1, 2),
    # `w` and `z` are one value here: the mean of theirs.
    TAGS: rows(0, 40, 20, 10, 40),
}


def test_rows_find_their_tokens_on_the_way_here():
    made = layout()
    shapes = {name: tensor.shape for name, tensor in {**OURS, **others()}.items()}
    ours = made.to_ours({**THEIRS, **others()}, shapes, "file")
    assert set(ours) == set(shapes)
    for name, expected in {**OURS, **others()}.items():
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=0, msg=name)
    assert made.model == "GRU4RecF"
    assert made.items.others.tolist() == [2] and made.values["tags"].others.tolist() == [3, 5]


def test_and_back_with_what_nothing_here_corresponds_to():
    theirs = layout().to_theirs({**others(), **OURS})
    assert list(theirs) == [TABLE, TOKENS, FLOATS, TAGS, *others()], "RecBole's order of parameters"
    expected = {
        # An item that is unknown here, and the row of a float that RecBole never reads.
        TABLE: rows(0, 10, 0, 30, 40),
        TOKENS: THEIRS[TOKENS],
        FLOATS: rows(0, 1, 0, 2),
        # Values that are one here get the same row.
        TAGS: rows(0, 10, 20, 40, 40, 40),
        **others(),
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=0, msg=name)


def test_without_features_the_names_are_gru4recs():
    made = layout(specs=[])
    weights = {name: tensor for name, tensor in others().items() if not name.startswith("feature_")}
    theirs = made.to_theirs({TABLE: OURS[TABLE], **weights})
    assert made.model == "GRU4Rec"
    assert list(theirs) == [TABLE, "gru_layers.weight_ih_l0", "gru_layers.weight_hh_l0", "dense.weight", "dense.bias"]
    shapes = {name: tensor.shape for name, tensor in {TABLE: OURS[TABLE], **weights}.items()}
    ours = made.to_ours(theirs, shapes, "file")
    assert all(torch.equal(ours[name], tensor) for name, tensor in {TABLE: OURS[TABLE], **weights}.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({TABLE: rows(1, 2, 3, 4)}, r"file: 'item_embedding.weight' has shape \[4, 3\]; .* ids .* \[5, 3\]"),
        ({TAGS: torch.zeros(6, 4)}, r"token_seq_embedding_table.item.0.weight' has shape \[6, 4\]"),
        ({"dense_layer.bias": torch.zeros(2)}, r"'dense_layer.bias' has shape \[2\]; .* \[3\]"),
        ({"dense_layer.weight": torch.zeros(3)}, r"'dense_layer.weight' has shape \[3\]"),
        ({FLOATS: None}, "has no weight 'feature_embed_layer.float_embedding_table"),
        ({"position_embedding.weight": rows(1)}, "has a weight 'position_embedding.weight'"),
    ],
)
def test_sizes_that_do_not_fit_are_named(change, message):
    weights = {name: tensor for name, tensor in {**THEIRS, **others(), **change}.items() if tensor is not None}
    shapes = {name: tensor.shape for name, tensor in {**OURS, **others()}.items()}
    with pytest.raises(UserError, match=message):
        layout().to_ours(weights, shapes, "file")


def test_a_token_that_recbole_lacks_is_named():
    with pytest.raises(UserError, match=r"ids: the item 'b' of the data set is not there \(2 of 3 are not\)"):
        layout(ids=TokenIds("ids", ["[PAD]", "a", "d"], IDS.features))
    fewer = {**IDS.features, "tags": ["[PAD]", "t", "v"]}
    with pytest.raises(
        UserError, match=r"ids: the value of 'tags' 'u' of the data set is not there \(1 of 3 are not\)"
    ):
        layout(ids=TokenIds("ids", IDS.items, fewer))
    with pytest.raises(UserError, match="ids: has no ids of the feature 'shop'"):
        layout(ids=TokenIds("ids", IDS.items, {"brand": IDS.features["brand"], "tags": IDS.features["tags"]}))
    # On the way there a value that RecBole's items do not have is left out.
    made = layout(ids=TokenIds("ids", IDS.items, fewer), all_values=False)
    torch.testing.assert_close(made.to_theirs({**OURS, **others()})[TAGS], rows(0, 20, 40), rtol=0, atol=0)


def test_a_token_that_is_called_like_the_padding_is_not_the_padding():
    with pytest.raises(UserError, match=r"the item '\[PAD\]' of the data set is not there"):
        Layout(
            ModelConfig(embedding_size=D, fusion="item_only"),
            [],
            ["", "a", "[PAD]"],
            {},
            TokenIds("ids", ["[PAD]", "a"]),
        )


# -- files of ids ------------------------------------------------------------------------------------------------------


def test_ids_are_read_as_they_were_written(tmp_path):
    write_ids(str(tmp_path), IDS)
    again = read_ids(str(tmp_path))
    assert (again.items, again.features) == (IDS.items, IDS.features)
    (tmp_path / "features.json").unlink()
    assert read_ids(str(tmp_path)).features == {}


@pytest.mark.parametrize(
    ("items", "features", "message"),
    [
        (["[PAD]", "a", "b", "a"], {}, "items: 'a' has two ids, 1 and 3"),
        (["a", "b"], {}, r"items: entry 0 must be '\[PAD\]'"),
        ([], {}, r"items: entry 0 must be '\[PAD\]'"),
        (["[PAD]", "a"], {"brand": ["[PAD]", "x", "x"]}, "brand: 'x' has two ids, 1 and 2"),
        (["[PAD]", "a"], {"brand": ["x"]}, "brand: entry 0"),
        (["[PAD]", 7], {}, "items.json: must be a list of tokens"),
        ({"a": 1}, {}, "items.json: must be a list of tokens"),
        (["[PAD]", "a"], ["x"], "features.json: must be an object"),
        (["[PAD]", "a"], {"brand": "x"}, "features.json: must be an object"),
    ],
)
def test_ids_that_are_not_in_order_are_one_clear_line(items, features, message, tmp_path):
    (tmp_path / "items.json").write_text(json.dumps(items))
    (tmp_path / "features.json").write_text(json.dumps(features))
    with pytest.raises(UserError, match=message) as error:
        read_ids(str(tmp_path))
    assert str(tmp_path) in str(error.value)


def test_ids_that_are_not_there_are_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"items\.json: no such file"):
        read_ids(str(tmp_path))
    with pytest.raises(UserError, match="nowhere: no such file"):
        read_ids(str(tmp_path / "nowhere"))
    (tmp_path / "other.pth").write_bytes(b"not a pickle")
    with pytest.raises(UserError, match=r"other\.pth: neither a folder"):
        read_ids(str(tmp_path / "other.pth"))

"""RecBole's atomic files: which ids RecBole gives to what is in them."""

from __future__ import annotations

import pytest

from gru4recf_dist.errors import UserError
from gru4recf_dist.recbole.atomic_files import ids_of_files

INTER = "user_id:token\titem_id:token\ttimestamp:float\nu1\tc\t3\nu2\ta\t1\n\nu1\tc\t2\nu1\tnull\t2\n\tx\t2\nu3\tb\t1\n"
ITEM = (
    "item_id:token\tbrand:token\ttags:token_seq\tprice:float\n"
    "d\tz\tp q\t1\n"
    "b\t\t\t2\n"
    'c\t"y y"\tq  r\t3\n'
    "b\tlate\tlate\t3\n"
    "a\tN/A\tNA\t3\n"
    "e\tz\n"
)
LOADED = {"inter": ["user_id", "item_id"], "item": ["item_id", "brand", "tags", "price"]}


@pytest.fixture
def folder(tmp_path):
    where = tmp_path / "shop"
    where.mkdir()
    (where / "shop.inter").write_text(INTER)
    (where / "shop.item").write_text(ITEM)
    return where


def test_ids_follow_the_order_of_appearance(folder):
    ids = ids_of_files(str(folder), ["brand", "tags", "price"], {"load_col": LOADED})
    # Events first, then the items that only the other file has; rows without user or item are none.
    assert ids.items == ["[PAD]", "c", "a", "b", "d", "e"]
    # The first row of an item counts; pandas takes `N/A` and `NA` for nothing.
    assert ids.features == {"brand": ["[PAD]", "z", "y y"], "tags": ["[PAD]", "p", "q", "r"]}


def test_without_the_item_file_the_events_alone_count(folder):
    ids = ids_of_files(str(folder), [], {"load_col": {"inter": ["user_id", "item_id"]}})
    assert ids.items == ["[PAD]", "c", "a", "b"] and ids.features == {}


def test_events_of_items_that_the_item_file_lacks_are_left_out(folder):
    with (folder / "shop.inter").open("a") as stream:
        stream.write("u1\tnew\t9\n")
    assert "new" not in ids_of_files(str(folder), [], {"load_col": LOADED}).items
    for settings in ({"load_col": {"inter": ["item_id"]}}, {"load_col": LOADED, "filter_inter_by_user_or_item": False}):
        assert "new" in ids_of_files(str(folder), [], settings).items


def test_names_and_separators_are_recboles_settings(folder):
    (folder / "shop.inter").write_text("session:token,product:token\ns,b\ns,a\n")
    (folder / "shop.item").write_text("product:token,tags:token_seq\na,p|q\nb,r|p\n")
    settings = {"USER_ID_FIELD": "session", "ITEM_ID_FIELD": "product", "field_separator": ",", "seq_separator": "|"}
    ids = ids_of_files(str(folder), ["tags"], settings)
    assert ids.items == ["[PAD]", "b", "a"] and ids.features == {"tags": ["[PAD]", "p", "q", "r"]}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rm_dup_inter", "first"),
        ("val_interval", {"rating": "[3,inf)"}),
        ("user_inter_num_interval", "[5,inf)"),
        ("item_inter_num_interval", "[5,inf)"),
        ("alias_of_item_id", ["other_id"]),
        ("benchmark_filename", ["train", "valid", "test"]),
    ],
)
def test_settings_that_change_the_ids_are_refused_by_name(name, value, folder):
    with pytest.raises(UserError, match=f"RecBole's {name} was .*--ids"):
        ids_of_files(str(folder), [], {"load_col": LOADED, name: value})


def test_a_user_file_is_refused(folder):
    (folder / "shop.user").write_text("user_id:token\nu1\n")
    with pytest.raises(UserError, match=r"shop\.user: .*--ids"):
        ids_of_files(str(folder), [], {"load_col": None})
    assert ids_of_files(str(folder), [], {"load_col": LOADED}).items


def test_what_is_missing_is_named(folder):
    (folder / "shop.item").unlink()
    with pytest.raises(UserError, match=r"shop\.item: no such file"):
        ids_of_files(str(folder), ["brand"], {"load_col": LOADED})
    (folder / "shop.inter").write_text("user_id:token\tproduct:token\nu\ta\n")
    with pytest.raises(UserError, match=r"shop\.inter: has no column 'item_id' \(it has: user_id, product\)"):
        ids_of_files(str(folder), [], {"load_col": LOADED})
    (folder / "shop.inter").unlink()
    with pytest.raises(UserError, match=r"shop\.inter: no such file"):
        ids_of_files(str(folder), [], {"load_col": LOADED})

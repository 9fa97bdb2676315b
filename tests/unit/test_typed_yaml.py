"""Typed YAML on a schema of its own: files, overrides and every way in which they can be wrong."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gru4recf_dist import typed_yaml
from gru4recf_dist.data import storage
from gru4recf_dist.errors import UserError
from gru4recf_dist.section import Section


class Engine(Section):
    power: int = 1
    fuel: Literal["petrol", "steam"] = "steam"


class Car(Section):
    name: str
    doors: int = 4
    engine: Engine = Engine()
    spare: Engine | None = None


def _load_text(text: str | bytes, *overrides: str) -> Car:
    url = "memory://typed-yaml/car.yaml"
    storage.write_bytes(url, text if isinstance(text, bytes) else text.encode())
    return typed_yaml.load(Car, url, list(overrides))


def _error(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert text
    assert "\n" not in text
    return text


def test_overrides_win_over_the_file_and_later_over_earlier():
    car = _load_text("name: a\nengine: {power: 3, fuel: petrol}", "engine.power=5", "engine.power=6")
    assert car == Car(name="a", engine=Engine(power=6, fuel="petrol"))


def test_optional_section_can_be_given_by_a_dotted_key():
    assert _load_text("name: a", "spare.power=2").spare == Engine(power=2)


def test_interpolation_refers_to_another_key():
    assert _load_text("name: car-${doors}\ndoors: 3").name == "car-3"


def test_empty_file_is_an_empty_mapping():
    assert "name must be given" in _error(lambda: _load_text(""))
    assert _load_text("", "name=a") == Car(name="a")


def test_dump_keeps_the_order_of_the_declaration():
    text = typed_yaml.dump(Car(name="a"))
    assert [line.partition(":")[0] for line in text.splitlines() if line[0] != " "] == list(Car.model_fields)


@pytest.mark.parametrize("override", ["doors", "", "=4", "--doors=4", "-d=4", "doors 4"])
def test_malformed_override_is_quoted_back(override):
    assert _error(lambda: _load_text("name: a", override)).startswith(f"'{override}'")


@pytest.mark.parametrize("override", ["doors=[", "doors={a: ", 'name="open'])
def test_override_whose_value_is_not_yaml_is_one_line_with_its_key(override):
    assert override.partition("=")[0] in _error(lambda: _load_text("name: a", override)).replace("car.yaml", "")


def test_interpolation_of_an_unknown_key_names_it():
    assert "nowhere" in _error(lambda: _load_text("name: a", "name=${nowhere}"))


def test_missing_file_is_named(tmp_path):
    path = str(tmp_path / "none.yaml")
    assert path in _error(lambda: typed_yaml.load(Car, path, []))
    assert str(tmp_path) in _error(lambda: typed_yaml.load(Car, str(tmp_path), []))


@pytest.mark.parametrize(
    "text",
    [
        "name: [",
        "name: a\n name: b",
        "- name",
        "name: 'a",
        "\tname: a",
        "name: !!python/object/apply:os.system ['true']",
        "name: *nowhere",
        b"\xff\xfe\x00name",
        b"name: \x00",
        "5",
        "[1, 2]",
    ],
)
def test_broken_file_is_named(text):
    assert "car.yaml" in _error(lambda: _load_text(text))


def test_yaml_tags_execute_nothing(tmp_path):
    target = tmp_path / "executed"
    _error(lambda: _load_text(f"name: !!python/object/apply:os.mkdir ['{target}']"))
    assert not target.exists()


@pytest.mark.parametrize(
    ("text", "unknown", "meant"),
    [
        ("name: a\ndors: 3", "dors", "doors"),
        ("name: a\nengine: {powr: 3}", "engine.powr", "engine.power"),
        ("name: a\nspare: {fule: steam}", "spare.fule", "spare.fuel"),
    ],
)
def test_unknown_key_in_a_file_names_the_closest(text, unknown, meant):
    assert f"unknown key '{unknown}'; did you mean '{meant}'?" in _error(lambda: _load_text(text))


def test_wrong_type_names_key_and_value():
    assert _error(lambda: _load_text("name: a\ndoors: many")).startswith("doors: ")
    assert "'many'" in _error(lambda: _load_text("name: a\ndoors: many"))
    assert "engine.fuel" in _error(lambda: _load_text("name: a\nengine: {fuel: coal}"))
    assert "name" in _error(lambda: _load_text("name: {x: 1}"))


def test_several_errors_are_all_in_the_line():
    text = _error(lambda: _load_text("name: a\ndoors: many\nengine: {power: much}"))
    assert "doors" in text
    assert "engine.power" in text


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_a_car_or_a_user_error(text):
    try:
        car = _load_text(text.encode("utf-8", "surrogatepass"), "name=a")
    except UserError as error:
        assert str(error)
    else:
        assert isinstance(car, Car)


@settings(deadline=None)
@given(st.lists(st.text(max_size=15), max_size=3))
def test_any_overrides_give_a_car_or_a_user_error(overrides):
    try:
        car = _load_text("name: a", *overrides)
    except UserError as error:
        assert str(error)
    else:
        assert isinstance(car, Car)

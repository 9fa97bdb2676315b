"""Recipes: unknown keys, wrong values, and what the shipped ones say."""

import json
import pickle
from pathlib import Path

import pytest

from data_prep.prepare import prepare
from data_prep.recipe import Recipe
from gru4recf_dist import typed_yaml
from gru4recf_dist.data import storage
from gru4recf_dist.errors import UserError, exits_cleanly
from tests.unit.data_prep.prepared import make, random_rows, run, write_csv

SHIPPED = sorted((Path(__file__).parents[3] / "configs/data").glob("*.yaml"))
NEEDED = ["name=x", "source=a", "output=b"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path):
    recipe = typed_yaml.load(Recipe, str(path), ["source=elsewhere"])
    assert (recipe.name, recipe.source) == (path.stem, "elsewhere")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["min_item_suport=5"], "unknown key 'min_item_suport'; did you mean 'min_item_support'"),
        (["input.sesion=x"], "unknown key 'input.sesion'; did you mean 'input.session'"),
        (["streams=12"], "streams: must be a power of two"),
        (["split.method=random"], "split.method: .*'leave_one_out', 'temporal' or 'files'"),
        (["block_sessions=2000"], "block_sessions: .*1024"),
        (["session_gap=60"], "session_gap and input.user must be given together"),
        (["split.valid_from=3"], "valid_from and test_from must be given together"),
        (["split.method=temporal", "split.valid_share=0.6", "split.test_share=0.4"], "must leave something"),
        (["input.events=e", "input.format=csv"], "events needs format jsonl or parquet"),
        (["input.test_files=[x]"], "input.test_files needs split.method=files"),
        (["features=[{name: a, kind: token, standardize: true}]"], "standardize needs kind float"),
        (["features=[{name: a}, {name: a}]"], "'a' is listed twice"),
        (["input.encoding=latin-7000"], "encoding 'latin-7000' is not known"),
        (["input.encoding=latin-1", "input.format=parquet"], "encoding needs format recbole, csv or tsv"),
        (["input.keep={kind: []}"], "keep.kind lists no values"),
        (["items.property=x"], "items: property and value must be given together"),
        (["item_tables={x: {fil: a}}"], "unknown key 'item_tables.x.fil'"),
        (["features=[{name: a, kind: token, extract: '('}]"], "extract: is not a regular expression"),
        (["features=[{name: a, kind: token, extract: 'x'}]"], "extract: must have one group, not 0"),
        (["features=[{name: a, npy: a, npy_items: b, table: x}]"], "table is of no use with npy"),
        (["min_session_length=0"], "min_session_length: .*1"),
        (["engine=spark", "threads=2"], r"threads is for engine duckdb; with spark use spark.master=local\[N\]"),
        (
            ["engine=spark", "memory_limit_gib=2"],
            "memory_limit_gib is for engine duckdb; with spark use spark.settings",
        ),
        (["engine=spark", "output=memory://x"], "output: engine spark works in other processes"),
        (["engine=spark", "spark.master=spark://host:7077"], "temporary_folder must be given with spark.master=spark:"),
        (["spark.settings.executor.memory=8g"], "spark.settings: 'executor.memory' is no Spark setting"),
        (["spark.settings.spark.master=yarn"], "spark.master has a key of its own"),
        (["memory_limit_gib=0"], "memory_limit_gib: .*0"),
    ],
)
def test_wrong_values_name_the_key(overrides, message):
    with pytest.raises(UserError, match=message):
        typed_yaml.load(Recipe, None, [*NEEDED, *overrides])


def test_every_key_is_documented():
    def undocumented(schema, prefix=""):
        for name, field in schema.model_fields.items():
            if not field.description:
                yield prefix + name
            for inner in typed_yaml._section_types(field.annotation):
                yield from undocumented(inner, f"{prefix}{name}.")

    assert list(undocumented(Recipe)) == []


def test_settings_of_spark_as_keys_or_nested():
    """What YAML holds under one quoted key, an override of the command line gives level by level."""
    overrides = ["spark.settings.spark.executor.memory=8g", "spark.settings.spark.sql.ansi.enabled=true"]
    expected = {"spark.executor.memory": "8g", "spark.sql.ansi.enabled": "true"}
    assert typed_yaml.load(Recipe, None, NEEDED + overrides).spark.settings == expected
    given = {"name": "x", "source": "a", "output": "b", "spark": {"settings": expected}}
    assert Recipe.model_validate(given).spark.settings == expected


SECRET = "hunter-of-somebody"


@pytest.mark.parametrize(
    "wrong",
    [
        f"spark.settings.spark.hadoop.fs.s3a.secret.key=[{SECRET}]",
        f"spark.settings={SECRET}",
        f"spark=[{SECRET}]",
        f"spark={{settings: {{spark.secret: '{SECRET}",
        f"spark.settings.spark.secret='${{{SECRET}}}'",
        f"spark.settings.spark.secret=*{SECRET}",
        f"storage.options.s3.secret=*{SECRET}",
        f"storage={SECRET}",
    ],
)
def test_a_wrong_value_of_a_setting_that_may_be_secret_is_not_shown(wrong):
    with pytest.raises(UserError, match=r"^(spark|storage)") as caught:
        typed_yaml.load(Recipe, None, [*NEEDED, wrong])
    assert "somebody" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_secret_of_a_file_that_cannot_be_resolved_is_not_shown():
    storage.write_bytes("memory://recipes/x.yaml", b"spark: {settings: {spark.a: 8g, spark.b: '${of-somebody}'}}")
    with pytest.raises(UserError, match=r"^spark.settings.*: cannot be parsed") as caught:
        typed_yaml.load(Recipe, "memory://recipes/x.yaml", NEEDED)
    assert "somebody" not in str(caught.value)


def test_settings_of_spark_are_written_nowhere_and_not_shown(tmp_path, capsys):
    secrets = {"spark.hadoop.fs.s3a.secret.key": "secret-of-somebody", "spark.hadoop.fs.s3a.endpoint": "http://store:9"}
    spark = {"settings": {**secrets, "spark.executor.memory": "8g"}}
    source = str(write_csv(tmp_path / "raw.csv", random_rows(2)))
    content = {"source": source, "output": str(tmp_path / "data"), "input": {"format": "csv"}, "spark": spark}
    content["split"] = {"method": "temporal"}
    run(content)
    recipe = make(content)
    assert recipe.spark.settings["spark.hadoop.fs.s3a.secret.key"] == "secret-of-somebody"
    # Executors get it this way.
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    other = str(write_csv(tmp_path / "more.csv", random_rows(3)))
    prepare(make({**content, "source": other}), append=True)
    manifest = (tmp_path / "data/manifest.json").read_text()
    assert json.loads(manifest)["recipe"]["spark"] == {"master": "local[*]"}
    for text in (manifest, repr(recipe), str(recipe), recipe.model_dump_json()):
        assert "somebody" not in text and "store:9" not in text

    @exits_cleanly
    def main() -> None:
        raise UserError("spark: cannot be started (secret-of-somebody at store:9 with 8g)")

    assert main() == 2
    assert capsys.readouterr().err == "error: spark: cannot be started (*** at *** with 8g)\n"

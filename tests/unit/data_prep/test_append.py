"""Appending: the same as an independent reference says, and nothing of what was there is touched."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pytest

from data_prep import output, writer
from data_prep import prepare as preparation
from data_prep.prepare import prepare
from gru4recf_dist.data import storage
from gru4recf_dist.data.shard_format import kept_manifest, read_manifest
from gru4recf_dist.errors import UserError
from tests.unit.data_prep.append_reference import RECIPE, STREAMS, Reference, write_day
from tests.unit.data_prep.both_engines import ON_SPARK, SPARK, files_of
from tests.unit.data_prep.prepared import Prepared, make, write_csv

DAYS = (1, 2, 3)


@pytest.fixture(scope="module")
def days(tmp_path_factory) -> dict[int, dict]:
    """The recipe's values for the raw files of each day."""
    folder = tmp_path_factory.mktemp("raw")
    return {day: write_day(folder, day) for day in DAYS}


@pytest.fixture(scope="module")
def first(tmp_path_factory, days) -> Path:
    """Day 1, prepared."""
    folder = tmp_path_factory.mktemp("first") / "data"
    prepare(make({**RECIPE, **days[1], "output": str(folder)}))
    return folder


@pytest.fixture
def data(tmp_path, first) -> Path:
    """A copy of `first` to append to."""
    shutil.copytree(first, tmp_path / "data")
    return tmp_path / "data"


def append(data: Path | str, content: dict, **more):
    return prepare(make({**RECIPE, **content, "output": str(data), **more}), append=True)


def everything(data: Path) -> dict[str, bytes]:
    return {**files_of(data), "manifest.json": (data / "manifest.json").read_bytes()}


# -- what is in it ----------------------------------------------------------------------------------------------------


def test_ids_numbers_streams_popularity_and_features_are_those_of_the_reference(data, days):
    reference = Reference()
    reference.add(days[1])
    reference.check(Prepared(data))
    for day in (2, 3):
        before = len(reference.ids)
        append(data, days[day])
        reference.add(days[day])
        reference.check(Prepared(data))
        # What the comparison rests on: there are new items, and all splits grow.
        assert len(reference.ids) > before
    sizes = [sum(1 for stream, *_ in Prepared(data).sessions("train") if stream == s) for s in range(STREAMS)]
    assert max(sizes) - min(sizes) <= 1
    assert all(len(Prepared(data).shards(split)) > 2 for split in ("train", "valid", "test"))


@pytest.mark.parametrize("engine", [pytest.param("spark", marks=ON_SPARK)])
def test_spark_appends_the_same_bytes_as_duckdb(request, tmp_path, data, days, engine):
    request.getfixturevalue("spark_application")
    shutil.copytree(data, tmp_path / "spark")
    # In the second append nothing is new, and nothing is held out.
    again = tmp_path / "again.csv"
    again.write_text(Path(days[2]["source"]).read_text() + "s1,i1,5\n")
    trained = {"method": "temporal", "valid_from": 98, "test_from": 99}
    on_spark = {"engine": engine, "spark": SPARK, "threads": None}
    for folder, settings in ((data, {}), (tmp_path / "spark", on_spark)):
        append(folder, days[2], min_item_support=3, **settings)
        append(folder, {**days[2], "source": str(again)}, min_item_support=999, split=trained, **settings)
    first, second = ({**files_of(folder)} for folder in (data, tmp_path / "spark"))
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (data, tmp_path / "spark")]
    for number, files in enumerate((first, second)):
        engines = [each.pop("recipe")["engine"] for each in manifests[number]["appends"]]
        assert engines == [("duckdb", "spark")[number]] * 2
        kept = manifests[number]["ancestors"][1]
        assert files.pop(f"manifests/{kept}.json")
    assert first == second
    assert manifests[0] == manifests[1]


def test_the_manifest_tells_where_all_came_from(data, days):
    before = read_manifest(str(data))
    append(data, days[2])
    append(data, days[3], shard_sessions=7, session_gap=None)
    after = read_manifest(str(data))
    assert [file.name for file in after.inputs] == ["events.csv"] * 3
    assert [file.bytes for file in after.inputs] == [Path(days[day]["source"]).stat().st_size for day in DAYS]
    assert (after.recipe, after.report) == (before.recipe, before.report)
    assert [each.recipe["shard_sessions"] for each in after.appends] == [5, 7]
    assert [each.report[0]["events"] for each in after.appends] == [260, 260]
    assert len(after.ancestors) == 2 and after.ancestors[0] == before.training_digest
    assert len({*after.ancestors, after.training_digest}) == 3


def test_earlier_states_stay_as_they_were(data, days):
    states = []
    for day in (2, 3):
        states.append((read_manifest(str(data)), everything(data)))
        append(data, days[day])
    for manifest, before in states:
        assert read_manifest(str(data), manifest.training_digest) == manifest
        name = kept_manifest(manifest.training_digest)
        assert (data / name).read_bytes() == before.pop("manifest.json")
        now = everything(data)
        assert {file: now[file] for file in before} == before
        assert set(manifest.files) <= before.keys()


def test_without_its_manifest_an_earlier_state_loses_the_files_that_are_its_alone(data, days):
    old = read_manifest(str(data))
    append(data, days[2])
    (data / kept_manifest(old.training_digest)).unlink()
    append(data, days[3])
    gone = {file for file in old.files if not (data / file).exists()}
    assert gone == {file for file in old.files if file.startswith("items/")}


def test_known_items_need_no_support_and_new_ones_need_it_among_the_new_events(tmp_path):
    recipe = {"input": {"format": "csv"}, "split": {"method": "temporal", "valid_from": 90, "test_from": 95}}
    recipe |= {"output": str(tmp_path / "out"), "min_item_support": 3}

    def day(number: int, sessions: list[str]) -> dict:
        # One letter an item; the last two sessions are held out.
        times = [10] * (len(sessions) - 2) + [90, 95]
        rows = [(f"{number}-{n}", item, times[n]) for n, items in enumerate(sessions) for item in items]
        return {**recipe, "source": str(write_csv(tmp_path / f"{number}.csv", rows))}

    prepare(make(day(1, ["abc", "abc", "abcx", "ab", "ab"])))
    assert set(Prepared(tmp_path / "out").ids) == {"a", "b", "c"}
    # x has two events here and one before; of y's four one is in a session that is too short without z.
    prepare(make(day(2, ["axy", "cxy", "yz", "yb", "ab", "ab"])), append=True)
    data = Prepared(tmp_path / "out")
    assert set(data.ids) == {"a", "b", "c", "y"} and data.ids["y"] == 4
    assert [tokens for _, number, tokens, _ in data.sessions("train") if number < 3] == [list("abc")] * 3
    assert sorted(tokens for _, number, tokens, _ in data.sessions("train") if number >= 3) == [
        ["a", "y"],
        ["c", "y"],
        ["y", "b"],
    ]
    assert {token: int(data.popularity[number]) for token, number in data.ids.items()} == {
        "a": 4,
        "b": 4,
        "c": 4,
        "y": 3,
    }


def test_an_append_may_hold_nothing_out_but_must_hold_something_to_train_on(data, days):
    before = everything(data)
    bounds = {"method": "temporal", "valid_from": -2, "test_from": -1}
    with pytest.raises(UserError, match="split: no train session with a target is left"):
        append(data, days[2], split=bounds)
    assert everything(data) == before
    sessions = Prepared(data).sessions("test")
    append(data, days[2], split={**bounds, "valid_from": 98, "test_from": 99})
    assert Prepared(data).sessions("test") == sessions
    rows = {row.get("step"): row for row in Prepared(data).manifest["appends"][0]["report"]}
    assert (rows["split: test"]["targets"], rows["split: test"]["untrained_share"]) == (0, 0)


def test_given_files_may_be_appended_to_train_alone(tmp_path, days):
    for day in (1, 2):
        shutil.copy(days[day]["source"], tmp_path / f"{day}.csv")
    shutil.copy(days[3]["source"], tmp_path / "test.csv")
    recipe = {"source": str(tmp_path), "output": str(tmp_path / "out"), "split": {"method": "files"}}
    given = {"format": "csv", "train_files": ["1.csv"], "test_files": ["test.csv"]}
    prepare(make({**recipe, "input": given}))
    before = Prepared(tmp_path / "out")
    prepare(make({**recipe, "input": {"format": "csv", "train_files": ["2.csv"]}}), append=True)
    after = Prepared(tmp_path / "out")
    assert after.sessions("test") == before.sessions("test")
    assert all(len(after.sessions(split)) > len(before.sessions(split)) for split in ("train", "valid"))


def test_a_data_set_whose_missing_numbers_are_zeros_is_appended_to_as_such(data, days):
    """As those are that were prepared before there was `flag_missing`."""
    manifest = json.loads((data / "manifest.json").read_text())
    for feature in manifest["recipe"]["features"]:
        del feature["flag_missing"]
    (price,) = [feature for feature in manifest["features"] if feature["name"] == "price"]
    price["missing"] = False
    values = np.load(data / price["values"])
    np.save(data / price["values"], np.nan_to_num(values))
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"features\.price\.flag_missing: True, but the data set at .* with False"):
        append(data, days[2])
    features = [{**each, "flag_missing": False} if each["name"] == "price" else each for each in RECIPE["features"]]
    append(data, days[2], features=features)
    (price,) = [feature for feature in read_manifest(str(data)).features if feature.name == "price"]
    grown = np.load(data / price.values)
    assert not price.missing and len(grown) > len(values) and (grown == 0).sum() > (np.nan_to_num(values) == 0).sum()


# -- failures ---------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process is gone: nothing is cleaned up."""


def append_failing(data: Path, recipe: dict, number: int, error: BaseException) -> bool:
    """Append, but let the write with this number fail when half of the file is there; whether there was one."""
    opened, cleaned = storage.open_atomic, output._remove_unnamed
    writes, cleanings = itertools.count(), itertools.count()

    @contextlib.contextmanager
    def open_or_fail(url):
        with opened(url) as stream:
            yield stream
            if next(writes) == number:
                if isinstance(error, Killed):
                    Path(f"{url}.{uuid.uuid4().hex}.tmp").write_bytes(b"half")
                raise error

    def clean_unless_killed(url):
        if next(cleanings) == 0 or not isinstance(error, Killed):
            cleaned(url)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "open_atomic", open_or_fail)
        patch.setattr(output, "_remove_unnamed", clean_unless_killed)
        try:
            append(data, recipe)
        except (type(error), UserError):
            return True
    return False


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Killed()], ids=["error", "killed"])
def test_whichever_write_fails_the_data_set_stays_and_appending_again_gives_the_same(tmp_path, data, days, error):
    # Bad rows too, and only as many files as it takes.
    raw = tmp_path / "events.csv"
    raw.write_text(Path(days[2]["source"]).read_text() + "s1,,5\n")
    recipe = {**days[2], "source": str(raw), "shard_sessions": 1000}
    shutil.copytree(data, tmp_path / "undisturbed")
    append(tmp_path / "undisturbed", recipe)
    before, failures = everything(data), 0
    while append_failing(data, recipe, failures, error):
        failures += 1
        now = everything(data)
        assert {name: now[name] for name in before} == before
        if isinstance(error, OSError):
            # All that stays is the copy of the manifest, if its turn came.
            assert {name for name in now if not name.startswith("manifests/")} == before.keys()
    # Quarantine, tokens, popularity; 2, 3, 1 and 1 files of features; the shards; both manifests.
    assert failures == 3 + 7 + STREAMS + 2 + 2
    after, expected = everything(data), everything(tmp_path / "undisturbed")
    assert after.keys() == expected.keys()
    for manifest in (after, expected):
        manifest["manifest.json"] = manifest["manifest.json"].replace(str(tmp_path / "undisturbed").encode(), b"")
        manifest["manifest.json"] = manifest["manifest.json"].replace(str(data).encode(), b"")
    assert after == expected


def test_a_failure_after_the_manifest_was_replaced_takes_nothing_away(tmp_path, data, days, monkeypatch):
    replaced = output.write_manifest

    def write_and_die(url, manifest):
        replaced(url, manifest)
        raise KeyboardInterrupt

    monkeypatch.setattr(output, "write_manifest", write_and_die)
    with pytest.raises(KeyboardInterrupt):
        append(data, days[2])
    manifest = read_manifest(str(data))
    assert len(manifest.ancestors) == 1
    assert all((data / file).exists() for file in manifest.files)


def test_a_change_by_another_program_is_noticed(data, days, monkeypatch):
    original = writer.write_shard

    def write_and_change(folder, *args):
        text = (data / "manifest.json").read_text()
        (data / "manifest.json").write_text(text + " ")
        return original(folder, *args)

    monkeypatch.setattr(writer, "write_shard", write_and_change)
    files = files_of(data)
    with pytest.raises(UserError, match=r"output: .*: another program has changed the data set meanwhile"):
        append(data, days[2])
    now = {name: content for name, content in files_of(data).items() if not name.startswith("manifests/")}
    assert now == files


def test_on_object_storage(tmp_path, data, days, monkeypatch):
    url = f"memory://{uuid.uuid4().hex}/data"
    fs, path = fsspec.core.url_to_fs(url)

    def found() -> dict[str, bytes]:
        return {name.removeprefix(f"{path}/"): fs.cat_file(name) for name in fs.find(path)}

    fs.put(str(data), path, recursive=True)
    before = found()
    original, written = writer.write_shard, []

    def fails_the_second_time(*args):
        written.append(args)
        if len(written) == 2:
            raise OSError("connection lost")
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_shard", fails_the_second_time)
        with pytest.raises(OSError, match="connection lost"):
            append(url, days[2])
    assert found() == before
    append(url, days[2])
    append(data, days[2])
    remote, local = found(), everything(data)
    for manifest in (remote, local):
        del manifest["manifest.json"]
    assert remote == local
    # Preparing anew leaves nothing of the appends either.
    prepare(make({**RECIPE, **days[1], "output": url}))
    assert found().keys() == before.keys()


# -- refusals ---------------------------------------------------------------------------------------------------------

FEATURES = RECIPE["features"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"output": "nowhere"}, "output: .*nowhere: there is no data set to append to"),
        ({"name": "other"}, "name: other, but the data set at .* was prepared with test"),
        ({"seed": 8}, "seed: 8, but .* with 7"),
        ({"streams": 8}, "streams: 8, but .* with 4"),
        ({"store_times": False}, "store_times: False, but .* with True"),
        ({"split": {"method": "leave_one_out"}}, "split.method: leave_one_out, but .* with temporal"),
        ({"features": FEATURES[:2]}, r"features: brand \(token\), tags \(token_seq\), but .*image \(vector\)"),
        ({"features": FEATURES[1:] + FEATURES[:1]}, r"features: tags \(token_seq\), .*, but"),
        (
            {"features": [*FEATURES[:2], {"name": "price", "kind": "float"}, FEATURES[3]]},
            "features.price.standardize: False, but .* with True",
        ),
        ({"input": {"format": "csv", "time_format": "integer"}}, "input.time_format: integer, but .* with number"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_by_its_key(data, days, tmp_path, monkeypatch, changes, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preparation, "open_engine", None)
    before = everything(data)
    with pytest.raises(UserError, match=says) as caught:
        prepare(make({**RECIPE, "output": str(data), **days[2], **changes}), append=True)
    assert "\n" not in str(caught.value)
    assert everything(data) == before


def test_streams_need_not_be_repeated(data, days):
    append(data, days[2], streams=None)
    assert read_manifest(str(data)).streams == STREAMS


def test_events_that_are_there_are_refused_whatever_their_file_is_called(tmp_path, data, days):
    append(data, days[2])
    for day in (1, 2):
        again = shutil.copy(days[day]["source"], tmp_path / "new-name.csv")
        with pytest.raises(UserError, match=r"source: new-name.csv: the data set holds these events already"):
            append(data, {**days[3], "source": str(again)})


def test_leave_one_out_is_refused(tmp_path, days):
    recipe = {**RECIPE, "split": {"method": "leave_one_out"}, "output": str(tmp_path / "out")}
    prepare(make({**recipe, **days[1]}))
    with pytest.raises(UserError, match=r"split.method: leave_one_out .* stored sessions cannot be continued"):
        prepare(make({**recipe, **days[2]}), append=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda manifest: manifest.update(recipe={}), "was prepared by another version"),
        (lambda manifest: manifest["features"][2].pop("mean"), "features.price.standardize: .* prepare it anew"),
    ],
)
def test_a_data_set_of_an_earlier_version_is_refused_where_it_says_too_little(data, days, change, says):
    manifest = json.loads((data / "manifest.json").read_text())
    change(manifest)
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=says):
        append(data, days[2])


def test_vectors_of_another_size_are_refused(tmp_path, data, days):
    lines = Path(days[2]["items"]["file"]).read_text().splitlines()
    (tmp_path / "items.csv").write_text("\n".join([lines[0], *(f"{line}|1" for line in lines[1:])]))
    before = everything(data)
    with pytest.raises(UserError, match=r"features.image: vectors of size 3, but the data set has size 2"):
        append(data, {**days[2], "items": {"file": str(tmp_path / "items.csv")}})
    assert everything(data) == before

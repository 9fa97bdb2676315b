"""URLs with a user or password in them: refused by the key at which they stand, and never shown."""

from __future__ import annotations

import pytest

from data_prep.recipe import Recipe
from gru4recf_dist import config as configuration
from gru4recf_dist import typed_yaml
from gru4recf_dist.data import filesystems, storage
from gru4recf_dist.data.shard_format import read_manifest
from gru4recf_dist.data.storage_config import StorageConfig
from gru4recf_dist.errors import UserError
from tests.support.synthetic import random_sessions, write_dataset

URL = "https://bob:hunter2@host.example.org/data"
HOLDING = [
    (URL, "https://***@host.example.org/data"),
    ("https://bob@host/data", "https://***@host/data"),
    ("HTTP://bob:h@nter2@host/a@b", "HTTP://***@host/a@b"),
    # Not how it is to be written, but what is meant can be told.
    ("https://bob:hun/ter2@host/data", "https://***@host/data"),
    ("s3://key:hunter2@bucket/x", "s3://***@bucket/x"),
    ("ftp://bob:hunter2@host/x", "ftp://***@host/x"),
    ("simplecache::https://bob:hunter2@host/x", "simplecache::https://***@host/x"),
    ("abfs://container:hunter2@account.dfs.core.windows.net/x", "abfs://***@account.dfs.core.windows.net/x"),
]


@pytest.mark.parametrize(("url", "shown"), HOLDING)
@pytest.mark.parametrize("call", [storage.filesystem, storage.exists, storage.read_bytes, storage.glob])
def test_a_url_with_a_user_or_password_is_refused_without_showing_it(call, url, shown):
    with pytest.raises(UserError) as caught:
        call(url)
    assert str(caught.value).startswith(f"{shown}: a URL must not hold a user or password")
    protocol = shown.partition("://")[0].rpartition(":")[2].lower()
    says = "'ftp' is not supported" if protocol == "ftp" else f"storage.options.{protocol}"
    assert str(caught.value).endswith(says)


@pytest.mark.parametrize(
    "url",
    [
        "/data/a@b",
        "https://host/a@b",
        "https://host:8080/a:c@b",
        "http://[::1]:8080/a@b",
        "https://host?user=a@b",
        "s3://bucket/a:c@b",
        "s3://arn:aws:s3:us-east-1:123456789012:accesspoint/name/a@b",
        "abfs://container@account.dfs.core.windows.net/x",
        "memory://a:b@c",
    ],
)
def test_other_signs_in_a_url_are_no_user(url):
    filesystems.refuse_userinfo(url)
    assert filesystems.without_userinfo(url) == url


@pytest.mark.parametrize("key", ["data", "run_dir", "init_from", "storage.cache_folder", "seed"])
@pytest.mark.parametrize("where", ["override", "file"])
def test_a_password_in_a_configuration_is_refused_by_its_key(tmp_path, key, where):
    overrides, path = ["data=x", "run_dir=y"], None
    if where == "override":
        overrides.append(f"{key}={URL}")
    else:
        path = str(tmp_path / "config.yaml")
        given = {"storage": {"cache_folder": URL}} if "." in key else {key: URL}
        storage.write_bytes(path, str(given).encode())
        overrides = [each for each in overrides if not each.startswith(f"{key}=")]
    _check_refused(lambda: configuration.load(path, overrides), f"{key}: a URL must not hold")


@pytest.mark.parametrize(
    "override", [f"source={URL}", f"output={URL}", f"input.files=[a, '{URL}']", f"items.file={URL}"]
)
def test_a_password_in_a_recipe_is_refused_by_its_key(override):
    key = override.partition("=")[0]
    given = ["name=x", "source=a", "output=b", override]
    _check_refused(lambda: typed_yaml.load(Recipe, None, given), f"{key}: a URL must not hold")


@pytest.mark.parametrize("override", [f"data=[{URL}", URL, f"{URL}?a=1", f"data=${{{URL}}}"])
def test_a_password_in_an_override_that_cannot_be_read_is_not_shown(override):
    _check_refused(lambda: configuration.load(None, ["run_dir=y", override]), "")


def test_a_recipe_at_a_url_with_a_password_is_refused():
    _check_refused(lambda: configuration.load(URL, []), "https://***@host.example.org/data: ")


def _check_refused(call, begins: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert str(caught.value).startswith(begins)
    assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("allow_outside", [False, True])
@pytest.mark.parametrize("damage", [{}, {"targets": 10**15}])
def test_a_password_in_a_manifest_is_refused_without_showing_it(tmp_path, allow_outside, damage):
    content = write_dataset(str(tmp_path), random_sessions(0, 20, 9)).model_dump(mode="json")
    content["splits"]["train"]["shards"][0].update({"url": URL, **damage})
    storage.write_json(f"{tmp_path}/manifest.json", content)
    filesystems.configure(StorageConfig(allow_outside=allow_outside))
    _check_refused(lambda: read_manifest(str(tmp_path)), f"{tmp_path}/manifest.json: ")


@pytest.mark.parametrize("text", ["a" * 200_000, "http://a:" * 20_000, "http://" + "a:" * 100_000, "a://" * 50_000])
def test_long_texts_are_looked_through_in_one_go(text):
    """Manifests are anybody's: a name of a megabyte must not take hours. The test's own time limit is the measure."""
    assert filesystems.without_userinfo(text) == text

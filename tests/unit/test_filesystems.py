"""What may be opened, and what must not be shown."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

from data_prep import spark_tasks
from data_prep.recipe import Recipe
from gru4recf_dist import config as configuration
from gru4recf_dist import errors, typed_yaml
from gru4recf_dist.config import LoaderConfig
from gru4recf_dist.data import filesystems, shards, storage, streams
from gru4recf_dist.data.shard_format import Manifest, file_url, read_manifest, write_manifest
from gru4recf_dist.data.storage_config import StorageConfig
from gru4recf_dist.data.streams import SessionLoader
from gru4recf_dist.errors import UserError, exits_cleanly, redacted
from gru4recf_dist.run_description import describe
from tests.support.http_files import serving
from tests.support.synthetic import random_sessions, write_dataset


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("RANK", *filesystems._SECRET_VARIABLES):
        monkeypatch.delenv(name, raising=False)


# Secrets

SECRETS = {
    "s3": {
        "key": "AKIA0123456789",
        "secret": "s3cr3t/with+signs=",
        "endpoint_url": "https://user:pass-word@minio.example.org:9000/",
        "client_kwargs": {"headers": [{"Authorization": "Bearer token-of-somebody"}]},
        "default_block_size": 5000,
        "password": 123456789012,
        "use_ssl": True,
    }
}
SHOWN = ("AKIA0123456789", "s3cr3t/with+signs=", "minio.example.org", "pass-word", "token-of-somebody", "123456789012")


def _message() -> str:
    return " ".join(str(value) for value in filesystems._texts(SECRETS)) + " https://minio.example.org/b 5000 True"


def test_no_text_of_the_options_is_shown():
    filesystems.configure(StorageConfig(options=SECRETS))
    shown = redacted(_message())
    assert not any(secret in shown for secret in SHOWN), shown
    assert shown.endswith("https://***/b 5000 True")


@pytest.mark.parametrize(
    "text", ["Cannot connect to host minio.example.org:9000 ssl:default", "https://minio.example.org:9000/bucket/x"]
)
def test_the_endpoint_is_hidden_however_it_is_written(text):
    filesystems.configure(StorageConfig(options=SECRETS))
    assert "example" not in redacted(text) and "9000" not in redacted(text)


@pytest.mark.parametrize("url", ["http://[bad", "://", "http://", "s3://"])
def test_options_that_only_look_like_urls_are_no_error(url):
    filesystems.configure(StorageConfig(options={"s3": {"endpoint_url": url}}))


def test_the_longest_secret_is_hidden_first():
    errors.hide(["secret", "secret-and-more", "abc"])
    # Three letters are no secret.
    assert redacted("secret-and-more, secret, abc") == "***, ***, abc"


@pytest.mark.parametrize("name", filesystems._SECRET_VARIABLES)
def test_the_environment_is_hidden(monkeypatch, name):
    monkeypatch.setenv(name, "https://host-of-somebody:9000")
    filesystems.hide_environment()
    assert redacted("at host-of-somebody:9000: https://host-of-somebody:9000") == "at ***: ***"


def test_fsspecs_own_variables_are_hidden(monkeypatch):
    found: dict = {}
    fsspec.config.set_conf_env(
        found, {"FSSPEC_S3_SECRET": "of-somebody", "FSSPEC_GCS": '{"token": {"private_key": "key-of-somebody"}}'}
    )
    monkeypatch.setattr(fsspec.config, "conf", found)
    filesystems.hide_environment()
    assert redacted("of-somebody and key-of-somebody") == "*** and ***"


def test_error_lines_show_no_secret(capsys):
    @exits_cleanly
    def main() -> None:
        configuration.load(None, ["data=x", "run_dir=y", *_overrides()])
        raise UserError(f"s3://b/x: ClientError: {_message()}")

    assert main() == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: s3://b/x: ClientError: *** ") and not any(secret in shown for secret in SHOWN)


def _overrides() -> list[str]:
    options = SECRETS["s3"]
    given = [f"storage.options.s3.{name}={options[name]}" for name in ("key", "secret", "endpoint_url", "password")]
    return [*given, "storage.options.s3.client_kwargs={headers: [{Authorization: Bearer token-of-somebody}]}"]


@pytest.mark.parametrize("wrong", ["storage.options.s3=AKIA0123456789", "storage.options=AKIA0123456789"])
def test_a_wrong_option_is_not_shown(wrong):
    with pytest.raises(UserError, match=r"storage\.options") as caught:
        configuration.load(None, ["data=x", "run_dir=y", wrong])
    assert "AKIA" not in str(caught.value)


def test_settings_that_are_written_have_no_options(tmp_path):
    config = configuration.load(None, ["data=x", "run_dir=y", *_overrides(), "storage.attempts=3"])
    recipe = Recipe.model_construct(storage=config.storage)
    manifest = write_dataset(str(tmp_path), random_sessions(0, 20, 9))
    written = [typed_yaml.dump(config), str(describe(config, manifest, world=1)), repr(config), str(config)]
    written += [
        str(recipe.model_dump(mode="json", warnings=False)),
        recipe.model_dump_json(warnings=False),
        repr(recipe),
    ]
    for text in written:
        assert "options" not in text and not any(secret in text for secret in SHOWN), text
    assert "attempts: 3" in written[0]
    # Loader workers get the settings this way, and need them.
    assert pickle.loads(pickle.dumps(config.storage)).options == config.storage.options


def test_loader_workers_hide_secrets_too(monkeypatch, tmp_path, caplog):
    manifest = write_dataset(str(tmp_path / "sec-ret"), random_sessions(0, 20, 9), features=False)
    shard = manifest.splits["train"].shards[0].url
    os.remove(tmp_path / "sec-ret" / shard)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sec-ret")
    monkeypatch.setattr(streams, "get_worker_info", lambda: SimpleNamespace(id=0, num_workers=1))
    config = LoaderConfig(on_bad_shard="skip")
    loader = SessionLoader(str(tmp_path / "sec-ret"), manifest, config, 8, 0, 0, 1)
    assert len(list(streams._StreamParts(loader))) == loader.steps_per_epoch
    assert f"/***/{shard}: no such file" in caplog.text and "sec-ret" not in caplog.text


def test_executors_hide_the_secrets_of_their_own_environment(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://host-of-somebody:9000")

    def fail(batches):
        raise UserError("s3://b/x: no answer from host-of-somebody:9000")

    with pytest.raises(spark_tasks.TaskError) as caught:
        list(spark_tasks.writing(fail)(iter([])))
    assert spark_tasks.user_line(str(caught.value)) == "s3://b/x: no answer from ***"


# What a manifest may name

OUTSIDE = [
    "../other.tar",
    "train/../../other.tar",
    "..",
    "train/..",
    "/etc/hostname",
    "//host/share",
    "..\\other.tar",
    "train\\..\\..\\other.tar",
    "C:\\other.tar",
    "c:other.tar",
    "file:///etc/hostname",
    "local:///etc/hostname",
    "s3://bucket/x.tar",
    "memory://x.tar",
    "pipe:touch executed",
    "pipe://touch executed",
    "exec:touch executed",
    "train/x.tar::zip://y",
    "simplecache::s3://b/x.tar",
    "train/%2e%2e/%2E%2e/secret.tar",
    "train/.%2e/x.tar",
    "..%2fsecret.tar",
    "..%5csecret.tar",
    "%2fetc/hostname",
    "train/%252e%252e/%25252e%25252e/secret.tar",
    "%2525252525252525252525252e%2e/x",
    "c%3a/x.tar",
    "train/x%00.tar",
    "train/x.tar\0.npy",
    "train/x.tar\nerror: ok",
    "train/\x1b[2J.tar",
    "train//x.tar",
    "train/./x.tar",
    "./train/x.tar",
    "train/",
    "/",
    "",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_outside_is_refused(name):
    with pytest.raises(UserError, match=r"storage\.allow_outside") as caught:
        file_url("s3://bucket/data", name)
    assert str(caught.value).startswith("s3://bucket/data/manifest.json: names ")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "name", ["train/x.tar", "x.tar", "items/features/größe [cm].npy", "a/b/...tar", "~/x.tar", "100%/x%41?#"]
)
def test_a_name_inside_is_joined(name):
    assert file_url("s3://bucket/data", name) == f"s3://bucket/data/{name}"


@pytest.mark.parametrize("name", ["x?y/../x.tar", "train/x.tar?y", "train/x.tar#y", "train/x.tar%3fy", "train/%23"])
def test_a_name_on_a_web_server_has_no_query(name):
    with pytest.raises(UserError, match=r"storage\.allow_outside"):
        file_url("https://host/data", name)


@pytest.mark.parametrize("name", ["train/%2e%2e/%2e%2e/secret.tar", "..%2fsecret.tar", "%252e%252e/secret.tar"])
def test_a_manifest_does_not_lead_out_of_its_folder_on_a_web_server(tmp_path, name):
    manifest = write_dataset(str(tmp_path), random_sessions(0, 20, 9))
    content = manifest.model_dump(mode="json")
    content["splits"]["train"]["shards"][0]["url"] = name
    with serving() as server:
        server.files = {
            f"data/{path.relative_to(tmp_path)}": path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
        }
        server.files["secret.tar"] = (tmp_path / manifest.splits["train"].shards[0].url).read_bytes()
        # As it is, the data set can be read.
        assert read_manifest(f"{server.url}/data") == manifest
        server.files["data/manifest.json"] = json.dumps(content).encode()
        with pytest.raises(UserError, match=r"data/manifest\.json: names .* not a file of this data set"):
            read_manifest(f"{server.url}/data")
        assert {name for name, _ in server.requests} == {"data/manifest.json"}


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    return write_dataset(str(tmp_path / "data"), random_sessions(0, 20, 9), random_sessions(1, 4, 9))


@pytest.mark.parametrize("place", ["shard", "valid shard", "values", "indptr", "vocabulary"])
@pytest.mark.parametrize("name", ["../x.tar", "pipe:touch executed"])
def test_no_file_of_a_manifest_may_lie_outside(tmp_path, manifest, place, name):
    content = manifest.model_dump(mode="json")
    if "shard" in place:
        content["splits"]["valid" if "valid" in place else "train"]["shards"][0]["url"] = name
    else:
        content["features"][1][place] = name
    storage.write_json(f"{tmp_path}/data/manifest.json", content)
    with pytest.raises(UserError, match=r"names .* not a file of this data set"):
        read_manifest(f"{tmp_path}/data")


def _move(tmp_path: Path, manifest: Manifest, name: str) -> Manifest:
    """Move the first shard to ``tmp_path/elsewhere`` and let the manifest name it ``name``."""
    shard = manifest.splits["train"].shards[0]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data" / shard.url).rename(tmp_path / "elsewhere" / "x.tar")
    shard.url = name
    write_manifest(f"{tmp_path}/data", manifest)
    return manifest


@pytest.mark.parametrize("name", ["../elsewhere/x.tar", "{}/elsewhere/x.tar", "file://{}/elsewhere/x.tar"])
def test_files_outside_are_read_when_the_user_allows_it(tmp_path, manifest, name, monkeypatch):
    _move(tmp_path, manifest, name.format(tmp_path))
    # Not where the program happens to run.
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="allow_outside"):
        read_manifest(f"{tmp_path}/data")
    filesystems.configure(StorageConfig(allow_outside=True))
    shard = read_manifest(f"{tmp_path}/data").splits["train"].shards[0]
    blocks = list(shards.read_blocks(f"{tmp_path}/data", shard, manifest.items))
    assert sum(len(block.lengths) for block in blocks) == shard.sessions


@pytest.mark.parametrize(
    "name",
    [
        "pipe:touch {}/executed",
        "pipe://touch {}/executed",
        "exec:touch {}/executed",
        "exec://touch {}/executed",
        "simplecache::file://{}/elsewhere/x.tar",
        "file://{}/elsewhere/x.tar::pipe:touch {}/executed",
        "github://c/x",
        "ftp://127.0.0.1/x",
        "data:,x",
    ],
)
@pytest.mark.parametrize("on_bad_shard", ["fail", "skip"])
def test_no_name_runs_a_program_even_if_outside_is_allowed(tmp_path, manifest, name, on_bad_shard):
    _move(tmp_path, manifest, name.replace("{}", str(tmp_path)))
    filesystems.configure(StorageConfig(allow_outside=True))
    shard = read_manifest(f"{tmp_path}/data").splits["train"].shards[0]
    with pytest.raises(UserError, match="not supported"):
        list(shards.read_blocks(f"{tmp_path}/data", shard, manifest.items, on_bad_shard))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bytes": 1 << 40}, "bytes"),
        ({"sessions": 10**15}, "cannot hold"),
        ({"events": 10**15}, "cannot hold"),
        ({"targets": 10**15}, "targets, not 1000000000000000"),
    ],
)
def test_a_manifest_that_claims_too_much_is_refused(tmp_path, manifest, changes, says):
    content = manifest.model_dump(mode="json")
    content["splits"]["train"]["shards"][0].update(changes)
    storage.write_json(f"{tmp_path}/data/manifest.json", content)
    with pytest.raises(UserError, match=f"manifest.json: .*{says}"):
        read_manifest(f"{tmp_path}/data")


def test_a_key_of_a_manifest_cannot_write_a_line_of_its_own(tmp_path, manifest):
    content = {**manifest.model_dump(mode="json"), "x\nerror: all is well\x1b[2J": 1, "y" * 10_000: 1}
    storage.write_json(f"{tmp_path}/data/manifest.json", content)
    with pytest.raises(UserError) as caught:
        read_manifest(f"{tmp_path}/data")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000

"""Which failures are tried again, how often, and how giving up looks."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest

from data_prep.__main__ import main as prepare_main
from gru4recf_dist.data import attempts, filesystems, storage
from gru4recf_dist.data.storage_config import StorageConfig
from gru4recf_dist.errors import UserError
from tests.support.http_files import serving
from tests.support.s3 import free_ports

URL = "s3://bucket/x"


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """The pauses that would have been made."""
    made: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", made.append)
    return made


def _configure(**changes) -> None:
    filesystems.configure(StorageConfig(**changes))


class _Failing:
    """Raises ``error`` the first ``times`` times."""

    def __init__(self, error: BaseException, times: int = 10**9) -> None:
        self.error, self.times, self.calls = error, times, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return "content"


def test_what_fails_for_a_moment_is_asked_for_again(pauses):
    request = _Failing(ConnectionResetError("reset"), times=5)
    assert attempts.attempted(URL, request) == "content"
    assert (request.calls, len(pauses)) == (6, 5)


def test_pauses_double_up_to_a_bound_and_up_to_half_of_each_is_random(pauses):
    _configure(attempts=9, backoff_seconds=0.5, longest_backoff_seconds=10)
    for _ in range(200):
        with pytest.raises(UserError):
            attempts.attempted(URL, _Failing(OSError("busy")))
    shares = np.reshape(pauses, (200, 8)) / [0.5, 1, 2, 4, 8, 10, 10, 10]
    assert shares.min() >= 0.5 and shares.max() <= 1
    # Of every pause, the long ones too: uniform, so within 4 deviations of its mean.
    assert np.abs(shares.mean(axis=0) - 0.75).max() < 4 * 0.5 / np.sqrt(12 * 200)
    assert (np.ptp(shares, axis=0) > 0.4).all()


def test_giving_up_is_one_line_that_names_file_and_reason(pauses):
    _configure(attempts=4)
    request = _Failing(TimeoutError("stalled\nsecond line"))
    with pytest.raises(UserError) as caught:
        attempts.attempted(URL, request)
    assert str(caught.value) == f"{URL}: TimeoutError: stalled"
    assert request.calls == 4


def test_an_error_without_a_text_is_named_by_its_type(pauses):
    _configure(attempts=1)
    with pytest.raises(UserError, match=r"x: TimeoutError$"):
        attempts.attempted(URL, _Failing(TimeoutError()))


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError("x"), PermissionError("x"), IsADirectoryError("x"), NotADirectoryError("x"), UserError("x")],
)
def test_what_asking_again_does_not_change_is_raised_as_it_is(pauses, error):
    request = _Failing(error)
    with pytest.raises(type(error)) as caught:
        attempts.attempted(URL, request)
    assert caught.value is error
    assert request.calls == 1


class _Status(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"{status}")
        self.status = status


NoCredentialsError = type("NoCredentialsError", (Exception,), {})
EndpointConnectionError = type("EndpointConnectionError", (Exception,), {})


@pytest.mark.parametrize(
    ("error", "calls"),
    [
        (ValueError("bad"), 1),
        (NoCredentialsError("none"), 1),
        (_Status(403), 1),
        (_Status(400), 1),
        (_Status(408), 5),
        (_Status(429), 5),
        (_Status(500), 5),
        (_Status(503), 5),
        (Exception("Requested Range Not Satisfiable"), 1),
    ],
    ids=repr,
)
def test_other_errors_become_a_user_error_at_once_or_after_all_attempts(pauses, error, calls):
    _configure(attempts=5)
    request = _Failing(error)
    with pytest.raises(UserError, match=URL):
        attempts.attempted(URL, request)
    assert request.calls == calls


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
def test_an_interrupted_request_is_not_made_again(pauses, error):
    request = _Failing(error)
    with pytest.raises(type(error)):
        attempts.attempted(URL, request)
    assert request.calls == 1


def test_an_endpoint_that_never_answered_is_given_up_early(pauses):
    request = _Failing(EndpointConnectionError("nobody"))
    with pytest.raises(UserError):
        attempts.attempted(URL, request)
    assert request.calls == 3
    # Another protocol's answer says nothing about this one.
    attempts.attempted("gs://bucket/x", lambda: "")
    with pytest.raises(UserError):
        attempts.attempted(URL, request)
    assert request.calls == 6
    attempts.attempted(URL, lambda: "")
    with pytest.raises(UserError):
        attempts.attempted(URL, request)
    assert request.calls == 14


def test_only_what_fails_for_the_third_time_is_shown_and_without_secrets(pauses, caplog):
    _configure(options={"s3": {"key": "AKIA-of-somebody", "endpoint_url": "https://store.example.org:9000"}})
    with caplog.at_level(logging.INFO):
        attempts.attempted(URL, _Failing(OSError("AKIA-of-somebody at store.example.org:9000"), times=3))
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO", "WARNING"]
    assert re.search(r"s3://bucket/x: attempt 3 failed \(OSError: \*\*\* at \*\*\*\)", caplog.text)
    assert "AKIA" not in caplog.text and "example.org" not in caplog.text


def test_a_stalled_request_ends_with_a_time_out_and_is_made_again():
    _configure(timeout_seconds=1, backoff_seconds=0.01)
    with serving() as server:
        server.files["x"] = b"content"
        server.fault = lambda name, earlier: "" if earlier else "stall"
        assert storage.read_bytes(f"{server.url}/x") == b"content"
        assert server.count("x") == 2


def test_a_stalled_server_is_given_up():
    _configure(timeout_seconds=1, attempts=2, backoff_seconds=0.01)
    with serving() as server:
        server.files["x"] = b"content"
        server.fault = lambda name, earlier: "stall"
        with pytest.raises(UserError, match=r"/x: .*Timeout"):
            storage.read_bytes(f"{server.url}/x")


def test_a_listing_by_a_pattern_is_asked_for_again(pauses, monkeypatch):
    storage.write_bytes("memory://patterns/x.csv", b"content")
    fs = filesystems.filesystem("memory://")[0]
    request = _Failing(ConnectionResetError("reset"), times=2)
    original = type(fs).glob
    monkeypatch.setattr(type(fs), "glob", lambda fs, path: request() and original(fs, path))
    assert storage.glob("memory://patterns/*.csv") == ["memory:///patterns/x.csv"]
    assert (request.calls, len(pauses)) == (3, 2)


def test_a_pattern_on_an_endpoint_that_is_not_there_is_one_line_without_it(pauses, tmp_path, capsys):
    pytest.importorskip("s3fs", reason="needs s3fs: pip install -e '.[dev]'")
    endpoint = f"http://127.0.0.1:{free_ports(1)[0]}"
    client = ["key=somebody", "secret=something", f"endpoint_url={endpoint}", "client_kwargs={region_name: us-east-1}"]
    recipe = [
        "name=x",
        "source=s3://bucket/raw",
        f"output={tmp_path}/data",
        "input.format=csv",
        'input.files=["*.csv"]',
    ]
    assert prepare_main([*recipe, *(f"storage.options.s3.{each}" for each in client)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: s3://bucket/raw/*.csv: EndpointConnectionError: ") and shown.count("\n") == 1
    assert "127.0.0.1" not in shown
    assert not (tmp_path / "data").exists()


def test_a_refusing_server_is_not_asked_again():
    with serving() as server:
        server.files["x"] = b"content"
        server.fault = lambda name, earlier: "403"
        with pytest.raises(UserError, match=r"/x: .*403"):
            storage.read_bytes(f"{server.url}/x")
        assert server.count("x") == 1

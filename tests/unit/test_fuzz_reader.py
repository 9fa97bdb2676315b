"""Whatever a shard or a `.npy` file holds: an answer or a `UserError`, in bounded memory."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zlib

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gru4recf_dist.data import storage
from gru4recf_dist.data.blocks import encode_shard
from gru4recf_dist.data.shard_format import MANIFEST, ShardInfo
from gru4recf_dist.data.shards import read_blocks
from gru4recf_dist.errors import UserError
from tests.support.mutations import edited
from tests.support.synthetic import random_sessions, to_block, write_dataset

pytestmark = pytest.mark.filterwarnings("ignore:Reading `.npy`")
# Far above what any of these small files may take, far below what they claim.
MEMORY_BYTES = 32 << 20
DATA = "memory://fuzz"
SESSIONS = random_sessions(0, 12, 20)
CONTENT = encode_shard([to_block(SESSIONS[:5]), to_block(SESSIONS[5:], 5)], "s")


def fuzz(examples: int):
    """The same examples every time."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=checks)


def put(name: str, content: bytes) -> str:
    fsspec.filesystem("memory").pipe(f"/fuzz/{name}", content)
    return storage.join(DATA, name)


def info_of(content: bytes, **changes) -> ShardInfo:
    """What a forged manifest would say: the checksum fits."""
    sessions, events = len(SESSIONS), sum(map(len, SESSIONS))
    counts = {"sessions": sessions, "events": events, "targets": events - sessions, "bytes": len(content)}
    sha256 = hashlib.sha256(content).hexdigest()
    return ShardInfo(**{"url": "x.tar", "stream": 0, "sha256": sha256, **counts, **changes})


def answer(name: str, read):
    """What ``read`` gives, None for a `UserError` of one readable line that names the file; else the test fails."""
    tracemalloc.start()
    try:
        return read()
    except UserError as error:
        assert storage.join(DATA, name) in str(error)
        assert str(error).isprintable(), repr(str(error))
        assert " object at 0x" not in str(error) and len(str(error)) < 1000
        return None
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < MEMORY_BYTES, f"{peak} bytes"


def read_shard(content: bytes, **changes):
    put("x.tar", content)
    return answer("x.tar", lambda: list(read_blocks(DATA, info_of(content, **changes), 1 << 31)))


def edits(content: bytes, places: st.SearchStrategy[int]) -> st.SearchStrategy[bytes]:
    """``content`` with bytes changed, put in or cut out."""
    return edited(content, places, removed=st.integers(0, 3) | st.integers(0, 2000), longest=8, most=5)


HEADERS = [
    offset for offset in range(len(CONTENT)) if CONTENT[offset] and CONTENT[offset // 512 * 512 + 257 :][:5] == b"ustar"
]


@fuzz(600)
@given(content=edits(CONTENT, st.sampled_from(HEADERS) | st.integers(0, len(CONTENT) - 1)))
def test_mutated_tar(content):
    blocks = read_shard(content)
    assert blocks is None or sum(len(block.lengths) for block in blocks) == len(SESSIONS)


# Headers that are well-formed, with a right checksum, and say something else than ours do


@st.composite
def crafted_members(draw) -> bytes:
    """A tar of members of any type and claimed size, some of them before, some behind a good shard."""
    made = b""
    for _ in range(draw(st.integers(1, 3))):
        header = bytearray(512)
        name = draw(
            st.sampled_from(
                [b"s-0.items.npy", b"s-00000.items.npy", b"../x.items.npy", b"././@LongLink", b"s\n.items.npy"]
            )
        )
        header[: len(name)] = name
        header[100:108] = b"0000644\0"
        size = draw(st.integers(-(1 << 70), 1 << 70) | st.integers(0, 5000) | st.sampled_from([1 << 40, 8 << 30]))
        if 0 <= size < 8**11 and draw(st.booleans()):
            header[124:136] = b"%011o\0" % size
        else:
            header[124:136] = (b"\x80" if size >= 0 else b"\xff") + (size % (1 << 88)).to_bytes(11, "big")
        header[156:157] = draw(
            st.sampled_from([bytes([kind]) for kind in b"\x000123456789LKSxgXVDMN"]) | st.binary(min_size=1, max_size=1)
        )
        header[257:265] = draw(st.sampled_from([b"ustar\x0000", b"ustar  \0", b"\0" * 8]))
        # Where old GNU tar has its map of a sparse file, and how large it is when it is spread out.
        header[386:398] = b"%011o\0" % draw(st.integers(0, 8**11 - 1))
        header[398:410] = b"%011o\0" % draw(st.integers(0, 5000))
        header[482:483] = draw(st.sampled_from([b"\0", b"\1"]))
        header[483:495] = b"%011o\0" % draw(st.sampled_from([0, 100, 8**11 - 1]))
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        body = draw(
            st.sampled_from(
                [b"", b"30 GNU.sparse.realsize=999999999\n", b"22 size=99999999999999\n", b"20 path=../../x.tar\n"]
            )
            | st.binary(max_size=600)
        )
        made += bytes(header) + body + bytes(-len(body) % 512)
    return draw(
        st.sampled_from([made, made + CONTENT, CONTENT.rstrip(b"\0") + bytes(-len(CONTENT.rstrip(b"\0")) % 512) + made])
    )


@fuzz(500)
@given(content=crafted_members())
def test_crafted_members(content):
    assert read_shard(content) is None


def _tar(format_: int, size: int | None = None, **changes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format_) as tar:
        member = tarfile.TarInfo("s-00000.items.npy")
        for name, value in changes.items():
            setattr(member, name, value)
        content = b"x" * 100
        member.size = len(content) if size is None else size
        tar.addfile(member, io.BytesIO(content) if member.isreg() and size is None else None)
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        _tar(tarfile.GNU_FORMAT, name="s" * 300 + ".items.npy"),
        _tar(tarfile.PAX_FORMAT, name="s" * 300 + ".items.npy"),
        _tar(tarfile.PAX_FORMAT, pax_headers={"GNU.sparse.major": "1", "GNU.sparse.realsize": "99999999999"}),
        _tar(tarfile.PAX_FORMAT, pax_headers={"size": "99999999999"}),
        _tar(tarfile.GNU_FORMAT, type=tarfile.SYMTYPE, linkname="/etc/hostname"),
        _tar(tarfile.GNU_FORMAT, type=tarfile.LNKTYPE, linkname="s-00000.lengths.npy"),
        _tar(tarfile.GNU_FORMAT, type=tarfile.DIRTYPE),
        _tar(tarfile.GNU_FORMAT, type=tarfile.FIFOTYPE),
        _tar(tarfile.GNU_FORMAT, type=tarfile.CHRTYPE),
        _tar(tarfile.GNU_FORMAT, name="train/s-00000.items.npy"),
        _tar(tarfile.GNU_FORMAT, size=1 << 40),
        _tar(tarfile.USTAR_FORMAT, size=8 << 29),
    ],
    ids=[
        "gnu name",
        "pax name",
        "pax sparse",
        "pax size",
        "symlink",
        "link",
        "folder",
        "fifo",
        "device",
        "path",
        "1 TB",
        "4 GB",
    ],
)
def test_members_that_are_no_plain_small_file(content):
    assert read_shard(content) is None


def _gzip_with_a_tar_mark(content: bytes) -> bytes:
    """A gzip whose file name puts "ustar" where a tar has it."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = packer.compress(content) + packer.flush()
    name = b"n" * 247 + b"ustar\x30\x30" + b"n" * 300 + b"\0"
    return (
        b"\x1f\x8b\x08\x08" + bytes(6) + name + body + struct.pack("<II", zlib.crc32(content), len(content) % (1 << 32))
    )


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, _gzip_with_a_tar_mark])
def test_compressed_tars_are_not_unpacked(pack):
    assert read_shard(pack(CONTENT)) is None
    bomb = io.BytesIO()
    with tarfile.open(fileobj=bomb, mode="w") as tar:
        member = tarfile.TarInfo("s-00000.items.npy")
        member.size = 64 << 20
        tar.addfile(member, io.BytesIO(bytes(member.size)))
    assert read_shard(pack(bomb.getvalue())) is None


@fuzz(100)
@given(content=st.binary(max_size=2000), claimed=st.integers(0, 4 << 30))
def test_anything_as_a_tar(content, claimed):
    put("x.tar", content)
    assert read_shard(content, bytes=claimed, sessions=3, events=3) is None


# .npy

KEYS = ("descr", "fortran_order", "shape")
FLAT = ["<i4", "<i8", ">i4", "<f4", "|b1", "|O", "|V8", "|V0", "|V2147483647", "<U9", "<M8[ns]", "|S0", "<f16", "<c16"]
NESTED = ["", [("a", "<i4")], [("a", "O")], ("<i4", (2,)), ("<i4", (2147483647,)), [("a", "<i4", (9999999,))], None, 5]
DTYPES = st.sampled_from(FLAT + NESTED)
SIZES = st.integers(-5, 30) | st.sampled_from([1 << 31, 1 << 62, 1 << 63, 10**30, -(1 << 63), True])
SHAPES = st.lists(SIZES, max_size=4).map(tuple) | st.sampled_from([20, "x", None, (20.0,), ("20",), [20], (20, None)])


@st.composite
def crafted_npy(draw) -> bytes:
    values = {
        "descr": draw(DTYPES),
        "fortran_order": draw(st.booleans() | st.sampled_from([0, None])),
        "shape": draw(SHAPES),
    }
    text = draw(
        st.sampled_from(
            [
                repr(values),
                repr({key: values[key] for key in draw(st.lists(st.sampled_from(KEYS), unique=True))}),
                repr({**values, "more": 1}),
                # As Python 2 wrote numbers.
                repr(values).replace(",)", "L,)"),
                repr(values).replace("}", "} + {}"),
                "(" * 5000,
                "[" * 99 + "]" * 99,
                "__import__('os').getpid()",
                "{'descr': '<i4'" + "," * 3,
                "9" * 5000,
                "",
            ]
        )
        | st.text(max_size=40)
    )
    header = text.encode("latin1", "replace") + draw(
        st.sampled_from([b"\n", b"", b" " * 200 + b"\n", b" " * 20_000 + b"\n"])
    )
    version = draw(st.sampled_from([(1, 0), (2, 0), (3, 0), (1, 1), (9, 9), (0, 0)]))
    claimed = draw(st.just(len(header)) | st.sampled_from([0, 1, 65_535, (1 << 32) - 1]))
    count = struct.pack("<H", claimed % (1 << 16)) if version[0] == 1 else struct.pack("<I", claimed)
    return b"\x93NUMPY" + bytes(version) + count + header + draw(st.binary(max_size=200))


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _header(shape: str) -> bytes:
    text = f"{{'descr': '<i4', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text


PLAIN = _npy(np.arange(1, 21, dtype=np.int32))
ROWS = st.tuples(st.integers(0, 30), st.none() | st.integers(0, 30) | st.just(1 << 62))


@fuzz(1000)
@example(content=PLAIN, rows=(3, 5))
@example(content=_header("(0, 4611686018427387904)"), rows=(0, None))
@example(content=_header("(0, True)"), rows=(0, None))
@example(content=_header("(0,)").replace(b"\x01\0", b"\x01\x01", 1), rows=(0, None))
@example(content=_header("(1, " + "1, " * 70 + ")") + b"1234", rows=(0, None))
@given(content=crafted_npy() | edits(PLAIN, st.integers(0, len(PLAIN) - 1)), rows=ROWS)
def test_npy_file(content, rows):
    url = put("x.npy", content)
    whole = answer("x.npy", lambda: storage.read_npy_rows(url))
    part = answer("x.npy", lambda: storage.read_npy_rows(url, *rows))
    answer("x.npy", lambda: storage.read_npy_header(url))
    if whole is not None:
        np.testing.assert_array_equal(whole, np.load(io.BytesIO(content), allow_pickle=False))
        np.testing.assert_array_equal(part, whole[rows[0] : rows[1]])


@fuzz(500)
@given(member=crafted_npy(), column=st.sampled_from(["items", "lengths", "sessions", "times"]))
def test_npy_member(member, column):
    columns = {"items": PLAIN, "lengths": _npy(np.full(4, 5, np.int32)), "sessions": _npy(np.arange(4)), column: member}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in columns.items():
            header = tarfile.TarInfo(f"s-0.{name}.npy")
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    read_shard(stream.getvalue(), sessions=4, events=20)


# Real memory, not what Python counts: numpy and the C library allocate on their own.

LIMITED = """
import resource, sys
from gru4recf_dist.data import storage
from gru4recf_dist.data.shard_format import read_manifest
from gru4recf_dist.data.shards import read_blocks
from gru4recf_dist.errors import UserError

for line in open("/proc/self/status"):
    if line.startswith("VmSize"):
        held = int(line.split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (held + (64 << 20),) * 2)
for name in sys.argv[2:]:
    try:
        storage.read_npy_rows(f"{sys.argv[1]}/{name}")
        print("read")
    except UserError as error:
        print(error)
manifest = read_manifest(sys.argv[1])
for shard in manifest.splits["train"].shards:
    try:
        print(sum(len(block.lengths) for block in read_blocks(sys.argv[1], shard, 1 << 31)))
    except UserError as error:
        print(error)
"""


def test_files_that_claim_gigabytes_fit_into_64_mib(tmp_path):
    """On a local disk, where Python would reserve memory for all that a read asks for."""
    npys = {f"{count}.npy": _header(f"({count},)") for count in (1 << 25, 1 << 33, 1 << 38)}
    for name, content in npys.items():
        (tmp_path / name).write_bytes(content + bytes(80))
    (tmp_path / "header.npy").write_bytes(b"\x93NUMPY\x02\0" + struct.pack("<I", (1 << 32) - 1) + b"{" * 1000)
    shards = {
        "size.tar": _tar(tarfile.USTAR_FORMAT, size=3 << 30),
        "sparse.tar": _sparse_bomb(),
        "gzip.tar": _gzip_with_a_tar_mark(_tar(tarfile.USTAR_FORMAT) + bytes(256 << 20)),
    }
    infos = []
    for name, content in shards.items():
        (tmp_path / name).write_bytes(content)
        infos.append(info_of(content, url=name, bytes=4 << 30 if name == "size.tar" else max(len(content), 10_000)))
    manifest = write_dataset(str(tmp_path), SESSIONS, features=False, streams=1)
    manifest.splits["train"].shards += infos
    for count in ("sessions", "events", "targets"):
        setattr(manifest.splits["train"], count, sum(getattr(s, count) for s in manifest.splits["train"].shards))
    storage.write_json(f"{tmp_path}/{MANIFEST}", manifest.model_dump(mode="json"))
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), *npys, "header.npy"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines.pop(4) == "12"
    for name, line in zip([*npys, "header.npy", *shards], lines, strict=True):
        assert line.startswith(f"{tmp_path}/{name}: "), line
        assert "MemoryError" not in line and "memory" not in line, line


def _sparse_bomb() -> bytes:
    """A member of 100 bytes that old GNU tar would spread out to 8 GB."""
    header = bytearray(_tar(tarfile.GNU_FORMAT))
    header[156:157] = b"S"
    header[386:410] = b"%011o\0%011o\0" % (0, 100)
    header[483:495] = b"%011o\0" % (8**11 - 1)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    return bytes(header)

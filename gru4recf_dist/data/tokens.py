"""The raw tokens of a data set: what its item ids, and the values of its features, stand for."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gru4recf_dist.data import storage
from gru4recf_dist.data.shard_format import UNKNOWN_VALUE_ID, Feature, Manifest, file_url
from gru4recf_dist.errors import UserError, first_line

# Rows decoded at a time: tokens may be long, and hashing takes 24 bytes for each byte of theirs.
_BATCH_ROWS = 1 << 14
# Tokens of a file that is read as a whole, and bytes of any other that are at a time.
_MOST_IN_MEMORY = 1 << 18
_COPIED_BYTES = 1 << 20
# Snappy makes 64 bytes of 3 at most. Zstandard has no such bound, nor have encodings that share what tokens begin with.
_MOST_UNPACKED = 22
_LARGEST_SMALL_FILE = 1 << 20
_READ_AS = {"UNCOMPRESSED", "SNAPPY", "PLAIN", "RLE", "BIT_PACKED", "RLE_DICTIONARY", "PLAIN_DICTIONARY"}


def read_item_tokens(data: str, manifest: Manifest) -> list[str]:
    """The raw token of each item id; entry 0, the padding, is empty.

    Raises:
        UserError: the file is missing or does not fit the manifest.
    """
    return ["", *read_tokens(file_url(data, manifest.tokens), manifest.items)]


def read_vocabulary(data: str, feature: Feature) -> list[str]:
    """The raw value of each id of a token feature; entries 0 (none) and 1 (unknown) are empty.

    Raises:
        UserError: as `read_item_tokens`.
    """
    reserved = UNKNOWN_VALUE_ID + 1
    if feature.vocabulary is None:
        raise UserError(f"data: {data} has no vocabulary of the feature '{feature.name}'")
    return ["", "", *read_tokens(file_url(data, feature.vocabulary), feature.size - reserved)]


def read_tokens(url: str, expected: int) -> list[str]:
    """The ``expected`` tokens of one file; errors as `TokenFile`."""
    return [token for batch in TokenFile(url, expected).batches() for token in batch.to_pylist()]


class TokenFile:
    """A Parquet file of ``expected`` tokens, in memory as it is stored; a large one mapped from the temporary folder.

    Like the rest of a data set it is not trusted: how much it unpacks to is known before it is unpacked.

    Raises:
        UserError: it is missing, damaged, has no text in a column `token`, or holds another number of rows.
    """

    def __init__(self, url: str, expected: int) -> None:
        self._url, self._expected = url, expected
        with self._explained():
            content = _in_memory(url) if expected <= _MOST_IN_MEMORY else _mapped(url)
            # A value that is there a thousand times stays one.
            as_dictionary = pq.ParquetFile(content, read_dictionary=["token"])
            self._check_metadata(as_dictionary, content.size())
            self._check_tokens(as_dictionary, content.size())
            self._file = pq.ParquetFile(content)

    def _check_metadata(self, file: pq.ParquetFile, size: int) -> None:
        kind, metadata = file.schema_arrow.field("token").type, file.metadata
        if not (pa.types.is_dictionary(kind) and kind.value_type in (pa.string(), pa.large_string())):
            raise UserError(f"{self._url}: its column 'token' is not text")
        self._check_rows(metadata.num_rows)
        if metadata.num_rows > _most_bytes(size):
            # No two are the same, and so each must have taken some of the file.
            raise UserError(f"{self._url}: is too small for {metadata.num_rows} different tokens")
        for group in range(metadata.num_row_groups):
            for number in range(metadata.row_group(group).num_columns):
                column = metadata.row_group(group).column(number)
                unknown = {column.compression, *column.encodings} - _READ_AS
                if column.path_in_schema == "token" and unknown:
                    raise UserError(f"{self._url}: column 'token' is stored as {min(unknown)}, which is not read")

    def _check_tokens(self, file: pq.ParquetFile, size: int) -> None:
        rows = text_bytes = 0
        for group in range(file.num_row_groups):
            # A whole group at once: parts of it would each have a dictionary of all before them.
            for tokens in file.read_row_group(group, columns=["token"], use_threads=False).column(0).chunks:
                tokens.validate(full=True)
                if tokens.null_count:
                    raise UserError(f"{self._url}: has rows without a token")
                rows += len(tokens)
                lengths = pc.binary_length(tokens.dictionary).take(tokens.indices)
                text_bytes += pc.sum(lengths.cast(pa.int64()), min_count=0).as_py()
        self._check_rows(rows)
        if text_bytes > _most_bytes(size):
            raise UserError(f"{self._url}: is too small for {text_bytes} bytes of different tokens")

    def _check_rows(self, rows: int) -> None:
        if rows != self._expected:
            raise UserError(f"{self._url}: holds {rows} tokens, the manifest says {self._expected}")

    def batches(self) -> Iterator[pa.LargeStringArray]:
        """All tokens, some at a time."""
        with self._explained():
            # Not by threads: see above.
            for batch in self._file.iter_batches(_BATCH_ROWS, columns=["token"], use_threads=False):
                yield batch.column(0).cast(pa.large_string())

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """What pyarrow raises at a damaged file as a `UserError`."""
        try:
            yield
        except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, MemoryError, OverflowError) as error:
            reason = first_line(error)
            raise UserError(f"{self._url}: damaged, or no Parquet file with a column 'token' ({reason})") from error


def _in_memory(url: str) -> pa.NativeFile:
    # Copied to Arrow's own memory: its threads outlive the read a little, and one that lets go of a Python object
    # while Python ends aborts the process.
    stream = pa.BufferOutputStream()
    stream.write(storage.read_bytes(url))
    return pa.BufferReader(stream.getvalue())


def _mapped(url: str) -> pa.NativeFile:
    """As a file that has lost its name already: nothing stays behind, and nobody else can shorten it."""
    with storage.open_read(url) as source, tempfile.NamedTemporaryFile(prefix="gru4recf-") as copy:
        try:
            shutil.copyfileobj(source, copy, _COPIED_BYTES)
            copy.flush()
        except OSError as error:
            reason = f"cannot hold a copy of {url} ({error.strerror})"
            raise UserError(f"TMPDIR: {tempfile.gettempdir()} {reason}") from error
        return pa.memory_map(copy.name)


def _most_bytes(size: int) -> int:
    """Of text, in different tokens, that a file of ``size`` bytes may hold."""
    return _LARGEST_SMALL_FILE + _MOST_UNPACKED * size

"""The raw tokens of a data set: what its item ids, and the values of its features, stand for."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from gru4recf_dist.data import storage
from gru4recf_dist.data.shard_format import UNKNOWN_VALUE_ID, Feature, Manifest, file_url
from gru4recf_dist.errors import UserError


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
    """The ``expected`` tokens of one file; errors as `open_tokens`."""
    return open_tokens(url, expected).read(columns=["token"])["token"].to_pylist()


def open_tokens(url: str, expected: int) -> pq.ParquetFile:
    """A file of ``expected`` tokens, in memory as it is stored.

    Raises:
        UserError: it is missing, or holds another number.
    """
    # Copied to Arrow's own memory: its threads outlive the read a little, and one that lets go of a Python object while
    # Python ends aborts the process.
    content = pa.BufferOutputStream()
    content.write(storage.read_bytes(url))
    file = pq.ParquetFile(pa.BufferReader(content.getvalue()))
    if file.metadata.num_rows != expected:
        raise UserError(f"{url}: holds {file.metadata.num_rows} tokens, the manifest says {expected}")
    return file

"""Which file system a URL lies on, and the settings it is reached with."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import fsspec

from gru4recf_dist.data.storage_config import StorageConfig
from gru4recf_dist.errors import UserError, hide

# A URL may come from a manifest, which is untrusted: only protocols that name plain storage are opened.
PROTOCOLS = frozenset({"file", "local", "memory", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "http", "https"})

# Where the clients of S3 and Azure find what must not be shown.
_SECRET_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_CLIENT_SECRET",
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_STORAGE_SAS_TOKEN",
)
# `user:password@` before a server; a password may hold a slash that should have been written %2F. All lengths are
# bounded, as the text may be anybody's: time must not grow with its square.
_USERINFO = re.compile(
    r"(?P<protocol>[a-zA-Z][a-zA-Z0-9+.-]{0,31})://"
    r"(?P<userinfo>[^/?#\s]{0,2048}|(?<=http://|ttps://)[^/?#\s@\[\]:]{0,255}:(?![0-9]{0,9}[/?#])[^\s@]{0,2048})@"
)
_WITHOUT_SERVER = frozenset({"file", "local", "memory"})
# abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH
_WITH_CONTAINER = frozenset({"abfs", "abfss", "az"})

# A number of so many digits is a credential, not a setting.
_SHORTEST_NUMBER = 8

_settings = StorageConfig()


def configure(settings: StorageConfig) -> None:
    """Reach files with ``settings`` from now on, in this process.

    The options become fsspec's own defaults, so that libraries that open URLs themselves find them too.
    """
    global _settings
    _settings = settings
    for protocol, options in settings.options.items():
        fsspec.config.conf.setdefault(protocol, {}).update(options)
    hide_texts(settings.options)


def hide_texts(tree: Any) -> None:
    """Leave every text in nested settings, and the server of every URL there, out of all messages from now on."""
    hide(_texts(tree))


def hide_environment() -> None:
    """Leave what the environment says of object storage out of all messages from now on.

    fsspec's own defaults are from `FSSPEC_S3_KEY` and the like, and from its configuration file.
    """
    hide_texts([value for name in _SECRET_VARIABLES if (value := os.environ.get(name))])
    hide_texts(fsspec.config.conf)


def settings() -> StorageConfig:
    """What `configure` was last given."""
    return _settings


def refuse_userinfo(text: str, place: str = "") -> None:
    """Refuse URLs with a user or password: URLs are written to files and shown.

    Args:
        text: a URL, or what may hold some.
        place: where it stands, for the message.

    Raises:
        UserError: there is one; the line does not have what must not be shown.
    """
    protocol = next((match["protocol"] for match in _userinfos(text)), None)
    if protocol is not None:
        is_known = protocol.lower() in PROTOCOLS
        instead = f"give them in storage.options.{protocol.lower()}" if is_known else f"'{protocol}' is not supported"
        raise UserError(
            f"{place or without_userinfo(text)}: a URL must not hold a user or password, as it is written to files; "
            f"{instead}"
        )


def without_userinfo(text: str) -> str:
    """``text`` with ``***`` in place of the users and passwords of its URLs."""
    for match in reversed(list(_userinfos(text))):
        text = f"{text[: match.start('userinfo')]}***{text[match.end('userinfo') :]}"
    return text


def _userinfos(text: str) -> Iterator[re.Match[str]]:
    for match in _USERINFO.finditer(text):
        protocol = match["protocol"].lower()
        is_container = protocol in _WITH_CONTAINER and ":" not in match["userinfo"]
        if not is_container and protocol not in _WITHOUT_SERVER:
            yield match


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of ``url`` and the path in it.

    Raises:
        UserError: the protocol is not one of plain storage (``pipe:``, say), its package is missing, or the URL holds
            a user or password.
    """
    refuse_userinfo(url)
    if "::" in url:
        # fsspec reads it as a chain of file systems, and would open the first of them only.
        raise UserError(f"{url}: '::' is not supported")
    protocol = protocol_of(url)
    if protocol not in PROTOCOLS:
        raise UserError(f"{url}: protocol '{protocol}' is not supported (one of {', '.join(sorted(PROTOCOLS))})")
    # A remembered listing does not know what another rank has written since.
    options: dict[str, Any] = {} if protocol in ("file", "local", "memory") else {"use_listings_cache": False}
    try:
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise UserError(f"{url}: {error}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{url}: storage.options.{protocol}: {str(error).partition(chr(10))[0]}") from error


def protocol_of(url: str) -> str:
    """``file`` for a plain path, otherwise what stands before the first colon."""
    head, colon, _ = url.partition(":")
    # A path like "a/b:c" has a slash before its colon and is a plain path.
    if not colon or "/" in head or not head:
        return "file"
    return head


def is_local(url: str) -> bool:
    return protocol_of(url) in ("file", "local")


def is_remote(url: str) -> bool:
    """Whether reading takes requests over a network."""
    return protocol_of(url) not in ("file", "local", "memory")


def _texts(tree: Any) -> Iterator[str]:
    """Every text in nested options; of a URL also its server alone, as messages name it."""
    if isinstance(tree, dict):
        for value in tree.values():
            yield from _texts(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _texts(value)
    elif isinstance(tree, str):
        yield tree
        if "://" in tree:
            try:
                address = urlsplit(tree)
            except ValueError:
                return
            yield from filter(None, (address.netloc, address.netloc.rpartition("@")[2], address.hostname))
    elif isinstance(tree, int) and len(str(tree)) >= _SHORTEST_NUMBER:
        yield str(tree)

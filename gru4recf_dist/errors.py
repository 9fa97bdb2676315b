"""The one exception that means "the user's input is wrong", and how programs end on it."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Bad configuration or input. Its text is one line that names the key or the file."""


class RanksLost(Exception):
    """A collective failed: another rank is gone, or did not arrive in time. One line; not this rank's fault."""


_hidden: set[str] = set()
# numpy and others quote all that they do not understand.
LONGEST_REASON = 300
# A shorter text is no secret, and would be found everywhere.
_SHORTEST_HIDDEN = 4


def hide(texts: Iterable[str]) -> None:
    """Leave ``texts``, such as credentials, out of all messages from now on."""
    _hidden.update(text for text in texts if len(text) >= _SHORTEST_HIDDEN)


def redacted(message: str) -> str:
    """``message`` without what `hide` was given."""
    for text in sorted(_hidden, key=len, reverse=True):
        message = message.replace(text, "***")
    return message


def first_line(error: Exception) -> str:
    """The first line of an exception's text, without Python objects: a `UserError` is one readable line."""
    text = (str(error.args[0]) if error.args else type(error).__name__).split("\n")[0]
    text = re.sub(r": <\S+ object at 0x\w+>", "", text)[:LONGEST_REASON]
    return "".join(sign if sign.isprintable() else "?" for sign in text)


_every_rank_reports = False


def report_from_every_rank() -> None:
    """Call once the ranks work on different things: from then on one rank alone may fail, and must say so itself."""
    global _every_rank_reports
    _every_rank_reports = True


def exits_cleanly(main: Callable[..., int | None]) -> Callable[..., int]:
    """Make a program's ``main`` print a ``UserError`` as one line on stderr and return 2; for a ``RanksLost`` 1.

    Under torchrun every rank fails alike on a bad configuration, so only rank 0 speaks until
    `report_from_every_rank` is called.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            if _every_rank_reports or os.environ.get("RANK", "0") == "0":
                print(f"error: {redacted(str(error))}", file=sys.stderr, flush=True)
            return 2
        except RanksLost as error:
            print(f"error: rank {os.environ.get('RANK', '0')}: {redacted(str(error))}", file=sys.stderr, flush=True)
            return 1

    return wrapper

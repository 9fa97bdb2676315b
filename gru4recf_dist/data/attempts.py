"""Requests that are made again when they fail: object storage fails now and then, and that must not end a run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
import tenacity
from fsspec.asyn import sync

from gru4recf_dist.data import filesystems
from gru4recf_dist.errors import UserError, redacted

_log = logging.getLogger(__name__)

Result = TypeVar("Result")

# Asking again does not change these.
_LASTING = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    FileExistsError,
    ValueError,
    TypeError,
    AttributeError,
    NotImplementedError,
    ImportError,
    UserError,
)
# Of backends that need not be installed.
_LASTING_NAMES = {"NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "InvalidRegionError"}
# Of HTTP's refusals (4xx), those that mean "not now".
_PASSING_STATUSES = {408, 425, 429}
# Nobody is there, as far as one can tell.
_UNREACHABLE_NAMES = {"EndpointConnectionError", "ClientConnectorError", "ConnectionRefusedError", "gaierror"}
# An endpoint that never answered is more likely mistyped than down: not worth minutes.
_ATTEMPTS_WITHOUT_ANSWER = 3
_UPLOAD_BYTES_PER_SECOND = 1 << 20

_answered: set[str] = set()


def attempted(url: str, request: Callable[[], Result]) -> Result:
    """What ``request`` returns, which is called again, after longer and longer pauses, when storage fails.

    Up to half of each pause is left out at random, so that the ranks of a run do not all come back at once.

    Raises:
        OSError: the last attempt's, if it is one of those that say what is wrong with the file
            (`FileNotFoundError`, `PermissionError` and the like).
        UserError: storage went on failing; the line names ``url``.
    """
    settings = filesystems.settings()
    half, longest_half = settings.backoff_seconds / 2, settings.longest_backoff_seconds / 2

    def answer() -> Result:
        result = request()
        _answered.add(filesystems.protocol_of(url))
        return result

    try:
        for attempt in tenacity.Retrying(
            stop=lambda state: state.attempt_number >= _attempts(url, state.outcome.exception()),
            # A random part that did not grow with the pauses would bring all ranks back at nearly the same time.
            wait=tenacity.wait_exponential(half, max=longest_half)
            + tenacity.wait_random_exponential(half, max=longest_half),
            retry=tenacity.retry_if_exception(is_passing),
            before_sleep=lambda state: _report(url, state),
            reraise=True,
        ):
            with attempt:
                return answer()
    except Exception as error:
        if isinstance(error, UserError) or (isinstance(error, OSError) and not is_passing(error)):
            raise
        raise UserError(f"{url}: {_reason(error)}") from error
    raise AssertionError("unreachable: Retrying returns or raises")


def call(fs: fsspec.AbstractFileSystem, method: str, *arguments: Any, upload_bytes: int = 0, **named: Any) -> Any:
    """One call of a file system's method, ended with a `TimeoutError` if it stalls.

    Args:
        upload_bytes: what the call sends; it may take longer for that.
    """
    coroutine = getattr(fs, f"_{method}", None) if getattr(fs, "async_impl", False) else None
    if coroutine is None:
        return getattr(fs, method)(*arguments, **named)
    seconds = filesystems.settings().timeout_seconds + upload_bytes / _UPLOAD_BYTES_PER_SECOND
    return sync(fs.loop, coroutine, *arguments, timeout=seconds, **named)


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later."""
    return (
        isinstance(error, Exception)
        and not isinstance(error, _LASTING)
        and not is_behind_the_end(error)
        and not _is_refusal(error)
        and not any(kind.__name__ in _LASTING_NAMES for kind in type(error).__mro__)
    )


def is_behind_the_end(error: BaseException) -> bool:
    """Whether storage refused a range because the file ends before it (S3's InvalidRange, HTTP's 416)."""
    text = str(error).lower()
    return "range" in text and "satisfiable" in text


def _is_refusal(error: BaseException) -> bool:
    """Whether an HTTP server answered that it will not do this."""
    status = getattr(error, "status", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in _PASSING_STATUSES


def _attempts(url: str, error: BaseException) -> int:
    """How often a request that fails with ``error`` is made."""
    attempts = filesystems.settings().attempts
    is_unreachable = any(kind.__name__ in _UNREACHABLE_NAMES for kind in type(error).__mro__)
    if is_unreachable and filesystems.protocol_of(url) not in _answered:
        return min(attempts, _ATTEMPTS_WITHOUT_ANSWER)
    return attempts


def _report(url: str, state: tenacity.RetryCallState) -> None:
    assert state.outcome is not None and state.next_action is not None
    # One failure is everyday life; a person who waits for the fourth attempt wants to know why.
    level = logging.WARNING if state.attempt_number >= 3 else logging.INFO
    reason, pause = redacted(_reason(state.outcome.exception())), state.next_action.sleep
    _log.log(level, "%s: attempt %d failed (%s), the next in %.0f s", url, state.attempt_number, reason, pause)


def _reason(error: BaseException | None) -> str:
    """An exception in one line."""
    text = str(error).split("\n")[0].strip()
    name = type(error).__name__
    return f"{name}: {text}" if text else name

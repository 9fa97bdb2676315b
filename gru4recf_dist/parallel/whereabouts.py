"""Where this rank is in its work: what is looked at when ranks wait for each other in vain, or one is slow."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Position:
    """A rank's place at a moment; JSON types only.

    Attributes:
        step: the update that is being made, or that was made last.
        phase: what it does in it: `reading`, `forward`, `backward`, `update`, `evaluation`, `checkpoint`, ...
        calls: collectives that it has begun since it started: the same numbers mean the same collective on every rank.
        waiting_in: the purpose of the collective that it is in; None: in none.
        seconds: for how long all this has been so.
        told_at: when it was told, seconds since 1970.
    """

    step: int
    phase: str
    calls: int
    waiting_in: str | None
    seconds: float
    told_at: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        inside = f", in the collective '{self.waiting_in}'" if self.waiting_in else ""
        return f"step {self.step}, phase {self.phase}{inside}, for {self.seconds:.0f} s"


@dataclass
class Whereabouts:
    """Kept by the thread that trains, at the cost of a few assignments; read by others.

    Attributes:
        waited_seconds: spent within collectives so far.
    """

    step: int = 0
    phase: str = "start"
    calls: int = 0
    waiting_in: str | None = None
    waited_seconds: float = 0.0
    _since: float = field(default_factory=time.monotonic)
    _others: threading.local = field(default_factory=threading.local)

    def enter(self, phase: str, step: int | None = None) -> None:
        """A new phase begins, of ``step`` if it is given."""
        self.phase, self._since = phase, time.monotonic()
        if step is not None:
            self.step = step

    def ignore_this_thread(self) -> None:
        """The collectives of the calling thread are not the training's."""
        self._others.is_this = True

    def waiting(self, purpose: str) -> _Waiting:
        """Around a collective. If it fails, the position stays the one within it."""
        return _Waiting(self, purpose, hasattr(self._others, "is_this"))

    def position(self) -> Position:
        """As it is now."""
        seconds = time.monotonic() - self._since
        return Position(self.step, self.phase, self.calls, self.waiting_in, seconds, time.time())


class _Waiting:
    def __init__(self, whereabouts: Whereabouts, purpose: str, ignored: bool) -> None:
        self._whereabouts, self._purpose, self._ignored = whereabouts, purpose, ignored

    def __enter__(self) -> None:
        if not self._ignored:
            self._whereabouts.calls += 1
            self._whereabouts._since = time.monotonic()
            self._whereabouts.waiting_in = self._purpose

    def __exit__(self, kind, error, trace) -> None:
        if kind is None and not self._ignored:
            now = time.monotonic()
            self._whereabouts.waited_seconds += now - self._whereabouts._since
            self._whereabouts._since, self._whereabouts.waiting_in = now, None


# One process is one rank, so there is one.
HERE = Whereabouts()

"""Where this rank is in its work: what is looked at when ranks wait for each other in vain, or one is slow."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

# Phases of a thread that has nothing to do, and of training that waits for it: neither looks for missing ranks.
IDLE = "idle"
LEFT_TO_BACKGROUND = "waiting for the checkpoint before"


@dataclass(frozen=True)
class Position:
    """A rank's place at a moment; JSON types only.

    Attributes:
        step: the update that is being made, or that was made last.
        phase: what it does in it: `reading`, `forward`, `backward`, `update`, `evaluation`, `checkpoint`, ...
        calls: collectives that it has begun since it started: the same numbers mean the same collective on every rank.
        waiting_in: the purpose of the collective that it is in; None: in none.
        seconds: for how long all this has been so.
    """

    step: int
    phase: str
    calls: int
    waiting_in: str | None
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        inside = f", in the collective '{self.waiting_in}'" if self.waiting_in else ""
        return f"step {self.step}, phase {self.phase}{inside}, for {self.seconds:.0f} s"


@dataclass
class Whereabouts:
    """Kept by the thread that works, at the cost of a few assignments; read by others.

    Attributes:
        waited_seconds: spent waiting so far.
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

    def note_this_thread_in(self, other: Whereabouts) -> None:
        """The collectives of the calling thread are not the training's: from now on, ``other`` has them."""
        self._others.has_this = other

    def waiting(self, purpose: str) -> _Waiting:
        """Around a collective, or what else waits for all ranks. If it fails, the position stays the one within it."""
        return _Waiting(self._of_this_thread, purpose)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Within `waiting`, around work of this rank alone: if it takes long, the others wait for this rank."""
        here = self._of_this_thread
        purpose = here.waiting_in
        if purpose is None:
            yield
            return
        here._end()
        try:
            yield
        finally:
            here._begin(purpose)

    def position(self) -> Position:
        """As it is now."""
        return Position(self.step, self.phase, self.calls, self.waiting_in, time.monotonic() - self._since)

    @property
    def _of_this_thread(self) -> Whereabouts:
        return getattr(self._others, "has_this", self)

    def _begin(self, purpose: str) -> None:
        self.calls += 1
        self._since, self.waiting_in = time.monotonic(), purpose

    def _end(self) -> None:
        now = time.monotonic()
        self.waited_seconds += now - self._since
        self._since, self.waiting_in = now, None


class _Waiting:
    def __init__(self, whereabouts: Whereabouts, purpose: str) -> None:
        self._whereabouts, self._purpose = whereabouts, purpose

    def __enter__(self) -> None:
        self._whereabouts._begin(self._purpose)

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self._whereabouts._end()


# One process is one rank, so there is one of the training.
HERE = Whereabouts()
# And one of the thread that writes checkpoints meanwhile.
BACKGROUND = Whereabouts(phase=IDLE)

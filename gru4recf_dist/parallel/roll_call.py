"""Finds the rank that did not arrive: ranks tell each other where they are, and look when one does not get on for long.

The telling goes over the process group's store and a thread of its own, so it goes on while the rank hangs, and costs
the training nothing. A rank that is silent too was stopped, or its machine is gone: what it told has not changed
between two looks. Clocks of different machines are never compared.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Sequence

import torch.distributed as dist
from torch._C import _distributed_c10d

from gru4recf_dist.errors import UserError, redacted
from gru4recf_dist.frames import current_frames
from gru4recf_dist.parallel.whereabouts import HERE, IDLE, LEFT_TO_BACKGROUND, Position, Whereabouts

# Shares of the time-out after which a rank that does not get on listens to what the others tell, and then looks for who
# is missing: when it is over, it cannot any more. In between each of them tells its position four times at least.
LISTEN_AFTER = 0.6
LOOK_AFTER = 0.8


class RollCall:
    """This rank's part; a daemon thread from `start` to `stop`.

    Args:
        timeout_seconds: how long collectives wait.
        store: shared by the ranks; a connection of its own, as a slow request holds the others up.
        keep: is given the name and content of files that tell about a hang, to keep them; None: nothing is kept.
        here: of the thread whose calls are compared with those of the other ranks' threads.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        timeout_seconds: float,
        store: dist.Store,
        keep: Callable[[str, bytes], None] | None = None,
        here: Whereabouts = HERE,
    ) -> None:
        self._rank, self._world, self._timeout, self._store = rank, world, timeout_seconds, store
        self._keep, self._here = keep, here
        self._interval = min(5.0, timeout_seconds / 20)
        self._answered: set[str] = set()
        self._called_at: tuple[int, str, int] | None = None
        # What every rank had told when this one listened, and when that was.
        self._heard: list[str | None] | None = None
        self._heard_at = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="roll call", daemon=True)
        self._found = ""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; does not wait for a request that hangs."""
        self._stopped.set()
        self._thread.join(timeout=self._interval)

    def findings(self) -> str | None:
        """What was found out about where this rank is; None if it was not there for long, or others know better."""
        return (self._found or None) if self._called_at == _place(self._here.position()) else None

    def _run(self) -> None:
        # The store goes with the rank or launcher that holds it: then all ends anyway.
        with contextlib.suppress(RuntimeError):
            while not self._stopped.wait(self._interval):
                self._look()

    def _look(self) -> None:
        mine = self._here.position()
        self._store.set(_key(self._rank), json.dumps(mine.as_dict()))
        if self._store.check(["alarm"]):
            alarm = self._store.get("alarm").decode()
            if alarm not in self._answered:
                # Who hangs cannot know that it does: the others ask it for what it is doing.
                self._answered.add(alarm)
                self._keep_evidence(mine)
        if mine.phase in (IDLE, LEFT_TO_BACKGROUND) or mine.seconds < LISTEN_AFTER * self._timeout:
            self._heard = None
        elif self._heard is None:
            self._heard, self._heard_at = self._told(), time.monotonic()
        elif mine.seconds > LOOK_AFTER * self._timeout and _place(mine) != self._called_at:
            self._call(mine)

    def _call(self, mine: Position) -> None:
        """Find out who is missing, say so, and have all ranks keep what they know."""
        told = self._told()
        positions = [None if text is None else Position(**json.loads(text)) for text in told]
        positions[self._rank] = mine
        silent = {rank for rank, text in enumerate(told) if text is not None and text == self._heard[rank]}
        self._called_at, self._found = _place(mine), ""
        if not mine.waiting_in and others_look(positions, mine):
            return
        late = missing(positions, mine)
        self._found = describe(late, positions, mine, silent - {self._rank}, time.monotonic() - self._heard_at)
        self._store.set("alarm", str(mine.calls))
        # One is enough to say it.
        if self._rank == min(set(range(self._world)) - set(late), default=0):
            left = max(self._timeout - mine.seconds, 0.0)
            fails = f". The collective fails in {left:.0f} s" if mine.waiting_in else ""
            kept = "; what the ranks were doing is kept in the run folder" if self._keep else ""
            print(redacted(f"warning: {self._found}{fails}{kept}"), file=sys.stderr, flush=True)

    def _told(self) -> list[str | None]:
        """What each rank told last; None of those never heard of."""
        keys = map(_key, range(self._world))
        return [self._store.get(key).decode() if self._store.check([key]) else None for key in keys]

    def _keep_evidence(self, mine: Position) -> None:
        if self._keep is None:
            return
        files = {f"stacks-{self._rank}.txt": f"{mine}\n\n{stacks()}".encode(), f"rank_{self._rank}": flight_recorder()}
        try:
            for name, content in files.items():
                if content is not None:
                    self._keep(f"flight-recorder/step-{mine.step}/{name}", content)
        except (OSError, UserError) as error:
            print(f"warning: {redacted(str(error))}", file=sys.stderr, flush=True)


def missing(positions: Sequence[Position | None], mine: Position) -> list[int]:
    """The ranks that have begun fewer collectives than one that waits; None is a rank that was never heard of.

    Those of them that wait in one themselves are left out, but for the last of all: in an exchange a rank may have got
    all that it needs and gone on, while another still waits for the one that is missing.
    """
    late = {rank: each for rank, each in enumerate(positions) if each is None or each.calls < mine.calls}
    calls = {rank: -1 if each is None else each.calls for rank, each in late.items()}
    last = min(calls.values(), default=0)
    return [rank for rank, each in late.items() if calls[rank] == last or each.waiting_in is None]


def others_look(positions: Sequence[Position | None], mine: Position) -> bool:
    """Whether another rank knows better than one that is in no collective: it waits in one, or is further on."""
    others = [each for each in positions if each is not None and each is not mine]
    return any(each.waiting_in or each.calls > mine.calls for each in others)


def describe(
    late: list[int], positions: Sequence[Position | None], mine: Position, silent: Collection[int], heard: float
) -> str:
    """One line about who is missing.

    Args:
        silent: ranks that have told nothing new for ``heard`` seconds.
    """
    where = f"step {mine.step}, phase {mine.phase}"
    if mine.waiting_in:
        waited = f"{where}: waited {mine.seconds:.0f} s in the collective '{mine.waiting_in}'"
        nobody = f"{waited}, in which all ranks are: the network, or a device, hangs"
    else:
        waited = f"{where}: not got on for {mine.seconds:.0f} s, waiting"
        nobody = f"{where}: no rank has got on for {mine.seconds:.0f} s: the network, storage or a device hangs"
    if not late:
        return nobody
    shown = []
    for rank in late[:8]:
        position = positions[rank]
        if position is None:
            shown.append(f"rank {rank} (never heard of)")
            continue
        silence = f"; silent for {heard:.0f} s or more: stopped, or gone" if rank in silent else ""
        shown.append(f"rank {rank} (last at {position}{silence})")
    more = f" and {len(late) - 8} more" if len(late) > 8 else ""
    return f"{waited} for {', '.join(shown)}{more}"


def flight_recorder() -> bytes | None:
    """The last collectives of this process, a pickle of torch's; None where torch records none."""
    dump = getattr(_distributed_c10d, "_dump_fr_trace", None) or getattr(_distributed_c10d, "_dump_nccl_trace", None)
    return dump() if dump else None


def stacks() -> str:
    """What every other thread of this process is doing, the one that trains first."""
    frames = current_frames()
    threads = sorted(threading.enumerate(), key=lambda thread: thread is not threading.main_thread())
    return "\n".join(
        f"thread {thread.name}:\n{''.join(traceback.format_stack(frames[thread.ident]))}"
        for thread in threads
        if thread is not threading.current_thread() and thread.ident in frames
    )


def _place(position: Position) -> tuple[int, str, int]:
    """The same as long as a rank does not get on."""
    return position.step, position.phase, position.calls


def _key(rank: int) -> str:
    return f"position/{rank}"

"""Finds the rank that did not arrive: ranks tell each other where they are, and look when one waits for long.

The telling goes over the process group's store and a thread of its own, so it goes on while the rank hangs, and costs
the training nothing. A rank that is silent too was stopped, or its machine is gone.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import traceback
from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch._C import _distributed_c10d

from gru4recf_dist.errors import UserError, redacted
from gru4recf_dist.parallel.whereabouts import HERE, Position, Whereabouts

# Share of the time-out after which a rank that waits looks for who is missing: when it is over, it cannot any more.
LOOK_AFTER = 0.8
# A rank that has not told its position for so many intervals is silent.
_SILENT_AFTER = 4


class RollCall:
    """This rank's part; a daemon thread from `start` to `stop`.

    Args:
        timeout_seconds: how long collectives wait.
        store: shared by the ranks; a connection of its own, as a slow request holds the others up.
        keep: is given the name and content of files that tell about a hang, to keep them; None: nothing is kept.
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
        self._called_at = -1
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
        """What was found out about the collective in which this rank is; None if it was not waited for long."""
        return self._found if self._called_at == self._here.calls else None

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
        if mine.waiting_in and mine.seconds > LOOK_AFTER * self._timeout and mine.calls != self._called_at:
            self._call(mine)

    def _call(self, mine: Position) -> None:
        """Find out who is missing, say so, and have all ranks keep what they know."""
        positions = [self._position_of(rank) for rank in range(self._world)]
        positions[self._rank] = mine
        late = missing(positions, mine)
        self._found = describe(late, positions, mine, _SILENT_AFTER * self._interval)
        self._called_at = mine.calls
        self._store.set("alarm", str(mine.calls))
        # One is enough to say it.
        if self._rank == min(set(range(self._world)) - set(late), default=0):
            left = max(self._timeout - mine.seconds, 0.0)
            kept = "; what the ranks were doing is kept in the run folder" if self._keep else ""
            text = f"warning: {self._found}. The collective fails in {left:.0f} s{kept}"
            print(redacted(text), file=sys.stderr, flush=True)

    def _position_of(self, rank: int) -> Position | None:
        if not self._store.check([_key(rank)]):
            return None
        return Position(**json.loads(self._store.get(_key(rank))))

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


def describe(late: list[int], positions: Sequence[Position | None], mine: Position, silent_after: float) -> str:
    """One line about who is missing.

    Args:
        silent_after: seconds without a word after which a rank counts as silent.
    """
    waited = f"step {mine.step}, phase {mine.phase}: waited {mine.seconds:.0f} s in the collective '{mine.waiting_in}'"
    if not late:
        return f"{waited}, in which all ranks are: the network, or a device, hangs"
    shown = []
    for rank in late[:8]:
        position = positions[rank]
        if position is None:
            shown.append(f"rank {rank} (never heard of)")
            continue
        silence = mine.told_at - position.told_at
        silent = f"; silent for {silence:.0f} s: stopped, or gone" if silence > silent_after else ""
        shown.append(f"rank {rank} (last at {position}{silent})")
    more = f" and {len(late) - 8} more" if len(late) > 8 else ""
    return f"{waited} for {', '.join(shown)}{more}"


def flight_recorder() -> bytes | None:
    """The last collectives of this process, a pickle of torch's; None where torch records none."""
    dump = getattr(_distributed_c10d, "_dump_fr_trace", None) or getattr(_distributed_c10d, "_dump_nccl_trace", None)
    return dump() if dump else None


def stacks() -> str:
    """What every other thread of this process is doing, the one that trains first."""
    frames = sys._current_frames()
    threads = sorted(threading.enumerate(), key=lambda thread: thread is not threading.main_thread())
    return "\n".join(
        f"thread {thread.name}:\n{''.join(traceback.format_stack(frames[thread.ident]))}"
        for thread in threads
        if thread is not threading.current_thread() and thread.ident in frames
    )


def _key(rank: int) -> str:
    return f"position/{rank}"

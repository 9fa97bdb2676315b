"""Who did not arrive, from what the ranks told; and who is slow."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest

from gru4recf_dist.parallel.roll_call import RollCall, describe, missing, others_look
from gru4recf_dist.parallel.slow_ranks import SlowRanks, ratios
from gru4recf_dist.parallel.waits import to_host
from gru4recf_dist.parallel.whereabouts import HERE, IDLE, Position, Whereabouts


def position(calls: int, phase: str = "forward", waiting_in: str | None = None) -> Position:
    return Position(12, phase, calls, waiting_in, 16.0)


def test_those_that_began_fewer_collectives_are_missing():
    mine = position(8, "backward", "row_gradients")
    positions = [mine, position(7), None, position(8, "backward", "row_gradients"), position(6)]
    late = missing(positions, mine)
    assert late == [1, 2, 4]
    assert describe(late, positions, mine, silent={4}, heard=30.0) == (
        "step 12, phase backward: waited 16 s in the collective 'row_gradients' for rank 1 (last at step 12, phase "
        "forward, for 16 s), rank 2 (never heard of), rank 4 (last at step 12, phase forward, for 16 s; silent for "
        "30 s or more: stopped, or gone)"
    )


def test_a_rank_that_waits_for_the_missing_one_is_not_missing_itself():
    mine = position(9, "forward", "negatives")
    waits, hangs, is_slow = position(8, "forward", "rows"), position(7, "forward", "rows"), position(8, "reading")
    assert missing([waits, hangs, mine], mine) == [1]
    assert missing([waits, hangs, mine, is_slow], mine) == [1, 3]
    assert missing([waits, hangs, mine], waits) == [1]


def test_where_all_are_in_the_same_collective_nobody_is_blamed():
    mine = position(8, "backward", "rows")
    assert missing([mine, mine], mine) == []
    assert "in which all ranks are" in describe([], [mine, mine], mine, (), 20.0)


def test_a_rank_that_is_in_no_collective_looks_only_if_no_other_knows_better():
    mine = position(8, "backward")
    assert others_look([mine, position(8, "backward", "rows")], mine)
    assert others_look([mine, position(9, "update")], mine)
    assert not others_look([mine, position(8, "backward"), position(7), None], mine)
    assert describe([], [mine, position(8)], mine, (), 20.0) == (
        "step 12, phase backward: no rank has got on for 16 s: the network, storage or a device hangs"
    )
    assert describe([1], [mine, position(7)], mine, (), 20.0) == (
        "step 12, phase backward: not got on for 16 s, waiting for rank 1 (last at step 12, phase forward, for 16 s)"
    )


def test_of_many_missing_ranks_eight_are_named():
    mine = position(8, "backward", "rows")
    positions = [mine] + [position(7)] * 12
    text = describe(missing(positions, mine), positions, mine, (), 20.0)
    assert text.count("last at") == 8 and text.endswith("and 4 more")


def test_a_collective_that_fails_keeps_the_position_within_it():
    here = Whereabouts()
    here.enter("update", step=5)
    with here.waiting("loss"):
        assert here.position().waiting_in == "loss"
    assert (here.calls, here.position().waiting_in) == (1, None)
    with pytest.raises(RuntimeError), here.waiting("rows"):
        raise RuntimeError
    assert (here.calls, here.position().waiting_in, here.position().step) == (2, "rows", 5)


def test_work_within_a_wait_is_this_ranks_own():
    here = Whereabouts()
    with here.waiting("checkpoint"):
        with pytest.raises(OSError), here.working():
            assert (here.calls, here.position().waiting_in) == (1, None)
            raise OSError
        # Who has done its part is further on than one that has not, and waits for it.
        assert (here.calls, here.position().waiting_in) == (2, "checkpoint")
    with here.working():
        assert here.calls == 2
    assert (here.calls, here.position().waiting_in) == (2, None)


class Store(dict):
    """In the place of the ranks' store; everything in it is text."""

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def get(self, key: str) -> bytes:
        return self[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


@pytest.mark.parametrize("tells", [True, False])
def test_a_rank_is_silent_when_it_has_told_nothing_new_whatever_clocks_say(tells, monkeypatch):
    now, store, here = 0.0, Store(), Whereabouts()
    monkeypatch.setattr("time.monotonic", lambda: now)
    roll_call = RollCall(0, 2, 100.0, store, here=here)
    with here.waiting("rows"):
        store["position/1"] = json.dumps(position(0).as_dict())
        for now in (50.0, 65.0, 75.0, 85.0):
            if tells:
                # It lives, in one place, with a clock that is an hour off.
                store["position/1"] = json.dumps({**position(0).as_dict(), "seconds": 3600 + now})
            roll_call._look()
        found = roll_call.findings()
    assert found.startswith("step 0, phase start: waited 85 s in the collective 'rows' for rank 1 (last at step 12")
    assert ("silent for 20 s or more" in found) == (not tells)


@pytest.mark.parametrize("other_waits", [False, True])
def test_where_no_rank_gets_on_outside_of_collectives_that_is_said_too(other_waits, monkeypatch, capsys):
    now, store, here, kept = 0.0, Store(), Whereabouts(), []
    monkeypatch.setattr("time.monotonic", lambda: now)
    roll_call = RollCall(0, 2, 100.0, store, lambda name, content: kept.append(name), here)
    here.enter("backward", step=3)
    for now in (50.0, 65.0, 85.0, 90.0):
        waiting_in = "rows" if other_waits else None
        store["position/1"] = json.dumps({**position(0, "backward", waiting_in).as_dict(), "seconds": now})
        roll_call._look()
    # The other one looks for itself, if it waits in a collective.
    said = "step 3, phase backward: no rank has got on for 85 s: the network, storage or a device hangs"
    assert roll_call.findings() == (None if other_waits else said)
    assert capsys.readouterr().err.count(f"warning: {said}") == (not other_waits)
    assert ("flight-recorder/step-3/stacks-0.txt" in kept) == (not other_waits)


@pytest.mark.parametrize("is_cuda", [False, True])
def test_the_host_waits_for_a_device_as_for_the_ranks_that_the_device_waits_for(is_cuda):
    class OnDevice:
        def cpu(self) -> str | None:
            return HERE.position().waiting_in

    tensor = OnDevice()
    tensor.is_cuda = is_cuda
    assert to_host(tensor) == ("device" if is_cuda else tensor)
    assert HERE.position().waiting_in is None


def test_the_collectives_of_a_thread_beside_the_training_do_not_count():
    here, other = Whereabouts(), Whereabouts()

    def beside() -> None:
        here.note_this_thread_in(other)
        with here.waiting("other"):
            assert here.position().waiting_in is None and other.position().waiting_in == "other"
            with here.working():
                assert other.position().waiting_in is None

    thread = threading.Thread(target=beside)
    thread.start()
    thread.join()
    with here.waiting("loss"):
        pass
    assert here.calls == 1


def test_a_thread_without_work_does_not_look_for_anybody():
    store, here = Store(), Whereabouts(phase=IDLE)
    roll_call = RollCall(0, 2, 100, store, here=here)
    here._since -= 1000
    roll_call._look()
    roll_call._look()
    assert not store.check(["alarm"]) and roll_call.findings() is None
    # But it tells where it is.
    assert json.loads(store.get("position/0"))["phase"] == IDLE


def test_a_rank_is_compared_with_the_median_of_the_others():
    np.testing.assert_allclose(ratios(np.array([1.0, 3.0])), [1 / 3, 3.0])
    np.testing.assert_allclose(ratios(np.array([1.0, 1.0, 2.0, 5.0])), [0.5, 0.5, 2.0, 5.0])
    assert ratios(np.array([7.0])) == [1.0]


def test_only_a_rank_that_is_slow_without_a_break_is_named():
    slow = SlowRanks(factor=2.0, seconds=30.0)
    usual, late = np.array([1.0, 1.0, 1.0]), np.array([1.0, 2.5, 1.0])
    assert [slow.look(late, 10.0), slow.look(late, 10.0)] == [[], []]
    # A break: from the beginning.
    assert slow.look(usual, 10.0) == []
    assert [slow.look(late, 10.0), slow.look(late, 10.0)] == [[], []]
    (line,) = slow.look(late, 10.0)
    assert line.startswith("warning: rank 1 has been 2.5 times as slow as the median of the others for 30 s")
    # Said once in so many seconds, not at every log line.
    assert [slow.look(late, 10.0), slow.look(late, 10.0)] == [[], []]
    assert len(slow.look(late, 10.0)) == 1

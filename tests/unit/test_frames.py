"""The frames of threads are read without a garbage collection, during which some versions of Python would hang."""

from __future__ import annotations

import gc
import sys
import threading

import pytest

from gru4recf_dist.frames import current_frames


@pytest.mark.parametrize("collects", [True, False])
def test_no_garbage_is_collected_meanwhile_and_later_as_before(collects, monkeypatch):
    during = []
    monkeypatch.setattr(sys, "_current_frames", lambda: during.append(gc.isenabled()) or {})
    before = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        current_frames()
        assert (during, gc.isenabled()) == ([False], collects)
    finally:
        (gc.enable if before else gc.disable)()


def test_every_thread_has_its_frame():
    assert current_frames()[threading.get_ident()].f_code.co_name == "current_frames"

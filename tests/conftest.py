"""What a test sets for its whole process goes away with it, so that tests pass in any order and any company."""

from __future__ import annotations

import fsspec
import pytest

from gru4recf_dist import errors
from gru4recf_dist.data import attempts, filesystems
from gru4recf_dist.data.storage_config import StorageConfig


@pytest.fixture(autouse=True)
def settings_of_the_process(monkeypatch) -> None:
    """Storage as a process starts with it; what a message hides, and which ranks speak, too."""
    monkeypatch.setattr(filesystems, "_settings", StorageConfig())
    monkeypatch.setattr(attempts, "_answered", set())
    monkeypatch.setattr(errors, "_hidden", set())
    monkeypatch.setattr(errors, "_every_rank_reports", False)
    # `filesystems.configure` adds to it.
    monkeypatch.setattr(fsspec.config, "conf", {})

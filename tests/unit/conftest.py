"""Places for a data set, new for every test."""

from __future__ import annotations

import uuid

import pytest


@pytest.fixture(params=["file", "memory"])
def data(request, tmp_path) -> str:
    """On disk, and in fsspec's memory."""
    return f"file://{tmp_path}" if request.param == "file" else f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def memory() -> str:
    return f"memory://{uuid.uuid4().hex}"

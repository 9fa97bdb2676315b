"""The S3 server and its fault proxy, started once for all tests here and ended with them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.s3 import S3, FaultyS3, running_fault_proxy, running_server

# A seed with which several kinds of fault come up in every test that asks for them. Should they not any more, after a
# change of which requests the project makes, take another seed.
FAULT_SEED = 17
STALL_SECONDS = 1.5


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    with running_server() as server:
        yield server


@pytest.fixture(scope="session")
def faulty_s3(s3) -> Iterator[FaultyS3]:
    with running_fault_proxy(s3, FAULT_SEED, STALL_SECONDS) as proxy:
        yield proxy

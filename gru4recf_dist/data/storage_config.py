"""How files are reached: the section `storage` of training and of preparation."""

from __future__ import annotations

from typing import Any

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from gru4recf_dist.section import Section


class StorageConfig(Section):
    """Access to object storage.

    ``options`` go to fsspec as they are, by protocol: ``{s3: {endpoint_url: .., key: .., secret: ..}}``. They are
    never written anywhere: a run folder or manifest that is handed on must not hand on credentials. What is given
    neither here nor in the environment (``AWS_ENDPOINT_URL``, ``FSSPEC_S3_KEY`` and so on) has the backend's default.
    """

    options: dict[str, dict[str, Any]] = Field(
        {}, exclude=True, repr=False, description="fsspec's storage options by protocol; never written to any file"
    )
    attempts: PositiveInt = Field(8, description="how often a failing request is made before the program gives up")
    backoff_seconds: NonNegativeFloat = Field(0.5, description="pause before the second attempt; then it doubles")
    longest_backoff_seconds: NonNegativeFloat = Field(30.0, description="the pause does not double beyond this")
    timeout_seconds: PositiveFloat = Field(60.0, description="how long a request may take, a stalled one for example")
    range_mib: PositiveFloat = Field(4.0, description="a shard is fetched in ranges of this size")
    ahead_ranges: PositiveInt = Field(2, description="ranges of a shard that are fetched before they are asked for")
    ahead_shards: NonNegativeInt = Field(1, description="shards of a stream whose first ranges are fetched ahead")
    ahead_mib: PositiveFloat = Field(256.0, description="bound of what a process holds that was fetched ahead")
    cache_folder: str | None = Field(None, description="local folder that keeps shards, shared by a machine's ranks")
    cache_gib: PositiveFloat = Field(10.0, description="bound of its size; the longest unused shards go first")
    allow_outside: bool = Field(
        False, description="let a manifest name files outside its own data set; only for manifests you trust"
    )

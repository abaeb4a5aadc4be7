"""Settings of ``ptafuse interpret``."""

from typing import Final

from pydantic import Field

from stages.contract.fingerprint import Settings

VERSION: Final = 1
"""Version of the figures; raised when the code gives others for the same settings."""


class InterpretConfig(Settings):
    """Settings for the sample that ``ptafuse interpret`` reads, and for what it shows."""

    max_positions: int = Field(
        100_000,
        ge=1,
        description="Approximate number of target positions to read: whole documents, the same number of positions in "
        "each shard.",
    )
    max_shards: int = Field(8, ge=1, le=64, description="Shards from which documents are drawn.")
    seed: int = Field(42, description="Seed of the draw of shards and documents.")
    num_pairs: int = Field(
        20, ge=1, le=1000, description="Number of most moved pairs of tokens to keep for each source."
    )

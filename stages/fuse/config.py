"""Settings of the fuse stage."""

from typing import Annotated, Final, Literal

from pydantic import Field

from stages.contract.fingerprint import RUNTIME, Settings

VERSION: Final = 3
"""Of the stage's algorithm; raised when its code gives other rows for the same settings."""


class FuseConfig(Settings):
    """How the candidates at each position become one distribution, and how segments become training blocks."""

    function: Literal["min-ce", "avg-ce"] = Field(
        "min-ce",
        description="Take the candidate with the lowest cross-entropy on the gold text, or weight by exp(-CE).",
    )
    granularity: Literal["document", "segment", "token", "block"] = Field(
        "document", description="Over which span a candidate is judged."
    )
    unit: Literal["bits-per-byte", "nats-per-token"] = Field(
        "bits-per-byte", description="Of the cross-entropy: fair between tokenizers, or the paper's."
    )
    max_length: int = Field(2048, ge=2, description="Tokens of a training block.")
    top_k: int = Field(10, ge=1, le=256, description="Entries kept of a mixed row; the mass cut off is counted.")
    num_workers: Annotated[int | None, RUNTIME] = Field(None, ge=1, description="Actors; by default one a CPU.")
    cpus_per_worker: Annotated[float, RUNTIME] = Field(1, gt=0, description="CPUs that Ray reserves for an actor.")

"""Interface of a sharded stage: ``setup()`` once per worker, then ``run(inputs)`` once per shard.

A stage is a pure function of its inputs; the runner reads them, and commits what comes back.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import pyarrow as pa

from stages.contract.manifest import Health


@dataclass(frozen=True)
class BadRecord:
    """A record that a stage could not process; it goes to the shard's quarantine file and is counted in the manifest.

    Attributes:
        doc_id: the document's index in the dataset.
        segment: the segment's index in the document, -1 for the document as a whole.
        error: the error class, e.g. ``"InvalidUtf8"``.
        message: description of the found and the expected value.
    """

    doc_id: int
    segment: int
    error: str
    message: str


@dataclass(frozen=True)
class StageOutput:
    """Result of one shard.

    Attributes:
        table: the rows, in the stage's schema (see ``schemas``).
        num_tokens: tokens processed; the unit of progress and of rates.
        health: counts and means for the manifest, by name; finite.
        quarantine: the records that could not be processed.
        versions: versions that affect the numbers, in addition to the libraries that every manifest records.
    """

    table: pa.Table
    num_tokens: int
    health: Health = field(default_factory=dict)
    quarantine: tuple[BadRecord, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


class Stage(Protocol):
    """A sharded stage."""

    def setup(self) -> None:
        """Load what every shard needs (models, tokenizers, compiled kernels). Called once per worker."""

    def run(self, inputs: Mapping[str, pa.Table]) -> StageOutput:
        """Compute one shard.

        A stage whose row in the stage table has ``shards_per_worker`` above 1 is called from that many threads at once.

        Args:
            inputs: input name (``"shard"``, ``"logits/target"``...) -> the table of the same shard.
        """

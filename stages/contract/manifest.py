"""Manifest, the only proof that a shard is done; and the paths of a stage's files in a run directory."""

from collections.abc import Mapping
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MANIFEST_VERSION: Final = 1


class InputRef(BaseModel):
    """Version of an input that a shard was computed from."""

    model_config = ConfigDict(frozen=True)

    folder: str = Field(description="The input step's folder in the run directory.")
    manifest_sha256: str = Field(description="sha256 of the input's manifest file (or of the frozen plan).")
    data_sha256: str = Field(description="sha256 of the input's data file.")


class Mean(BaseModel):
    """A mean that can be added up over shards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    total: float
    count: int

    @property
    def value(self) -> float:
        """Mean; NaN if nothing was counted."""
        return self.total / self.count if self.count else float("nan")

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(total=self.total + other.total, count=self.count + other.count)


HealthMetric = int | float | Mean
"""A health metric: a count (int), seconds (float) or a mean; all add up over shards."""

Health = Mapping[str, HealthMetric]
"""A stage's health metrics, by name."""


class DataFile(BaseModel):
    """A file that a manifest names."""

    model_config = ConfigDict(frozen=True)

    key: str = Field(description="Path in the run directory.")
    sha256: str
    num_bytes: int
    home: str | None = Field(
        None, description="The run directory that holds the file, where that is another one: it is read there."
    )


class Manifest(BaseModel):
    """Proof that a shard is done; published once, never changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    manifest_version: Literal[1] = MANIFEST_VERSION
    stage: str = Field(description="Stage, with its model where it has one: 'shard', 'logits/gemma3', 'align/gemma3'.")
    shard: int
    num_shards: int
    fingerprint: str
    settings: dict = Field(description="The readable settings behind the fingerprint.")
    inputs: dict[str, InputRef]
    data: DataFile
    quarantine: DataFile | None = None
    num_rows_in: int
    num_rows_out: int
    num_quarantined: int
    num_tokens: int
    health: dict[str, HealthMetric]
    seconds: float = Field(description="Reading, computing and writing this shard, without start-up.")
    cpus: float | None = Field(None, description="CPUs that the worker had; None before this was recorded.")
    gpus: float | None = Field(None, description="GPUs that the worker had; None before this was recorded.")
    attempt: int
    host: str
    versions: dict[str, str]

    def to_bytes(self) -> bytes:
        """Serialise to the manifest file."""
        return (self.model_dump_json(indent=1) + "\n").encode()

    @classmethod
    def from_bytes(cls, raw: bytes) -> "Manifest":
        """Read a manifest file.

        Raises:
            ValueError: it is not a manifest of this version.
        """
        try:
            return cls.model_validate_json(raw)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(key) for key in first["loc"])
            raise ValueError(
                f"not a manifest of version {MANIFEST_VERSION}, which this ptafuse reads ({where}: {first['msg']}): it was "
                "damaged, or written by another version of ptafuse; continue with that version, or start a new run directory"
            ) from None


def stage_folder(stage: str, fingerprint: str) -> str:
    """Return ``logits/gemma3/<fp>``."""
    return f"{stage}/{fingerprint}"


def manifest_key(folder: str, shard: int) -> str:
    """Return ``<folder>/manifests/shard-00017.json``."""
    return f"{folder}/manifests/shard-{shard:05d}.json"


def data_key(folder: str, shard: int, num_shards: int, attempt: str) -> str:
    """Return ``<folder>/data/shard-00017-of-00256.<attempt>.parquet``; the attempt makes it unique."""
    return f"{folder}/data/shard-{shard:05d}-of-{num_shards:05d}.{attempt}.parquet"


def quarantine_key(folder: str, shard: int, attempt: str) -> str:
    """Return ``<folder>/quarantine/shard-00017.<attempt>.parquet``."""
    return f"{folder}/quarantine/shard-{shard:05d}.{attempt}.parquet"


def choices_key(folder: str) -> str:
    """Return ``<folder>/choices.json``: values of "auto" settings for the whole folder.

    See ``pipeline.engine.worker``.
    """
    return f"{folder}/choices.json"


def attempts_folder(folder: str, shard: int) -> str:
    """Return ``<folder>/attempts/shard-00017``: one file per attempt, written before it computes.

    See ``pipeline.engine.worker``.
    """
    return f"{folder}/attempts/shard-{shard:05d}"

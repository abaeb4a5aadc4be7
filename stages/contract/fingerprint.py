"""Fingerprints: which settings of a configuration change a result.

A stage's folder in the run directory is named by its fingerprint: the hash of its result-changing settings, its
algorithm version and its inputs' fingerprints. A setting that only says how to run (workers, batch sizes, paths) is
annotated with ``RUNTIME`` where it is declared and stays out. One that came later is annotated with ``ADDED``.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

FINGERPRINT_LENGTH: Final = 12


class _Runtime:
    """Marker of a setting that does not change results."""

    def __repr__(self) -> str:
        return "RUNTIME"


RUNTIME: Final = _Runtime()
"""``num_workers: Annotated[int, RUNTIME] = 1``: not part of any fingerprint."""


class _Added:
    """Marker of a setting that earlier versions did not have."""

    def __repr__(self) -> str:
        return "ADDED"


ADDED: Final = _Added()
"""``test_fraction: Annotated[float, ADDED] = 0``: at its default not part of any fingerprint, for the default does what
was done before there was the setting; so an upgrade computes nothing again."""


class Settings(BaseModel):
    """Base of every configuration class: frozen, and an unknown key, an infinite number or NaN is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false for numbers: Python would read ``max_documents = true`` as one document."""
        if isinstance(value, bool) and info.field_name is not None:
            annotation = cls.model_fields[info.field_name].annotation
            kinds = {annotation, *get_args(annotation)}
            if kinds & {int, float} and bool not in kinds:
                raise ValueError(f"expected a number; found {str(value).lower()}")
        return value

    def result_settings(self) -> dict[str, Any]:
        """Return the settings that change results, as JSON values; nested settings included.

        ``RUNTIME`` fields are left out, and ``ADDED`` ones at their default.
        """
        settings = {}
        for name, field in type(self).model_fields.items():
            if any(isinstance(mark, _Runtime) for mark in field.metadata):
                continue
            value = getattr(self, name)
            if value == field.default and any(isinstance(mark, _Added) for mark in field.metadata):
                continue
            settings[field.alias or name] = (
                value.result_settings() if isinstance(value, Settings) else _json_value(value)
            )
        return settings


def _json_value(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [item.result_settings() if isinstance(item, Settings) else _json_value(item) for item in value]
    return value


def canonical_json(value: Any) -> str:
    """Serialise to JSON such that equal values give equal texts: sorted keys, no white space, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def fingerprint(stage: str, version: int, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Name one stage's result.

    Args:
        stage: the stage's name, e.g. ``"align"``.
        version: the stage's algorithm version; raised when its code gives other rows for the same settings.
        settings: its result-changing settings, JSON values.
        inputs: input name -> fingerprint or content hash of that input.

    Returns:
        12 hexadecimal digits.
    """
    text = canonical_json({"stage": stage, "version": version, "settings": dict(settings), "inputs": dict(inputs)})
    return hashlib.sha256(text.encode()).hexdigest()[:FINGERPRINT_LENGTH]

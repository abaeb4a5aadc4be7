"""How much of a text an evaluation reads, against figures worked out by hand."""

import json
from pathlib import Path

import pytest

from pipeline.forecast.estimate import Assumed
from pipeline.forecast.sizes import evaluated_text_bytes
from pipeline.settings.planning import AssumptionsConfig
from pipeline.settings.texts import TextConfig


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Ten documents, 1,000 bytes of file."""
    file = tmp_path / "text.jsonl"
    line = json.dumps({"text": ""})
    file.write_text((line[:-2] + "x" * (99 - len(line)) + line[-2:] + "\n") * 10)
    assert file.stat().st_size == 1000
    return file


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 1000),
        ({"num_documents": 4}, 400),
        ({"num_documents": 40}, 1000),
        ({"fraction": 0.2}, 200),
        ({"max_documents": 5}, 500),
        ({"max_documents": 5, "num_documents": 2}, 200),
        ({"max_characters": 30}, 300),
        ({"num_documents": 2, "max_characters": 30}, 60),
        ({"max_characters": 500}, 1000),
    ],
)
def test_the_bytes_of_what_is_chosen(path: Path, settings: dict, expected: float) -> None:
    text = TextConfig.model_validate({"name": "x", "path": str(path), **settings})
    assert evaluated_text_bytes(text, Assumed(AssumptionsConfig())) == pytest.approx(expected)


def test_a_text_of_the_hub_is_sized_by_what_is_chosen_of_it() -> None:
    hub = {"name": "x", "hub": "someone/essays", "revision": "abc"}
    assumed = Assumed(AssumptionsConfig())
    sized = TextConfig.model_validate({**hub, "num_documents": 10, "max_characters": 1000})
    assert evaluated_text_bytes(sized, assumed) == 10_000
    with pytest.raises(
        ValueError, match=r"the size of eval\.texts\.x is unknown.* set num_documents and max_characters"
    ):
        evaluated_text_bytes(TextConfig.model_validate(hub), assumed)

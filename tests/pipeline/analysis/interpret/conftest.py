"""A finished fuse stage of two tiny sources, over a corpus whose documents have kinds, and what ``interpret`` says of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_run import documents, ptafuse

KINDS = ("prose", "code", None)


def kind_of(doc_id: int) -> str | None:
    return KINDS[doc_id % 3] if doc_id != 2 else None


class InterpretedRun:
    """The run, and the command line that speaks of it."""

    def __init__(self, config: Path, folder: Path) -> None:
        self.folder = folder / "run"
        corpus = folder / "kinds.jsonl"
        records = ({"text": text, "kind": kind_of(index)} for index, text in enumerate(documents()))
        corpus.write_text("".join(f"{json.dumps(record)}\n" for record in records))
        text = config.read_text()
        gemma = f'[[sources]]\nname = "gemma"\npath = "{config.parent}/gemma"\n\n'
        config = folder / "two.toml"
        config.write_text(text.replace("[shard]", f"{gemma}[shard]"))
        self._arguments = (str(config), "--run", str(self.folder), "--set", f"dataset.path={corpus}")
        ptafuse("fuse", *self._arguments, "--local", "--upstream")

    def interpret(self, *arguments: str, check: bool = True):
        return ptafuse("interpret", *self._arguments, *arguments, check=check)

    def figures(self, *arguments: str) -> dict[str, Any]:
        return json.loads(self.interpret("--json", *arguments).stdout)


@pytest.fixture(scope="session")
def interpreted_run(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> InterpretedRun:
    return InterpretedRun(tiny_config, tmp_path_factory.mktemp("interpreted"))


@pytest.fixture(scope="session")
def figures(interpreted_run: InterpretedRun) -> dict[str, Any]:
    """Of all positions."""
    return interpreted_run.figures()

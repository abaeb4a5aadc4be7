"""The README is short, its configuration loads, and what it says of commands is true."""

import re
import tomllib
from pathlib import Path

import pytest

from pipeline.run.stage_table import STAGES
from pipeline.settings.load import parse_config

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE))


def test_readme_takes_five_minutes() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) < 120


@pytest.mark.parametrize("page", ["README.md", "docs/guide/own-data.md"])
def test_complete_configuration_of_a_page_loads(page: str) -> None:
    (toml,) = re.findall(r"```toml\n(.*?)```", (REPOSITORY / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    config = parse_config(tomllib.loads(toml), where=page)
    assert config.align.preset == "semi-relaxed"
    assert config.shard.validation_fraction > 0


def test_continuous_integration_runs_the_readme_s_test_command() -> None:
    command = re.search(r"exec (make \w+)", (REPOSITORY / ".ci" / "run").read_text())
    assert command is not None
    assert re.search(rf"^{command[1]}\b.*CI", README, flags=re.MULTILINE)


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "AGENTS.md", "docs/guide/first-run.md", "docs/guide/own-data.md"]
)
def test_every_make_command_of_a_page_is_a_target(page: str) -> None:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|[`\s])make ([a-z][a-z-]+)", text, flags=re.MULTILINE))
    commands = {name for name in named if re.search(rf"(`make {name}|^\s*make {name})", text, flags=re.MULTILINE)}
    stages = {spec.name for spec in STAGES}
    assert commands
    assert commands <= TARGETS | stages, commands - TARGETS - stages

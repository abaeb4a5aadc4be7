"""The generated pages hold every setting and command, and every setting says what it is."""

import re
from pathlib import Path

import pytest
import typer

from docs.hooks.reference import commands_page, configuration_page, section_class, sections, sweep_page
from pipeline.cli.main import app
from pipeline.run.stage_table import STAGES
from pipeline.settings.run import RunConfig
from pipeline.workflow.sweep import SweepConfig
from stages.contract import schemas
from stages.models import token_tables

DOCS = Path(__file__).parents[2] / "docs"


def _settings(root: type) -> list[tuple[str, str, str]]:
    """Return (section, setting, description) of every setting that is no section."""
    return [
        (part.title, field.alias or name, field.description or "")
        for part in sections(root)
        for name, field in part.settings.model_fields.items()
        if section_class(field.annotation) is None
    ]


@pytest.mark.parametrize(("root", "write"), [(RunConfig, configuration_page), (SweepConfig, sweep_page)])
def test_every_setting_has_a_description_and_a_row(root: type, write) -> None:
    page = write()
    settings = _settings(root)
    assert len(settings) > 8
    for section, name, description in settings:
        assert description, f"{section} {name} has no description"
        title = f"`{section}`" if section else "Top of the file"
        body = page.split(f"## {title}\n")[1].split("\n## ")[0]
        assert re.search(rf"^\| `{re.escape(name)}` \| .+ \| .* \| .+ \|", body, flags=re.MULTILINE), (
            f"{section} {name}"
        )


def test_reference_tells_sections_choices_defaults_and_what_recomputes() -> None:
    page = configuration_page()
    assert "## `[[sources]]`" in page
    assert "## `[[eval.texts]]`" in page
    assert "## `[train.lora]`" in page
    assert re.search(
        r'^\| `pairing` \| `"edit-distance"`, `"boundary"` \| `"edit-distance"` \| .* \| yes \|$', page, re.MULTILINE
    )
    assert re.search(r"^\| `batch_tokens` \| whole number \| `8192` \| .* \| no \|$", page, re.MULTILINE)
    assert re.search(r"^\| `lambda` \| number \| `0.8` \|", page, re.MULTILINE)
    assert re.search(r"^\| `gpu_hour` \|.* \| no \|$", page, re.MULTILINE)  # of a section that changes no result


def test_every_command_and_option_has_a_row() -> None:
    page = commands_page()
    commands = typer.main.get_command(app).commands
    assert {spec.name for spec in STAGES} < set(commands)
    for name, command in commands.items():
        body = page.split(f"## {name}\n")[1].split("\n## ")[0]
        for parameter in command.params:
            assert parameter.help, f"{name} {parameter.name} says nothing of itself"
            shown = (
                parameter.opts[0]
                if parameter.param_type_name == "option"
                else parameter.metavar or parameter.name.upper()
            )
            assert f"{shown}" in body


def test_page_of_files_names_every_column_and_outcome() -> None:
    page = (DOCS / "files.md").read_text(encoding="utf-8")
    tables = {
        "shard": schemas.shard_schema(conversations=True),
        "logits/&lt;model&gt;": schemas.logits_schema(32_000, has_draws=True, conversations=True),
        "align/&lt;source&gt;": schemas.aligned_schema(32_000, "bucket", has_draws=True),
        "fuse": schemas.fused_schema(32_000, "bucket", ("a", "b"), conversations=True),
        "tokenizers/&lt;model&gt;": token_tables.SCHEMA,
        "Quarantine": schemas.QUARANTINE,
    }
    for title, schema in tables.items():
        body = page.split(f"## {title}\n")[1].split("\n## ")[0]
        missing = [name for name in schema.names if f"`{name}`" not in body]
        assert not missing, f"{title}: {missing}"
    for number, name in enumerate(schemas.PAIRED_BY):
        assert f"| {number} | `{name}` |" in page

"""STAGES is the only list of stages: what else is kept by stage has the same keys."""

import re
from pathlib import Path

import typer

from pipeline.analysis.positions import VIEWS
from pipeline.cli.main import app
from pipeline.forecast.stage_costs import STAGE_COSTS
from pipeline.run.resolve import resolve
from pipeline.run.specs import JobStage
from pipeline.run.stage_table import SHARDED_STAGES, STAGES
from pipeline.run.steps import Request, result_key
from pipeline.settings.adapt import AdaptConfig
from pipeline.settings.load import load_config
from pipeline.settings.run import RunConfig
from pipeline.workflow.stages import JOBS
from stages.contract.store import Store
from tests.tiny_run import REPOSITORY

NAMES = [spec.name for spec in STAGES]


def test_every_stage_has_a_cost() -> None:
    assert list(STAGE_COSTS) == NAMES


def test_every_sharded_stage_has_a_view() -> None:
    assert list(VIEWS) == [spec.name for spec in SHARDED_STAGES]


def test_every_job_can_be_run() -> None:
    assert list(JOBS) == [spec.name for spec in STAGES if isinstance(spec, JobStage)]


def test_every_stage_is_a_command_with_its_help() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert {spec.name: spec.help for spec in STAGES} == {name: commands[name].help for name in NAMES}


def test_every_stage_is_a_target_of_make() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    (listed,) = re.findall(r"^STAGES := (.*)$", makefile, re.MULTILINE)
    assert listed.split() == NAMES


def test_every_sharded_stage_has_its_section_of_the_configuration() -> None:
    assert [spec.name for spec in SHARDED_STAGES if spec.name not in RunConfig.model_fields] == []


def test_a_step_is_computed_from_steps_before_it(tiny_config: Path, tmp_path: Path) -> None:
    config = load_config(tiny_config, ("fuse.function=fitted",))
    adapted = config.sources[0].model_copy(update={"adapt": AdaptConfig()})
    config = config.model_copy(update={"sources": (adapted,)})
    run = resolve(config, Store(str(tmp_path)), Request(str(tiny_config)))
    order = list(run.steps)
    for position, step in enumerate(run.steps.values()):
        assert {key for key in step.inputs.values() if key not in order[:position]} == set(), step.key
    assert list(dict.fromkeys(step.stage for step in run.steps.values())) == NAMES


def test_stages_that_do_not_apply_have_no_step(tiny_config: Path, tmp_path: Path) -> None:
    run = resolve(load_config(tiny_config), Store(str(tmp_path)), Request(str(tiny_config)))
    assert list(dict.fromkeys(step.stage for step in run.steps.values())) == [
        name for name in NAMES if name not in ("adapt", "fit")
    ]


def test_what_proves_a_job_done_is_a_file_of_its_folder(tiny_config: Path, tmp_path: Path) -> None:
    run = resolve(load_config(tiny_config), Store(str(tmp_path)), Request(str(tiny_config)))
    assert result_key(run.steps["train"]) == f"{run.steps['train'].folder}/manifest.json"
    assert result_key(run.steps["eval/fused"]) == f"{run.steps['eval/fused'].folder}/bits-per-byte.json"

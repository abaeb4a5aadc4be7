"""A run that an earlier ptafuse computed is still done: nothing of it is computed again, on disk and in an object store."""

import json
import tarfile
from pathlib import Path

import pytest

from pipeline.run.records import recorded_run
from pipeline.run.stage_table import STAGES
from stages.contract.store import Store
from tests.recorded_run.record import ARCHIVE, FOLDER
from tests.s3.conftest import run_url, s3_client, s3_server  # noqa: F401  # fixtures
from tests.s3.servers import S3Server
from tests.tiny_run import ptafuse

NUM_STEPS = 5 + 1 + 1
"""Lines of a command that goes through all stages: the sharded steps, train, and eval for all models together."""


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """Provide the folder of the recorded run, its models and its text, in another place than where it was recorded."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / FOLDER.name
    config = folder / "tiny.toml"
    config.write_text(config.read_text().replace(str(FOLDER), str(folder)) + f'scratch = "{tmp_path}/scratch"\n')
    return folder


def go_through_all_stages(folder: Path, run: str) -> str:
    return ptafuse("eval", str(folder / "tiny.toml"), "--run", run, "--local", "--upstream").stdout


def results(store: Store) -> dict[str, bytes]:
    """Return every file but the records of configurations, of which a command adds its own."""
    keys = [entry.key.lstrip("/") for entry in store.files("")]
    return dict(store.read_all([key for key in keys if not key.startswith("configs/")]))


def test_the_recorded_run_has_the_versions_of_today(recorded: Path) -> None:
    steps = recorded_run(Store(str(recorded / "run"))).steps.values()
    then = {step.stage: step.settings["version"] for step in steps if "version" in step.settings}
    today = {spec.name: spec.version for spec in STAGES}
    assert then == {stage: today[stage] for stage in then}, (
        "the VERSION of a stage was raised, so that old results are computed again, as they must be: record the run "
        "anew with `python -m tests.recorded_run.record`"
    )


def test_nothing_of_a_recorded_run_on_disk_is_computed_again(recorded: Path) -> None:
    run = str(recorded / "run")
    before = results(Store(run))
    output = go_through_all_stages(recorded, run)
    assert output.count("nothing to do") == NUM_STEPS, output
    assert results(Store(run)) == before


def test_a_recorded_run_is_planned_shown_and_verified(recorded: Path) -> None:
    run = str(recorded / "run")
    plan = json.loads(ptafuse("plan", str(recorded / "tiny.toml"), "--run", run, "--json").stdout)
    assert {step["step"]: step["state"] for step in plan["steps"]} == dict.fromkeys(
        recorded_run(Store(run)).steps, "done"
    )
    assert json.loads(ptafuse("status", run, "--json").stdout)["next_command"] is None
    assert "; 0 shards or models do not" in ptafuse("verify", run).stdout


@pytest.mark.s3
@pytest.mark.slow
def test_nothing_of_a_recorded_run_in_an_object_store_is_computed_again(
    recorded: Path,
    s3_client: S3Server,  # noqa: F811
    run_url: str,  # noqa: F811
) -> None:
    store = Store(run_url)
    for path in sorted((recorded / "run").rglob("*")):
        if path.is_file():
            store.upload(str(path.relative_to(recorded / "run")), path)
    before = results(store)
    output = go_through_all_stages(recorded, run_url)
    assert output.count("nothing to do") == NUM_STEPS, output
    assert results(store) == before

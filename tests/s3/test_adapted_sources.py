"""Adapted sources pass between run directories on disk and in an object store, with the logits that they gave."""

from pathlib import Path

import pytest

from pipeline.run.records import recorded_run
from stages.contract.store import Store
from tests.pipeline.engine.test_adapt_stage import config, resolved, run  # noqa: F401  # fixtures
from tests.s3.servers import S3Server
from tests.tiny_run import ptafuse

pytestmark = [pytest.mark.s3, pytest.mark.slow]


def test_a_model_is_taken_over_into_a_bucket_and_back(
    config: Path,  # noqa: F811
    run: Path,  # noqa: F811
    s3_client: S3Server,
    run_url: str,
    tmp_path: Path,
) -> None:
    def logits(there: str, other: str) -> str:
        sets = (f"logits_from={other}", f"engine.scratch={tmp_path}/scratch")
        arguments = [argument for one in sets for argument in ("--set", one)]
        return ptafuse("logits", str(config), "--run", there, "--local", "--upstream", *arguments).stdout

    back = str(tmp_path / "back")
    for there, other in ((run_url, str(run)), (back, run_url)):
        shown = logits(there, other)
        assert "adapt/neox-even: the model is copied from" in shown
        assert "adapt/neox-odd: the model is copied from" in shown
        assert "logits/neox: nothing to do" in shown
        assert "; 0 shards or models do not" in ptafuse("verify", there).stdout
    folder = recorded_run(Store(back), "adapted").steps["adapt/neox-even"].folder
    weights = f"{folder}/model/model.safetensors"
    assert Store(back).read(weights) == Store(str(run)).read(weights)
    assert folder == resolved(run).steps["adapt/neox-even"].folder

"""The settings of the recipe, through the whole loop."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.train.conftest import job_in
from tests.train.test_loop import InterruptedError_, assert_same_weights, interrupt_after, weights
from tests.train.workers import train_on
from train.loop import train
from train.run_log import read_log

LORA = {"lora": {"r": 4, "alpha": 8, "dropout": 0.1}}


def losses(folder) -> list[float]:
    return [record.loss for record in read_log(folder)]


def test_lambda_follows_its_schedule(tiny_job, tmp_path):
    train(job_in(tiny_job, tmp_path, **{"lambda": 1.0}, lambda_schedule="linear", lambda_end=0.0))
    records = read_log(tmp_path)
    assert [record.lambda_ for record in records] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    for record in records:
        expected = record.lambda_ * record.loss_clm + (1 - record.lambda_) * record.loss_fusion
        assert record.loss == pytest.approx(expected)


@pytest.mark.parametrize(
    "settings", [{"fusion_loss": "reverse-kl"}, {"temperature": 2.0}, {"isolate_documents": True}, LORA]
)
def test_each_setting_trains_and_changes_the_result(tiny_job, tmp_path, settings):
    train(job_in(tiny_job, tmp_path / "one", **settings, num_epochs=6, micro_batch_size=2))
    train(job_in(tiny_job, tmp_path / "plain", num_epochs=6, micro_batch_size=2))
    found = losses(tmp_path / "one")
    assert sum(found[-3:]) < sum(found[:3])
    if settings.get("isolate_documents"):  # each of these blocks is one document
        assert found == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    else:
        assert found[-1] != pytest.approx(losses(tmp_path / "plain")[-1], rel=1e-3)


@pytest.mark.parametrize("settings", [LORA, {"isolate_documents": True, "fusion_loss": "reverse-kl"}])
def test_an_interrupted_run_ends_as_an_undisturbed_one(tiny_job, tmp_path, settings):
    undisturbed = train(job_in(tiny_job, tmp_path / "undisturbed", **settings))
    job = job_in(tiny_job, tmp_path / "interrupted", **settings)
    with pytest.raises(InterruptedError_):
        train(job, on_step=interrupt_after(3))
    result = train(job)
    assert losses(tmp_path / "interrupted") == losses(tmp_path / "undisturbed")
    assert_same_weights(result.model_folder, undisturbed.model_folder)


def test_two_workers_match_one_process(tiny_job, tmp_path):
    settings = {
        "lora": {"r": 4, "alpha": 8},
        "isolate_documents": True,
        "fusion_loss": "reverse-kl",
        "temperature": 1.5,
    }
    one = train(job_in(tiny_job, tmp_path / "one", **settings))
    train_on(job_in(tiny_job, tmp_path / "two", **settings), tmp_path, num_workers=2)
    for record, other in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
        assert record.loss == pytest.approx(other.loss, rel=1e-4)
        assert record.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
    last = weights(one.model_folder)
    for name, value in weights(str(tmp_path / "two" / "model")).items():
        assert (value - last[name]).abs().mean() < 1e-5, name


def test_adapters_are_merged_into_a_plain_model(tiny_job, tmp_path):
    result = train(job_in(tiny_job, tmp_path, **LORA, gradient_checkpointing=True))
    found = weights(result.model_folder)
    original = dict(AutoModelForCausalLM.from_pretrained(tiny_job.model.path, dtype=torch.float32).named_parameters())
    assert found.keys() == original.keys()
    changed = {name for name, value in found.items() if not torch.equal(value, original[name])}
    assert changed
    assert all("self_attn" in name or "mlp" in name for name in changed)
    assert not list(tmp_path.glob("model/adapter*"))

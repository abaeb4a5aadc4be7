import dataclasses

import pytest

from train.config import LoraConfig, TrainConfig
from train.model.architecture import Architecture, Saved
from train.model.estimate import estimate_memory, fits, num_steps, remedies

MODEL = Architecture(
    num_parameters=1000,
    num_trained=1000,
    num_layers=8,
    layer_parameters=100,
    outside_parameters=200,
    num_trained_in_layer=100,
    num_trained_outside=200,
    hidden_size=10,
    vocab_size=15,
    saved=Saved(outside_layers=7, layer=50, layer_recomputed=5),
)


def memory(**settings):
    return estimate_memory(MODEL, TrainConfig(**settings), block_tokens=16)


def test_the_memory_estimate_equals_its_formulas():
    found = memory(chunk_positions=4, micro_batch_size=2)
    assert (found.weights, found.gradients, found.optimizer) == (4000, 4000, 8000)
    assert found.gathered == 2 * (200 + 2 * 100) + 6 * 200
    assert found.activations == 2 * (7 + 8 * 50)
    assert found.loss == 4 * 15 * (2 * 2 + 8) + 3 * 2 * 2 * 16 * 10 + 4 * 15 * 10
    assert found.update == 4000
    assert found.total == 4000 + 4000 + 8000 + max(found.gathered + found.activations + found.loss, 4000)


def test_the_total_is_that_of_the_passes_or_of_the_update():
    """What the passes need is freed before the update: of a large model on one GPU the update needs more."""
    passes = memory(chunk_positions=4, micro_batch_size=16)
    assert passes.gathered + passes.activations + passes.loss > passes.update
    assert passes.total == 16000 + passes.gathered + passes.activations + passes.loss
    large = dataclasses.replace(MODEL, num_parameters=100_000, num_trained=100_000)
    update = estimate_memory(large, TrainConfig(chunk_positions=4), block_tokens=16)
    assert update.update == 400_000
    assert update.total == 5 * 400_000


def test_on_a_cpu_adamw_goes_from_tensor_to_tensor():
    assert memory(device="cpu").update == 8 * 15 * 10
    assert memory(device="cpu", lora=LoraConfig()).update == 0


def test_shards_shrink_with_the_number_of_workers_and_nothing_else_does():
    one, three = memory(), memory(num_workers=3, batch_size=255)
    assert (three.weights, three.gradients, three.optimizer, three.update) == (1334, 1334, 2667, 1334)
    assert (three.gathered, three.activations, three.loss) == (one.gathered, one.activations, one.loss)


def test_settings_that_save_memory_do():
    assert memory(gradient_checkpointing=True).activations == 7 + 8 * 5 + 50
    assert memory(autocast="float32").gathered == 4 * 400 + 8 * 200
    assert memory(reshard_after_forward=False).gathered == 2 * 1000 + 6 * 200
    assert memory(lora=LoraConfig()).loss == memory().loss - 4 * 15 * 10


def test_remedies_are_single_changes_and_workers_stop_where_it_fits():
    tight = TrainConfig(gpu_memory_gb=1e-5, micro_batch_size=4, batch_size=64)
    assert not fits(estimate_memory(MODEL, tight, block_tokens=16), 1e-5)
    found = dict(remedies(MODEL, tight, block_tokens=16))
    assert list(found)[:2] == ["train.gradient_checkpointing=true", "train.micro_batch_size=1"]
    (workers,) = [changed for text, changed in found.items() if "num_workers" in text]
    assert fits(estimate_memory(MODEL, workers, block_tokens=16), 1e-5) or workers.num_workers == 16
    assert 64 % (workers.num_workers * 4) == 0


@pytest.mark.parametrize(("blocks", "steps"), [(1, 2), (4, 2), (5, 4)])
def test_a_last_step_may_be_smaller(blocks, steps):
    assert num_steps(blocks, TrainConfig(batch_size=4, num_epochs=2)) == steps

import shutil
from pathlib import Path

from stages.contract.store import Store
from tests.pipeline.report.finished_runs import begin
from tests.tiny_run import ptafuse


def test_the_papers_run_is_estimated_without_weights_or_network(tmp_path):
    done = ptafuse(
        "train", "--dry-run", "pipeline/configs/llama2_7b.toml", "--run", str(tmp_path), "--tokens", "1500000000"
    )
    assert "6,738,415,616 parameters" in done.stdout
    assert "ptafuse's copy, only for dry runs" in done.stdout
    assert "1,500,000,000 tokens in 2,862 steps of 256 blocks" in done.stdout
    assert all(name in done.stdout for name in ("weights", "gradients", "optimizer", "activations", "loss", "total"))
    assert "8 worker(s)" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_model_that_training_would_refuse_is_refused(tiny_config: Path, tmp_path: Path):
    """The target and the sources, as ``train`` does; the tiny run's own models stay as they are."""
    models = Path(shutil.copytree(tiny_config.parent / "llama", tmp_path / "llama"))
    (models / "model.safetensors").rename(models / "pytorch_model.bin")
    config = tmp_path / "pickled.toml"
    for name in ("llama", "neox"):
        config.write_text(tiny_config.read_text().replace(f'"{tiny_config.parent}/{name}"', f'"{models}"'))
        done = ptafuse("train", "--dry-run", str(config), "--run", str(tmp_path / "run"), check=False)
        assert done.returncode == 1
        assert f"model {name}: " in done.stderr
        assert f"`ptafuse convert {models}`" in done.stderr


def test_the_run_on_conversations_fits_without_weights_or_network(tmp_path):
    done = ptafuse("train", "--dry-run", "chat", "--run", str(tmp_path), "--tokens", "270000000")
    assert "8,030,261,248 parameters" in done.stdout
    assert "ptafuse's copy, only for dry runs" in done.stdout
    assert "It fits" in done.stdout


def test_what_cannot_fit_is_refused_with_what_to_change(tmp_path):
    arguments = ("train", "--dry-run", "llama2_7b", "--run", str(tmp_path), "--set", "train.num_workers=1")
    done = ptafuse(*arguments, check=False)
    assert done.returncode == 1
    assert "do not fit into 90% of train.gpu_memory_gb = 80" in done.stderr
    assert "--set train.num_workers=4" in done.stderr
    assert "--set train.lora.r=16" in done.stderr
    adapters = ptafuse(*arguments, "--set", "train.lora.r=16")
    assert "39,976,960 of them trained" in adapters.stdout
    assert "It fits" in adapters.stdout


def test_tokens_come_from_the_fused_shards_of_the_run(tiny_config: Path, undisturbed_run: Path):
    unread = ("--set", "train.num_epochs=2", "--set", "interpret.seed=7")
    done = ptafuse("train", "--dry-run", str(tiny_config), "--run", str(undisturbed_run), *unread)
    assert "fused shards in" in done.stdout
    assert "2 epoch(s)" in done.stdout
    other = ptafuse(
        "train", "--dry-run", str(tiny_config), "--run", str(undisturbed_run), "--set", "fuse.max_length=128"
    )
    assert "not known before fuse has run" in other.stdout


def test_tokens_come_from_the_fused_shards_of_a_configuration_whose_name_was_taken_since(
    tiny_config: Path, undisturbed_run: Path, tmp_path: Path
):
    run = shutil.copytree(undisturbed_run, tmp_path / "run")
    begin(Store(str(run)), tiny_config, "align.epsilon=0.7")
    done = ptafuse("train", "--dry-run", str(tiny_config), "--run", str(run))
    assert "fused shards in" in done.stdout


def test_a_model_of_the_hub_that_cannot_be_reached_is_an_error_that_says_what_to_give(tmp_path):
    sets = ("--set", "target.hub=nobody/nothing", "--set", "target.revision=main")
    done = ptafuse("train", "--dry-run", "llama2_7b", "--run", str(tmp_path), *sets, check=False)
    assert done.returncode == 1
    assert "give the target as `path`" in done.stderr


def test_tokens_without_a_dry_run_are_refused(tmp_path):
    done = ptafuse("train", "llama2_7b", "--run", str(tmp_path), "--tokens", "5", check=False)
    assert done.returncode == 2
    assert "--dry-run" in done.stderr

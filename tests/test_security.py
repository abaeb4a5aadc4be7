"""What the code may not do with other people's files: run them, follow them out of the run directory, repeat secrets."""

import ast
import contextlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import load, save

from stages.models.config import ModelConfig, load_model, load_tokenizer
from tests.tiny_models import save_model
from tests.tiny_run import REPOSITORY, data_hashes, ptafuse
from train.checkpoints.reader import CheckpointReader

SOURCES = [path for package in ("pipeline", "stages", "train") for path in (REPOSITORY / package).rglob("*.py")]
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "os.system", "os.popen", "torch.load", "yaml.load", "np.load", "numpy.load"}


RESTRICTED = REPOSITORY / "train" / "checkpoints" / "reader.py"
"""Unpickles what names a few classes of torch and nothing else."""
CONVERTER = REPOSITORY / "stages" / "models" / "convert.py"
"""Loads pickled weights with ``weights_only``, and nowhere else."""


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if path != RESTRICTED], ids=lambda path: str(path.relative_to(REPOSITORY))
)
def test_no_pickle_is_read_and_no_text_is_executed(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            assert not FORBIDDEN_MODULES & {alias.name.split(".")[0] for alias in node.names}, where
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in FORBIDDEN_MODULES, where
        elif isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS or (path == CONVERTER and only_weights(node)), where
            assert not any(
                word.arg == "shell" and not (isinstance(word.value, ast.Constant) and word.value.value is False)
                for word in node.keywords
            ), f"{where}: no command goes through a shell"


def only_weights(call: ast.Call) -> bool:
    """Return whether a call is ``torch.load(..., weights_only=True)``, in so many words."""
    return ast.unparse(call.func) == "torch.load" and any(
        word.arg == "weights_only" and isinstance(word.value, ast.Constant) and word.value.value is True
        for word in call.keywords
    )


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


def test_the_trap_of_these_tests_runs_code_when_it_is_unpickled(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


def test_checkpoint_s_table_of_contents_names_no_other_code(tmp_path: Path) -> None:
    folder, marker = tmp_path / "checkpoint", tmp_path / "sprung"
    save({"weight": torch.arange(6.0).reshape(2, 3)}, checkpoint_id=folder, no_dist=True)
    assert CheckpointReader(folder).read_metadata().state_dict_metadata["weight"].size == (2, 3)
    loaded = {"weight": torch.zeros(2, 3)}
    load(loaded, storage_reader=CheckpointReader(folder), no_dist=True)
    assert loaded["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    (folder / ".metadata").write_bytes(pickle.dumps(Trap(marker)))
    with pytest.raises(ValueError, match=r"\.metadata is not a checkpoint's table of contents \(it names pathlib"):
        CheckpointReader(folder).read_metadata()
    assert not marker.exists()
    (folder / ".metadata").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match="holds a list"):
        CheckpointReader(folder).read_metadata()
    (folder / ".metadata").write_bytes(b"")
    with pytest.raises(ValueError, match="not a checkpoint's table of contents"):
        CheckpointReader(folder).read_metadata()


def test_pickled_weights_are_not_read(model_folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "sprung"
    torch.save(Trap(marker), model_folder / "pytorch_model.bin")
    model = ModelConfig(name="m", path=model_folder)
    load_model(model, dtype="float32", attention=("eager",), device="cpu")
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"only pickled weights \(pytorch_model.bin\), which can run arbitrary code"
    ):
        model.check()
    with pytest.raises(OSError, match="safetensors"):
        load_model(model, dtype="float32", attention=("eager",), device="cpu")
    assert not marker.exists()


def test_code_of_a_model_runs_only_where_the_configuration_says_so(model_folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (model_folder / "custom.py").write_text(
        f"from pathlib import Path\nfrom transformers import LlamaConfig\nPath({str(marker)!r}).touch()\n"
        "class CustomConfig(LlamaConfig):\n    model_type = 'custom-llama'\n"
    )
    config = json.loads((model_folder / "config.json").read_text())
    config |= {"model_type": "custom-llama", "auto_map": {"AutoConfig": "custom.CustomConfig"}}
    (model_folder / "config.json").write_text(json.dumps(config))
    plain = ModelConfig(name="m", path=model_folder)
    assert not plain.trust_remote_code
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(plain, dtype="float32", attention=("eager",), device="cpu")
    assert not marker.exists()
    from transformers import AutoConfig

    trusted = ModelConfig(name="m", path=model_folder, trust_remote_code=True)
    AutoConfig.from_pretrained(**trusted.pretrained_arguments(), trust_remote_code=trusted.trust_remote_code)
    assert marker.exists(), "the trap works: the setting is what kept it shut"


def test_code_of_a_tokenizer_does_not_run(model_folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (model_folder / "custom.py").write_text(
        f"from pathlib import Path\nfrom transformers import PreTrainedTokenizerFast\nPath({str(marker)!r}).touch()\n"
        "class CustomTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    path = model_folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings |= {"tokenizer_class": "CustomTokenizer", "auto_map": {"AutoTokenizer": [None, "custom.CustomTokenizer"]}}
    path.write_text(json.dumps(settings))
    with contextlib.suppress(ValueError):  # refused, or loaded without the class
        load_tokenizer(ModelConfig(name="m", path=model_folder))
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize("key", ["../../outside.parquet", "/etc/passwd", "file:///etc/passwd"])
def test_manifest_that_points_out_of_the_run_directory_is_refused(
    tiny_config: Path, undisturbed_run: Path, tmp_path: Path, key: str
) -> None:
    run = Path(shutil.copytree(undisturbed_run, tmp_path / "run"))
    shutil.rmtree(run / "fuse")
    for path in run.glob("align/neox/*/manifests/*.json"):
        manifest = json.loads(path.read_text())
        manifest["data"]["key"] = key
        path.write_text(json.dumps(manifest))
    for arguments in (("fuse", str(tiny_config), "--run", str(run), "--local"), ("verify", str(run))):
        refused = ptafuse(*arguments, check=False)
        assert refused.returncode == 1
        assert f"{key!r} is not a path inside the run directory" in refused.stdout + refused.stderr
    assert not any(folder.startswith("fuse") for folder in data_hashes(run))


@pytest.mark.slow
def test_settings_with_shell_characters_are_quoted_in_the_next_command(tiny_config: Path, tmp_path: Path) -> None:
    name = tmp_path / "run; touch sprung"
    refused = ptafuse("logits", str(tiny_config), "--run", str(name), "--set", "fuse.unit=nats-per-token", check=False)
    assert refused.returncode == 1
    assert f"'{name}'" in refused.stderr

"""What an export keeps of the model that was trained."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.models.config import ModelConfig, load_model
from stages.models.preflight.examine import examine
from stages.models.segment_text import Message, SegmentText
from stages.models.tokenizer import SegmentTokenizer
from tests.fp8 import to_fp8
from tests.tiny_models import save_model
from tests.tiny_tokenizers import save_tokenizer
from tests.train.conftest import job_in
from train.job import TrainJob
from train.loop import train
from train.model.card import CARD
from train.model.carry_over import carry_over, keep_conversations

GENERATION = '{"eos_token_id": [2, 300], "temperature": 0.6, "top_p": 0.9}'
KEPT = {
    "generation_config.json": GENERATION,
    "preprocessor_config.json": '{"image_size": 224}',
    "processor_config.json": '{"processor_class": "P"}',
    "chat_template.jinja": "{{ messages }}",
    "LICENSE": "the terms",
    "modeling_own.py": "raise SystemExit",
    "1_Pooling/config.json": "{}",
}
LEFT_OUT = (
    "consolidated.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "model.gguf",
    "onnx/model.onnx",
    "checkpoint-3/trainer_state.json",
    ".git/config",
    ".gitattributes",
)


def fill(folder: Path) -> None:
    for name, content in {**KEPT, **dict.fromkeys(LEFT_OUT, "weights"), CARD: "the target's own card"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


@pytest.fixture
def target(tiny_model: ModelConfig, tmp_path: Path) -> ModelConfig:
    return ModelConfig(name="tiny", path=Path(shutil.copytree(str(tiny_model.path), tmp_path / "target")))


def job_for(tiny_job: TrainJob, model: ModelConfig, folder: Path) -> TrainJob:
    return replace(job_in(tiny_job, folder / "out", num_epochs=1), model=model)


def test_an_export_keeps_all_that_is_not_weights_and_loads(
    tiny_job: TrainJob, target: ModelConfig, tmp_path: Path
) -> None:
    folder = Path(str(target.path))
    fill(folder)
    # Weights of other names lie beside the ones that are read, so nothing here is read as an index.
    exported = Path(train(job_for(tiny_job, target, tmp_path)).model_folder)
    assert {name: (exported / name).read_text() for name in KEPT} == KEPT
    assert not [name for name in LEFT_OUT if (exported / name).exists()]
    assert "fused" in (exported / CARD).read_text()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert KEPT.keys() <= manifest["model_files"].keys()
    loaded = AutoModelForCausalLM.from_pretrained(exported)
    assert loaded.generation_config.eos_token_id == [2, 300]
    assert loaded.generation_config.temperature == 0.6
    assert loaded.dtype == torch.float32
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (exported / name).read_bytes() == (folder / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert (
        tokenizer("The quick fox")["input_ids"] == AutoTokenizer.from_pretrained(folder)("The quick fox")["input_ids"]
    )
    assert examine(ModelConfig(name="fused", path=exported), trained=True, isolated=True) == []


def test_the_tokenizer_of_an_export_is_the_one_that_was_used(target: ModelConfig, tmp_path: Path) -> None:
    elsewhere = save_tokenizer("byte-bpe", tmp_path / "tokenizer")
    (elsewhere / "notes.txt").write_text("not the tokenizer's")
    model = target.model_copy(update={"tokenizer": ModelConfig(name="t", path=elsewhere)})
    exported = tmp_path / "exported"
    exported.mkdir()
    carry_over(model, exported)
    assert (exported / "tokenizer.json").read_bytes() == (elsewhere / "tokenizer.json").read_bytes()
    assert not (exported / "notes.txt").exists()
    assert not (exported / "config.json").exists()


def test_a_fp8_target_is_trained_and_exported_as_plain_weights(tiny_job: TrainJob, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "target")
    meant = to_fp8(folder)
    model = ModelConfig(name="tiny", path=folder)
    assert examine(model, trained=True, isolated=True) == []
    loaded = load_model(model, dtype="float32", attention=("sdpa",), device="cpu")
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, meant[name], rtol=1e-2, atol=1e-2)
    exported = Path(train(job_for(tiny_job, model, tmp_path)).model_folder)
    assert "quantization_config" not in json.loads((exported / "config.json").read_text())
    after = AutoModelForCausalLM.from_pretrained(exported).state_dict()
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert examine(ModelConfig(name="fused", path=exported), trained=True) == []


def test_files_of_the_hub_are_kept_where_they_can_be_had(
    target: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import huggingface_hub

    fill(Path(str(target.path)))
    hub = ModelConfig(name="tiny", hub="a/b", revision="0" * 40)
    asked = {}

    def snapshot(name: str, *, revision: str, ignore_patterns: list[str]) -> str:
        asked.update(name=name, revision=revision, ignored=ignore_patterns)
        return str(target.path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    exported = tmp_path / "exported"
    carry_over(hub, exported)
    assert {name: (exported / name).read_text() for name in KEPT} == KEPT
    assert (asked["name"], asked["revision"]) == ("a/b", "0" * 40)
    assert "*.safetensors" in asked["ignored"]

    def unreachable(*_: object, **__: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    carry_over(hub, tmp_path / "other")
    assert "the export lacks files that a/b has in addition to weights and tokenizer (no network)" in caplog.text


TURNS = [{"role": "user", "content": "Who jumps?"}, {"role": "assistant", "content": "The fox."}]


@pytest.mark.parametrize("given", [None, "file", "plain"])
def test_an_export_of_a_run_on_conversations_answers_as_it_was_trained(tmp_path: Path, given: str | None) -> None:
    """With the target's own template; or with one that the run gave to a model that has none."""
    chat = "chatml" if given is None else None
    folder = save_model(tmp_path / "target", tokenizer_family="byte-bpe", seed=3, chat=chat)
    own_template = tmp_path / "turns.jinja"
    own_template.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": 7, "temperature": 0.6}))
    model = ModelConfig(
        name="target",
        path=folder,
        reads_conversations=True,
        chat_template=str(own_template) if given == "file" else given,
    )
    exported = tmp_path / "exported"
    shutil.copytree(folder, exported)
    keep_conversations(model, exported)
    keep_conversations(model, exported)  # once more changes nothing
    tokenizer = AutoTokenizer.from_pretrained(exported)
    (encoding,) = SegmentTokenizer.load(model).encode_segments(
        [SegmentText.conversation([Message(turn["role"], turn["content"], is_trained=True) for turn in TURNS])]
    )
    assert tokenizer.apply_chat_template(TURNS, return_dict=False) == encoding.ids.tolist()
    loaded = AutoModelForCausalLM.from_pretrained(exported)
    turn_end = SegmentTokenizer.load(model).vocabulary.eos_id
    assert loaded.generation_config.eos_token_id == [7, turn_end]
    assert loaded.generation_config.temperature == 0.6
    prompt = tokenizer.apply_chat_template(TURNS[:1], add_generation_prompt=True, return_dict=True, return_tensors="pt")
    length = prompt["input_ids"].shape[1]
    assert prompt["input_ids"][0].tolist() == encoding.ids.tolist()[:length], "the prompt is what was trained on"
    with torch.no_grad():  # the model would end its turn now: generation stops there
        loaded.lm_head.weight[turn_end] = 0
        loaded.lm_head.weight[turn_end] += 50 * loaded.model(**prompt).last_hidden_state[0, -1]
    answer = loaded.generate(**prompt, max_new_tokens=5, do_sample=False)[0, length:].tolist()
    assert answer == [turn_end]


def test_an_export_of_a_run_on_texts_keeps_its_files(target: ModelConfig, tmp_path: Path) -> None:
    exported = Path(shutil.copytree(str(target.path), tmp_path / "exported"))
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    keep_conversations(target, exported)
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before

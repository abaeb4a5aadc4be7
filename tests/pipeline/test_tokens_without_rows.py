"""A tokenizer with more tokens than its model has rows: used as long as no text holds one of them."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from tests.tiny_run import documents, ptafuse, status

pytestmark = pytest.mark.slow

TOKEN = "<extra>"


@pytest.fixture
def config(tiny_config: Path, tmp_path: Path) -> Path:
    """A run whose target and source both have one token more than rows, of the same text."""
    text = tiny_config.read_text()
    for name in ("llama", "neox"):
        folder = Path(shutil.copytree(tiny_config.parent / name, tmp_path / name))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        num_rows = json.loads((folder / "config.json").read_text())["vocab_size"]
        assert len(tokenizer) == num_rows
        tokenizer.add_tokens([TOKEN])
        tokenizer.save_pretrained(folder)
        assert tokenizer.convert_tokens_to_ids(TOKEN) == num_rows
        text = text.replace(f"{tiny_config.parent}/{name}", str(folder))
    text = text.replace(f"{tiny_config.parent}/corpus.jsonl", str(tmp_path / "corpus.jsonl"))
    write(tmp_path, documents())
    (tmp_path / "run.toml").write_text(text)
    return tmp_path / "run.toml"


def write(folder: Path, texts: list[str]) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(config: Path, stage: str, *sets: str) -> None:
    arguments = [f"--set={setting}" for setting in sets]
    ptafuse(stage, str(config), "--run", str(config.parent / "run"), "--local", "--upstream", *arguments)


def test_a_token_that_no_text_holds_is_no_obstacle(config: Path) -> None:
    run(config, "eval")
    steps = status(config.parent / "run")
    assert all(steps[key]["is_done"] for key in ("logits/llama", "logits/neox", "align/neox", "fuse", "train"))
    for step in ("logits/llama", "align/neox", "fuse"):
        for file in (config.parent / "run").glob(f"{step}/*/data/*.parquet"):
            for row in pq.read_table(file).to_pylist():
                assert max((token for ids in row["topk_ids"] for token in ids), default=0) < 400


def test_a_text_that_holds_it_is_set_apart_before_training(config: Path) -> None:
    write(config.parent, [*documents(), f"A text with {TOKEN} in it."])
    run(config, "train", "shard.validation_fraction=0.0", "logits.max_bad_fraction=1.0")
    bad = [
        row
        for file in (config.parent / "run").glob("logits/*/*/quarantine/*")
        for row in pq.read_table(file).to_pylist()
    ]
    assert {row["doc_id"] for row in bad} == {len(documents())}
    assert all("the text holds token 400, and the model's embedding has 400 rows" in row["message"] for row in bad)


def test_a_held_out_text_that_holds_it_ends_eval_with_its_document(config: Path) -> None:
    write(config.parent, [f"{text} {TOKEN}" for text in documents()])
    held_out = "shard.validation_fraction=0.4"
    run(config, "shard", held_out)
    refused = ptafuse(
        "eval", str(config), "--run", str(config.parent / "run"), "--local", "--set", held_out, check=False
    )
    assert refused.returncode == 1
    assert "model llama: document " in refused.stderr
    assert "holds token 400, and the model's embedding has 400 rows" in refused.stderr

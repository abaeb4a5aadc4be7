"""Warnings about documents: given before anything expensive runs, and only where there is something to say."""

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.run.warnings import expected_warnings, shard_warnings
from pipeline.settings.load import load_config
from pipeline.settings.run import RunConfig
from stages.models.tokenizer import SegmentTokenizer
from tests.tiny_run import ptafuse

CONFIG = """
name = "x"
[dataset]
path = "{path}"
[target]
name = "a"
path = "a"
[[sources]]
name = "b"
path = "b"
"""


def config(folder: Path, path: str = "corpus.jsonl", *sets: str) -> RunConfig:
    file = folder / "x.toml"
    file.write_text(CONFIG.format(path=folder / path))
    return load_config(file, sets)


def test_forty_documents_leave_hardly_any_to_evaluate_on(tmp_path: Path) -> None:
    (warning,) = expected_warnings(config(tmp_path), 40)
    assert warning == (
        "shard.validation_fraction = 0.01 of 40 documents holds out about 0.4 to evaluate on, and none with a "
        "probability of 67%: set it to 0.25, say"
    )
    assert expected_warnings(config(tmp_path), 300) == []
    assert expected_warnings(config(tmp_path), None) == []
    assert expected_warnings(config(tmp_path, "a.jsonl", "shard.validation_fraction=0.25"), 40) == []
    test = ("eval.split=test", "shard.test_fraction=0.05", "shard.validation_fraction=0.4")
    (warning,) = expected_warnings(config(tmp_path, "a.jsonl", *test), 40)
    assert "shard.test_fraction = 0.05 of 40 documents holds out about 2.0" in warning
    (warning,) = expected_warnings(config(tmp_path, "a.jsonl", "shard.validation_fraction=0.0"), 5000)
    assert "holds no document out" in warning
    assert "set it to 0.002, say" in warning


def test_one_text_file_is_one_document_and_lines_are_offered(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (warning,) = expected_warnings(config(tmp_path, "a.txt"), 1)
    assert "the dataset is one document, and one document cannot be both trained on and evaluated on" in warning
    assert 'A .txt file is one document: set dataset.documents = "lines" if each of its lines is one' in warning
    (warning,) = expected_warnings(config(tmp_path, "a.txt", "dataset.documents=lines"), 2)
    assert "lines" not in warning
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    (warning,) = expected_warnings(config(tmp_path, "a.jsonl"), 1)
    assert warning.endswith("evaluated on: split it into documents")


def test_shards_that_leave_one_split_empty_cause_a_warning(tmp_path: Path) -> None:
    health = {"documents": 40, "train_segments": 40, "validation_segments": 0}
    (warning,) = shard_warnings(config(tmp_path), health)
    assert "shard: none of 40 documents is held out (shard.validation_fraction = 0.01)" in warning
    assert shard_warnings(config(tmp_path), {**health, "validation_segments": 1}) == []
    (warning,) = shard_warnings(config(tmp_path), {"documents": 1, "train_segments": 0, "validation_segments": 3})
    assert "all 1 documents are held out, and nothing is left to train on" in warning
    assert shard_warnings(config(tmp_path), {"documents": 40}) == [], "of a version that did not count them"


def test_control_tokens_are_warned_of_where_they_are_no_exception(tmp_path: Path) -> None:
    health = {"documents": 1000, "control_token_documents": 10, "control_token/<|a|>": 3, "control_token/<|b|>": 9}
    (warning,) = shard_warnings(config(tmp_path), health)
    assert "10 of 1,000 documents hold control tokens of the run's models as text (<|b|>, <|a|>)" in warning
    assert "Give the conversations themselves, with dataset.messages_column" in warning
    assert 'set dataset.control_tokens = "parse"' in warning
    assert shard_warnings(config(tmp_path), {**health, "control_token_documents": 9}) == []
    text_run = config(tmp_path)
    dataset = text_run.dataset.model_copy(update={"messages_column": "messages"})
    assert shard_warnings(text_run.model_copy(update={"dataset": dataset}), health) == [], "messages may speak of them"


@pytest.fixture
def corpus(tiny_config: Path, tmp_path: Path) -> Path:
    """A configuration of the tiny models over 12 documents that are rendered conversations."""
    lines = [f"<|endoftext|>Question {number}?<|endoftext|>\nAnswer." for number in range(12)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    text = tiny_config.read_text().replace(f"{tiny_config.parent}/corpus.jsonl", str(tmp_path / "corpus.jsonl"))
    toml = tmp_path / "x.toml"
    toml.write_text(text)
    return toml


def test_plan_shard_and_status_warn(corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, few = str(tmp_path / "run"), "--set=shard.validation_fraction=0.01"
    planned = ptafuse("plan", str(corpus), "--run", run, few).stdout
    assert "warning: shard.validation_fraction = 0.01 of 12 documents holds out about 0.1 to evaluate on" in planned
    assert json.loads(ptafuse("plan", str(corpus), "--run", run, few, "--json").stdout)["warnings"]
    ptafuse("shard", str(corpus), "--run", run, "--local", few)
    assert "shard.validation_fraction = 0.01 of 12 documents holds out about 0.1" in caplog.text
    held_out = "shard: none of 12 documents is held out (shard.validation_fraction = 0.01)"
    control = "shard: 12 of 12 documents hold control tokens of the run's models as text (<|endoftext|>)"
    shown = re.sub(r"\s+", " ", ptafuse("status", run).stdout)
    planned = ptafuse("plan", str(corpus), "--run", run, few).stdout
    for text in (caplog.text, shown, planned):
        assert held_out in text
        assert control in text


def test_control_tokens_can_be_read_as_tokens(corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, parse = str(tmp_path / "run"), "--set=dataset.control_tokens=parse"
    ptafuse("shard", str(corpus), "--run", run, "--local")
    assert "12 of 12 documents hold control tokens" in caplog.text
    caplog.clear()
    ptafuse("fuse", str(corpus), "--run", run, "--local", "--upstream", parse)
    assert "control tokens" not in caplog.text
    assert len(list((tmp_path / "run" / "shard").iterdir())) == 2, "another tokenizer gives other shards"
    tokenizer = SegmentTokenizer.load(load_config(corpus, ("dataset.control_tokens=parse",)).find_model("neox"))
    eos = tokenizer.vocabulary.eos_id
    rows = [row for path in (tmp_path / "run").glob("logits/neox/*/data/*") for row in pq.read_table(path).to_pylist()]
    assert rows
    assert all(row["token_ids"].count(eos) == 4 for row in rows), "before the text, two in it, and at its end"
    assert list((tmp_path / "run").glob("fuse/*/data/*"))

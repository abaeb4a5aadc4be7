"""Bad input, row by row of docs/bad-input.md: a clear message or a quarantined record, in the documented words."""

import errno
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file

from pipeline.engine import cluster
from pipeline.run.preflight import PreflightError, refuse_unusable_models
from pipeline.settings.load import load_config
from pipeline.settings.run import EngineConfig
from stages.models import token_tables
from stages.models.devices import require_cuda
from tests.stages.models.preflight.spoil import LFS_POINTER, change_weights, edit_json
from tests.tiny_models import save_model, split_weights
from tests.tiny_run import REPOSITORY, data_hashes, ptafuse, status
from tests.tiny_tokenizers import save_tokenizer
from tests.train.fused_files import fused_table, save
from train.checkpoints.disks import compare_disks
from train.data.blocks import columns_read
from train.data.files import open_file, survey
from train.distributed import join_workers
from train.job import FusedFile

pytestmark = pytest.mark.slow

TABLE = (REPOSITORY / "docs" / "bad-input.md").read_text()


def said(row: str) -> str:
    """Return the documented message of a row, as a pattern."""
    cell = next(line for line in TABLE.splitlines() if line.startswith(f"| {row} |")).split(" | ")[-1]
    message = re.search(r"`(.+?)`", cell)
    assert message, row
    return re.sub(r"<\w+>", ".+?", re.escape(message[1])).replace("'", "['`]")


class Corpus:
    """A run of the tiny models over documents of the test's own."""

    def __init__(self, tiny_config: Path, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "corpus.jsonl"
        self.run = folder / "run"
        self._text = tiny_config.read_text()
        self._models = tiny_config.parent

    def config(self, **replace: str) -> Path:
        text = self._text.replace(f"{self._models}/corpus.jsonl", str(self.file))
        for old, new in replace.items():
            text = text.replace(f"{self._models}/{old}", new)
        toml = self.folder / "bad.toml"
        toml.write_text(text)
        return toml

    def write(self, *texts: Any) -> "Corpus":
        self.file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return self

    def ptafuse(self, stage: str, *sets: str, check: bool = True, **replace: str) -> subprocess.CompletedProcess[str]:
        arguments = [f"--set={setting}" for setting in sets]
        return ptafuse(
            stage, str(self.config(**replace)), "--run", str(self.run), "--local", "--upstream", *arguments, check=check
        )

    def refused(self, stage: str, *sets: str, **replace: str) -> str:
        done = self.ptafuse(stage, *sets, check=False, **replace)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        return done.stderr

    def quarantined(self, step: str) -> list[dict[str, Any]]:
        return [row for path in self.run.glob(f"{step}/*/quarantine/*") for row in pq.read_table(path).to_pylist()]


@pytest.fixture
def corpus(tiny_config: Path, tmp_path: Path) -> Corpus:
    return Corpus(tiny_config, tmp_path)


GOOD = [f"Plain sentence number {number} of a document that is good." for number in range(6)]


def test_empty_and_blank_documents_are_counted(corpus: Corpus) -> None:
    corpus.write(*GOOD, "", " \n\t ", "\u3000").ptafuse("shard")
    assert re.search(said("an empty document"), ptafuse("status", str(corpus.run)).stdout.replace("\n", " "))
    assert said("only whitespace") == said("an empty document")
    assert status(corpus.run)["shard"]["health"]["empty_documents"] == 3
    assert corpus.quarantined("shard") == []


def test_one_character_and_nul_are_ordinary(corpus: Corpus) -> None:
    corpus.write(*GOOD, "x", "\U0001f600", "a\x00b", "\x00").ptafuse("fuse", "shard.validation_fraction=0.0")
    rows = [row for path in corpus.run.glob("shard/*/data/*") for row in pq.read_table(path).to_pylist()]
    assert {row["text"] for row in rows} >= {"x", "\U0001f600", "a\x00b", "\x00"}
    steps = status(corpus.run)
    assert all(steps[key]["is_done"] for key in ("shard", "logits/llama", "logits/neox", "align/neox", "fuse"))
    assert not any(shard["num_quarantined"] for step in steps.values() for shard in step["shards"])


def test_very_large_document_is_cut_and_complete(corpus: Corpus) -> None:
    text = "A long document of many sentences that never ends, or so it seems. " * 6000
    corpus.write(*GOOD, text).ptafuse("shard", "shard.max_length=1024", "fuse.max_length=1024")
    rows = [row for path in sorted(corpus.run.glob("shard/*/data/*")) for row in pq.read_table(path).to_pylist()]
    assert "".join(row["text"] for row in rows if row["doc_id"] == len(GOOD)) == text


def test_bad_records_go_to_quarantine_and_are_counted_downstream(corpus: Corpus) -> None:
    lines = [json.dumps({"text": text}).encode() for text in GOOD]
    lines += [b'{"text": "\\ud800 lone"}', b'{"text": null}', b"{broken", b'{"text": 7}']
    corpus.file.write_bytes(b"\n".join(lines) + b"\n")
    sets = ("shard.max_bad_fraction=0.7", "shard.validation_fraction=0.0", "shard.documents_per_shard=10")
    corpus.ptafuse("fuse", *sets)
    messages = {row["doc_id"]: row["message"] for row in corpus.quarantined("shard")}
    expected = ("invalid UTF-8", "a null text", "a line that is not JSON", "a text that is a number")
    assert sorted(messages) == [6, 7, 8, 9]
    for message, row in zip((messages[number] for number in sorted(messages)), expected, strict=True):
        assert re.search(said(row), message), row
    shown = ptafuse("status", str(corpus.run)).stdout
    assert "shard: 4 records are in quarantine" in shown
    rows = sum(pq.read_metadata(path).num_rows for path in corpus.run.glob("logits/llama/*/data/*"))
    assert rows == len(GOOD), "what is in quarantine is missing in later stages, and nothing else is"
    refused = corpus.refused("shard", "shard.max_bad_fraction=0.1", "shard.documents_per_shard=11")
    assert re.search(said("too many bad records"), refused)
    assert "document 6, segment -1: InvalidUtf8" in refused


@pytest.mark.parametrize(
    ("row", "columns"),
    [("a column of the wrong type", {"text": [1, 2, 3]}), ("a missing column", {"body": ["a", "b"], "id": [1, 2]})],
)
def test_wrong_columns_are_refused(corpus: Corpus, row: str, columns: dict[str, list]) -> None:
    corpus.file = corpus.folder / "corpus.parquet"
    pq.write_table(pa.table(columns), corpus.file)
    assert re.search(said(row), corpus.refused("shard"))


def test_parquet_file_cut_short_is_refused(corpus: Corpus) -> None:
    corpus.file = corpus.folder / "corpus.parquet"
    pq.write_table(pa.table({"text": GOOD * 50}), corpus.file)
    corpus.file.write_bytes(corpus.file.read_bytes()[:-40])
    assert re.search(said("a truncated Parquet file"), corpus.refused("shard"))


def test_dataset_that_changed_after_planning_is_noticed(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the plan and the reading of its rows."""
    from pipeline.engine import sharded_stage

    freeze = sharded_stage.freeze_plan

    def freeze_and_change(*arguments: Any) -> Any:
        plan = freeze(*arguments)
        corpus.write(*GOOD[:2])
        return plan

    monkeypatch.setattr(sharded_stage, "freeze_plan", freeze_and_change)
    assert re.search(said("a dataset file that changed after planning"), corpus.write(*GOOD).refused("shard"))


def model_with(corpus: Corpus, name: str, change) -> dict[str, str]:
    """Return a copy of a tiny model with other weights; the arguments that make the configuration use it."""
    copy = Path(shutil.copytree(corpus._models / name, corpus.folder / name))
    weights = load_file(copy / "model.safetensors")
    change(weights)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return {name: str(copy)}


def test_model_whose_weights_are_nan_is_refused_before_its_first_shard(corpus: Corpus) -> None:
    def poison(weights) -> None:
        weights["model.norm.weight"][0] = float("nan")

    refused = corpus.write(*GOOD).refused("logits", **model_with(corpus, "llama", poison))
    assert re.search(said("a model that returns NaN for every input"), refused)


def test_record_for_which_a_model_gives_nan_is_named_after_three_tries(corpus: Corpus) -> None:
    from stages.models.config import ModelConfig
    from stages.models.tokenizer import SegmentTokenizer

    tokenizer = SegmentTokenizer.load(ModelConfig(name="llama", path=corpus._models / "llama"))
    odd = "\U0001f600 \u0416\u0416"
    usual = {int(token) for text in GOOD for token in tokenizer.encode(text, is_last=True).ids}
    rare = [int(token) for token in tokenizer.encode(odd, is_last=True).ids if int(token) not in usual and token > 8]

    def poison(weights) -> None:
        weights["model.embed_tokens.weight"][rare[0]] = float("nan")

    corpus.write(*GOOD, odd)
    refused = corpus.refused("logits", "shard.validation_fraction=0.0", **model_with(corpus, "llama", poison))
    assert re.search(said("a model that returns NaN for some records"), refused)
    assert f"doc_id {len(GOOD)}, segment 0" in refused
    assert "ptafuse retry" in refused
    states = {
        shard["shard"]: (shard["state"], shard["attempts"]) for shard in status(corpus.run)["logits/llama"]["shards"]
    }
    assert states == {0: ("done", 1), 1: ("failed", 3)}


def test_text_with_a_token_that_the_model_has_no_row_for_is_quarantined(corpus: Corpus) -> None:
    from stages.models.config import ModelConfig
    from stages.models.tokenizer import SegmentTokenizer

    tokenizer = SegmentTokenizer.load(ModelConfig(name="neox", path=corpus._models / "neox"))
    known, unknown = "z q j", "The quick brown fox jumps over the lazy dog."
    num_rows = int(tokenizer.encode(known, is_last=True).ids.max()) + 1
    assert tokenizer.encode(unknown, is_last=True).ids.max() >= num_rows

    folder = save_model(
        corpus.folder / "neox",
        architecture="gpt_neox",
        tokenizer_family="byte-bpe",
        vocab_padding=num_rows - tokenizer.vocabulary.size,
    )
    sets = ("shard.validation_fraction=0.0", "logits.max_bad_fraction=0.5")
    corpus.write(known, unknown, known).ptafuse("fuse", *sets, neox=str(folder))
    (bad,) = corpus.quarantined("logits/neox")
    assert bad["doc_id"] == 1
    assert re.search(said("a training text with a token without an embedding row"), bad["message"])
    assert status(corpus.run)["fuse"]["is_done"]


def change_tokenizer(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "clean_up_tokenization_spaces": True}))


def test_tokenizer_that_changed_between_stages_is_noticed(corpus: Corpus) -> None:
    copy = Path(shutil.copytree(corpus._models / "neox", corpus.folder / "neox"))
    corpus.write(*GOOD).ptafuse("shard", neox=str(copy))
    change_tokenizer(copy)
    before = data_hashes(corpus.run)
    refused = ptafuse("logits", str(corpus.config(neox=str(copy))), "--run", str(corpus.run), "--local", check=False)
    assert refused.returncode == 1
    assert re.search(said("a tokenizer that changed between two stages"), refused.stderr)
    assert data_hashes(corpus.run) == before


def test_tokenizer_that_changes_while_the_stage_starts_is_noticed(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine that has other files under the same path."""
    from pipeline.engine import sharded_stage

    copy = Path(shutil.copytree(corpus._models / "llama", corpus.folder / "llama"))
    corpus.write(*GOOD).ptafuse("shard", llama=str(copy))
    check = sharded_stage._check_tokenizers

    def check_and_change(*arguments: Any) -> None:
        check(*arguments)
        change_tokenizer(copy)

    monkeypatch.setattr(sharded_stage, "_check_tokenizers", check_and_change)
    row = "a tokenizer that changes while a stage runs, or differs on another machine"
    assert re.search(said(row), corpus.refused("logits", llama=str(copy)))


def test_a_full_disk_is_reported_and_costs_no_attempt(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    corpus.write(*GOOD).ptafuse("shard")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert re.search(said("a full disk"), corpus.refused("logits"))
    corpus.ptafuse("logits")
    assert all(shard["error"] is None for shard in status(corpus.run)["logits/llama"]["shards"])


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this user may not mount a disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_read_only_folder_is_named(corpus: Corpus, read_only_disk: Path) -> None:
    corpus.run = read_only_disk / "run"
    assert re.search(said("a read-only folder"), corpus.write(*GOOD).refused("shard"))


def test_run_folder_of_another_version_is_refused(corpus: Corpus) -> None:
    corpus.write(*GOOD).ptafuse("shard")
    path = next(corpus.run.glob("shard/*/manifests/shard-00000.json"))
    text = path.read_text()
    path.write_text(text.replace('"manifest_version": 1', '"manifest_version": 2'))
    shown = ptafuse("verify", str(corpus.run), check=False)
    assert re.search(said("a manifest from another version"), shown.stdout.replace("\n", " "))
    assert re.search(said("a manifest from another version"), corpus.refused("logits"))
    path.write_text(text)
    record = next(corpus.run.glob("configs/*.json"))
    value = json.loads(record.read_text())
    value["config"]["align"]["setting_of_the_future"] = 1
    record.write_text(json.dumps(value))
    refused = ptafuse("status", str(corpus.run), check=False)
    assert refused.returncode == 1
    assert re.search(said("a configuration recorded by another version"), refused.stderr)


def test_changed_data_file_is_refused(corpus: Corpus) -> None:
    corpus.write(*GOOD).ptafuse("shard")
    path = next(corpus.run.glob("shard/*/data/*"))
    path.write_bytes(path.read_bytes()[:-8])
    assert re.search(said("a data file that was changed or truncated"), corpus.refused("logits"))


def test_kind_column_that_is_not_there_is_refused(corpus: Corpus) -> None:
    refused = corpus.write(*GOOD).refused("shard", "dataset.kind_column=kind")
    assert re.search(said("a missing `kind_column`, or one for plain text files"), refused)


def test_a_kind_column_of_other_values_is_refused(corpus: Corpus) -> None:
    corpus.file.write_text(json.dumps({"text": GOOD[0], "kind": 1.5}) + "\n")
    refused = corpus.refused("shard", "dataset.kind_column=kind")
    assert re.search(said("a `kind_column` whose first value is no string or integer"), refused)


def test_documents_without_a_kind_are_counted(corpus: Corpus, caplog: pytest.LogCaptureFixture) -> None:
    kinds = [{"kind": "prose"}, {"kind": 0.5}, {"kind": None}, {}, {"kind": "prose"}, {"kind": "prose"}]
    rows = [{"text": text, **kind} for text, kind in zip(GOOD, kinds, strict=True)]
    corpus.file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = ("dataset.kind_column=kind", "shard.validation_fraction=0.0", "shard.documents_per_shard=10")
    corpus.ptafuse("fuse", *sets)
    shown = ptafuse("interpret", str(corpus.config()), "--run", str(corpus.run), *(f"--set={one}" for one in sets))
    row = "a document whose kind is missing, null, empty, or no string or integer"
    assert re.search(said(row), caplog.text)
    assert "3 of 6 documents" in caplog.text
    assert "(none)" in shown.stdout


def test_secret_in_the_dataset_url_is_refused_and_not_recorded(corpus: Corpus) -> None:
    refused = corpus.refused("shard", "dataset.path=https://user:hunter2@host/corpus.jsonl")
    assert re.search(said("a URL that holds a secret"), refused)
    assert "hunter2" not in refused
    assert not corpus.run.exists()


class Essays:
    """A text besides the held-out split."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self.file = corpus.folder / "essays.jsonl"

    def write(self, *texts: Any) -> "Essays":
        self.file.write_text("".join(json.dumps({"text": text, "kind": "essay"}) + "\n" for text in texts))
        return self

    def setting(self, *more: str, name: str = "news") -> str:
        lines = (f'name = "{name}"', f'path = "{self.file}"', *more)
        return "{" + ", ".join(lines) + "}"

    def eval(self, *more: str) -> str:
        """Evaluate after the shard stage alone; the trained model is missing, so the command always ends with a message."""
        self.corpus.write(*GOOD).ptafuse("shard", "shard.validation_fraction=0.4")
        sets = ("--set=shard.validation_fraction=0.4", f"--set=eval.texts=[{self.setting(*more)}]")
        command = ("eval", str(self.corpus.config()), "--run", str(self.corpus.run), "--local", *sets)
        done = ptafuse(*command, check=False)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr


def test_texts_that_cannot_be_read_are_refused_before_anything_runs(corpus: Corpus) -> None:
    essays = Essays(corpus)
    corpus.write(*GOOD)
    refused = corpus.refused("eval", f"eval.texts=[{essays.setting()}]")
    assert re.search(said("a text of `[[eval.texts]]` whose file is missing"), refused)
    essays.write("An essay.")
    of_kinds = essays.setting('kind_column = "genre"')
    refused = corpus.refused("eval", f"eval.texts=[{of_kinds}]")
    assert re.search(said("a text whose text or kind column is missing"), refused)
    refused = corpus.refused("eval", f"eval.texts=[{essays.setting()}, {essays.setting()}]")
    assert re.search(said("two texts with the same name"), refused)
    refused = corpus.refused("eval", f"eval.texts=[{essays.setting(name='heldout')}]")
    assert re.search(said("a text named like the held-out split"), refused)
    assert not list(corpus.run.glob("shard/*"))


def test_documents_of_a_text_that_are_not_scored_are_counted(corpus: Corpus) -> None:
    training = [f" {text}\n" for text in GOOD]
    essays = Essays(corpus).write("An essay of its own.", *training, "", None, " ")
    shown = essays.eval()
    assert re.search(said("a document of a text that shares text with the training documents"), shown)
    assert re.search(said("a document of a text that is empty, null, or not text"), shown)
    assert "3 that are empty or not text" in shown
    assert list(corpus.run.glob("eval/llama/news/*/bits-per-byte.json"))
    refused = essays.eval('overlap = "refuse"')
    assert re.search(said('such a document with `overlap = "refuse"`'), refused)


def test_a_text_of_which_nothing_is_left_is_refused_before_any_model_runs(corpus: Corpus) -> None:
    refused = Essays(corpus).write("", None).eval()
    assert re.search(said("a text with no documents left"), refused)
    assert "left out: 2 that are empty or not text. Document 0: empty, or only whitespace. Use" in refused
    assert not list(corpus.run.glob("eval/*"))


# --- data sets and configurations that users bring -----------------------------------------------------------------------


def test_links_are_followed_and_dangling_links_are_refused(corpus: Corpus, caplog: pytest.LogCaptureFixture) -> None:
    corpus.write(*GOOD)
    data = corpus.folder / "data"
    data.mkdir()
    (data / "a.jsonl").symlink_to(corpus.file)
    (data / "again.jsonl").symlink_to(corpus.file)
    (data / "cycle").symlink_to(data, target_is_directory=True)
    corpus.file = data
    corpus.ptafuse("shard")
    assert re.search(said("links to files and folders; a file with two names"), caplog.text)
    assert status(corpus.run)["shard"]["health"]["documents"] == len(GOOD)
    (data / "b.jsonl").symlink_to("gone.jsonl")
    assert re.search(said("a broken link"), corpus.refused("shard"))


def test_files_of_several_splits_are_reported(corpus: Corpus, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train-0.jsonl", "train-1.jsonl"):
        (corpus.folder / "data").mkdir(exist_ok=True)
        corpus.file = corpus.folder / "data" / name
        corpus.write(*GOOD)
    corpus.file = corpus.file.parent
    refused = corpus.refused("shard", "dataset.split=test")
    assert re.search(said("a `split` that no file name contains"), refused)
    (corpus.file / "train-1.jsonl").rename(corpus.file / "test-0.jsonl")
    corpus.ptafuse("shard")
    assert re.search(said("files of several splits, and no `split`"), caplog.text)


def test_files_that_other_tools_wrote_are_recognised(corpus: Corpus) -> None:
    import datasets

    corpus.file = corpus.folder / "saved"
    datasets.Dataset.from_dict({"text": GOOD}).save_to_disk(corpus.file)
    assert re.search(said("a folder written by `Dataset.save_to_disk`"), corpus.refused("shard"))
    corpus.file = corpus.folder / "long.jsonl.zst"
    frame = b'{"text": "x"}\n'
    # A frame of zstd whose header asks for a window of 2 GiB, with one block that is not compressed.
    corpus.file.write_bytes(b"\x28\xb5\x2f\xfd\x00\xa8" + (len(frame) << 3 | 1).to_bytes(3, "little") + frame)
    assert re.search(said("a .zst file with a long window (`zstd --long`)"), corpus.refused("shard"))
    corpus.file = corpus.folder / "wide.jsonl"
    corpus.file.write_text('{"text": "x"}\n', encoding="utf-16")
    assert re.search(said("a file in UTF-16"), corpus.refused("shard"))


def test_damaged_row_group_is_named(corpus: Corpus) -> None:
    corpus.file = corpus.folder / "corpus.parquet"
    table = pa.table({"text": [f"{text} {number}" for number in range(50) for text in GOOD]})
    pq.write_table(table, corpus.file, row_group_size=100, write_page_checksum=True, use_dictionary=False)
    column = pq.ParquetFile(corpus.file).metadata.row_group(1).column(0)
    raw = bytearray(corpus.file.read_bytes())
    raw[column.data_page_offset + column.total_compressed_size - 200] ^= 0xFF
    corpus.file.write_bytes(raw)
    refused = corpus.refused("shard", "shard.documents_per_shard=100")
    assert re.search(said("a damaged row group of a Parquet file"), refused)
    assert f"{corpus.file}: row group 1 of 3 (rows 100 to 200)" in refused


def test_texts_with_nothing_to_evaluate_are_reported_before_training(
    corpus: Corpus, caplog: pytest.LogCaptureFixture
) -> None:
    corpus.write(*GOOD).ptafuse("shard", "shard.validation_fraction=0.01")
    assert re.search(said("few documents and a small held-out fraction"), caplog.text)
    refused = corpus.refused("eval", "shard.validation_fraction=0.01")
    assert re.search(said("no held-out document"), refused)
    assert not list(corpus.run.glob("logits/*"))
    corpus.file = corpus.folder / "book.txt"
    corpus.file.write_text("\n".join(GOOD))
    corpus.ptafuse("shard")
    assert re.search(said("one .txt file, which is one document"), caplog.text)
    corpus.ptafuse("shard", "dataset.documents=lines", "shard.validation_fraction=0.5")
    assert status(corpus.run)["shard"]["health"]["documents"] == len(GOOD)


def test_rendered_conversations_are_counted(corpus: Corpus, caplog: pytest.LogCaptureFixture) -> None:
    corpus.write(*GOOD, *(f"<|endoftext|>{text}" for text in GOOD)).ptafuse("shard")
    row = "control tokens as text, in at least 1 % of the documents"
    assert re.search(said(row), caplog.text)
    assert "6 of 12 documents" in caplog.text


def talk(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


TALKS = [talk(("user", f"What is {number}?"), ("assistant", f"A number, {number}.")) for number in range(6)]
CONVERSATIONS = ("dataset.messages_column=text", "target.chat_template=plain", "sources.neox.chat_template=plain")


def test_conversations_that_are_not_learnt_from_are_quarantined_with_the_reason(corpus: Corpus, tmp_path: Path) -> None:
    strict = tmp_path / "strict.jinja"
    strict.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
        "{{ m.role }}\n{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    image = [{"type": "image_url", "image_url": {"url": "a.png"}}]
    bad = {
        "a conversation with tools": talk(("user", "a"), ("tool", "b")),
        "a conversation with images, audio or video": talk(("user", image), ("assistant", "b")),
        "a message that is not text": talk(("user", None), ("assistant", "b")),
        "a message with an unknown role": talk(("narrator", "a")),
        "a conversation that a chat template refuses or rewrites": talk(
            ("system", "a"), ("user", "b"), ("assistant", "c")
        ),
        "a question and its answer longer than `shard.max_length`": talk(("user", "a"), ("assistant", "long " * 200)),
    }
    corpus.write(*TALKS, *bad.values(), talk(("user", "And now?")))
    sets = ("shard.max_bad_fraction=0.7", "shard.documents_per_shard=20", "shard.validation_fraction=0.0")
    corpus.ptafuse("logits", *CONVERSATIONS, f"sources.neox.chat_template={strict}", *sets)
    messages = {row["doc_id"]: row["message"] for row in corpus.quarantined("shard")}
    assert sorted(messages) == list(range(6, 12))
    for message, row in zip((messages[number] for number in sorted(messages)), bad, strict=True):
        assert re.search(said(row), message), (row, message)
    assert re.search(said("a conversation without any answer"), "unlearnt_conversations 1")
    health = status(corpus.run)["shard"]["health"]
    assert health["unlearnt_conversations"] == 1
    assert health["quarantined/HasTools"] == 1
    assert sum(pq.read_metadata(path).num_rows for path in corpus.run.glob("logits/neox/*/data/*")) == len(TALKS)


def test_columns_that_hold_no_conversations_are_refused(corpus: Corpus) -> None:
    corpus.write(*GOOD)
    row = "a messages column that holds something else"
    assert re.search(said(row), corpus.refused("shard", *CONVERSATIONS).replace("'text'", "'messages'"))
    corpus.file = corpus.folder / "talks.parquet"
    pq.write_table(pa.table({"text": TALKS}), corpus.file)
    assert re.search(said("a text column that holds messages"), corpus.refused("shard"))


def test_models_that_cannot_render_conversations_are_refused_before_anything_runs(
    corpus: Corpus, tmp_path: Path
) -> None:
    corpus.write(*TALKS)
    refused = corpus.refused("shard", "dataset.messages_column=text")
    assert re.search(said("conversations, and a model without a chat template"), refused)
    endless = tmp_path / "endless.jinja"
    endless.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    refused = corpus.refused("shard", *CONVERSATIONS, f"target.chat_template={endless}")
    assert re.search(said("conversations, and a chat template that does not end answers"), refused)
    assert not list(corpus.run.glob("shard/*/manifests/*"))


@pytest.mark.parametrize(
    ("row", "setting"),
    [
        ('conversations with `fuse.packing = "cut"`', "fuse.packing=cut"),
        ("conversations with `train.isolate_documents = false`", "train.isolate_documents=false"),
    ],
)
def test_conversations_are_packed_whole_and_isolated(corpus: Corpus, row: str, setting: str) -> None:
    corpus.write(*TALKS)
    assert re.search(said(row), corpus.refused("shard", *CONVERSATIONS, setting))
    assert not corpus.run.exists()


TALK_TEXT = '[[eval.texts]]\nname = "talks"\npath = "talks.jsonl"\nmessages_column = "messages"\n'


@pytest.mark.parametrize(
    ("row", "old", "new"),
    [
        ("`[sources]` for `[[sources]]`", "[[sources]]", "[sources]"),
        ("an unknown setting", "[train]", "[train]\nlearning-rate = 1"),
        ("a setting of the wrong type, or out of bounds", "[train]", '[train]\nseed = "x"'),
        ("an infinite number, or NaN", "learning_rate = 1e-3", "learning_rate = inf"),
        ("a name that cannot be a folder name", 'name = "tiny"', 'name = "my run"'),
        ("two names that differ only in case", 'name = "neox"', 'name = "LLAMA"'),
        ("`eval.num_generations` in a run on texts", "[eval]", "[eval]\nnum_generations = 5"),
        ("a text of conversations in a run on texts", "[engine]", f"{TALK_TEXT}\n[engine]"),
        ("a text of conversations with `max_characters`", "[engine]", f"{TALK_TEXT}max_characters = 9\n[engine]"),
    ],
)
def test_wrong_settings_are_explained_in_the_words_of_the_file(corpus: Corpus, row: str, old: str, new: str) -> None:
    toml = corpus.config()
    assert old in toml.read_text()
    toml.write_text(toml.read_text().replace(old, new))
    refused = ptafuse("run", str(toml), "--run", str(corpus.run), check=False)
    assert refused.returncode == 1
    assert re.search(said(row), refused.stderr)
    assert not corpus.run.exists()


def test_configuration_that_is_not_filled_in_is_refused(corpus: Corpus) -> None:
    toml = corpus.folder / "new.toml"
    ptafuse("init", str(toml))
    refused = ptafuse("run", str(toml), "--run", str(corpus.run), check=False)
    assert re.search(said("a configuration from `ptafuse init` that is not filled in"), refused.stderr)


def test_ray_address_that_refuses_is_named(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free.getsockname()[1]}")
    toml = corpus.write(*GOOD).config()
    waits = ("--set", "engine.connect_timeout_seconds=0.5")
    refused = ptafuse("shard", str(toml), "--run", str(corpus.run), *waits, check=False)
    assert refused.returncode == 1
    assert re.search(said("a `RAY_ADDRESS` at which no cluster answers"), refused.stderr)


def test_a_stage_that_a_cluster_of_fixed_size_has_no_room_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8.0}}])
    row = said("a stage that asks for more than a fixed-size cluster has")
    with pytest.raises(ValueError, match=row):
        cluster.require_resources("train", 8, 1, EngineConfig(autoscaling=False), count=8)


def test_gpus_that_may_come_later_are_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(
        ValueError, match=said('`device = "auto"` on a cluster that may grow and whose GPUs may join later')
    ):
        cluster.gpus_per_worker(None, "auto", EngineConfig(), section="train")


def test_disks_that_training_cannot_use_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A marker that the command has made is not in the folder that the worker sees: another disk."""
    with join_workers(torch.device("cpu")) as alone:
        row = said("training on several machines without a shared disk, with a local run directory")
        with pytest.raises(ValueError, match=row):
            compare_disks(tmp_path, alone, store=None, marker=".started-elsewhere")
        assert compare_disks(tmp_path, alone, store="s3://bucket/run", marker=".started-elsewhere").is_shared
        monkeypatch.setattr(Path, "write_text", refuse_to_write)
        with pytest.raises(ValueError, match=said("an `engine.scratch` that a machine cannot write to")):
            compare_disks(tmp_path, alone, store="s3://bucket/run")


def refuse_to_write(path: Path, text: str) -> int:
    raise PermissionError(errno.EACCES, "Permission denied")


def test_fused_file_that_changes_while_it_is_trained_on_is_refused(tmp_path: Path) -> None:
    ids = [np.arange(8) + number for number in range(4)]
    here = [save(fused_table(ids, 50, seed=seed), tmp_path / f"{seed}.parquet") for seed in (0, 1)]
    files = [FusedFile(f"file://{tmp_path}/0.parquet", here[0].sha256)]
    columns = partial(columns_read, with_distributions=True)
    facts = survey(files, columns, scratch=tmp_path / "other-machine")
    shutil.copy(here[1].path, here[0].path)
    opened = open_file(files[0], facts[0], columns, scratch=tmp_path / "machine")
    row = said("a fused file in an object store that changes while it is trained on")
    with pytest.raises(ValueError, match=row):
        opened.read_row_group(0, columns=["token_ids"])


def test_a_reserved_gpu_that_torch_does_not_see_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=said("a worker with a reserved GPU that torch does not see")):
        require_cuda("logits/mpt")


def spoiled(corpus: Corpus, change: Callable[[Path], Any]) -> dict[str, str]:
    """Return a copy of the tiny target with something wrong; the arguments that make the configuration use it."""
    copy = Path(shutil.copytree(corpus._models / "llama", corpus.folder / "llama"))
    path = change(copy)
    return {"llama": str(path or copy)}


def no_head(tensors: dict[str, Any]) -> None:
    del tensors["lm_head.weight"]


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def missing_shard(folder: Path) -> None:
    (folder / split_weights(folder)[1]).unlink()


def recurrent(folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **settings)).save_pretrained(folder)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def bos_without_row(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<extra>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    edit_json(folder / "tokenizer_config.json", eos_token="<extra>")


def read_as_another_tokenizer(folder: Path) -> None:
    save_tokenizer("byte-bpe", folder)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", add_prefix_space=True)


def config_with(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


SPOILED: dict[str, Callable[[Path], Any]] = {
    "weights without an LM head, with tensor names changed by a wrapper (`torch.compile`), or of a classifier": (
        lambda folder: change_weights(folder, no_head)
    ),
    "weights with more layers than config.json says": config_with(num_hidden_layers=1),
    "weights whose shapes differ from config.json": config_with(vocab_size=390),
    "a Git LFS pointer instead of a file": (
        lambda folder: (folder / "model.safetensors").write_text(LFS_POINTER) and None
    ),
    "a truncated weight file": cut_short,
    "an index that names a missing file": missing_shard,
    "the path of a weight file instead of its folder": lambda folder: folder / "model.safetensors",
    "pickled weights (`pytorch_model.bin`) without safetensors": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin") and None
    ),
    "an adapter in the model's folder": lambda folder: (folder / "adapter_config.json").write_text("{}") and None,
    "an encoder-decoder (T5)": config_with(model_type="t5", is_encoder_decoder=True),
    'a bidirectional model (BERT; `"is_causal": false`)': config_with(is_causal=False),
    "a recurrent model (Mamba) as target, with `train.isolate_documents`": recurrent,
    "quantised weights whose package is missing": config_with(quantization_config={"quant_method": "hqq"}),
    "quantised weights of a model that is to be trained (FP8 and MXFP4 are unpacked instead)": (
        config_with(quantization_config={"quant_method": "bitnet"})
    ),
    "a padding token outside the vocabulary": config_with(pad_token_id=32000),
    'a tokenizer.json that transformers loads as a different tokenizer (Llama-3\'s next to `"model_type": "qwen2"`)': (
        read_as_another_tokenizer
    ),
    "a BOS or EOS token without an embedding row": bos_without_row,
}


@pytest.mark.parametrize("row", SPOILED)
def test_models_that_cannot_be_used_are_refused_before_anything_runs(corpus: Corpus, row: str) -> None:
    files = spoiled(corpus, SPOILED[row])
    for stage in ("shard", "plan"):
        sets = ("train.isolate_documents=true",)
        config = str(corpus.write(*GOOD).config(**files))
        arguments = () if stage == "plan" else ("--local",)
        done = ptafuse(
            stage, config, "--run", str(corpus.run), *arguments, *(f"--set={one}" for one in sets), check=False
        )
        assert done.returncode == 1
        assert re.search(said(row), done.stderr), done.stderr
        assert "model llama: " in done.stderr
        assert "model neox" not in done.stderr
        assert all(line.count("model llama:") <= 1 for line in done.stderr.splitlines())
        assert "Traceback" not in done.stderr
    assert not list(corpus.run.glob("shard/*"))


def test_a_model_that_is_not_causal_is_refused_where_it_is_loaded(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a model of the hub that was not in the cache before."""
    monkeypatch.setattr("pipeline.run.session.refuse_unusable_models", lambda config: None)
    refused = corpus.write(*GOOD).refused("logits", **spoiled(corpus, config_with(is_causal=False)))
    assert re.search(said("a bidirectional model whose files do not say so"), refused)


def test_a_tokenizer_that_draws_at_random_is_made_not_to(corpus: Corpus, caplog: pytest.LogCaptureFixture) -> None:
    def dropout(folder: Path) -> None:
        values = json.loads((folder / "tokenizer.json").read_text())
        values["model"]["dropout"] = 0.5
        (folder / "tokenizer.json").write_text(json.dumps(values))

    corpus.write(*GOOD).ptafuse("logits", "shard.validation_fraction=0.0")
    plain = corpus.run
    corpus.run = corpus.folder / "drawn"
    corpus.ptafuse("logits", "shard.validation_fraction=0.0", **spoiled(corpus, dropout))
    assert re.search(said("a tokenizer that splits words at random (BPE dropout)"), caplog.text)
    one, two = (
        [
            row["token_ids"]
            for file in sorted(run.glob("logits/llama/*/data/*"))
            for row in pq.read_table(file).to_pylist()
        ]
        for run in (plain, corpus.run)
    )
    assert one == two


def test_a_held_out_text_with_a_token_without_a_row_ends_eval(corpus: Corpus) -> None:
    def add_token(folder: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(["<extra>"])
        tokenizer.save_pretrained(folder)

    files = spoiled(corpus, add_token)
    held_out = "shard.validation_fraction=0.5"
    corpus.write(*(f"{text} <extra>" for text in GOOD)).ptafuse("shard", held_out, **files)
    refused = ptafuse(
        "eval", str(corpus.config(**files)), "--run", str(corpus.run), "--local", f"--set={held_out}", check=False
    )
    assert re.search(said("a token without an embedding row in a held-out text"), refused.stderr)


def test_check_names_everything_at_once_and_computes_nothing(corpus: Corpus) -> None:
    def spoil(folder: Path) -> None:
        edit_json(folder / "config.json", pad_token_id=32000, is_causal=False)
        cut_short(folder)
        (folder / "adapter_config.json").write_text("{}")

    config = str(corpus.write(*GOOD).config(**spoiled(corpus, spoil)))
    done = ptafuse("check", config, check=False)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0] == f"llama ({corpus.folder}/llama): 4 problems"
    assert [line.split(": ")[0] for line in lines[1:5]] == [
        "  - config.json",
        "  - config.json",
        "  - adapter_config.json",
        "  - model.safetensors",
    ]
    assert lines[5] == f"neox ({corpus._models}/neox): nothing wrong was found"
    assert lines[6] == f"dataset ({corpus.file}): nothing wrong was found"
    assert len(lines) == 7
    stage = corpus.refused("shard", **spoiled_again(corpus))
    assert "4 problems:" in stage
    assert ptafuse("check", str(corpus.config())).stdout.count("nothing wrong was found") == 3
    assert not corpus.run.exists()


def test_ten_broken_models_and_data_sets_are_ten_messages_on_one_screen(corpus: Corpus) -> None:
    import datasets

    spoilers = [
        *("a truncated weight file", "a Git LFS pointer instead of a file", "an adapter in the model's folder"),
        *(
            "an encoder-decoder (T5)",
            "a padding token outside the vocabulary",
            "weights whose shapes differ from config.json",
        ),
        *("an index that names a missing file", "quantised weights whose package is missing"),
    ]
    toml = corpus.write(*GOOD).config()
    models = []
    for number, row in enumerate(spoilers):
        folder = Path(shutil.copytree(corpus._models / "llama", corpus.folder / f"broken-{number}"))
        SPOILED[row](folder)
        models.append(f'[[sources]]\nname = "broken-{number}"\npath = "{folder}"\n')
    saved = corpus.folder / "saved"
    datasets.Dataset.from_dict({"text": GOOD}).save_to_disk(saved)
    text = f'[[eval.texts]]\nname = "news"\npath = "{corpus.file}"\ntext_column = "body"\n'
    values = toml.read_text().replace(f'path = "{corpus.file}"', f'path = "{saved}"')
    toml.write_text("\n".join([values, *models, text]))
    done = ptafuse("check", str(toml), check=False)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert sum(line.startswith("  - ") for line in lines) == 10
    assert sum(": 1 problem" in line for line in lines) == 10
    assert len(lines) <= 24
    assert re.search(said("a folder written by `Dataset.save_to_disk`"), done.stdout)


def spoiled_again(corpus: Corpus) -> dict[str, str]:
    """The spoiled copy that is there."""
    return {"llama": str(corpus.folder / "llama")}


def test_pickled_weights_of_the_hub_are_refused_before_they_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [SimpleNamespace(rfilename=name) for name in ("config.json", "pytorch_model.bin")]
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=files))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    config = load_config("llama2_7b")
    with pytest.raises(PreflightError) as refused:
        refuse_unusable_models(config)
    assert len(refused.value.problems) == len(config.models)
    for problem in refused.value.problems:
        assert re.search(said("pickled weights on the hub that are not downloaded yet"), str(problem))


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_a_pickle_is_converted_without_running_code_and_without_overwriting(corpus: Corpus) -> None:
    folder = Path(shutil.copytree(corpus._models / "llama", corpus.folder / "pickled"))
    torch.save({"weight": Trap(corpus.folder / "sprung")}, folder / "pytorch_model.bin")
    there = ptafuse("convert", str(folder), check=False)
    assert there.returncode == 1
    assert re.search(said("existing safetensors where `ptafuse convert` would write"), there.stderr)
    (folder / "model.safetensors").unlink()
    trap = ptafuse("convert", str(folder), check=False)
    assert trap.returncode == 1
    documented = said("a pickle that holds more than tensors, given to `ptafuse convert`")
    assert re.search(documented, trap.stderr), trap.stderr
    assert not (corpus.folder / "sprung").exists()
    assert not list(folder.glob("*.safetensors"))


def test_a_damaged_token_table_is_made_again(corpus: Corpus, caplog: pytest.LogCaptureFixture) -> None:
    corpus.write(*GOOD).ptafuse("logits")
    (table,) = corpus.run.glob("tokenizers/llama/*/tokens.parquet")
    sound = table.read_bytes()
    table.write_bytes(sound[: len(sound) // 2])
    token_tables._LOADED.clear()  # as in a new process
    caplog.clear()
    corpus.ptafuse("align")
    assert re.search(said("a damaged or stale file in a run directory's `tokenizers` folder"), caplog.text)
    assert table.read_bytes() == sound


def test_every_documented_message_is_compared_with_a_real_one() -> None:
    rows = [line.split(" | ") for line in TABLE.splitlines() if line.startswith("| ") and line.endswith("` |")]
    compared = Path(__file__).read_text()
    assert len(rows) > 20
    names = [row.removeprefix("| ") for row, *_ in rows]
    quoted = {name: (f'"{name}"', f"'{name}'") for name in names}
    assert [name for name in names if name not in SPOILED and not any(one in compared for one in quoted[name])] == []

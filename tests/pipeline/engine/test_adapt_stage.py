"""Sources trained on the run's own text: who is trained on what, who dumps what, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.engine.adapt_stage import source_blocks
from pipeline.run.records import recorded_run
from pipeline.run.steps import ResolvedRun
from pipeline.settings.adapt import AdaptConfig
from pipeline.settings.load import load_config
from stages.contract.digest import file_sha256, sha256
from stages.contract.schemas import SHARD, shard_schema
from stages.contract.store import Store
from stages.logits.stage import LogitsStage
from stages.models.config import ModelConfig
from stages.models.segment_text import Message, SegmentText
from stages.models.tokenizer import SegmentTokenizer
from tests.chat_tokenizers import save_chat_tokenizer
from tests.tiny_run import ptafuse
from tests.tiny_tokenizers import TEXTS, save_tokenizer
from train.config import TrainConfig

ADAPT = """
[sources.adapt]
learning_rate = 1e-2
batch_size = 4
max_length = 64
autocast = "float32"
"""


def shard_table(texts: list[str]) -> pa.Table:
    columns = {
        "doc_id": range(len(texts)),
        "segment": [0] * len(texts),
        "byte_start": [0] * len(texts),
        "split": ["train"] * len(texts),
        "text": texts,
        "is_last": [True] * len(texts),
    }
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in SHARD}, schema=SHARD)


def test_blocks_hold_every_train_segment_once_under_the_source_s_tokens(tmp_path: Path) -> None:
    tokenizer = SegmentTokenizer.load(ModelConfig(name="neox", path=save_tokenizer("byte-bpe", tmp_path)))
    blocks = source_blocks(shard_table(list(TEXTS[:8])), tokenizer, max_length=48)
    found: dict[int, list[int]] = {}
    for block in blocks.to_pylist():
        ends = [*block["piece_start"][1:], len(block["token_ids"])]
        assert block["piece_start"][0] == 0
        for start, end, doc_id in zip(block["piece_start"], ends, block["piece_doc_id"], strict=True):
            assert doc_id not in found
            found[doc_id] = block["token_ids"][start:end]
    expected = {doc_id: tokenizer.encode(text, is_last=True).ids.tolist() for doc_id, text in enumerate(TEXTS[:8])}
    assert found == expected
    assert source_blocks(shard_table([]), tokenizer, max_length=48).num_rows == 0


def test_a_segment_longer_than_a_block_has_one_alone_and_changes_no_other(tmp_path: Path) -> None:
    tokenizer = SegmentTokenizer.load(ModelConfig(name="neox", path=save_tokenizer("byte-bpe", tmp_path)))
    long = " ".join(TEXTS)
    assert tokenizer.count(long) > 48

    def blocks(texts: list[str]) -> list[list[int]]:
        return source_blocks(shard_table(texts), tokenizer, max_length=48)["token_ids"].to_pylist()

    short = [text[:20] for text in TEXTS[:8]]
    assert blocks([*short, long]) == [*blocks(short), tokenizer.encode(long, is_last=True).ids.tolist()]
    assert max(map(len, blocks(short))) <= 48


def test_blocks_of_conversations_say_what_is_learnt(tmp_path: Path) -> None:
    folder = save_chat_tokenizer("chatml", tmp_path)
    tokenizer = SegmentTokenizer.load(ModelConfig(name="source", path=folder, reads_conversations=True))
    segments = [
        SegmentText.conversation(
            [
                Message("user", f"Question {number}?", is_trained=False),
                Message("assistant", TEXTS[number][:30], is_trained=True),
            ]
        )
        for number in range(4)
    ]
    rows = [
        {
            "doc_id": number,
            "segment": 0,
            "split": "train",
            "byte_start": 0,
            "is_last": True,
            "text": segment.text,
            "message_role": [message.role for message in segment.messages],
            "message_end": np.cumsum([len(message.content.encode()) + 1 for message in segment.messages]).tolist(),
            "message_trained": [message.is_trained for message in segment.messages],
        }
        for number, segment in enumerate(segments)
    ]
    table = pa.Table.from_pylist(rows, schema=shard_schema(conversations=True))
    encodings = tokenizer.encode_segments(segments)
    found = {}
    for block in source_blocks(table, tokenizer, max_length=120).to_pylist():
        ends = [*block["piece_start"][1:], len(block["token_ids"])]
        for start, end, doc_id in zip(block["piece_start"], ends, block["piece_doc_id"], strict=True):
            found[doc_id] = (block["token_ids"][start:end], block["is_trained"][start:end])
    assert found == {
        doc_id: (encodings[doc_id].ids.tolist(), np.asarray(encodings[doc_id].is_trained).tolist())
        for doc_id in range(4)
    }
    learnt = [any(trained) and not all(trained) for _, trained in found.values()]
    assert learnt == [True] * 4


def test_a_source_of_conversations_is_adapted_on_each_of_them_alone() -> None:
    adapt = AdaptConfig(batch_size=1)
    assert adapt.training(TrainConfig(), isolate=True).isolate_documents
    assert not adapt.training(TrainConfig(isolate_documents=True)).isolate_documents


@pytest.fixture(scope="module")
def config(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide the tiny run with an adapted source."""
    text = tiny_config.read_text().replace("\n[shard]", f"{ADAPT}\n[shard]", 1).replace('"tiny"', '"adapted"')
    path = tmp_path_factory.mktemp("adapt") / "adapted.toml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapt") / "run"
    ptafuse("logits", str(config), "--run", str(folder), "--local", "--upstream")
    return folder


def resolved(run: Path) -> ResolvedRun:
    return recorded_run(Store(str(run)), "adapted")


def trained_on(run: Path, fold: str) -> set[int]:
    """Return the documents that the model of a fold is trained on."""
    blocks = (run / resolved(run).steps[f"adapt/neox-{fold}"].folder / "blocks").iterdir()
    return {doc_id for path in blocks for row in pq.read_table(path)["piece_doc_id"].to_pylist() for doc_id in row}


@pytest.mark.slow
def test_no_document_is_dumped_by_a_model_that_saw_it(run: Path) -> None:
    steps = resolved(run).steps
    for shard, path in enumerate(sorted((run / steps["logits/neox"].folder / "manifests").glob("shard-*.json"))):
        fold = ("even", "odd")[shard % 2]
        model = steps[f"adapt/neox-{fold}"]
        manifest = json.loads(path.read_text())
        assert {name: ref["folder"] for name, ref in manifest["inputs"].items() if name != "shard"} == {
            fold: model.folder
        }
        dumped = set(pq.read_table(run / manifest["data"]["key"])["doc_id"].to_pylist())
        seen = trained_on(run, fold)
        assert seen
        assert dumped
        assert not seen & dumped


@pytest.mark.slow
def test_held_out_documents_train_no_source(run: Path) -> None:
    shards = run / resolved(run).steps["shard"].folder / "data"
    rows = [row for path in shards.iterdir() for row in pq.read_table(path).to_pylist()]
    train = {row["doc_id"] for row in rows if row["split"] == "train"}
    assert train < {row["doc_id"] for row in rows}
    assert trained_on(run, "even") | trained_on(run, "odd") == train


@pytest.mark.slow
def test_a_document_of_both_folds_trains_neither(config: Path, run: Path, tmp_path: Path) -> None:
    lines = Path(str(load_config(config).dataset.path)).read_text().splitlines()
    first, second = sorted(trained_on(run, "odd"))[0], sorted(trained_on(run, "even"))[0]  # of even and of odd shards
    lines[second] = lines[first]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(lines) + "\n")
    other = tmp_path / "run"
    arguments = ("--run", str(other), "--local", "--upstream", "--set", f"dataset.path={corpus}")
    shown = ptafuse("adapt", str(config), *arguments).stdout
    assert shown.count("1 documents are left out: the fold that it dumps has equal ones") == 2
    assert trained_on(other, "odd") == trained_on(run, "odd") - {first}
    assert trained_on(other, "even") == trained_on(run, "even") - {second}


@pytest.mark.slow
def test_another_run_takes_over_the_adapted_models_and_their_logits(config: Path, run: Path, tmp_path: Path) -> None:
    source = tmp_path / "other"
    shutil.copytree(run, source)
    there = sorted((source / resolved(run).steps["logits/neox"].folder / "manifests").glob("shard-*.json"))
    for manifest in there[-2:]:  # one of each fold
        manifest.unlink()
    here = tmp_path / "here"
    arguments = (str(config), "--run", str(here), "--local", "--upstream")
    shown = ptafuse("logits", *arguments, "--set", f"logits_from={source}").stdout
    for fold in ("even", "odd"):
        assert f"adapt/neox-{fold}: the model is copied from {source}" in shown
    assert f"logits/neox: {len(there) - 2} of {len(there)} shards are read in {source}" in shown
    assert "step 1/" not in shown, "nothing is trained"
    step = resolved(here).steps["logits/neox"]
    for shard in range(len(there)):
        rows = [Store(str(folder)).read_manifest(step.folder, shard) for folder in (here, run)]
        assert all(manifest is not None for manifest in rows)
        assert len({manifest.data.sha256 for manifest in rows if manifest is not None}) == 1
    assert "match their manifests; 0 shards" in ptafuse("verify", str(here)).stdout
    assert "nothing to do" in ptafuse("adapt", *arguments).stdout


@pytest.mark.slow
def test_a_source_of_another_name_is_taken_over_with_files_in_subfolders(
    config: Path, run: Path, tmp_path: Path
) -> None:
    source, renamed = tmp_path / "other", tmp_path / "renamed.toml"
    shutil.copytree(run, source)
    steps = resolved(run).steps
    folder = source / steps["adapt/neox-even"].folder
    (source / "adapt/aaa-even" / folder.name / "blocks").mkdir(parents=True)  # of an attempt that was not finished
    nested = folder / "model" / "additional_chat_templates" / "tool_use.jinja"
    nested.parent.mkdir()
    nested.write_text("{{ messages }}")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model_files"]["additional_chat_templates/tool_use.jinja"] = file_sha256(nested)
    raw = (json.dumps(manifest, indent=1) + "\n").encode()
    (folder / "manifest.json").write_bytes(raw)
    for path in (source / steps["logits/neox"].folder / "manifests").glob("shard-*.json"):
        value = json.loads(path.read_text())
        if "even" in value["inputs"]:
            value["inputs"]["even"] |= {"data_sha256": sha256(raw), "manifest_sha256": sha256(raw)}
            path.write_text(json.dumps(value))
    renamed.write_text(config.read_text().replace('name = "neox"', 'name = "pythia"'))
    here = tmp_path / "here"
    arguments = (str(renamed), "--run", str(here), "--local", "--upstream", "--set", f"logits_from={source}")
    shown = ptafuse("logits", *arguments).stdout
    assert "adapt/pythia-even: the model is copied from" in shown
    assert re.search(r"logits/pythia: (\d+) of \1 shards are read in", shown)
    model = here / resolved(here).steps["adapt/pythia-even"].folder / "model"
    assert (model / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"
    assert "; 0 shards or models do not" in ptafuse("verify", str(here)).stdout
    inputs = {
        reference["folder"].split("/")[1]
        for path in here.glob("logits/pythia/*/manifests/shard-*.json")
        for name, reference in json.loads(path.read_text())["inputs"].items()
        if name != "shard"
    }
    assert inputs == {"pythia-even", "pythia-odd"}, "its manifests name the models of this run"


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["README.md", "model.safetensors"])
def test_a_model_without_all_its_files_is_not_taken_over(config: Path, run: Path, tmp_path: Path, missing: str) -> None:
    source = tmp_path / "other"
    shutil.copytree(run, source)
    next(source.glob(f"adapt/neox-even/*/model/{missing}")).unlink()
    arguments = ("--run", str(tmp_path / "here"), "--local", "--upstream", "--set", f"logits_from={source}")
    refused = ptafuse("adapt", str(config), *arguments, check=False)
    assert refused.returncode == 1
    assert "is marked as done, and its model cannot be copied:" in refused.stderr
    assert missing in refused.stderr
    assert "or remove logits_from: both adapt the source here" in refused.stderr


@pytest.mark.slow
def test_a_damaged_model_is_not_taken_over(config: Path, run: Path, tmp_path: Path) -> None:
    source = tmp_path / "other"
    shutil.copytree(run, source)
    weights = next(source.glob("adapt/neox-even/*/model/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    here = tmp_path / "here"
    arguments = ("--run", str(here), "--local", "--upstream", "--set", f"logits_from={source}")
    refused = ptafuse("adapt", str(config), *arguments, check=False)
    assert refused.returncode == 1
    assert f"{weights.name} is not the file that was written. Run `ptafuse verify {source} --repair`" in refused.stderr
    assert not list(here.glob("adapt/neox-even/*/manifest.json"))


@pytest.mark.slow
def test_rows_are_those_of_the_model_that_was_adapted(run: Path, config: Path) -> None:
    found = resolved(run)
    store, loaded = Store(str(run)), load_config(config)
    for shard in (0, 1):
        manifest = store.read_manifest(found.steps["logits/neox"].folder, shard)
        segments = store.read_manifest(found.steps["shard"].folder, shard)
        assert manifest is not None
        assert segments is not None
        folder = run / found.steps[f"adapt/neox-{('even', 'odd')[shard]}"].folder / "model"
        inputs = {"shard": store.read_table(segments.data, remake="")}
        tables = []
        for path in (folder, loaded.sources[0].path):
            stage = LogitsStage(loaded.logits, ModelConfig(name="neox", path=path))
            stage.setup()
            tables.append(stage.run(inputs).table)
        committed = store.read_table(manifest.data, remake="")
        assert committed["token_ids"] == tables[0]["token_ids"]
        adapted, original, stored = (
            np.array(part["gold_logprob"].combine_chunks().flatten().drop_null()) for part in (*tables, committed)
        )
        np.testing.assert_allclose(stored, adapted, rtol=2e-3, atol=2e-3)
        assert np.abs(adapted - original).mean() > 0.01
        assert stored.mean() > original.mean(), "it has learnt something of the text's kind"


@pytest.mark.slow
def test_a_second_command_has_nothing_to_do_and_the_cost_is_shown(run: Path, config: Path) -> None:
    again = ptafuse("logits", str(config), "--run", str(run), "--local", "--upstream").stdout
    for line in ("adapt/neox-even: nothing to do", "adapt/neox-odd: nothing to do", "logits/neox: nothing to do"):
        assert line in again
    assert "adapt/neox-odd" in ptafuse("report", str(run)).stdout
    planned = ptafuse("plan", str(config), "--run", str(run)).stdout
    assert "adapt/neox-even" in planned
    assert ptafuse("verify", str(run)).returncode == 0
    weights = next(run.glob("adapt/neox-even/*/model/*.safetensors"))
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-1] + b"x")
    assert "adapt/neox-even" in ptafuse("verify", str(run), check=False).stdout
    weights.write_bytes(raw)


@pytest.mark.slow
def test_sources_without_it_are_dumped_as_they_are(tiny_config: Path, tmp_path: Path) -> None:
    said = ptafuse("adapt", str(tiny_config), "--run", str(tmp_path / "run"), "--local").stdout
    assert "adapt: nothing to do (no source has `adapt`)" in said
    assert "adapt" not in {step.stage for step in recorded_run(Store(str(tmp_path / "run")), "tiny").steps.values()}


@pytest.mark.slow
def test_one_shard_is_refused_before_anything_is_trained(config: Path, tmp_path: Path) -> None:
    sets = ("--set", "shard.documents_per_shard=100")
    ptafuse("shard", str(config), "--run", str(tmp_path / "run"), "--local", *sets)
    refused = ptafuse("adapt", str(config), "--run", str(tmp_path / "run"), "--local", *sets, check=False)
    assert refused.returncode == 1
    assert "these 0 of 1 contain no text to train on: lower shard.documents_per_shard" in refused.stderr


def test_logits_without_the_adapted_model_says_what_to_run(config: Path, tmp_path: Path) -> None:
    ptafuse("shard", str(config), "--run", str(tmp_path / "run"), "--local")
    refused = ptafuse("logits", str(config), "--run", str(tmp_path / "run"), "--local", check=False)
    assert refused.returncode == 1
    assert "logits/neox needs the result of adapt/neox-even, which has not run yet: run `make adapt" in refused.stderr

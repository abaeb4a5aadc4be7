"""The shard stage: every document is a row, in quarantine, or counted."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pytest

from stages.contract.schemas import SHARD
from stages.contract.stage import StageOutput
from stages.models.config import ModelConfig
from stages.models.tokenizer import SegmentTokenizer
from stages.shard.config import ShardConfig
from stages.shard.stage import ShardStage
from tests.tiny_tokenizers import TEXTS, save_tokenizer

DOCUMENTS = [
    TEXTS[0],
    "".join(TEXTS),
    "",
    " \n\t ",
    "a\x00b\r\n" * 40,
    "שלום עולם " * 30,
    "👨‍👩‍👧" * 20,
    "same text",
    "same text",
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, ...]:
    folder: Path = tmp_path_factory.mktemp("tokenizers")
    families = {"target": "spm-bpe", "one": "byte-bpe", "two": "unigram"}
    return tuple(
        ModelConfig(name=name, path=save_tokenizer(family, folder / name)) for name, family in families.items()
    )


def _run(models: tuple[ModelConfig, ...], documents: list[bytes | None], **settings: float) -> StageOutput:
    stage = ShardStage(ShardConfig(**{"max_length": 64, "validation_fraction": 0.3, **settings}), models)
    stage.setup()
    return stage.run({"documents": _table(documents)})


def _table(documents: list[bytes | None], first: int = 100) -> pa.Table:
    ids = pa.array(range(first, first + len(documents)), pa.int64())
    return pa.table({"doc_id": ids, "text": pa.array(documents, pa.large_binary())})


@pytest.fixture(scope="module")
def output(models: tuple[ModelConfig, ...]) -> StageOutput:
    return _run(models, [text.encode() for text in DOCUMENTS])


def test_the_table_has_the_schema(output: StageOutput) -> None:
    assert output.table.schema.equals(SHARD, check_metadata=True)
    output.table.validate(full=True)


def test_segments_concatenate_to_their_documents(output: StageOutput) -> None:
    rows = output.table.to_pylist()
    for index, document in enumerate(DOCUMENTS):
        own = [row for row in rows if row["doc_id"] == 100 + index]
        if not document.strip():
            assert own == []
            continue
        assert "".join(row["text"] for row in own) == document
        assert [row["segment"] for row in own] == list(range(len(own)))
        assert [row["is_last"] for row in own] == [False] * (len(own) - 1) + [True]
        before = 0
        for row in own:
            assert row["byte_start"] == before
            before += len(row["text"].encode())


def test_every_segment_fits_every_tokenizer_and_tokens_are_counted(
    output: StageOutput, models: tuple[ModelConfig, ...]
) -> None:
    rows = output.table.to_pylist()
    for model in models:
        tokenizer = SegmentTokenizer.load(model)
        lengths = [len(tokenizer.encode(row["text"], is_last=row["is_last"]).ids) for row in rows]
        assert max(lengths) <= 64
        assert output.health[f"tokens/{model.name}"] == sum(lengths)
    assert output.num_tokens == output.health["tokens/target"]


def test_health_adds_up(output: StageOutput) -> None:
    health = output.health
    assert health["documents"] == 7
    assert health["empty_documents"] == 2
    assert health["segments"] == output.table.num_rows == health["train_segments"] + health["validation_segments"]
    assert health["validation_segments"] == output.table["split"].to_pylist().count("validation")
    assert health["bytes"] == sum(len(text.encode()) for text in DOCUMENTS if text.strip())
    assert output.quarantine == ()


def test_the_split_depends_only_on_a_hash_of_the_document(models: tuple[ModelConfig, ...]) -> None:
    documents = [f"document number {index}".encode() for index in range(300)]
    rows = _run(models, documents, validation_fraction=0.2).table.to_pylist()
    for row in rows:
        share = int(hashlib.sha256(row["text"].encode()).hexdigest()[:16], 16) / 2**64
        assert row["split"] == ("validation" if share < 0.2 else "train")
    assert 30 <= sum(row["split"] == "validation" for row in rows) <= 90
    none = _run(models, documents, validation_fraction=0).table["split"].to_pylist()
    assert set(none) == {"train"}


def test_a_test_split_leaves_the_validation_split_unchanged(models: tuple[ModelConfig, ...]) -> None:
    documents = [f"document number {index}".encode() for index in range(300)]
    before = _run(models, documents, validation_fraction=0.2).table["split"].to_pylist()
    output = _run(models, documents, validation_fraction=0.2, test_fraction=0.3)
    split = output.table["split"].to_pylist()
    assert [name == "validation" for name in split] == [name == "validation" for name in before]
    assert 60 <= split.count("test") <= 120
    assert output.health["test_segments"] == split.count("test")
    assert output.health["validation_segments"] == split.count("validation")
    assert output.health["train_segments"] == split.count("train")


def test_splits_that_leave_nothing_to_train_on_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.5 \+ 0\.5 leaves no document to train on"):
        ShardConfig(validation_fraction=0.5, test_fraction=0.5)


def test_segments_of_one_document_and_equal_documents_share_a_split(output: StageOutput) -> None:
    splits: dict[str, set[str]] = {}
    for row in output.table.to_pylist():
        splits.setdefault(DOCUMENTS[row["doc_id"] - 100], set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values())


def test_running_again_gives_the_same_rows(output: StageOutput, models: tuple[ModelConfig, ...]) -> None:
    again = _run(models, [text.encode() for text in DOCUMENTS])
    assert again.table.equals(output.table)
    assert again.health == output.health


def test_documents_do_not_depend_on_their_neighbours(output: StageOutput, models: tuple[ModelConfig, ...]) -> None:
    alone = _run(models, [DOCUMENTS[1].encode()]).table
    together = output.table.filter(pa.compute.equal(output.table["doc_id"], 101))
    assert alone.drop_columns("doc_id").equals(together.drop_columns("doc_id"))


def test_bad_documents_reach_quarantine_and_the_others_go_on(models: tuple[ModelConfig, ...]) -> None:
    table = _table([b"fine", b"abc\xff\xfe", None, None, "\u200b".encode(), "\ud800".encode(errors="surrogatepass")])
    errors = [None, None, None, "not valid JSON: Expecting value", None, None]
    stage = ShardStage(ShardConfig(max_length=64), models[:2])
    stage.setup()
    output = stage.run({"documents": table.append_column("error", pa.array(errors, pa.string()))})
    assert [(bad.doc_id, bad.segment, bad.error) for bad in output.quarantine] == [
        (101, -1, "InvalidUtf8"),
        (102, -1, "NullText"),
        (103, -1, "BadRecordLine"),
        (105, -1, "InvalidUtf8"),
    ]
    assert "byte 3 of 5" in output.quarantine[0].message
    assert output.quarantine[2].message == "not valid JSON: Expecting value"
    assert output.table["doc_id"].to_pylist() == [100, 104]


def test_a_document_without_any_cut_reaches_quarantine(models: tuple[ModelConfig, ...]) -> None:
    arabic = "\ufdfa"  # one character that NFKC makes 18 of
    output = _run(models, [b"The dog", arabic.encode() * 3], max_length=8)
    assert [(bad.doc_id, bad.error) for bad in output.quarantine] == [(101, "CannotCut")]
    assert "raise shard.max_length" in output.quarantine[0].message
    assert set(output.table["doc_id"].to_pylist()) == {100}


def test_a_shard_without_documents_is_an_empty_table(models: tuple[ModelConfig, ...]) -> None:
    output = _run(models, [])
    assert output.table.schema.equals(SHARD, check_metadata=True)
    assert (output.table.num_rows, output.num_tokens, output.health["documents"]) == (0, 0, 0)

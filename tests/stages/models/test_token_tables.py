"""Token tables: what is written is what the tokenizer says, and what is damaged or stale is made again."""

import json
import logging
import shutil
from dataclasses import fields
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest

from stages.contract.filesystem import StoreError
from stages.contract.store import Store
from stages.models import token_tables
from stages.models.config import ModelConfig
from stages.models.token_tables import (
    DamagedTableError,
    TokenTable,
    TokenTables,
    check_file,
    is_of_this_version,
    is_table_file,
    table_key,
    table_settings,
    table_to_bytes,
)
from stages.models.tokenizer import SegmentTokenizer
from tests.tiny_tokenizers import FAMILIES, save_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, ModelConfig]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {family: ModelConfig(name=family, path=save_tokenizer(family, folder / family)) for family in FAMILIES}


@pytest.fixture(autouse=True)
def _forget_tables():
    """As in a process that has just started."""
    token_tables._LOADED.clear()


@pytest.fixture
def no_tokenizers(monkeypatch):
    """Any use of a tokenizer fails from here on."""

    def refuse() -> None:
        def fail(model):
            raise AssertionError(f"the tokenizer of {model.name} was loaded")

        token_tables._LOADED.clear()
        monkeypatch.setattr(SegmentTokenizer, "load", fail)

    return refuse


def assert_same(found: TokenTable, tokenizer: SegmentTokenizer) -> None:
    for field in fields(tokenizer.vocabulary):
        ours, theirs = (getattr(part.vocabulary, field.name) for part in (found, tokenizer))
        if isinstance(theirs, np.ndarray):
            assert ours.dtype == theirs.dtype, field.name
            np.testing.assert_array_equal(ours, theirs)
        else:
            assert ours == theirs, field.name
    assert found.texts == tuple(map(tokenizer.vocabulary.text, range(tokenizer.vocabulary.size)))
    for name in ("prefix_id", "has_dummy_prefix", "spells_text"):
        assert getattr(found, name) == getattr(tokenizer, name), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("url", ["local", "memory://token-tables"])
def test_a_table_that_is_read_says_what_the_tokenizer_says(models, family, url, tmp_path, no_tokenizers) -> None:
    store = Store(str(tmp_path) if url == "local" else f"{url}-{family}")
    tokenizer = SegmentTokenizer.load(models[family])
    assert_same(TokenTables(store).read(models[family]), tokenizer)
    no_tokenizers()
    assert_same(TokenTables(store).read(models[family]), tokenizer)


def test_some_token_is_part_of_a_character_and_has_no_text(models, tmp_path) -> None:
    TokenTables(Store(str(tmp_path))).read(models["byte-bpe"])
    table = pq.read_table(tmp_path / table_key(models["byte-bpe"]))
    texts, token_bytes = table["text"].to_pylist(), table["bytes"].to_pylist()
    assert None in texts
    assert all(text is None or text.encode() == token for text, token in zip(texts, token_bytes, strict=True))


def test_token_ids_join_to_texts_in_duckdb(models, tmp_path) -> None:
    model = models["spm-bpe"]
    TokenTables(Store(str(tmp_path))).read(model)
    tokenizer = SegmentTokenizer.load(model)
    encoding = tokenizer.encode("The quick brown fox", is_last=True)
    duckdb.execute("create or replace temp table logits as select ? as token_ids", [encoding.ids.tolist()])
    found = duckdb.execute(
        """
        select string_agg(t.text, '' order by l.position) filter (not t.special), list(t.role) filter (t.role is not null)
        from (select unnest(token_ids) as id, generate_subscripts(token_ids, 1) as position from logits) l
        join read_parquet(?) t using (id)
        """,
        [str(tmp_path / "tokenizers" / "spm-bpe" / "*" / "tokens.parquet")],
    ).fetchall()
    assert found == [(" The quick brown fox", ["bos", "eos"])]


def test_nothing_is_written_where_a_command_only_reads(models, tmp_path) -> None:
    model = models["spm-bpe"]
    tables = TokenTables(Store(str(tmp_path)), may_write=False)
    assert_same(tables.read(model), SegmentTokenizer.load(model))
    np.testing.assert_array_equal(tables.keep(model, model, 1)("exact", lambda: np.arange(3, dtype=np.int32)), range(3))
    assert not list(tmp_path.iterdir())


def test_a_run_directory_that_cannot_be_written_to_can_be_read(models, tmp_path, caplog, monkeypatch) -> None:
    def refuse(key, raw):
        raise StoreError(f"{key}: the disk is mounted read-only")

    store = Store(str(tmp_path))
    monkeypatch.setattr(store, "create", refuse)
    with caplog.at_level(logging.WARNING):
        assert_same(TokenTables(store).read(models["spm-bpe"]), SegmentTokenizer.load(models["spm-bpe"]))
    assert "mounted read-only; the tokenizers will be loaded again next time" in caplog.text


def flipped(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 0x55]) + raw[at + 1 :]


DAMAGES = {
    "early byte": lambda raw: flipped(raw, len(raw) // 5),
    "middle byte": lambda raw: flipped(raw, len(raw) // 2),
    "metadata": lambda raw: raw.replace(b'"bos_id":', b'"bos_iD":'),
    "other value": lambda raw: raw.replace(b'"has_dummy_prefix":true', b'"has_dummy_prefix":null'),
    "cut short": lambda raw: raw[: len(raw) // 2],
    "end": lambda raw: raw[:-1],
    "empty": lambda raw: b"",
    "other file": lambda raw: b"<html>404</html>" * 100,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_table_is_made_again_with_a_message(models, tmp_path, caplog, damage) -> None:
    model = models["spm-bpe"]
    store = Store(str(tmp_path))
    TokenTables(store).read(model)
    file = tmp_path / table_key(model)
    sound = file.read_bytes()
    damaged = DAMAGES[damage](sound)
    assert damaged != sound
    file.write_bytes(damaged)
    token_tables._LOADED.clear()
    with caplog.at_level(logging.WARNING):
        assert_same(TokenTables(store).read(model), SegmentTokenizer.load(model))
    assert "it is rebuilt from the tokenizer" in caplog.text
    assert str(table_key(model)) in caplog.text
    assert file.read_bytes() == sound


def test_a_damaged_byte_is_noticed_or_not_read(models, tmp_path) -> None:
    model = models["wordpiece"]
    sound = table_to_bytes(TokenTable.of(SegmentTokenizer.load(model)), table_settings(model))
    key = table_key(model)
    check_file(key, sound)
    unnoticed = []
    for at in range(0, len(sound), 37):
        try:
            check_file(key, flipped(sound, at))
        except DamagedTableError:
            continue
        unnoticed.append(at)
    # What no reader looks at, as statistics in the footer, may differ; what is read may not.
    for at in unnoticed:
        table = token_tables.table_from_bytes(flipped(sound, at), table_settings(model))
        assert_same(table, SegmentTokenizer.load(model))
    assert len(unnoticed) < len(sound) / 37 / 4


def test_a_table_of_another_tokenizer_is_stale(models, tmp_path, caplog) -> None:
    store = Store(str(tmp_path))
    tables = TokenTables(store)
    for family in ("byte-bpe", "spm-bpe"):
        tables.read(models[family])
    shutil.copy(tmp_path / table_key(models["byte-bpe"]), tmp_path / table_key(models["spm-bpe"]))
    with pytest.raises(DamagedTableError, match="is in the folder of"):
        check_file(table_key(models["spm-bpe"]), store.read(table_key(models["spm-bpe"])))
    token_tables._LOADED.clear()
    with caplog.at_level(logging.WARNING):
        assert_same(tables.read(models["spm-bpe"]), SegmentTokenizer.load(models["spm-bpe"]))
    assert "stale: it was built from another tokenizer" in caplog.text


def test_whatever_changes_a_vocabulary_changes_the_folder(tmp_path) -> None:
    folder = save_tokenizer("spm-bpe", tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"vocab_size": 390}))
    model = ModelConfig(name="m", path=folder)
    keys = {table_key(model)}

    def differs(other: ModelConfig) -> None:
        assert table_key(other) not in keys
        keys.add(table_key(other))

    differs(model.model_copy(update={"bos": False}))
    differs(model.model_copy(update={"control_tokens": "parse"}))
    differs(model.model_copy(update={"trust_remote_code": True}))
    differs(model.model_copy(update={"reads_conversations": True}))
    differs(model.model_copy(update={"reads_conversations": True, "chat_template": "plain"}))
    (folder / "config.json").write_text(json.dumps({"vocab_size": 380}))
    differs(model)
    other = save_tokenizer("spm-bpe", tmp_path / "other", vocab_size=350)
    (folder / "tokenizer.json").write_bytes((other / "tokenizer.json").read_bytes())
    differs(model)
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    assert table_key(model.model_copy(update={"path": moved})) == table_key(model)


def test_a_map_is_computed_once(models, tmp_path, no_tokenizers) -> None:
    source, target = models["spm-bpe"], models["byte-bpe"]
    values = np.array([3, -1, 2], np.int32)
    assert_equal = np.testing.assert_array_equal
    assert_equal(TokenTables(Store(str(tmp_path))).keep(source, target, 1)("exact", lambda: values), values)
    keep = TokenTables(Store(str(tmp_path))).keep(source, target, 1)

    def fail() -> np.ndarray:
        raise AssertionError("computed again")

    assert_equal(keep("exact", fail), values)
    with pytest.raises(AssertionError, match="computed again"):
        keep("prefix", fail)
    with pytest.raises(AssertionError, match="computed again"):
        TokenTables(Store(str(tmp_path))).keep(target, source, 1)("exact", fail)


def test_maps_of_another_version_are_made_again(models, tmp_path, caplog) -> None:
    source, target = models["spm-bpe"], models["byte-bpe"]
    tables = TokenTables(Store(str(tmp_path)))
    old, new = np.zeros(3, np.int32), np.ones(3, np.int32)
    tables.keep(source, target, 1)("exact", lambda: old)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(tables.keep(source, target, 2)("exact", lambda: new), new)
    assert "stale" in caplog.text
    np.testing.assert_array_equal(tables.keep(source, target, 2)("exact", lambda: old), new)


def test_files_are_told_from_others_by_their_names(models, tmp_path) -> None:
    store = Store(str(tmp_path))
    tables = TokenTables(store)
    tables.read(models["spm-bpe"])
    tables.keep(models["spm-bpe"], models["unigram"], 1)("source-cut", lambda: np.zeros(4, np.int32))
    keys = [entry.key for entry in store.files("tokenizers")]
    assert len(keys) == 2
    for key in keys:
        assert is_table_file(key)
        check_file(key, store.read(key))
        assert is_of_this_version(key, store.read(key))
    assert not is_table_file("tokenizers/spm-bpe/notes.parquet")
    assert not is_table_file(keys[0] + ".bak")

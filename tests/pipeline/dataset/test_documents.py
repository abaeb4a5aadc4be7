"""Every source gives the same documents, under the same numbers, for every way to split them into shards."""

import gzip
import json
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.data_files import DataFilesDict, DataFilesList
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.dataset import find
from pipeline.dataset.documents import (
    DOCUMENTS,
    ShardRange,
    check_dataset,
    dataset_identity,
    plan_documents,
    read_documents,
    read_kinds,
)
from pipeline.dataset.files import DatasetError
from stages.shard.config import DatasetConfig
from tests.texts import texts

TEXTS = [f"document {index}: é日😀\r\n{'x' * index}" for index in range(23)]


def _lines(found: list[str]) -> bytes:
    return b"".join(
        json.dumps({"text": text, "id": 1}, ensure_ascii=bool(i % 2)).encode() + b"\n" for i, text in enumerate(found)
    )


def _zstd(raw: bytes) -> bytes:
    """Two frames, as parallel compressors write."""
    codec = pa.Codec("zstd")
    half = len(raw) // 2
    return codec.compress(raw[:half], asbytes=True) + codec.compress(raw[half:], asbytes=True)


def _parquet(found: list[str | None], kind: pa.DataType | None = None, row_group_size: int = 4) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"other": pa.array(range(len(found))), "text": pa.array(found, kind or pa.string())})
    pq.write_table(table, sink, row_group_size=row_group_size)
    return sink.getvalue().to_pybytes()


def _write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, raw in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)
    return folder


def _read_all(dataset: DatasetConfig, per_shard: int) -> pa.Table:
    plan = plan_documents(dataset, per_shard)
    for part in plan[:-1]:
        assert part.num_documents == per_shard
    tables = [read_documents(dataset, ShardRange.from_json(json.loads(json.dumps(part.to_json())))) for part in plan]
    for part, table in zip(plan, tables, strict=True):
        assert table.schema.equals(DOCUMENTS)
        assert table.num_rows == part.num_documents
        assert table["doc_id"].to_pylist() == list(range(part.first_doc_id, part.first_doc_id + part.num_documents))
    return pa.concat_tables(tables)


def _texts(table: pa.Table) -> list[str | None]:
    return [None if raw is None else raw.decode() for raw in table["text"].to_pylist()]


SOURCES: dict[str, dict[str, bytes]] = {
    "one.jsonl": {"one.jsonl": _lines(TEXTS)},
    "one.json": {"one.json": _lines(TEXTS)},
    "no-newline-at-end.jsonl": {"no-newline-at-end.jsonl": _lines(TEXTS)[:-1]},
    "blank-lines.jsonl": {"blank-lines.jsonl": b"\n" + _lines(TEXTS[:4]) + b"\n \r\n" + _lines(TEXTS[4:]) + b"\n\n"},
    "crlf.jsonl": {"crlf.jsonl": b"\xef\xbb\xbf" + _lines(TEXTS).replace(b"\n", b"\r\n")},
    "one.jsonl.zst": {"one.jsonl.zst": _zstd(_lines(TEXTS))},
    "one.jsonl.gz": {"one.jsonl.gz": gzip.compress(_lines(TEXTS))},
    "one.parquet": {"one.parquet": _parquet(TEXTS)},
    "large.parquet": {"large.parquet": _parquet(TEXTS, pa.large_string(), 1000)},
    "dictionary.parquet": {"dictionary.parquet": _parquet(TEXTS, pa.dictionary(pa.int32(), pa.string()))},
    "binary.parquet": {"binary.parquet": _parquet([text.encode() for text in TEXTS], pa.binary())},  # type: ignore[misc]
    "folder": {
        "folder/a.jsonl": _lines(TEXTS[:5]),
        "folder/b/a.jsonl": _lines(TEXTS[5:6]),
        "folder/b/b.jsonl": b"",
        "folder/c.jsonl.zst": _zstd(_lines(TEXTS[6:])),
        "folder/README.md": b"not data",
        "folder/_SUCCESS": b"",
        "folder/.hidden.jsonl": _lines(["hidden"]),
    },
    "shards/*.parquet": {
        "shards/0.parquet": _parquet(TEXTS[:10]),
        "shards/1.parquet": _parquet([]),
        "shards/2.parquet": _parquet(TEXTS[10:]),
        "shards/notes.txt": b"not data",
    },
    "texts": {f"texts/{index:03d}.txt": text.encode() for index, text in enumerate(TEXTS)},
    "odd[1].jsonl": {"odd[1].jsonl": _lines(TEXTS)},
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("per_shard", [1, 4, 7, 1000])
def test_every_local_source_gives_all_documents_in_order(source: str, per_shard: int, tmp_path: Path) -> None:
    _write(tmp_path, SOURCES[source])
    dataset = DatasetConfig(path=str(tmp_path / source))
    check_dataset(dataset)
    table = _read_all(dataset, per_shard)
    assert _texts(table) == TEXTS
    assert table["error"].null_count == len(TEXTS)


@pytest.fixture
def memory() -> Iterator[Any]:
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_is_read_behind_a_url(source: str, memory: Any) -> None:
    for name, raw in SOURCES[source].items():
        memory.pipe_file(f"/data/{name}", raw)
    dataset = DatasetConfig(path=f"memory://data/{source}")
    check_dataset(dataset)
    assert _texts(_read_all(dataset, 5)) == TEXTS
    before = dataset_identity(dataset)
    assert dataset_identity(dataset) == before
    name = next(name for name in SOURCES[source] if not name.endswith((".md", "_SUCCESS", "notes.txt")))
    memory.pipe_file(f"/data/{name}", SOURCES[source][name] + b"\n")
    assert dataset_identity(dataset) != before


@pytest.mark.parametrize("source", ["one.jsonl", "one.jsonl.zst", "folder", "shards/*.parquet", "texts"])
@pytest.mark.parametrize("wanted", [1, 5, 6, 12, 23, 100])
def test_max_documents_takes_the_first(source: str, wanted: int, tmp_path: Path) -> None:
    dataset = DatasetConfig(path=str(_write(tmp_path, SOURCES[source]) / source), max_documents=wanted)
    assert _texts(_read_all(dataset, 4)) == TEXTS[:wanted]


class HubBuilder:
    """What ``datasets`` knows of a hub dataset before anything is downloaded."""

    def __init__(self, **splits: list[str]) -> None:
        files = {split: DataFilesList(urls, [("etag",)] * len(urls)) for split, urls in splits.items()}
        self.config = datasets.BuilderConfig(name="default", data_files=DataFilesDict(files))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Provide a hub whose files lie in fsspec's memory; what it was asked for is under ``asked``."""
    found: dict[str, Any] = {"asked": [], "splits": {}}

    def load(hub: str, **arguments: Any) -> HubBuilder:
        found["asked"].append((hub, arguments))
        return HubBuilder(**found["splits"])

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the dataset would be downloaded whole"))
    find._hub_files.cache_clear()
    yield found
    find._hub_files.cache_clear()


def test_conversations_of_a_hub_dataset_are_read_where_they_are(hub: dict[str, Any], memory: Any) -> None:
    talks = [[{"content": f"{index}?", "role": "user"}, {"content": "é", "role": "assistant"}] for index in range(9)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"prompt": ["x"] * 9, "messages": talks}), sink, row_group_size=2)
    memory.pipe_file("/owner/name@abc/train_sft.parquet", sink.getvalue().to_pybytes())
    hub["splits"] = {"train_sft": ["memory://owner/name@abc/train_sft.parquet"]}
    dataset = DatasetConfig(hub="owner/name", revision="abc", split="train_sft", messages_column="messages")
    check_dataset(dataset)
    assert [json.loads(text) for text in _texts(_read_all(dataset, 4))] == talks
    with pytest.raises(DatasetError, match=r"column 'prompt' holds x: set dataset\.messages_column to a column of"):
        check_dataset(dataset.model_copy(update={"messages_column": "prompt"}))


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "jsonl.zst"])
def test_a_hub_dataset_is_read_where_it_is(hub: dict[str, Any], memory: Any, suffix: str) -> None:
    write = {"parquet": _parquet, "jsonl": _lines, "jsonl.zst": lambda found: _zstd(_lines(found))}[suffix]
    names = [f"owner/name@abc/en/test-{part:05d}.{suffix}" for part in range(2)]
    for name, found in zip(names, (TEXTS[:9], TEXTS[9:]), strict=True):
        memory.pipe_file(f"/{name}", write(found))
    hub["splits"] = {"train": ["memory://other.pdf"], "test": [f"memory://{name}" for name in names]}
    dataset = DatasetConfig(hub="owner/name", revision="abc", subset="en", split="test", max_documents=20)
    check_dataset(dataset)
    assert _texts(_read_all(dataset, 6)) == TEXTS[:20]
    assert hub["asked"] == [("owner/name", {"name": "en", "revision": "abc"})], "once a process"
    assert [part.file for part in plan_documents(dataset, 6)[1].files] == [
        f"test-{part:05d}.{suffix}" for part in range(2)
    ]
    assert dataset_identity(dataset) == "owner/name@abc:en:test"


def test_only_the_pages_of_the_range_are_fetched_from_the_hub(
    hub: dict[str, Any], memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.memory import MemoryFile

    rng = random.Random(0)
    found = [f"{index} {rng.randbytes(10_000).hex()}" for index in range(500)]
    raw = _parquet(found, row_group_size=20)
    memory.pipe_file("/owner/name@abc/train.parquet", raw)
    hub["splits"] = {"train": ["memory://owner/name@abc/train.parquet"]}
    dataset = DatasetConfig(hub="owner/name", revision="abc")
    plan = plan_documents(dataset, 20)
    fetched = []
    original = MemoryFile.readinto
    monkeypatch.setattr(MemoryFile, "readinto", lambda self, into: fetched.append(len(into)) or original(self, into))
    original_read = MemoryFile.read
    monkeypatch.setattr(MemoryFile, "read", lambda self, size=-1: fetched.append(size) or original_read(self, size))
    assert _texts(read_documents(dataset, plan[7])) == found[140:160]
    assert min(fetched) > 0
    assert sum(fetched) < 4 * 2**20 < len(raw) / 2, "a row group of 25, in buffers of 1 MiB"


def test_a_hub_dataset_that_cannot_be_read_as_asked_is_refused(hub: dict[str, Any], memory: Any) -> None:
    memory.pipe_file("/a.parquet", _parquet(TEXTS).replace(b"text", b"body"))
    hub["splits"] = {"train": ["memory://a.parquet"], "test": ["memory://b.pdf"]}
    with pytest.raises(DatasetError, match=r"no column 'text'.*'other', 'body'"):
        check_dataset(DatasetConfig(hub="owner/name", revision="abc"))
    with pytest.raises(DatasetError, match=r"b\.pdf: unknown format; expected \.parquet"):
        check_dataset(DatasetConfig(hub="owner/name", revision="abc", split="test"))
    with pytest.raises(DatasetError, match=r"no split 'validation'.*'train', 'test'"):
        check_dataset(DatasetConfig(hub="owner/name", revision="abc", split="validation"))


def test_records_that_cannot_be_read_keep_their_number(tmp_path: Path) -> None:
    lines = [
        b'{"text": "first"}',
        b'{"text": "cut off',
        b'{"other": 1}',
        b'["a list"]',
        b'{"text": 7}',
        b'{"text": null}',
        b'{"text": "not \xff UTF-8"}',
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
        b'{"text": "last"}',
    ]
    dataset = DatasetConfig(path=str(_write(tmp_path, {"bad.jsonl": b"\n".join(lines)}) / "bad.jsonl"))
    check_dataset(dataset)
    table = _read_all(dataset, 3)
    rows = dict(
        zip(
            table["doc_id"].to_pylist(),
            zip(table["text"].to_pylist(), table["error"].to_pylist(), strict=True),
            strict=True,
        )
    )
    assert rows[0] == (b"first", None)
    assert rows[9] == (b"last", None)
    assert rows[5] == (None, None)
    assert rows[7] == (b"\xed\xa0\x80", None)  # a lone surrogate stays bytes that are not UTF-8
    for number, part in {
        1: "not valid JSON",
        2: "'other'",
        3: "found list",
        4: "is int",
        6: "not valid JSON",
        8: "not valid JSON",
    }.items():
        text, error = rows[number]
        assert text is None
        assert part in error


def test_nulls_in_parquet_stay_null(tmp_path: Path) -> None:
    _write(tmp_path, {"a.parquet": _parquet(["x", None, "y"])})
    assert _texts(_read_all(DatasetConfig(path=str(tmp_path / "a.parquet")), 2)) == ["x", None, "y"]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=st.lists(texts, min_size=1, max_size=12), per_shard=st.integers(1, 13), escape=st.booleans())
def test_any_text_is_read_back_for_every_number_of_shards(
    found: list[str], per_shard: int, escape: bool, tmp_path: Path
) -> None:
    raw = b"".join(json.dumps({"text": text}, ensure_ascii=escape).encode() + b"\n" for text in found)
    dataset = DatasetConfig(path=str(_write(tmp_path, {"any.jsonl": raw}) / "any.jsonl"))
    assert _texts(_read_all(dataset, per_shard)) == found


def test_one_shard_of_json_lines_is_read_from_where_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = DatasetConfig(path=str(_write(tmp_path, SOURCES["one.jsonl"]) / "one.jsonl"))
    parsed = []
    monkeypatch.setattr(
        "pipeline.dataset.formats._text_of_line", lambda line, column: parsed.append(line) or (line, None)
    )
    plan = plan_documents(dataset, 5)
    starts = [part.files[0].byte_start for part in plan]
    raw = SOURCES["one.jsonl"]["one.jsonl"]
    assert starts == [sum(map(len, raw.splitlines(keepends=True)[:row])) for row in range(0, 23, 5)]
    read_documents(dataset, plan[3])
    assert len(parsed) == 5
    assert b"document 15" in parsed[0]


def test_only_the_row_groups_of_the_range_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = DatasetConfig(path=str(_write(tmp_path, SOURCES["one.parquet"]) / "one.parquet"))
    decoded = []
    original = pq.ParquetFile.iter_batches

    def spy(self: pq.ParquetFile, *args: Any, **kwargs: Any) -> Any:
        decoded.append((kwargs["row_groups"], kwargs["columns"]))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    table = read_documents(dataset, plan_documents(dataset, 5)[1])  # rows 5 to 10, groups of 4
    assert _texts(table) == TEXTS[5:10]
    assert decoded == [([1], ["text"]), ([2], ["text"])]


def test_identity_is_of_names_and_contents(tmp_path: Path) -> None:
    one, two, renamed, changed = (tmp_path / name for name in ("one", "two", "renamed", "changed"))
    _write(one, {"a.jsonl": _lines(TEXTS), "b.jsonl": _lines(TEXTS[:2])})
    _write(two, {"a.jsonl": _lines(TEXTS), "b.jsonl": _lines(TEXTS[:2]), "README.md": b"x"})
    _write(renamed, {"a.jsonl": _lines(TEXTS), "c.jsonl": _lines(TEXTS[:2])})
    _write(changed, {"a.jsonl": _lines(TEXTS), "b.jsonl": _lines(TEXTS[1:3])})
    found = [dataset_identity(DatasetConfig(path=str(folder))) for folder in (one, two, renamed, changed)]
    assert found[0] == found[1]
    assert len(set(found)) == 3


@pytest.mark.parametrize(
    ("files", "path", "error", "message"),
    [
        ({}, "missing.jsonl", FileNotFoundError, "is not a file or folder"),
        ({}, "missing/*.jsonl", FileNotFoundError, "matches no file; expected .parquet"),
        ({"f/README.md": b"x"}, "f", DatasetError, "no file that can be read.*found README.md"),
        ({"a.pdf": b"x"}, "a.pdf", DatasetError, "unknown format; expected .parquet"),
        ({"f/a.pdf": b"x"}, "f/*", DatasetError, "a.pdf: unknown format"),
        ({"f/a.jsonl": b"{}", "f/b.parquet": b""}, "f", DatasetError, "mixes jsonl, parquet: say which with a glob"),
        ({"a.jsonl": b'{"body": 1, "id": 2}\n'}, "a.jsonl", DatasetError, "no column 'text'.*'body', 'id'"),
        (
            {"a.parquet": _parquet(["x"]).replace(b"text", b"body")},
            "a.parquet",
            DatasetError,
            "no column 'text'.*'other', 'body'",
        ),
        ({"a.parquet": _parquet([1], pa.int64())}, "a.parquet", DatasetError, "column 'text' is int64, not text"),  # type: ignore[list-item]
        ({"a.parquet": b"PAR1 no"}, "a.parquet", DatasetError, "not a complete Parquet file"),
        ({"a.json": b'[\n{"text": "x"}\n]'}, "a.json", DatasetError, "is one JSON array; expected JSON lines"),
        ({"a.jsonl": b"plain words\n"}, "a.jsonl", DatasetError, "none of its first lines is a JSON object"),
        ({"a.jsonl": b"\n\n"}, "a.jsonl", DatasetError, "holds no documents"),
        ({"a.jsonl.zst": b"no zstd at all"}, "a.jsonl.zst", DatasetError, "cannot be read to its end"),
    ],
)
def test_unreadable_files_are_refused(
    files: dict[str, bytes], path: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    _write(tmp_path, files)
    with pytest.raises(error, match=message):
        check_dataset(DatasetConfig(path=str(tmp_path / path)))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no file that can be read.*found nothing"):
        check_dataset(DatasetConfig(path=str(tmp_path)))


def test_a_dataset_without_documents_has_no_plan(tmp_path: Path) -> None:
    _write(tmp_path, {"a.jsonl": b""})
    with pytest.raises(DatasetError, match="holds no documents"):
        plan_documents(DatasetConfig(path=str(tmp_path)), 4)


def test_a_truncated_compressed_file_is_no_shorter_dataset(tmp_path: Path) -> None:
    raw = _zstd(_lines(TEXTS))
    _write(tmp_path, {"a.jsonl.zst": raw[:-20]})
    with pytest.raises(DatasetError, match="Is the file complete"):
        plan_documents(DatasetConfig(path=str(tmp_path)), 4)


def test_a_file_that_changed_since_the_plan_is_noticed(tmp_path: Path) -> None:
    dataset = DatasetConfig(path=str(_write(tmp_path, {"a.jsonl": _lines(TEXTS)}) / "a.jsonl"))
    plan = plan_documents(dataset, 5)
    _write(tmp_path, {"a.jsonl": _lines(TEXTS)[3:]})
    with pytest.raises(DatasetError, match="changed after the run was planned"):
        read_documents(dataset, plan[1])
    _write(tmp_path, {"a.jsonl": _lines(TEXTS[:22])})
    with pytest.raises(DatasetError, match="expected rows 20 to 23, found 2 rows"):
        read_documents(dataset, plan[4])
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    with pytest.raises(FileNotFoundError, match="but is missing now"):
        read_documents(DatasetConfig(path=str(tmp_path)), plan[0])


def test_a_dataset_may_move_between_plan_and_reading(tmp_path: Path) -> None:
    _write(tmp_path / "old", SOURCES["folder"])
    plan = plan_documents(DatasetConfig(path=str(tmp_path / "old" / "folder")), 5)
    (tmp_path / "old").rename(tmp_path / "new")
    dataset = DatasetConfig(path=str(tmp_path / "new" / "folder"))
    assert [text for part in plan for text in _texts(read_documents(dataset, part))] == TEXTS


# --- kinds of documents --------------------------------------------------------------------------------------------------


def _with_kinds(folder: Path, file_format: str) -> DatasetConfig:
    kinds = [None if index == 4 else f"kind {index % 3}" for index in range(len(TEXTS))]
    if file_format == "parquet":
        pq.write_table(pa.table({"text": TEXTS, "kind": kinds}), folder / "all.parquet", row_group_size=5)
    else:
        lines = [json.dumps({"kind": kind, "text": text}) for text, kind in zip(TEXTS, kinds, strict=True)]
        (folder / "all.jsonl").write_text("\n".join([*lines, '{"text": "no kind"}', '{"text": "3", "kind": 3}']) + "\n")
    return DatasetConfig(path=str(folder), kind_column="kind")


@pytest.mark.parametrize("file_format", ["parquet", "jsonl"])
def test_kinds_are_those_of_the_documents_of_the_shard(tmp_path: Path, file_format: str) -> None:
    dataset = _with_kinds(tmp_path, file_format)
    check_dataset(dataset)
    found: dict[int, str | None] = {}
    for part in plan_documents(dataset, 4):
        found |= read_kinds(dataset, part)
    expected = {index: None if index == 4 else f"kind {index % 3}" for index in range(len(TEXTS))}
    assert found == (expected if file_format == "parquet" else expected | {23: None, 24: "3"})


@pytest.mark.parametrize("file_format", ["parquet", "jsonl"])
def test_kinds_may_be_numbered(tmp_path: Path, file_format: str) -> None:
    numbers = [1, None, 0, 1]
    if file_format == "parquet":
        pq.write_table(pa.table({"text": TEXTS[:4], "kind": numbers}), tmp_path / "all.parquet")
    else:
        lines = [json.dumps({"text": text, "kind": number}) for text, number in zip(TEXTS, numbers, strict=False)]
        (tmp_path / "all.jsonl").write_text("\n".join(lines) + "\n")
    dataset = DatasetConfig(path=str(tmp_path), kind_column="kind")
    check_dataset(dataset)
    (part,) = plan_documents(dataset, 10)
    assert read_kinds(dataset, part) == {0: "1", 1: None, 2: "0", 3: "1"}


def test_the_first_record_with_a_kind_decides_and_an_empty_kind_is_none(tmp_path: Path) -> None:
    lines = [
        '{"text": "a"}',
        '{"text": "b", "kind": ""}',
        '{"text": "c", "kind": "news"}',
        '{"text": "d", "kind": 1.5}',
    ]
    (tmp_path / "all.jsonl").write_text("\n".join(lines) + "\n")
    dataset = DatasetConfig(path=str(tmp_path), kind_column="kind")
    check_dataset(dataset)
    (part,) = plan_documents(dataset, 10)
    assert read_kinds(dataset, part) == {0: None, 1: None, 2: "news", 3: None}


@pytest.mark.parametrize("value", ['["a"]', "1.5", '{"name": "news"}'])
def test_a_kind_that_is_no_label_is_refused(tmp_path: Path, value: str) -> None:
    (tmp_path / "all.jsonl").write_text('{"text": "a"}\n' + f'{{"text": "b", "kind": {value}}}\n')
    with pytest.raises(DatasetError, match=r"column 'kind' holds .*kind_column to a column of strings or integers"):
        check_dataset(DatasetConfig(path=str(tmp_path), kind_column="kind"))


def test_a_kind_column_that_cannot_be_read_is_refused_before_anything_runs(tmp_path: Path) -> None:
    dataset = _with_kinds(tmp_path, "parquet")
    with pytest.raises(
        DatasetError, match=r"has no column 'subject': set dataset\.kind_column to one of 'text', 'kind'"
    ):
        check_dataset(dataset.model_copy(update={"kind_column": "subject"}))
    plain = tmp_path / "plain.txt"
    plain.write_text("x")
    with pytest.raises(DatasetError, match="plain text files have no columns"):
        check_dataset(DatasetConfig(path=str(plain), kind_column="kind"))


def test_the_kind_column_is_no_setting_of_a_result(tmp_path: Path) -> None:
    dataset = _with_kinds(tmp_path, "jsonl")
    assert dataset.result_settings() == dataset.model_copy(update={"kind_column": None}).result_settings()


def test_a_snapshot_of_a_hub_dataset_is_read_where_there_is_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `hf download --repo-type dataset` leaves it in the cache: links to files that are named by their hashes."""
    blobs = tmp_path / "datasets--me--texts" / "blobs"
    data = tmp_path / "datasets--me--texts" / "snapshots" / "0123abcd" / "data"
    blobs.mkdir(parents=True)
    data.mkdir(parents=True)
    splits = {
        "train-00000-of-00002": ["a", "b"],
        "train-00001-of-00002": ["c"],
        "validation-00000-of-00001": ["held out"],
    }
    for number, (name, column) in enumerate(splits.items()):
        pq.write_table(pa.table({"text": column}), blobs / f"{number:064x}")
        (data / f"{name}.parquet").symlink_to(f"../../../blobs/{number:064x}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it asks the network"))
    dataset = DatasetConfig(path=str(data / "train-*.parquet"))
    [plan] = plan_documents(dataset, 100)
    assert read_documents(dataset, plan)["text"].to_pylist() == [b"a", b"b", b"c"]


def test_a_hub_dataset_that_may_not_be_asked_for_says_what_to_give_instead() -> None:
    assert datasets.config.HF_HUB_OFFLINE, "the tests' own setting"
    with pytest.raises(
        DatasetError, match=r"HF_HUB_OFFLINE is set: .*`hf download --repo-type dataset me/texts"
    ) as refused:
        plan_documents(DatasetConfig(hub="me/texts", revision="main"), 100)
    assert isinstance(refused.value.__cause__, ConnectionError)

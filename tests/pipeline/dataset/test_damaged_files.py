"""Files that are damaged or written in another way than usual: read all the same, or refused with the file and the remedy."""

import codecs
import gzip
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dataset.documents import check_dataset, plan_documents, read_documents
from pipeline.dataset.files import DatasetError
from stages.shard.config import DatasetConfig


def dataset(path: Path | str, **settings: object) -> DatasetConfig:
    return DatasetConfig.model_validate({"path": str(path), **settings})


def rows(config: DatasetConfig, per_shard: int = 3) -> list[tuple[bytes | None, str | None]]:
    check_dataset(config)
    tables = [read_documents(config, part) for part in plan_documents(config, per_shard)]
    return [(row["text"], row["error"]) for table in tables for row in table.to_pylist()]


def documents(config: DatasetConfig, per_shard: int = 3) -> list[str]:
    found = rows(config, per_shard)
    assert [error for _, error in found] == [None] * len(found)
    return [raw.decode() for raw, _ in found if raw is not None]


# --- compression ---------------------------------------------------------------------------------------------------------


def _zstd_frame(raw: bytes, window_log: int) -> bytes:
    """One frame, not compressed, that asks for a window of 2^window_log bytes, as ``zstd --long=N`` writes of large input."""
    header = bytes([0x00, (window_log - 10) << 3])
    block = ((len(raw) << 3) | 1).to_bytes(3, "little")
    return (0xFD2FB528).to_bytes(4, "little") + header + block + raw


def test_zstd_with_a_usual_window_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(_zstd_frame(b'{"text": "x"}\n', 27))
    assert documents(dataset(tmp_path)) == ["x"]


def test_zstd_with_a_long_window_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(_zstd_frame(b'{"text": "x"}\n', 31))
    with pytest.raises(DatasetError, match=r"a\.jsonl\.zst was compressed with a longer window.*zstd -d --long=31"):
        check_dataset(dataset(tmp_path))


# --- Parquet -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_a_damaged_row_group_is_named(tmp_path: Path, compression: str) -> None:
    for number in range(3):
        texts = [f"document {number} {row} {row * 7919 % 104729}" for row in range(60)]
        pq.write_table(
            pa.table({"text": texts}),
            tmp_path / f"{number}.parquet",
            row_group_size=20,
            compression=compression,
            use_dictionary=False,
            write_page_checksum=compression == "none",
        )
    path = tmp_path / "1.parquet"
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    raw = bytearray(path.read_bytes())
    for offset in range(column.total_compressed_size - 60, column.total_compressed_size - 20):
        raw[column.data_page_offset + offset] ^= 0xFF
    path.write_bytes(raw)
    config = dataset(tmp_path)
    check_dataset(config)
    plan = plan_documents(config, 20)
    good = [read_documents(config, part).num_rows for index, part in enumerate(plan) if index != 4]
    assert good == [20] * 8
    with pytest.raises(
        DatasetError, match=r"1\.parquet: row group 1 of 3 \(rows 20 to 40\) cannot be decoded: .*damaged"
    ):
        read_documents(config, plan[4])


def test_a_damaged_footer_of_one_file_of_many_is_named(tmp_path: Path) -> None:
    for number in range(3):
        pq.write_table(pa.table({"text": ["x"]}), tmp_path / f"{number}.parquet")
    path = tmp_path / "1.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"X")
    with pytest.raises(DatasetError, match=r"1\.parquet is not a complete Parquet file"):
        plan_documents(dataset(tmp_path), 20)


@pytest.mark.parametrize("compression", ["snappy", "none"])
def test_any_damaged_byte_is_a_message_that_names_the_file(tmp_path: Path, compression: str) -> None:
    """Or changes nothing that is read, or a text, which only the checksums that a file may have would show."""
    path = tmp_path / "x.parquet"
    texts = [f"document {number}" for number in range(12)]
    pq.write_table(
        pa.table({"text": texts}), path, row_group_size=6, compression=compression, use_dictionary=False
    )  # fmt: skip
    raw = path.read_bytes()
    messages = set()
    for position in range(0, len(raw), 3):
        damaged = bytearray(raw)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            rows(dataset(path), 6)
        except DatasetError as error:
            messages.add(str(error))
    assert len(messages) > 10
    assert [message for message in messages if "x.parquet" not in message] == []


# --- URLs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path):
    """Provide a server of the files in ``tmp_path``, whatever the query."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(send_body=False)

        def do_GET(self) -> None:
            self.answer(send_body=True)

        def answer(self, *, send_body: bool) -> None:
            path = tmp_path / self.path.partition("?")[0].lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            raw = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            if send_body:
                self.wfile.write(raw)

        def log_message(self, *_: object) -> None:
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()
    served.server_close()


@pytest.mark.parametrize("query", ["", "?download=1", "?path=/other/name.bin&x=*", "?a=[1]"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt"])
def test_a_url_may_have_a_query(tmp_path: Path, server: str, name: str, query: str) -> None:
    raw = b"plain" if name == "a.txt" else b'{"text": "plain"}\n'
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    config = dataset(f"{server}/{name}{query}")
    assert documents(config) == ["plain"]
    assert [part.file for shard in plan_documents(config, 3) for part in shard.files] == [name]


def test_a_url_that_leads_nowhere_is_refused(server: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"a\.jsonl\?download=1' is not a file or folder"):
        check_dataset(dataset(f"{server}/a.jsonl?download=1"))


# --- byte order marks ----------------------------------------------------------------------------------------------------

TEXTS = ["erste", "日本", "third"]


def _json_lines(mark: bytes) -> bytes:
    return mark + b"".join(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in TEXTS)


@pytest.mark.parametrize("start", [b"", b"\n", b"\r\n\r\n"], ids=["at once", "after a line", "after lines"])
@pytest.mark.parametrize("per_shard", [1, 3])
def test_a_byte_order_mark_is_no_part_of_json_lines(tmp_path: Path, start: bytes, per_shard: int) -> None:
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + start + _json_lines(b""))
    assert documents(dataset(tmp_path), per_shard) == TEXTS
    (tmp_path / "a.jsonl").write_bytes(_json_lines(codecs.BOM_UTF8) * 2)  # two files, put together
    assert documents(dataset(tmp_path), per_shard) == TEXTS * 2


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    for index, text in enumerate(TEXTS):
        (tmp_path / f"{index}.txt").write_bytes(codecs.BOM_UTF8 + text.encode())
    assert documents(dataset(tmp_path)) == TEXTS


def test_a_json_array_behind_a_byte_order_mark_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(codecs.BOM_UTF8 + b'[{"text": "x"}]')
    with pytest.raises(DatasetError, match="is one JSON array"):
        check_dataset(dataset(tmp_path))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_utf_16_is_recognised(tmp_path: Path, encoding: str) -> None:
    raw = "\ufeff{}\n".encode(encoding)
    (tmp_path / "a.jsonl").write_bytes(raw)
    with pytest.raises(DatasetError, match=r"a\.jsonl begins with a UTF-16 or UTF-32 byte order mark.*iconv -f UTF-16"):
        check_dataset(dataset(tmp_path / "a.jsonl"))
    (tmp_path / "a.txt").write_bytes(raw)
    with pytest.raises(DatasetError, match=r"a\.txt begins with a UTF-16 or UTF-32"):
        check_dataset(dataset(tmp_path / "a.txt", documents="lines"))
    ((text, error),) = rows(dataset(tmp_path / "a.txt"))
    assert text is None
    assert error is not None
    assert "a.txt begins with a UTF-16 or UTF-32 byte order mark" in error


# --- a text file of many documents ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_shard", [1, 2, 7])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_each_line_of_a_text_file_can_be_a_document(tmp_path: Path, per_shard: int, line_end: str) -> None:
    lines = ["\ufefffirst ", "", " \t", "日本", "  indented", "a\x0bb\u2028c", "last"]
    (tmp_path / "a.txt").write_bytes(line_end.join(lines).encode())
    (tmp_path / "b.txt").write_bytes(b"of another file\n")
    config = dataset(tmp_path, documents="lines")
    expected = ["first ", "日本", "  indented", "a\x0bb\u2028c", "last", "of another file"]
    assert documents(config, per_shard) == expected
    assert documents(config.model_copy(update={"max_documents": 3}), per_shard) == expected[:3]
    assert len(documents(dataset(tmp_path), per_shard)) == 2


def test_lines_are_a_setting_of_the_result_and_files_are_not() -> None:
    assert dataset("a.txt").result_settings() == dataset("a.txt", documents="file").result_settings()
    assert dataset("a.txt", documents="lines").result_settings()["documents"] == "lines"


def test_lines_are_refused_of_other_formats_and_of_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_json_lines(b""))
    with pytest.raises(DatasetError, match=r'dataset\.documents = "lines" says how \.txt files are read.*holds jsonl'):
        check_dataset(dataset(tmp_path / "a.jsonl", documents="lines"))
    (tmp_path / "a.txt").write_bytes(b"\n \n")
    with pytest.raises(DatasetError, match="holds no documents"):
        check_dataset(dataset(tmp_path / "a.txt", documents="lines"))

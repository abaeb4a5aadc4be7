"""Every format counts and reads the same rows, and nothing outside of it knows which format a file has."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dataset.documents import check_dataset, plan_documents, read_documents
from pipeline.dataset.formats import FORMATS, LINES, format_of
from stages.shard.config import DatasetConfig

TEXTS = ["one", "zwei", "trois ", "", "πέντε"]


def write(folder: Path, name: str) -> None:
    """Write ``TEXTS`` as a dataset of a format."""
    if name == "parquet":
        pq.write_table(pa.table({"text": TEXTS}), folder / "rows.parquet", row_group_size=2)
    elif name == "jsonl":
        (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    elif name == "txt":
        for number, text in enumerate(TEXTS):
            (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    elif name == LINES:
        (folder / "rows.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    else:
        raise NotImplementedError(f"write the texts in the format {name} here")


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents(name: str, tmp_path: Path) -> None:
    write(tmp_path, name)
    dataset = DatasetConfig(path=str(tmp_path), documents="lines" if name == LINES else "file")
    check_dataset(dataset)
    tables = [read_documents(dataset, part) for part in plan_documents(dataset, 2)]
    expected = [text for text in TEXTS if text or name != LINES]  # a blank line is no document
    assert [table.num_rows for table in tables] == [2, 2, 1][: len(tables)]
    assert [text.decode() for table in tables for text in table["text"].to_pylist()] == expected


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_found_by_each_of_its_suffixes_in_any_case(name: str) -> None:
    found = {suffix: format_of(f"folder/FILE{suffix.upper()}") for suffix in FORMATS[name].suffixes}
    assert found == dict.fromkeys(FORMATS[name].suffixes, FORMATS[name])


def test_a_file_of_no_known_suffix_has_no_format() -> None:
    assert [format_of(name) for name in ("a.pdf", "a.txt.gz", "a.parquet.zst", "jsonl")] == [None] * 4

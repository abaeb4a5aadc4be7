"""Which files a dataset has: links, splits by name, what other tools leave beside data, names behind URLs."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dataset import find
from pipeline.dataset.documents import check_dataset, dataset_identity, plan_documents, read_documents
from pipeline.dataset.files import DatasetError
from pipeline.dataset.find import find_files
from pipeline.dataset.splits import splits_of
from stages.shard.config import DatasetConfig


def write(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": list(texts)}), path)
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def dataset(path: Path | str, **settings: object) -> DatasetConfig:
    return DatasetConfig.model_validate({"path": str(path), **settings})


def documents(config: DatasetConfig) -> list[str]:
    check_dataset(config)
    tables = [read_documents(config, part) for part in plan_documents(config, 3)]
    return [raw.decode() for table in tables for raw in table["text"].to_pylist()]


# --- links ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """Provide a folder with a file of its own, a linked file and a linked folder."""
    elsewhere, data = tmp_path / "elsewhere", tmp_path / "data"
    write(data / "a.jsonl", "own")
    write(elsewhere / "file.jsonl", "linked file")
    write(elsewhere / "folder" / "x.jsonl", "in a linked folder")
    (data / "b.jsonl").symlink_to(elsewhere / "file.jsonl")
    (data / "c").symlink_to(elsewhere / "folder", target_is_directory=True)
    return data


@pytest.mark.parametrize("path", ["", "**/*.jsonl", "*"])
def test_links_are_followed(linked: Path, path: str) -> None:
    found = ["own", "linked file", "in a linked folder"]
    assert documents(dataset(linked / path)) == (found[:2] if path == "*" else found)


@pytest.mark.parametrize("path", ["b.jsonl", "b*.jsonl", "c/x.jsonl", "c/*.jsonl", "c", "?/x.jsonl"])
def test_a_path_may_lead_through_a_link(linked: Path, path: str) -> None:
    assert documents(dataset(linked / path)) == ["linked file" if path[0] == "b" else "in a linked folder"]


def test_a_path_may_be_a_link_to_a_folder(linked: Path) -> None:
    link = linked.parent / "link"
    link.symlink_to(linked, target_is_directory=True)
    assert documents(dataset(link)) == documents(dataset(linked))
    assert dataset_identity(dataset(link)) == dataset_identity(dataset(linked))


@pytest.mark.parametrize("path", ["", "**/*.jsonl"])
def test_cycles_of_links_end(linked: Path, path: str) -> None:
    for index in range(12):
        folder = linked / f"f{index:02d}"
        write(folder / "x.jsonl", f"folder {index}")
        for other in range(12):
            (folder / f"to{other}").symlink_to(linked / f"f{other:02d}", target_is_directory=True)
        (folder / "up").symlink_to("..", target_is_directory=True)
    found = documents(dataset(linked / path))
    assert found == ["own", "linked file", "in a linked folder", *(f"folder {index}" for index in range(12))]


@pytest.mark.parametrize("path", ["", "*.jsonl"])
def test_a_file_with_two_names_is_read_once_under_its_own(
    tmp_path: Path, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "data-2.jsonl", "text")
    (tmp_path / "data-latest.jsonl").symlink_to("data-2.jsonl")
    (tmp_path / "a.jsonl").symlink_to("data-2.jsonl")
    assert documents(dataset(tmp_path / path)) == ["text"]
    assert list(find_files(dataset(tmp_path / path)).paths) == ["data-2.jsonl"]
    assert "a.jsonl links to " in caplog.text
    assert "data-2.jsonl: the file is read once" in caplog.text


def test_a_glob_that_names_a_linked_folder_finds_what_has_another_name_as_well(tmp_path: Path) -> None:
    write(tmp_path / "real" / "x.jsonl", "text")
    (tmp_path / "link").symlink_to("real", target_is_directory=True)
    assert documents(dataset(tmp_path / "l*" / "x.jsonl")) == ["text"]
    assert list(find_files(dataset(tmp_path / "*" / "x.jsonl")).paths) == ["real/x.jsonl"]


@pytest.mark.parametrize("path", ["", "*.jsonl", "b.jsonl"])
@pytest.mark.parametrize("target", ["gone.jsonl", "b.jsonl"], ids=["broken", "to itself"])
def test_a_dangling_link_is_refused(tmp_path: Path, path: str, target: str) -> None:
    write(tmp_path / "a.jsonl", "text")
    (tmp_path / "b.jsonl").symlink_to(target)
    with pytest.raises((DatasetError, FileNotFoundError), match=rf"b\.jsonl.* is a (link to {target}|broken link)"):
        check_dataset(dataset(tmp_path / path))


def test_a_broken_link_that_is_no_data_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "text")
    (tmp_path / "README.md").symlink_to("gone.md")
    (tmp_path / ".b.jsonl").symlink_to("gone.jsonl")
    assert documents(dataset(tmp_path)) == ["text"]


def test_a_folder_that_may_not_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.jsonl", "text")
    write(tmp_path / "secret" / "b.jsonl", "text")
    scandir = find.os.scandir

    def refuse(folder: str):
        if str(folder).endswith("secret"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(DatasetError, match=r"secret cannot be listed \(Permission denied\)"):
        check_dataset(dataset(tmp_path))


def test_what_is_no_part_of_data_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.jsonl", "lost+found.jsonl", ".git/b.jsonl", "_temporary/c.jsonl", ".d.jsonl", "lost+found/e.jsonl"):
        write(tmp_path / name, name)
    scandir = find.os.scandir
    monkeypatch.setattr(
        "os.scandir", lambda folder: scandir(folder) if Path(folder) == tmp_path else pytest.fail(folder)
    )
    assert documents(dataset(tmp_path)) == ["a.jsonl", "lost+found.jsonl"]


# --- splits --------------------------------------------------------------------------------------------------------------


def test_splits_are_read_from_names_as_on_the_hub() -> None:
    names = [
        *("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "dev.parquet", "my_test.jsonl"),
        *("Validation/a.parquet", "data/test/b.parquet", "x/eval-3.parquet", "train_sft-00000-of-00001.parquet"),
        *("trainer.parquet", "contest.parquet", "latest.jsonl", "training.parquet"),
    ]
    assert splits_of(names) == {
        "train": ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "training.parquet"],
        "validation": ["dev.parquet", "Validation/a.parquet"],
        "test": ["my_test.jsonl", "data/test/b.parquet", "x/eval-3.parquet"],
        "train_sft": ["train_sft-00000-of-00001.parquet"],
    }
    assert splits_of(["a.jsonl", "b/c.jsonl"]) == {"train": ["a.jsonl", "b/c.jsonl"]}


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet"],
        ["data/train.parquet", "data/validation.parquet", "data/test.parquet"],
        ["train/a.parquet", "train/b.parquet", "test/a.parquet", "valid/c.parquet"],
        ["corpus_train.parquet", "corpus_val.parquet"],
        ["a.parquet", "b.parquet"],
    ],
)
def test_names_are_read_as_the_hub_reads_them(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        write(tmp_path / name, "text")
    builder = datasets.load_dataset_builder(str(tmp_path))
    hub = {
        str(split): sorted(str(Path(file).relative_to(tmp_path)) for file in files)
        for split, files in builder.config.data_files.items()
    }
    assert {split: sorted(files) for split, files in splits_of(names).items()} == hub


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "test-00000-of-00001"):
        write(tmp_path / f"{name}.parquet", name)
    return tmp_path


@pytest.mark.parametrize("path", ["", "*.parquet"])
def test_the_split_setting_selects_files_of_a_path(splits: Path, path: str) -> None:
    found = {split: documents(dataset(splits / path, split=split)) for split in ("train", "validation", "dev", "test")}
    assert found == {
        "train": ["train-00000-of-00002", "train-00001-of-00002"],
        "validation": ["validation-00000-of-00001"],
        "dev": ["validation-00000-of-00001"],
        "test": ["test-00000-of-00001"],
    }


def test_without_a_split_all_files_are_read_and_the_splits_are_named(
    splits: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(documents(dataset(splits))) == 4
    assert "holds files of several splits, and all are read: 'test' (1 file, test-00000-of-00001.parquet" in caplog.text
    assert "Set dataset.split to one of them" in caplog.text


def test_a_split_that_no_name_says_is_refused(splits: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(DatasetError, match=r"no files of the split 'train\[:10%\]'.*'train' \(2 files, train-00000"):
        check_dataset(dataset(splits, split="train[:10%]"))
    unnamed = write(tmp_path_factory.mktemp("unnamed") / "corpus.jsonl", "text")
    assert documents(dataset(unnamed, split="train")) == ["text"]
    with pytest.raises(DatasetError, match=r"no files of the split 'test'.*'train' \(1 file, corpus\.jsonl"):
        check_dataset(dataset(unnamed, split="test"))


def test_files_without_a_split_are_left_out_if_others_have_one(splits: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(splits / "more.parquet", "more")
    assert documents(dataset(splits, split="test")) == ["test-00000-of-00001"]
    assert "1 of 5 files belong to no split by their names" in caplog.text


def test_a_split_that_is_not_given_changes_no_fingerprint() -> None:
    assert dataset("a.jsonl").result_settings()["split"] == "train"
    assert "documents" not in dataset("a.jsonl").result_settings()
    hub = DatasetConfig(hub="owner/name", revision="abc")
    assert hub.split == "train"
    assert hub.result_settings()["split"] == "train"


# --- folders of other tools ----------------------------------------------------------------------------------------------


def test_a_dataset_saved_to_disk_is_recognised(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_dict({"text": ["one", "two"]})
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=saved).save_to_disk(tmp_path / "several")
    for path in ("one", "several", "one/*.arrow", "one/data-00000-of-00001.arrow"):
        with pytest.raises(DatasetError, match=r"Dataset\.save_to_disk.*load_from_disk\(FOLDER\)\.to_parquet"):
            check_dataset(dataset(tmp_path / path))


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.parquet", "corpus.json"])
def test_files_about_the_data_are_passed_over(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, "text")
    for other in ("dataset_info.json", "state.json", "README.json", "metadata.json", "dataset_dict.json"):
        (tmp_path / other).write_text(json.dumps({"features": {"text": "string"}}))
    for other in ("README.txt", "LICENSE.txt", "sha256sums.txt"):
        (tmp_path / other).write_text("not a document")
    assert documents(dataset(tmp_path)) == ["text"]


def test_texts_about_the_data_are_documents_where_all_are_texts(tmp_path: Path) -> None:
    for name in ("README.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    assert documents(dataset(tmp_path)) == ["README.txt", "a.txt"]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("corpus.csv", r"pandas\.read_csv\(FILE\)\.to_parquet"),
        ("shard.00000.mds", "MosaicML"),
        ("corpus.jsonl.xz", "unpack it"),
        ("corpus.txt.gz", "unpack it"),
        ("corpus_text_document.bin", "give the original text"),
        ("corpus.pdf", r"expected \.parquet"),
    ],
)
def test_the_remedy_for_files_that_are_not_read_is_named(tmp_path: Path, name: str, remedy: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(DatasetError, match=f"(?i){remedy}"):
            check_dataset(dataset(path))


def test_ignored_data_of_other_formats_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "a.jsonl", "text")
    for name in ("b.csv", "c.csv", "README.md", ".d.csv"):
        (tmp_path / name).write_text("x")
    assert documents(dataset(tmp_path)) == ["text"]
    assert "2 files are not read" in caplog.text
    assert "b.csv: convert it, e.g. with `pandas.read_csv" in caplog.text

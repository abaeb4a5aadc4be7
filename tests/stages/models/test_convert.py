"""Pickled weights to safetensors."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.models import convert as conversion
from stages.models.config import ModelConfig, load_model, load_tokenizer
from stages.models.convert import PICKLED_FILE, PICKLED_INDEX, convert
from stages.models.preflight.examine import examine
from stages.models.weights import INDEX_FILE, SINGLE_FILE, WeightFileError
from tests.stages.models.preflight.spoil import LFS_POINTER
from tests.tiny_models import save_model


@pytest.fixture(autouse=True)
def _nothing_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("saved") / "llama")


@pytest.fixture
def pickled(saved: Path, tmp_path: Path) -> Path:
    """Provide the model with ``pytorch_model.bin`` alone."""
    folder = Path(shutil.copytree(saved, tmp_path / "llama"))
    torch.save(load_file(folder / SINGLE_FILE), folder / PICKLED_FILE)
    (folder / SINGLE_FILE).unlink()
    return folder


def in_two_files(folder: Path) -> dict[str, str]:
    """Divide the pickled weights in two, with an index; returns name -> file."""
    tensors = torch.load(folder / PICKLED_FILE, weights_only=True)
    (folder / PICKLED_FILE).unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / PICKLED_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def listing(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def assert_same_model(folder: Path, saved: Path) -> None:
    model = ModelConfig(name="m", path=folder)
    assert [str(problem) for problem in examine(model)] == []
    loaded, expected = (
        load_model(ModelConfig(name="m", path=path), dtype="float32", attention=("eager",), device="cpu").state_dict()
        for path in (folder, saved)
    )
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert load_tokenizer(model).get_vocab() == load_tokenizer(ModelConfig(name="m", path=saved)).get_vocab()


def test_a_single_file_is_converted_where_it_is(pickled: Path, saved: Path) -> None:
    before = listing(pickled)
    done = convert(pickled, pickled)
    assert listing(pickled) == sorted([*before, SINGLE_FILE])
    expected = load_file(saved / SINGLE_FILE)
    assert (done.files, done.num_tensors) == ((SINGLE_FILE,), len(expected))
    assert done.num_bytes == sum(tensor.numel() * tensor.element_size() for tensor in expected.values())
    assert_same_model(pickled, saved)


def test_a_folder_of_its_own_gets_configuration_and_tokenizer_and_nothing_pickled(
    pickled: Path, saved: Path, tmp_path: Path
) -> None:
    (pickled / "training_args.bin").write_bytes(b"whatever")
    output = tmp_path / "new" / "folder"
    convert(pickled, output)
    assert listing(output) == listing(saved)
    for name in listing(saved):
        if name != SINGLE_FILE:
            assert (output / name).read_bytes() == (saved / name).read_bytes()
    assert_same_model(output, saved)


@pytest.mark.parametrize("max_shard_bytes", [20_000, 1])
def test_shards_become_shards_with_an_index(pickled: Path, saved: Path, tmp_path: Path, max_shard_bytes: int) -> None:
    names = in_two_files(pickled)
    written: list[str] = []
    done = convert(pickled, tmp_path / "out", max_shard_bytes=max_shard_bytes, on_file=written.append)
    assert tuple(written) == done.files
    assert len(done.files) > 1
    index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
    assert index["weight_map"].keys() == names.keys()
    assert index["metadata"]["total_size"] == done.num_bytes
    for file in done.files:
        tensors = load_file(tmp_path / "out" / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == tensors.keys()
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        assert size <= max_shard_bytes or len(tensors) == 1
    assert_same_model(tmp_path / "out", saved)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_that_share_memory_and_views_of_larger_ones_are_kept_by_name(
    pickled: Path, saved: Path, zipped: bool
) -> None:
    tensors = torch.load(pickled / PICKLED_FILE, weights_only=True)
    whole = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = whole
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].t().contiguous().t()
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    torch.save(tensors, pickled / PICKLED_FILE, _use_new_zipfile_serialization=zipped)
    convert(pickled, pickled)
    found = load_file(pickled / SINGLE_FILE)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_each_type_keeps_its_bits(pickled: Path, dtype: torch.dtype) -> None:
    bits = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
    tensor = (bits > 7) if dtype == torch.bool else bits.view(dtype)
    torch.save({"a": tensor, "scalar": tensor.reshape(-1)[0], "none": tensor[:0]}, pickled / PICKLED_FILE)
    convert(pickled, pickled)
    found = load_file(pickled / SINGLE_FILE)
    assert found["a"].dtype == dtype
    assert torch.equal(found["a"].view(torch.uint8), tensor.view(torch.uint8))
    assert (found["scalar"].shape, found["none"].shape) == ((), (0, tensor.shape[1]))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(pickled: Path, tmp_path: Path, zipped: bool) -> None:
    before = listing(pickled)
    marker = tmp_path / "sprung"
    tensors = torch.load(pickled / PICKLED_FILE, weights_only=True)
    torch.save({**tensors, "trap": Trap(marker)}, pickled / PICKLED_FILE, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        WeightFileError, match=r"refers to \S+, which can run arbitrary code, so the file was not loaded"
    ) as raised:
        convert(pickled, pickled)
    assert raised.value.file == pickled / PICKLED_FILE
    assert "weights_only" not in str(raised.value), "torch advises to load it all the same"
    assert not marker.exists()
    assert listing(pickled) == before


def test_code_in_a_later_pickle_leaves_no_converted_file(pickled: Path, tmp_path: Path) -> None:
    in_two_files(pickled)
    torch.save(Trap(tmp_path / "sprung"), pickled / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(WeightFileError, match=r"00002-of-00002\.bin: refers to \S+, which can run arbitrary code"):
        convert(pickled, tmp_path / "out", max_shard_bytes=1)
    assert not (tmp_path / "sprung").exists()
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(pickled: Path, tmp_path: Path) -> None:
    convert(pickled, pickled)
    before = (pickled / SINGLE_FILE).stat().st_mtime_ns
    with pytest.raises(
        FileExistsError, match=r"already holds model.safetensors, and existing files are not overwritten"
    ):
        convert(pickled, pickled)
    assert (pickled / SINGLE_FILE).stat().st_mtime_ns == before
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(
        FileExistsError,
        match="existing files are not overwritten: give --output a folder that is empty or does not exist",
    ):
        convert(pickled, output)
    assert listing(output) == ["notes.txt"]


def test_a_tensor_that_is_read_back_otherwise_is_refused(
    pickled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_wrong(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        name = min(tensors)
        save_file({**tensors, name: tensors[name] + 1}, file, metadata)

    monkeypatch.setattr("safetensors.torch.save_file", save_wrong)
    with pytest.raises(WeightFileError, match=r"lm_head.weight differs when it is read back"):
        convert(pickled, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_without_room_is_refused_before_anything_is_written(
    pickled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"the disk has 0.0 GB free: free some space, or give --output"):
        convert(pickled, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def index_of(folder: Path, **changes: str) -> None:
    index = json.loads((folder / PICKLED_INDEX).read_text())
    (folder / PICKLED_INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | changes}))


def test_files_that_are_not_what_they_should_be_are_named(pickled: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            convert(pickled, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    tensors = torch.load(pickled / PICKLED_FILE, weights_only=True)
    torch.save([1, 2], pickled / PICKLED_FILE)
    refused(WeightFileError, "holds a list; expected a dictionary of names and dense tensors")
    torch.save({"model": tensors}, pickled / PICKLED_FILE)
    refused(WeightFileError, "holds a dict under 'model'; expected a dictionary of names and dense tensors")
    torch.save({"a": torch.eye(3).to_sparse()}, pickled / PICKLED_FILE)
    refused(WeightFileError, "holds a sparse or quantised tensor under 'a'")
    (pickled / PICKLED_FILE).write_text(LFS_POINTER)
    refused(WeightFileError, "a Git LFS pointer")
    torch.save(tensors, pickled / PICKLED_FILE)
    whole = (pickled / PICKLED_FILE).read_bytes()
    (pickled / PICKLED_FILE).write_bytes(whole[: len(whole) // 2])
    refused(WeightFileError, r"pytorch_model.bin: cannot be read \(.*zip archive")
    (pickled / PICKLED_FILE).write_text("these are no weights")
    refused(WeightFileError, r"pytorch_model.bin: cannot be read \(")
    (pickled / PICKLED_FILE).write_bytes(whole)
    in_two_files(pickled)
    index_of(pickled, **{"no.such.weight": "pytorch_model-00001-of-00002.bin"})
    refused(WeightFileError, "names no.such.weight, which pytorch_model-00001-of-00002.bin does not hold")
    index_of(pickled, **{"no.such.weight": "../pytorch_model-00003-of-00003.bin"})
    refused(WeightFileError, "names pytorch_model-00003-of-00003.bin, which does not exist; expected all 3 files")
    (pickled / PICKLED_INDEX).unlink()
    refused(FileNotFoundError, r"holds no pickled weights \(expected pytorch_model.bin, or shards with")
    (pickled / "config.json").unlink()
    refused(FileNotFoundError, r"holds no model configuration \(expected config.json\)")


def test_one_name_in_two_files_is_refused(pickled: Path, tmp_path: Path) -> None:
    names = in_two_files(pickled)
    first, second = sorted(set(names.values()))
    tensors = torch.load(pickled / second, weights_only=True)
    twice = min(name for name, file in names.items() if file == first)
    torch.save({**tensors, twice: torch.zeros(2)}, pickled / second)
    with pytest.raises(WeightFileError, match=f"holds {twice}, and so does {first}"):
        convert(pickled, tmp_path / "out")

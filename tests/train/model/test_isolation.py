import itertools

import numpy as np
import pytest
import torch

from stages.contract.columns import PAD_ID
from stages.models.config import ModelConfig, load_model
from stages.models.heads import split_head
from tests.tiny_models import save_model
from tests.train.dense_loss import loss_settings
from tests.train.fused_files import fused_table, replaced_pieces, save
from train.data.blocks import FusedBlocks, collate, piece_positions
from train.model.isolation import check_isolation
from train.objective.loss import IGNORED, fused_loss

SIZE = 400
LENGTHS = (7, 30, 5)
SETTINGS = loss_settings(1.0, 1.0, chunk_positions=16)


@pytest.fixture(scope="module", params=["llama", "gemma3", "gpt_neox", "gpt2", "qwen2"])
def architecture(request, tmp_path_factory) -> ModelConfig:
    family = {"gemma3": "unigram", "llama": "spm-bpe"}.get(request.param, "byte-bpe")
    folder = tmp_path_factory.mktemp("isolation")
    return ModelConfig(name="tiny", path=save_model(folder, architecture=request.param, tokenizer_family=family))


def load(model: ModelConfig, attention: str = "sdpa"):
    return load_model(model, dtype="float32", attention=(attention,), device="cpu")


def documents(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 300, length) for length in LENGTHS]


def pieces_of(parts: list[np.ndarray]) -> list[np.ndarray]:
    """The second document is two segments; no model read the second of them with the first before it."""
    first, second, third = parts
    return [first, second[: len(second) // 2], second[len(second) // 2 :], third]


def packed_file(path, parts: list[np.ndarray]):
    """Return one block of all documents, in the pieces of ``pieces_of``."""
    table = fused_table([np.concatenate(parts)], SIZE, tail="bucket")
    pieces = {
        "piece_start": np.cumsum([0, *(len(part) for part in pieces_of(parts))])[:-1],
        "piece_doc_id": np.array([4, 5, 5, 6]),
        "piece_segment": np.array([0, 0, 1, 0]),
        "piece_offset": np.zeros(4, np.int64),
    }
    return save(replaced_pieces(table, pieces), path)


def opened(file, *, isolate: bool = True) -> FusedBlocks:
    return FusedBlocks([file], prefix_id=None, eos_id=None, with_distributions=True, isolate_documents=isolate)


def loss(model, batch) -> torch.Tensor:
    body, head = split_head(model)
    arguments = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
    hidden = body(batch.ids, **arguments).flatten(0, 1)
    found = fused_loss(hidden, head, batch.labels.flatten(), batch.targets, SETTINGS)
    return torch.stack([found.clm, found.fusion])


def test_positions_restart_with_each_piece():
    assert piece_positions(np.array([0, 3, 5, 9]), 11).tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 0, 1]


def test_the_last_token_of_a_piece_predicts_nothing(tmp_path):
    parts = documents()
    block = opened(packed_file(tmp_path / "a.parquet", parts)).block(0)
    expected = np.concatenate([np.append(part[1:], IGNORED) for part in pieces_of(parts)])
    np.testing.assert_array_equal(block.labels, expected)
    together = opened(packed_file(tmp_path / "b.parquet", parts), isolate=False).block(0)
    assert (together.labels == IGNORED).sum() == 1
    assert together.position_ids is None


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_piece_has_the_same_loss_as_on_its_own(architecture, tmp_path, attention):
    model = load(architecture, attention)
    block = opened(packed_file(tmp_path / "a.parquet", documents())).block(0)
    batch = collate([block])
    expected = torch.zeros(2)
    borders = np.cumsum([0, *(len(part) for part in pieces_of(documents()))])
    for start, end in itertools.pairwise(borders):
        alone = part_of(batch, slice(int(start), int(end)))
        expected += loss(model, alone)
    torch.testing.assert_close(loss(model, batch), expected, rtol=1e-4, atol=1e-4)


def part_of(batch, span: slice):
    from dataclasses import replace

    return replace(
        batch,
        ids=batch.ids[:, span],
        labels=batch.labels[:, span],
        targets=batch.targets.select(span),
        position_ids=None,
    )


@pytest.mark.parametrize("isolate", [True, False])
def test_a_neighbours_text_changes_the_loss_only_without_isolation(architecture, tmp_path, isolate):
    model = load(architecture)
    one = documents()
    other = [(one[0] + 11) % 300, one[1], (one[2] + 5) % 300]
    losses = []
    for name, parts in (("a", one), ("b", other)):
        batch = collate([opened(packed_file(tmp_path / f"{name}.parquet", parts), isolate=isolate).block(0)])
        second = torch.zeros_like(batch.labels, dtype=torch.bool)
        second[:, LENGTHS[0] : LENGTHS[0] + LENGTHS[1] - 1] = True  # what the second document's own tokens predict
        batch.labels[~second] = IGNORED
        batch.targets.ids[~second.flatten()] = PAD_ID
        losses.append(loss(model, batch))
    difference = float((losses[0] - losses[1]).abs().max())
    assert difference < 1e-4 if isolate else difference > 1e-2


def test_padding_and_neighbouring_blocks_change_nothing(architecture, tmp_path):
    model = load(architecture)
    long = opened(packed_file(tmp_path / "a.parquet", documents())).block(0)
    short = opened(packed_file(tmp_path / "b.parquet", [part[:4] for part in documents(1)][:1] * 3)).block(0)
    apart = loss(model, collate([long])) + loss(model, collate([short]))
    torch.testing.assert_close(loss(model, collate([long, short])), apart, rtol=1e-4, atol=1e-4)
    one_row = collate([long, short], flatten=True)
    assert one_row.ids.shape == (1, one_row.num_tokens)
    torch.testing.assert_close(loss(model, one_row), apart, rtol=1e-4, atol=1e-4)


def test_blocks_that_are_not_isolated_are_not_flattened(tmp_path):
    block = opened(packed_file(tmp_path / "a.parquet", documents()), isolate=False).block(0)
    with pytest.raises(ValueError, match="isolated"):
        collate([block, block], flatten=True)


def test_isolation_is_checked_with_the_model(architecture):
    model = load(architecture).train()
    check_isolation(model)
    assert model.training


def test_an_architecture_that_cannot_isolate_is_refused(tmp_path):
    folder = save_model(tmp_path, architecture="mpt", tokenizer_family="byte-bpe")
    with pytest.raises(ValueError, match="isolate_documents = false"):
        check_isolation(load(ModelConfig(name="mpt", path=folder), "eager"))

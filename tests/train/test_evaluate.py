import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.models.config import ModelConfig, load_model
from stages.models.tokenizer import SegmentTokenizer
from tests.tiny_models import save_model
from tests.tiny_tokenizers import TEXTS
from train.config import EvalConfig
from train.evaluate import Segment, bits_per_byte, first_documents, gold_logprobs

CONFIG = EvalConfig(dtype="float32", device="cpu", batch_tokens=200, chunk_positions=7)
SEGMENTS = [
    Segment(4, TEXTS[0], is_last=False),
    Segment(4, TEXTS[6], is_last=True),
    Segment(9, TEXTS[2], is_last=True),
    Segment(11, "", is_last=True),
    Segment(12, TEXTS[9], is_last=True),
]


@pytest.fixture(scope="module", params=[("llama", "spm-bpe"), ("gpt_neox", "byte-bpe"), ("gemma3", "unigram")])
def model(request, tmp_path_factory) -> ModelConfig:
    architecture, family = request.param
    folder = save_model(
        tmp_path_factory.mktemp("eval") / family, architecture=architecture, tokenizer_family=family, seed=3
    )
    return ModelConfig(name="tiny", path=folder)


def plain_loss(model: ModelConfig, segment: Segment) -> tuple[float, int, int]:
    """Nats, tokens and bytes of a segment by the model's own loss, one token at a time."""
    tokenizer = SegmentTokenizer.load(model)
    encoding = tokenizer.encode(segment.text, is_last=segment.is_last)
    loaded = load_model(model, dtype="float32", attention=("eager",), device="cpu")
    nats, tokens, num_bytes = 0.0, 0, 0
    if len(encoding.ids) < 2:
        return nats, tokens, num_bytes
    with torch.no_grad():
        logits = loaded(input_ids=torch.tensor(encoding.ids, dtype=torch.int64)[None]).logits[0]
    for position in range(len(encoding.ids) - 1):
        gold = int(encoding.ids[position + 1])
        if tokenizer.vocabulary.is_special[gold]:
            continue
        nats += torch.nn.functional.cross_entropy(logits[position], torch.tensor(gold)).item()
        tokens += 1
        num_bytes += int(encoding.byte_end[position + 1] - encoding.byte_end[position])
    return nats, tokens, num_bytes


def test_bits_per_byte_is_the_models_plain_loss(model):
    found = bits_per_byte(model, SEGMENTS, CONFIG)
    parts = {segment: plain_loss(model, segment) for segment in SEGMENTS}
    assert found.total.nats == pytest.approx(sum(part[0] for part in parts.values()), rel=1e-5)
    assert found.total.num_tokens == sum(part[1] for part in parts.values())
    assert found.total.num_bytes == sum(part[2] for part in parts.values())
    assert found.bits_per_byte == pytest.approx(found.total.nats / math.log(2) / found.total.num_bytes)
    assert [doc_id for doc_id, _ in found.documents] == [4, 9, 11, 12]
    first = [parts[segment] for segment in SEGMENTS[:2]]
    assert found.documents[0][1].nats == pytest.approx(first[0][0] + first[1][0], rel=1e-5)


def test_batches_and_chunks_do_not_change_the_result(model):
    one = bits_per_byte(model, SEGMENTS, CONFIG)
    other = bits_per_byte(model, SEGMENTS, CONFIG.model_copy(update={"batch_tokens": 1, "chunk_positions": 1000}))
    for (doc_id, found), (same_id, expected) in zip(one.documents, other.documents, strict=True):
        assert doc_id == same_id
        assert found.nats == pytest.approx(expected.nats, rel=1e-5)


def test_a_small_change_of_the_weights_is_seen_unless_they_are_rounded(tmp_path):
    folder = save_model(tmp_path, tokenizer_family="spm-bpe", seed=3)
    file = folder / "model.safetensors"
    before = {name: weight.bfloat16().float() for name, weight in load_file(file).items()}
    figures = {"float32": [], "bfloat16": []}
    for factor in (1.0, 1 + 2**-11):
        save_file({name: weight * factor for name, weight in before.items()}, file, metadata={"format": "pt"})
        for dtype, found in figures.items():
            config = EvalConfig(device="cpu", attention="eager", **({"dtype": dtype} if dtype != "float32" else {}))
            found.append(bits_per_byte(ModelConfig(name="m", path=folder), SEGMENTS, config).bits_per_byte)
    assert figures["bfloat16"][0] == figures["bfloat16"][1], "half a step of bfloat16 is lost"
    assert abs(figures["float32"][0] - figures["float32"][1]) > 1e-6


def test_padded_embedding_rows_get_no_probability(tmp_path):
    folder = save_model(tmp_path, tokenizer_family="spm-bpe", vocab_padding=9)
    model = ModelConfig(name="padded", path=folder)
    tokenizer = SegmentTokenizer.load(model)
    loaded = load_model(model, dtype="float32", attention=("eager",), device="cpu")
    encoding = tokenizer.encode(TEXTS[0], is_last=True)
    ids = torch.tensor(encoding.ids, dtype=torch.int64)
    with torch.no_grad():
        logprobs = loaded(input_ids=ids[None]).logits[0, :, : tokenizer.vocabulary.size].log_softmax(dim=1)
    expected = logprobs[:-1].gather(1, ids[1:, None]).squeeze(1)
    (found,) = gold_logprobs(loaded, [encoding], CONFIG, num_ids=tokenizer.vocabulary.size, num_repeated=1)
    np.testing.assert_allclose(found[:-1], expected, rtol=1e-4, atol=1e-5)
    assert np.isnan(found[-1])


def test_a_long_segment_is_scored_once_everywhere_in_overlapping_windows(model):
    tokenizer = SegmentTokenizer.load(model)
    loaded = load_model(model, dtype="float32", attention=("eager",), device="cpu")
    encoding = tokenizer.encode(TEXTS[0], is_last=True)
    repeated = tokenizer.num_prefix
    config = CONFIG.model_copy(update={"max_length": 9})
    arguments = {"num_ids": tokenizer.vocabulary.size, "num_repeated": repeated}
    (found,) = gold_logprobs(loaded, [encoding], config, **arguments)
    ids, size = torch.tensor(encoding.ids, dtype=torch.int64), tokenizer.vocabulary.size
    assert np.isfinite(found[:-1]).all()
    for position in range(len(ids) - 1):
        # The first window has 9 tokens; each further one ends 4 tokens on, and begins with BOS where the model uses it.
        start, end, prefix = 0, min(9, len(ids)), 0
        if position >= 9:
            end = min(len(ids), 9 + 4 * ((position - 9) // 4 + 1))
            start, prefix = end - (9 - repeated), repeated
        window = torch.cat([ids[:prefix], ids[start:end]])
        with torch.no_grad():
            logits = loaded(input_ids=window[None]).logits[0, prefix + position - start, :size]
        assert found[position] == pytest.approx(logits.log_softmax(0)[ids[position + 1]].item(), rel=1e-4, abs=1e-5)


def test_the_first_documents_are_taken_whole():
    assert first_documents(SEGMENTS, 2) == SEGMENTS[:3]
    assert first_documents(SEGMENTS, None) == SEGMENTS


def test_no_text_is_refused(model):
    with pytest.raises(ValueError, match="validation_fraction"):
        bits_per_byte(model, [], CONFIG)


def test_a_model_is_asked_for_the_same_bytes_with_and_without_a_declared_bos(tmp_path):
    """A model whose one special token ends documents and could begin them: only its tokenizer's declaration differs."""
    folder = save_model(tmp_path / "model", architecture="gpt_neox", tokenizer_family="byte-bpe", seed=3)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "bos_token": settings["eos_token"]}))
    declared, silent = (
        bits_per_byte(ModelConfig(name="tiny", path=folder, bos=bos), SEGMENTS, CONFIG) for bos in (True, None)
    )
    assert SegmentTokenizer.load(ModelConfig(name="tiny", path=folder)).prefix_id is not None
    assert silent.total.num_bytes == declared.total.num_bytes == sum(len(part.text.encode()) for part in SEGMENTS)
    assert silent.bits_per_byte == pytest.approx(declared.bits_per_byte, rel=1e-6)

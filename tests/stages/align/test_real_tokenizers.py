import json
import os
from pathlib import Path

import numpy as np
import pytest
from rapidfuzz.distance import Levenshtein

from stages.align.costs.semantic import spell
from stages.align.transport.hard_mapping import NearestTokens
from stages.align.vocabulary_maps import exact_map, preferred_tokens, text_ids
from stages.models.config import ModelConfig
from stages.models.tokenizer import SegmentTokenizer

pytestmark = pytest.mark.skipif(
    "PTAFUSE_DATA" not in os.environ, reason="PTAFUSE_DATA names no folder of reference tokenizers"
)


@pytest.fixture(scope="module")
def load():
    loaded: dict[str, SegmentTokenizer] = {}

    def load_tokenizer(name: str) -> SegmentTokenizer:
        if name not in loaded:
            path = Path(os.environ["PTAFUSE_DATA"]) / "tokenizers" / name
            loaded[name] = SegmentTokenizer.load(ModelConfig(name=name, path=path))
        return loaded[name]

    return load_tokenizer


def encode_with(tokenizer: SegmentTokenizer):
    return lambda texts: tokenizer.encode_batch(texts, is_last=[False] * len(texts))


def preferred_by(tokenizer: SegmentTokenizer) -> dict[bytes, int]:
    return preferred_tokens(tokenizer.vocabulary, encode_with(tokenizer))


@pytest.mark.parametrize("name", ["mpt-7b", "t5-small", "bert-base-uncased"])
def test_nearest_of_sampled_tokens_equals_a_loop_over_the_vocabulary(load, name):
    source, target = load(name).vocabulary, load("llama2").vocabulary
    preferred = preferred_by(load("llama2"))
    texts = [[part.text(i) for i in range(part.size)] for part in (source, target)]
    exact = exact_map(source, target, preferred)
    nearest = NearestTokens(
        source, target, source_texts=texts[0], target_texts=texts[1], exact=exact, preferred=preferred
    )
    sample = np.random.default_rng(0).choice(np.flatnonzero(~source.is_special), 40, replace=False)
    ids, distances = nearest.nearest(sample)
    candidates = sorted(text_ids(target, preferred).values())
    for token_id, found, distance in zip(sample, ids, distances, strict=True):
        loop = min((Levenshtein.distance(texts[0][token_id], texts[1][other]), other) for other in candidates)
        assert loop == (distance, found)
        assert (distance == 0) == (exact[token_id] != -1)


@pytest.mark.parametrize("name", ["mpt-7b", "t5-small", "bert-base-uncased"])
def test_llama_2_spells_every_token_of_other_families(load, name):
    source, tokenizer = load(name).vocabulary, load("llama2")
    target = tokenizer.vocabulary
    pieces = spell(
        source,
        target,
        exact=exact_map(source, target, preferred_by(tokenizer)),
        encode=encode_with(tokenizer),
    )
    for token_id in np.flatnonzero(~source.is_special):
        joined = b"".join(target.token_bytes[piece] for piece in pieces.row(token_id))
        assert joined == source.token_bytes[token_id]


VECTORS = {"llama2": "llama2", "mpt-7b": "mpt-7b", "qwen2": "qwen3", "bert-base-uncased": "bert-base-uncased"}
"""Vectors -> the tokenizer here that has the same vocabulary of text."""


@pytest.mark.parametrize("vectors", sorted(VECTORS))
def test_ids_are_those_of_the_reference_vectors(load, vectors):
    folder = Path(os.environ["PTAFUSE_DATA"]) / "tokenizer-vectors"
    *texts, after_the_last = (folder / f"{vectors}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    assert after_the_last == ""
    wanted = [[int(token) for token in line.split()] for line in (folder / f"{vectors}.out").read_text().splitlines()]
    tokenizer = load(VECTORS[vectors])
    encodings = tokenizer.encode_batch(texts, is_last=[False] * len(texts))
    skip = tokenizer.num_prefix
    found = [encoding.ids[skip:].tolist() for encoding in encodings]
    assert len(found) == len(wanted) > 30
    for text, ids, expected in zip(texts, found, wanted, strict=True):
        assert ids == expected, text
    for text, encoding in zip(texts, encodings, strict=True):
        ends = encoding.byte_end[skip:]
        assert (np.diff(ends) >= 0).all()
        assert not len(ends) or ends[-1] == len(text.encode())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama2", "openllama-v1", "mpt-7b", "qwen3", "t5-small", "bert-base-uncased"])
def test_byte_end_of_all_real_text_never_falls_and_ends_at_its_length(load, name):
    with (Path(os.environ["PTAFUSE_DATA"]) / "text" / "mixed.jsonl").open(encoding="utf-8") as lines:
        documents = [json.loads(line)["text"] for line in lines]
    tokenizer = load(name)
    num_tokens = 0
    for text, found in zip(documents, tokenizer.encode_batch(documents, is_last=[True] * len(documents)), strict=True):
        assert found.byte_end[0] >= 0
        assert (np.diff(found.byte_end) >= 0).all()
        assert found.byte_end[-1] == len(text.encode())
        assert len(found.ids) == len(found.byte_end)
        assert found.ids[-1] == tokenizer.vocabulary.eos_id
        assert found.byte_end[-2] == len(text.encode())  # EOS has no bytes: the last text token ends the document
        num_tokens += len(found.ids)
    assert len(documents) == 338
    assert num_tokens > 500_000

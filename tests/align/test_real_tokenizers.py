import os
from pathlib import Path

import numpy as np
import pytest
from rapidfuzz.distance import Levenshtein

from stages.align.mapping import NearestTokens, exact_map
from stages.align.semantic import spell
from stages.align.stage import _preferred_tokens
from stages.align.support import text_ids
from stages.contract.models import ModelConfig
from stages.contract.tokens import SegmentTokenizer

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


@pytest.mark.parametrize("name", ["mpt-7b", "t5-small", "bert-base-uncased"])
def test_nearest_of_sampled_tokens_equals_a_loop_over_the_vocabulary(load, name):
    source, target = load(name).vocabulary, load("llama2").vocabulary
    preferred = _preferred_tokens(load("llama2"))
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
        exact=exact_map(source, target, _preferred_tokens(tokenizer)),
        encode=lambda texts: tokenizer.encode_batch(texts, is_last=[False] * len(texts)),
    )
    for token_id in np.flatnonzero(~source.is_special):
        joined = b"".join(target.token_bytes[piece] for piece in pieces.row(token_id))
        assert joined == source.token_bytes[token_id]

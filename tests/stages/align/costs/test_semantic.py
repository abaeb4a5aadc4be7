import numpy as np
import pytest

from stages.align.costs.semantic import Pieces, SemanticCosts, spell
from stages.align.vocabulary_maps import exact_map
from stages.models.tokenizer import SegmentTokenizer
from tests.stages.align.pairing.test_levenshtein import levenshtein
from tests.stages.align.transport.test_support import vocabulary
from tests.tiny_tokenizers import FAMILIES, save_tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, SegmentTokenizer]:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        family: SegmentTokenizer(AutoTokenizer.from_pretrained(save_tokenizer(family, folder / family)), bos=None)
        for family in FAMILIES
    }


def spelled(source, tokenizer: SegmentTokenizer) -> Pieces:
    target = tokenizer.vocabulary
    return spell(
        source,
        target,
        exact=exact_map(source, target, {}),
        encode=lambda texts: tokenizer.encode_batch(texts, is_last=[False] * len(texts)),
    )


@pytest.mark.parametrize("family", ["byte-bpe", "spm-bpe"])
def test_pieces_spell_the_token_s_bytes(tokenizers, family):
    tokenizer = tokenizers[family]
    source = vocabulary(
        b" internationalist", b"zebras", b" ", b"  \n", "日本語".encode(), "日".encode()[:2], b"<eos>", b"."
    )
    pieces = spelled(source, tokenizer)
    for token_id in range(source.size):
        joined = b"".join(tokenizer.vocabulary.token_bytes[piece] for piece in pieces.row(token_id))
        assert joined == source.token_bytes[token_id]
    assert len(pieces.row(0)) > 1


@pytest.mark.parametrize("family", ["unigram", "wordpiece"])
def test_a_normalising_tokenizer_spells_what_it_makes_of_the_token(tokenizers, family):
    tokenizer = tokenizers[family]
    pieces = spelled(vocabulary(b" The", " ﬁne".encode(), b"<bos>"), tokenizer)
    for token_id, text in ((0, "the"), (1, "fine")):
        joined = b"".join(tokenizer.vocabulary.token_bytes[piece] for piece in pieces.row(token_id)).decode()
        assert set(joined.strip().lower()) & set(text)
    assert not len(pieces.row(2)) or tokenizer.vocabulary.bos_id is not None


def test_a_token_of_the_target_is_itself_and_unknown_bytes_are_passed_over():
    target = vocabulary(b"ab", b"a", b"c", b"<eos>")
    source = vocabulary(b"ab", b"\xe6ab\xe6c", b"\xe6", b"<eos>", b"<bos>", b"")
    pieces = spell(source, target, exact=exact_map(source, target, {}), encode=lambda texts: [])
    assert [pieces.row(i).tolist() for i in range(source.size)] == [[0], [0, 2], [], [3], [], []]


def direct_cost(embeddings, is_special, scale, pieces, token_id: int) -> float:
    mean = embeddings[~is_special].mean(axis=0)
    one = embeddings[pieces].mean(axis=0) - mean
    other = embeddings[token_id] - mean
    return scale * (1 - one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def test_costs_are_scaled_cosine_distances_of_averaged_embeddings():
    rng = np.random.default_rng(0)
    target = vocabulary(*[f"t{i}".encode() * (1 + i % 3) for i in range(30)], b"<eos>")
    embeddings = rng.normal(size=(35, 16)).astype(np.float16)  # padded rows take no part
    pieces = Pieces([[3], [4, 5, 6], [30], [], [7, 7]])
    texts = [target.text(i) for i in range(target.size)]
    costs = SemanticCosts(embeddings, pieces, target, texts, num_slots=64)
    source_ids = np.array([[0, 1, 2], [3, 4, -1]])
    target_ids = np.array([[3, 4, 30, -1], [7, 8, 9, 10]])
    found = costs.costs(source_ids, target_ids)
    exact = embeddings[: target.size].astype(float)
    for problem, x, y in np.ndindex(found.shape):
        source, token = int(source_ids[problem, x]), int(target_ids[problem, y])
        if source < 0 or token < 0:
            assert found[problem, x, y] == 0
        elif not len(pieces.row(source)):
            assert found[problem, x, y] == pytest.approx(costs.scale)
        else:
            expected = direct_cost(exact, target.is_special, costs.scale, pieces.row(source), token)
            assert found[problem, x, y] == pytest.approx(expected, abs=1e-3 * costs.scale)
    assert found[0, 0, 0] == 0  # the same token
    assert (costs.costs(source_ids, target_ids) == found).all()


def test_the_scale_makes_random_tokens_as_far_apart_as_in_edits():
    rng = np.random.default_rng(1)
    words = sorted({"".join(rng.choice(list("abcdef"), size=rng.integers(2, 9))) for _ in range(150)})
    target = vocabulary(*map(str.encode, words))
    embeddings = rng.normal(size=(len(words), 32)) + 3.0  # a large common direction
    costs = SemanticCosts(embeddings, Pieces([[i] for i in range(len(words))]), target, words)
    ids = np.arange(len(words))[None]
    semantic = costs.costs(ids, ids)[0]
    edits = np.array([[levenshtein(one, other) for other in words] for one in words])
    different = ~np.eye(len(words), dtype=bool)
    assert semantic[different].mean() == pytest.approx(edits[different].mean(), rel=0.02)


def test_too_few_embedding_rows_are_refused():
    with pytest.raises(ValueError, match="2 embedding rows for 3 tokens"):
        SemanticCosts(np.zeros((2, 4)), Pieces([]), vocabulary(b"a", b"b", b"c"), ["a", "b", "c"])


def test_embeddings_without_spread_cost_the_scale():
    target = vocabulary(b"a", b"b")
    costs = SemanticCosts(np.ones((2, 4)), Pieces([[0], [1]]), target, ["a", "b"])
    found = costs.costs(np.array([[0, 1]]), np.array([[0, 1]]))[0]
    np.testing.assert_allclose(found, costs.scale * (1 - np.eye(2)))

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.align.costs.edit_distance import EditDistanceCosts
from stages.align.costs.prefix import PrefixCosts
from stages.align.transport.moved_mass import moved_share, text_numbers
from stages.align.vocabulary_maps import ModelPair
from stages.models.config import ModelConfig
from stages.models.tokenizer import SegmentTokenizer
from stages.models.vocabulary import Vocabulary
from tests.stages.align.costs.cutting import first_piece, prefix_cost
from tests.stages.align.pairing.test_levenshtein import levenshtein
from tests.stages.align.transport.test_support import vocabulary
from tests.tiny_tokenizers import FAMILIES, save_tokenizer

UNKNOWN = 0


def prefix_costs(source: Vocabulary, target: Vocabulary, *, source_cut=None, target_cut=None) -> np.ndarray:
    """(V of the source, V of the target); without cuts, the longest token of the other vocabulary is cut off."""
    distances = EditDistanceCosts(*([part.text(i) for i in range(part.size)] for part in (source, target)))
    costs = PrefixCosts(
        source,
        target,
        distances,
        source_cut=greedy_cuts(source, target) if source_cut is None else np.array(source_cut, np.int32),
        target_cut=greedy_cuts(target, source) if target_cut is None else np.array(target_cut, np.int32),
    )
    return costs.costs(np.arange(source.size)[None], np.arange(target.size)[None])[0]


def greedy_cuts(vocabulary: Vocabulary, other: Vocabulary) -> np.ndarray:
    """Of each token, the length of the longest token of the other vocabulary that begins it."""
    begins = [
        [len(piece) for piece in other.token_bytes if piece and token.startswith(piece)]
        for token in vocabulary.token_bytes
    ]
    return np.array([max(lengths, default=UNKNOWN) for lengths in begins], np.int32)


def test_a_beginning_costs_a_tenth_a_byte_and_all_else_its_edits():
    source = vocabulary(b" inter", b"inter", "é".encode())
    target = vocabulary(b" international", b" inter", b" i", b" outer", "école".encode(), "é".encode()[:1])
    found = prefix_costs(source, target, source_cut=[6, UNKNOWN, 1])
    np.testing.assert_allclose(found[0], [0.8, 0, 4, 2, levenshtein(" inter", "école"), 6])
    assert found[1, 0] == levenshtein("inter", " international")  # the boundary is a character like any other
    np.testing.assert_allclose(found[2], [14, 6, 2, 6, 0.4, 0.1])  # bytes, not characters; 5 characters, 6 bytes


def test_only_the_token_that_the_target_s_tokenizer_begins_with_is_a_beginning():
    source = vocabulary(b" international")
    target = vocabulary(b" ", b" in", b" inter", b" intern")
    found = prefix_costs(source, target, source_cut=[len(b" inter")])
    np.testing.assert_allclose(found, [[13, 11, 0.8, 7]])
    np.testing.assert_allclose(prefix_costs(source, target, source_cut=[UNKNOWN]), [[13, 11, 8, 7]])


def test_only_the_token_that_the_source_s_tokenizer_begins_with_has_a_longer_text_to_come():
    source = vocabulary(b" ", b" in", b" inter", b" intern")
    target = vocabulary(b" international")
    found = prefix_costs(source, target, target_cut=[len(b" inter")])
    np.testing.assert_allclose(found[:, 0], [13, 11, 0.8, 7])


def test_special_tokens_begin_nothing():
    source, target = vocabulary(b"<eos>", b"<"), vocabulary(b"<", b"<eos>", b"<bos>")
    assert prefix_costs(source, target).tolist() == [[4, 0, 1], [0, 4, 4]]


def test_pads_cost_nothing():
    part = vocabulary(b"ab", b"abc")
    cuts = greedy_cuts(part, part)
    distances = EditDistanceCosts(["ab", "abc"], ["ab", "abc"])
    costs = PrefixCosts(part, part, distances, source_cut=cuts, target_cut=np.array([2, 2], np.int32))
    found = costs.costs(np.array([[0, -1]]), np.array([[1, -1]]))
    np.testing.assert_allclose(found, [[[0.1, 0], [0, 0]]])


words = st.lists(st.text("ab ç", min_size=1, max_size=6).map(str.encode), min_size=1, max_size=8, unique=True)


@settings(max_examples=60)
@given(words, words, st.data())
def test_prefix_costs_equal_their_definition(source_words, target_words, data):
    source, target = vocabulary(*source_words), vocabulary(*target_words)
    cuts = [
        data.draw(st.lists(st.integers(0, 6), min_size=len(part), max_size=len(part)))
        for part in (source_words, target_words)
    ]
    found = prefix_costs(source, target, source_cut=cuts[0], target_cut=cuts[1])
    for x, one in enumerate(source_words):
        for y, other in enumerate(target_words):
            is_cut = (
                one == other
                or (one.startswith(other) and len(other) == cuts[0][x])
                or (other.startswith(one) and len(one) == cuts[1][y])
            )
            expected = 0.1 * abs(len(one) - len(other)) if is_cut else levenshtein(one.decode(), other.decode())
            assert found[x, y] == pytest.approx(expected)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, SegmentTokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        family: SegmentTokenizer.load(ModelConfig(name=family, path=save_tokenizer(family, folder / family)))
        for family in FAMILIES
    }


def pair_of(source: SegmentTokenizer, target: SegmentTokenizer) -> ModelPair:
    one, other = source.vocabulary, target.vocabulary
    return ModelPair(
        source=one,
        target=other,
        source_texts=[one.text(i) for i in range(one.size)],
        target_texts=[other.text(i) for i in range(other.size)],
        encode=lambda texts: target.encode_batch(texts, is_last=[False] * len(texts)),
        encode_source=lambda texts: source.encode_batch(texts, is_last=[False] * len(texts)),
        load_embeddings=lambda: np.empty((0, 0)),
    )


@pytest.mark.parametrize("target", FAMILIES)
@pytest.mark.parametrize("source", FAMILIES)
def test_prefix_costs_equal_tokenizing_pair_by_pair(tokenizers, source, target):
    one, other = tokenizers[source], tokenizers[target]
    source_ids = np.arange(0, one.vocabulary.size, 7)
    longest = np.argsort([-len(token) for token in other.vocabulary.token_bytes], kind="stable")
    target_ids = np.union1d(np.arange(0, other.vocabulary.size, 9), longest[:20])
    found = PrefixCosts.of(pair_of(one, other)).costs(source_ids[None], target_ids[None])[0]
    expected = [[prefix_cost(one, x, other, y) for y in target_ids.tolist()] for x in source_ids.tolist()]
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("target", ["byte-bpe", "spm-bpe", "unigram"])
@pytest.mark.parametrize("source", ["byte-bpe", "spm-bpe"])
def test_the_bare_space_takes_nothing_from_words(tokenizers, source, target):
    """All but the few whose letter is in no marked token, so that the tokenizer does write the space alone."""
    one, other = tokenizers[source].vocabulary, tokenizers[target].vocabulary
    space = [i for i, token in enumerate(other.token_bytes) if token == b" " and not other.is_special[i]]
    words = [
        i
        for i, token in enumerate(one.token_bytes)
        if token.startswith(b" ") and token[1:].isalpha() and first_piece(tokenizers[target], token) != b" "
    ]
    assert space
    assert b" in" in {one.token_bytes[i] for i in words}
    found = PrefixCosts.of(pair_of(tokenizers[source], tokenizers[target])).costs(np.array([words]), np.array([space]))
    letters = np.array([len(one.text(i)) - 1 for i in words])
    np.testing.assert_allclose(found[0], np.repeat(letters[:, None], len(space), axis=1))


@pytest.mark.parametrize(
    ("source", "target"),
    [("byte-bpe", "spm-bpe"), ("spm-bpe", "byte-bpe"), ("byte-bpe", "unigram"), ("wordpiece", "byte-bpe")],
)
def test_at_the_start_of_a_text_the_tokenizers_cut_what_stands_there(tokenizers, source, target):
    one, other = tokenizers[source], tokenizers[target]
    middle = pair_of(one, other)
    start = middle.at_text_start(source_dummy=one.has_dummy_prefix, target_dummy=other.has_dummy_prefix)
    mark = b" " if other.has_dummy_prefix else b""
    num_cut = 0
    for tokens, cuts, cutter, written in (
        (start.source, start.source_cut, other, other.vocabulary),
        (start.target, start.target_cut, one, start.source),
    ):
        for token_id, text in enumerate(tokens.token_bytes):
            if tokens.is_special[token_id] or not is_text(text) or not text.startswith(mark) or text == mark:
                continue
            ids = cutter.encode(text.removeprefix(mark).decode(), is_last=False).ids.tolist()
            pieces = [written.token_bytes[i] for i in ids if not written.is_special[i]]
            is_begun = bool(pieces) and text.startswith(pieces[0])
            assert cuts[token_id] == (len(pieces[0]) if is_begun else UNKNOWN), text
            num_cut += is_begun
    assert num_cut > 100
    assert start.at_text_start(source_dummy=True, target_dummy=True) is start
    again = middle.at_text_start(source_dummy=one.has_dummy_prefix, target_dummy=other.has_dummy_prefix)
    assert again is start  # what it computed is kept


def is_text(token: bytes) -> bool:
    try:
        return bool(token.decode())
    except UnicodeDecodeError:
        return False


def test_text_numbers_are_equal_where_tokens_stand_for_the_same():
    source = vocabulary(b"a", b"<eos>", b"<pad>", b"", b"b")
    target = vocabulary(b"<eos>", b"<pad>", b"a", b"", b"c", b"a", special=(b"<pad>",))
    one, other = text_numbers(source, target)
    same = [[x, y] for x in range(source.size) for y in range(target.size) if one[x] == other[y] >= 0]
    assert same == [[0, 2], [0, 5], [1, 0]]  # the source's "<pad>" is text
    assert one[3] == other[3] == -1


def test_moved_share_counts_what_lands_on_another_text():
    plan = np.array([[[0.3, 0.1], [0.2, 0.4]], [[0.0, 0.0], [0.0, 0.0]]])
    source, support = np.array([[1, 2], [1, 2]]), np.array([[1, 2], [1, 2]])
    np.testing.assert_allclose(moved_share(plan, source, support, largest_only=False), [0.3, 0])
    np.testing.assert_allclose(moved_share(plan, source, support, largest_only=True), [0, 0])
    crossed = support[:, ::-1]
    np.testing.assert_allclose(moved_share(plan, source, crossed, largest_only=False), [0.7, 0])
    np.testing.assert_allclose(moved_share(plan, source, crossed, largest_only=True), [1, 0])

"""The prefix cost by its definition: one pair of tokens at a time, each text tokenized alone."""

from stages.align.first_cuts import CONTEXTS
from stages.models.tokenizer import SegmentTokenizer
from tests.stages.align.pairing.test_levenshtein import levenshtein


def first_piece(tokenizer: SegmentTokenizer, text: bytes) -> bytes | None:
    """The token with which a tokenizer begins a text in the middle of a document; None where it writes the text otherwise.

    Bytes that are no text begin with the longest token of the vocabulary that begins them.
    """
    vocabulary = tokenizer.vocabulary
    try:
        decoded = text.decode()
    except UnicodeDecodeError:
        ordinary = [token for i, token in enumerate(vocabulary.token_bytes) if not vocabulary.is_special[i]]
        return max((token for token in ordinary if token and text.startswith(token)), key=len, default=None)
    for context in CONTEXTS:
        before = len(context.encode())
        encoding = tokenizer.encode(context + decoded, is_last=False)
        ends = [0, *encoding.byte_end.tolist()]
        spans = zip(encoding.ids.tolist(), ends[:-1], ends[1:], strict=True)
        pieces = [(vocabulary.token_bytes[token], end - start) for token, start, end in spans if end > start >= before]
        covered = sum(size for _, size in pieces)
        if covered == len(text) and text.startswith(pieces[0][0]) and len(pieces[0][0]) == pieces[0][1]:
            return pieces[0][0]
    return None


def prefix_cost(source: SegmentTokenizer, x: int, target: SegmentTokenizer, y: int) -> float:
    """0.1 a byte where the longer text would be begun with the shorter one; special tokens have no beginning."""
    one, other = source.vocabulary.token_bytes[x], target.vocabulary.token_bytes[y]
    is_text = not source.vocabulary.is_special[x] and not target.vocabulary.is_special[y]
    if is_text and (
        one == other
        or (len(other) < len(one) and first_piece(target, one) == other)
        or (len(one) < len(other) and first_piece(source, other) == one)
    ):
        return 0.1 * abs(len(one) - len(other))
    return levenshtein(source.vocabulary.text(x), target.vocabulary.text(y))

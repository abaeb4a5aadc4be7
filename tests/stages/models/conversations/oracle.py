"""What must hold of every token of an encoded conversation, told from the messages and the tokens' bytes alone."""

import unicodedata

import numpy as np

from stages.contract.roles import Role
from stages.models.segment_text import SegmentText
from stages.models.tokenizer import Encoding, SegmentTokenizer


def bases_of(segment: SegmentText) -> list[int]:
    """Where each message begins in the common coordinates, and the length of the whole."""
    return np.cumsum([0, *(len(message.content.encode()) + 1 for message in segment.messages)]).tolist()


def place(segment: SegmentText, byte_end: int, role: int) -> tuple[int, int] | None:
    """The context of a position: which message, and how many bytes of it were read, one more with the end of its turn."""
    bases = bases_of(segment)
    if role == Role.TEMPLATE:
        return None
    if role == Role.START:
        return bases.index(byte_end), 0
    message = int(np.searchsorted(bases, byte_end, side="left")) - 1
    return message, byte_end - bases[message]


def _decode(raw: bytes) -> str:
    """Some tokenizers compose characters, or read "▁" as a space."""
    return unicodedata.normalize("NFC", raw.decode("utf-8", errors="surrogateescape").replace("▁", " "))


def check_conversation(tokenizer: SegmentTokenizer, segment: SegmentText, encoding: Encoding) -> None:
    """Compare every token's bytes with what it is said to have read."""
    assert encoding.role is not None
    assert encoding.is_trained is not None
    raw, bases = segment.text.encode(), bases_of(segment)
    turn_end = tokenizer.vocabulary.eos_id
    before, last_read = 0, [0] * len(segment.messages)
    seen: set[tuple[int, tuple[int, int] | None]] = set()
    for token_id, end, role, trained in zip(
        encoding.ids.tolist(),
        encoding.byte_end.tolist(),
        encoding.role.tolist(),
        encoding.is_trained.tolist(),
        strict=True,
    ):
        assert end >= before
        spelled = tokenizer._spelling[token_id]
        where = place(segment, end, role)
        if role in (Role.START, Role.EOS):
            assert (role, where) not in seen
            seen.add((role, where))
        if role == Role.TEXT:
            assert where is not None
            message, num_bytes = where
            assert 0 <= num_bytes <= len(segment.messages[message].content.encode())
            assert trained == segment.messages[message].is_trained
            # A token may hold bytes of the template beside those of the content.
            read = _decode(raw[max(before, bases[message]) : end]).strip()
            assert read in _decode(spelled), (read, spelled)
            last_read[message] = num_bytes
        else:
            skipped = raw[before:end].decode().replace("\x03", "")
            assert not skipped.replace("▁", " ").strip(), (spelled, skipped)
        if role == Role.EOS:
            assert token_id == turn_end
            assert where is not None
            assert where[1] == len(segment.messages[where[0]].content.encode()) + 1
            assert trained == segment.messages[where[0]].is_trained
        if role in (Role.START, Role.TEMPLATE):
            assert not trained
        before = end
    assert before == len(raw)
    for message, num_bytes in zip(segment.messages, last_read, strict=True):
        assert num_bytes >= len(message.content.rstrip().replace("\x03", "").encode()) or not message.content.strip()

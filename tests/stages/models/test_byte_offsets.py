"""Hand-made cases of the two ways to token ends."""

import numpy as np
import pytest

from stages.models.byte_offsets import character_positions, ends_by_bytes, ends_by_offsets


def test_character_positions_count_utf8_bytes() -> None:
    assert character_positions("aé日😀".encode()).tolist() == [0, 1, 3, 6, 10]
    assert character_positions(b"").tolist() == [0]


@pytest.mark.parametrize(
    ("text", "pieces", "wanted"),
    [
        ("ab", [b"a", b"b"], [1, 2]),
        ("ab", [b" a", b"b"], [1, 2]),  # a dummy prefix
        ("a", [b" ", b"a"], [0, 1]),  # a dummy prefix alone
        (" a", [b" ", b" a"], [0, 2]),
        (" a", [b" a"], [2]),
        ("é", [b"\xc3", b"\xa9"], [1, 2]),
        ("", [], []),
        ("ab", [b"a", b"", b"b"], [1, 1, 2]),
    ],
)
def test_tokens_that_spell_the_text_end_at_their_running_sum(text: str, pieces: list[bytes], wanted: list[int]) -> None:
    ends = ends_by_bytes(text.encode(), pieces)
    assert ends is not None
    assert ends.tolist() == wanted


@pytest.mark.parametrize("pieces", [[b"A", b"b"], [b"a"], [b"xab"], [b"a", b"b", b" "], [b"  ab"]])
def test_tokens_that_do_not_spell_the_text_have_no_running_sum(pieces: list[bytes]) -> None:
    assert ends_by_bytes(b"ab", pieces) is None


@pytest.mark.parametrize(
    ("text", "pieces", "offsets", "wanted"),
    [
        # lower-casing and dropped white space: it belongs to the token after it
        ("The  Dog", [b" the", b" dog"], [(0, 3), (5, 8)], [3, 8]),
        # white space dropped at the end belongs to the last token
        ("The \n", [b" the"], [(0, 3)], [5]),
        # a composed character's offsets are its base's: the accent belongs to it
        ("e\u0301b", ["é".encode(), b"b"], [(0, 1), (2, 3)], [3, 4]),
        # ... also where two tokens share it, and at the end of the text
        ("be\u0301", [b"b", b"\xc3", b"\xa9"], [(0, 1), (1, 2), (1, 2)], [1, 2, 4]),
        # bytes of one character, beside something that keeps the text from being spelled
        ("X😀", [b"x", b"\xf0", b"\x9f", b"\x98", b"\x80"], [(0, 1), *[(1, 2)] * 4], [1, 2, 3, 4, 5]),
        # a marker alone has read nothing of the character that it shares
        ("X Ab", [b"x", b" ", b"ab"], [(0, 1), (2, 3), (2, 4)], [1, 2, 4]),
        ("X ﬁb", [b"x", b" ", b"fi", b"b"], [(0, 1), (2, 3), (2, 3), (3, 4)], [1, 2, 5, 6]),
        # NFKC makes three tokens of one character of two bytes: all but the last end inside it
        ("½x", [b"1", "⁄".encode(), b"2", b"x"], [(0, 1), (0, 1), (0, 1), (1, 2)], [1, 1, 2, 3]),
        # a token that ends inside a character, and one that begins there
        ("aﬁb", [b"af", b"ib"], [(0, 2), (1, 3)], [2, 5]),
        # offsets that go back are taken as far as they had come
        ("abc", [b"A", b"B", b"C"], [(0, 2), (0, 1), (2, 3)], [1, 2, 3]),
    ],
)
def test_offsets_give_ends(text: str, pieces: list[bytes], offsets: list[tuple[int, int]], wanted: list[int]) -> None:
    ends = ends_by_offsets(text, pieces, offsets)
    assert ends.tolist() == wanted
    assert (np.diff(ends) >= 0).all()

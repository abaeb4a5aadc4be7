"""Texts as a terminal and a page can show them."""


def visible(text: str) -> str:
    """A token's text with its white space visible, and all else that cannot be seen in hexadecimal; see ``printable``."""
    marks = {"\n": "⏎", "\t": "⇥", "\r": "␍", " ": "·"}
    return "".join(marks.get(char) or printable(char) for char in text) or "∅"


def printable(text: str) -> str:
    """A text that a terminal and a page show as it is: bytes that are no character as ``<0xE2>``, characters that control
    or cannot be seen (escape, zero width, changes of direction, spaces of other widths) as ``<U+200B>``.
    """
    return "".join(
        char
        if char.isprintable()
        else f"<0x{ord(char) - 0xDC00:02X}>"
        if 0xDC80 <= ord(char) <= 0xDCFF
        else f"<U+{ord(char):04X}>"
        for char in text
    )

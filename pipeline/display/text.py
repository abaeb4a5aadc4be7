"""Texts in a form that a terminal and a page can show."""


def format_bytes(num_bytes: float) -> str:
    """Format a number of bytes in powers of 1,000, with two or three digits: ``"120 kB"``, ``"5.9 GB"``.

    The text is empty for 0.
    """
    if not num_bytes:
        return ""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)):
        value = num_bytes / size
        if value >= 1 or unit == "B":
            return f"{value:,.0f} {unit}" if value >= 9.95 or unit == "B" else f"{value:.2g} {unit}"
    raise AssertionError("the last unit takes what is left")


def visible(text: str) -> str:
    """Return a token's text with visible white space, and everything else that cannot be seen in hexadecimal.

    See ``printable``.
    """
    marks = {"\n": "⏎", "\t": "⇥", "\r": "␍", " ": "·"}
    return "".join(marks.get(char) or printable(char) for char in text) or "∅"


def printable(text: str) -> str:
    """Return a text that a terminal and a page show without surprises.

    Bytes that are not part of a character become ``<0xE2>``; characters that control or cannot be seen (escape, zero
    width,
    changes of direction, spaces of other widths) become ``<U+200B>``.
    """
    return "".join(
        char
        if char.isprintable()
        else f"<0x{ord(char) - 0xDC00:02X}>"
        if 0xDC80 <= ord(char) <= 0xDCFF
        else f"<U+{ord(char):04X}>"
        for char in text
    )

"""Read the header of a GGUF file, without its tensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any, Final

from stages.models.weights import WeightFileError, refuse_stand_in

_NUMBERS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type of a value -> struct's code."""
_STRING: Final = 8
_ARRAY: Final = 9
_VERSIONS: Final = (2, 3)
_REFETCH: Final = "Fetch the file again"


def check_gguf(file: Path) -> None:
    """Refuse a file that is not GGUF, or is cut short.

    Args:
        file: a local file; the package gguf must be installed, which knows how large a quantised tensor is.

    Raises:
        WeightFileError: says what the file is instead.
    """
    refuse_stand_in(file)
    with file.open("rb") as opened:
        start = opened.read(8)
        if start[:4] != b"GGUF" or len(start) < 8:
            raise WeightFileError(file, f"it begins with {start!r}", "a GGUF file", _REFETCH)
        version = struct.unpack("<I", start[4:])[0]
        if version not in _VERSIONS:
            raise WeightFileError(
                file, f"version {version}", f"GGUF of version {_VERSIONS[0]} or {_VERSIONS[1]}", _REFETCH
            )
        size = file.stat().st_size
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as raw:
            try:
                end = _Header(raw).data_end()
            except (struct.error, OverflowError, UnicodeDecodeError, KeyError) as error:
                raise WeightFileError(
                    file, f"cut short or damaged in its header ({error})", "a whole file", _REFETCH
                ) from error
    if size < end:
        raise WeightFileError(file, f"cut short: {size:,} of {end:,} bytes", "a whole file", _REFETCH)


class _Header:
    """Reader of a header, from its beginning to its end."""

    def __init__(self, raw: mmap.mmap) -> None:
        self._raw = raw
        self._at = 8

    def data_end(self) -> int:
        """Return where the last tensor's data ends, in bytes from the file's beginning."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        num_tensors, num_values = self._number("Q"), self._number("Q")
        alignment = 32
        for _ in range(num_values):
            key, value = self._string(), self._value(self._number("I"))
            if key == "general.alignment":
                alignment = int(value)
        end = 0
        for _ in range(num_tensors):
            self._string()
            shape = [self._number("Q") for _ in range(self._number("I"))]
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(self._number("I"))]
            end = max(end, self._number("Q") + math.prod(shape) // block * block_bytes)
        start = -(-self._at // alignment) * alignment
        return start + end

    def _number(self, code: str) -> Any:
        value = struct.unpack_from(f"<{code}", self._raw, self._at)[0]
        self._at += struct.calcsize(f"<{code}")
        return value

    def _string(self) -> str:
        length = self._number("Q")
        text = self._raw[self._at : self._at + length].decode()
        self._at += length
        return text

    def _value(self, kind: int) -> Any:
        """Read a value; for an array only where it ends."""
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._number(_NUMBERS[kind])
        inner, length = self._number("I"), self._number("Q")
        if inner in _NUMBERS:
            self._at += length * struct.calcsize(f"<{_NUMBERS[inner]}")
            return None
        for _ in range(length):
            if inner == _STRING:
                self._at += 8 + struct.unpack_from("<Q", self._raw, self._at)[0]
            else:
                self._value(inner)
        return None

"""A problem of a model's files."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """Reason why a model cannot be used, in words.

    Attributes:
        model: the model's name in the configuration.
        file: the file, or the folder, that is meant.
        found: actual state.
        expected: expected state; empty if ``found`` implies it.
        remedy: remedy, as a sentence; empty if ``found`` implies it.
    """

    model: str
    file: str
    found: str
    expected: str = ""
    remedy: str = ""

    @property
    def text(self) -> str:
        """Text of the problem, without its model and file."""
        sentence = f"{self.found}; expected {self.expected}" if self.expected else self.found
        return f"{sentence}. {self.remedy}" if self.remedy else sentence

    def __str__(self) -> str:
        """Return the problem as one message."""
        where = f"{self.file}: " if self.file else ""
        return f"model {self.model}: {where}{self.text}"

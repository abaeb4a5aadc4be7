"""Render conversations with a model's own chat template, and find the contents in what it writes.

A template is a program, so nothing is assumed of it. It is run with the same roles and with contents that no text has, which
says where contents stand; and once more with white space around these, which says what of it is taken off. Put together again,
template pieces and contents must be what the template gives for the conversation itself. Otherwise that is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Final

from stages.models.segment_text import Message

_OPEN: Final = "\U000f5a1e"
_CLOSE: Final = "\U000f5a1f"
"""Private-use characters around the number of a message: the placeholder of its content."""
_LEAD: Final = "\n \x0b\x0c"
_TAIL: Final = "\x0c\x0b \n"
"""White space around a placeholder. How much of it a template leaves says what it takes off: nothing, line ends, line ends
and spaces, or all white space."""
_TRIMMED: Final = {_LEAD: "", _LEAD[1:]: "\n", _LEAD[2:]: "\n ", "": None}
"""What is left of ``_LEAD``, or of ``_TAIL`` backwards -> the characters that are taken off there; None: all white space."""
_MAX_SHAPES: Final = 4096
"""Sequences of roles of which the pieces are remembered."""

PLAIN_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{{ {'system': 'System', 'user': 'User', 'assistant': 'Assistant'}[message.role] }}:\n"
    "{{ message.content }}{{ eos_token }}{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
"""The generic template, of `chat_template = "plain"`: the role, a line end, the content, EOS, a line end."""


def plain_template(*, bos: bool) -> str:
    """Return the generic template; the rendering begins with BOS for models that use it."""
    return f"{{{{ bos_token }}}}{PLAIN_TEMPLATE}" if bos else PLAIN_TEMPLATE


_FROZEN_DATE: Final = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(
        f" | replace('%{letter}', '{text}')"
        for letter, text in {
            "d": "26",
            "b": "Jul",
            "B": "July",
            "Y": "2024",
            "y": "24",
            "m": "07",
            "A": "Friday",
            "a": "Fri",
            "H": "00",
            "M": "00",
            "S": "00",
            "I": "12",
            "p": "AM",
            "j": "208",
            "-d": "26",
            "-m": "7",
            "e": "26",
            "F": "2024-07-26",
            "D": "07/26/24",
            "T": "00:00:00",
        }.items()
    )
    + " }}{%- endmacro %}\n"
)
"""Takes the place of the clock that transformers offers to templates: a run must not depend on its day. The day is the one
that Llama 3's template falls back to where it has no clock."""


class RenderError(ValueError):
    """A conversation that a model's template cannot render, or that cannot be found in what it renders."""


@dataclass(frozen=True)
class Rendered:
    """A conversation of M messages as a template writes it: piece, content, piece, content, ..., piece.

    Attributes:
        pieces: M + 1 texts of the template.
        contents: M contents, as far as the template keeps them.
        num_dropped: M numbers of bytes that it takes off in front of each content.
    """

    pieces: tuple[str, ...]
    contents: tuple[str, ...]
    num_dropped: tuple[int, ...]

    @property
    def text(self) -> str:
        """The whole rendering."""
        return "".join(piece + content for piece, content in zip(self.pieces, (*self.contents, ""), strict=True))


@dataclass(frozen=True)
class _Shape:
    """Text that a template writes around the contents of messages with certain roles.

    Attributes:
        pieces: M + 1 texts.
        trimmed: M pairs of what is taken off in front of and behind a content: characters, or None for all white space.
    """

    pieces: tuple[str, ...]
    trimmed: tuple[tuple[str | None, str | None], ...]


class ChatTemplate:
    """A chat template, run by transformers, always on the same day."""

    def __init__(self, tokenizer: Any, jinja: str | None = None) -> None:
        """Take a template.

        Args:
            tokenizer: tokenizer of transformers, whose special tokens the template uses.
            jinja: the template's text; None: the tokenizer's own.

        Raises:
            ValueError: the tokenizer has none, or several and none is the default one.
        """
        if jinja is None:
            if not tokenizer.chat_template:
                raise ValueError(
                    "the tokenizer has no chat template, and documents are conversations (dataset.messages_column): set "
                    "`chat_template` of this model to a Jinja file, or to 'plain' for a generic one"
                )
            jinja = tokenizer.get_chat_template()
        self._tokenizer = tokenizer
        self._jinja = _FROZEN_DATE + jinja if "strftime_now" in jinja else jinja
        self._shapes: dict[tuple[str, ...], _Shape | RenderError] = {}

    def apply(self, messages: Sequence[tuple[str, str]]) -> str:
        """Return what the template writes for messages, given as role and content.

        Raises:
            RenderError: the template refuses them, or fails.
        """
        try:
            rendered: str = self._tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in messages],
                chat_template=self._jinja,
                tokenize=False,
                add_generation_prompt=False,
            )
        except Exception as error:  # a template is a program: it raises what it likes, and Jinja what Python does
            raise RenderError(f"the chat template refuses the conversation: {error}") from error
        return rendered

    def render(self, messages: Sequence[Message]) -> Rendered:
        """Render a conversation, and find its contents.

        Raises:
            RenderError: the template refuses the conversation, leaves out a message, or rewrites a content.
        """
        if not messages:
            raise RenderError("the conversation has no messages")
        shape = self._shape(tuple(message.role for message in messages))
        contents, num_dropped = [], []
        for message, (front, behind) in zip(messages, shape.trimmed, strict=True):
            kept = _strip(message.content.lstrip, front)
            num_dropped.append(len(message.content[: len(message.content) - len(kept)].encode()))
            contents.append(_strip(kept.rstrip, behind))
        rendered = Rendered(shape.pieces, tuple(contents), tuple(num_dropped))
        written = self.apply([(message.role, message.content) for message in messages])
        if rendered.text != written:
            raise RenderError(_rewritten(messages, rendered, written))
        return rendered

    def _shape(self, roles: tuple[str, ...]) -> _Shape:
        shape = self._shapes.get(roles)
        if shape is None:
            try:
                shape = self._find_shape(roles)
            except RenderError as error:
                shape = error
            # Several shards may be tokenized at once: each step leaves the shapes usable.
            if len(self._shapes) >= _MAX_SHAPES:
                self._shapes.pop(next(iter(self._shapes.copy())), None)
            self._shapes[roles] = shape
        if isinstance(shape, RenderError):
            raise RenderError(str(shape))
        return shape

    def _find_shape(self, roles: tuple[str, ...]) -> _Shape:
        """Run the template with placeholders, and take apart what it writes; then with white space around them."""
        pieces, spaced = self._apart(roles, "", ""), self._apart(roles, _LEAD, _TAIL)
        kept: list[tuple[str, str]] = []  # of each piece: white space that is left in front of it and behind it
        for index, (piece, spaced_piece) in enumerate(zip(pieces, spaced, strict=True)):
            tails = [left[::-1] for left in _TRIMMED] if index > 0 else [""]
            leads = list(_TRIMMED) if index < len(roles) else [""]
            matching = [(tail, lead) for tail, lead in product(tails, leads) if f"{tail}{piece}{lead}" == spaced_piece]
            if not matching:
                raise RenderError(
                    f"the chat template changes whitespace of message {max(index - 1, 0)} "
                    f"({roles[max(index - 1, 0)]}), or of the one after it, in an unsupported way"
                )
            kept.append(matching[0])
        trimmed = [(_TRIMMED[kept[index][1]], _TRIMMED[kept[index + 1][0][::-1]]) for index in range(len(roles))]
        return _Shape(pieces, tuple(trimmed))

    def _apart(self, roles: tuple[str, ...], lead: str, tail: str) -> tuple[str, ...]:
        """Return what a template writes around placeholders with white space around them, M + 1 texts."""
        marks = [f"{_OPEN}{index}{_CLOSE}" for index in range(len(roles))]
        rest = self.apply([(role, f"{lead}{mark}{tail}") for role, mark in zip(roles, marks, strict=True)])
        pieces = []
        for index, (role, mark) in enumerate(zip(roles, marks, strict=True)):
            piece, separator, rest = rest.partition(mark)
            if not separator or mark in rest or _OPEN in piece:
                how = "more than once" if mark in rest else "not in its place" if separator else "not at all"
                raise RenderError(f"the chat template writes message {index} ({role}) {how}")
            pieces.append(piece)
        return (*pieces, rest)


def _strip(strip: Any, characters: str | None) -> str:
    """Take white space off one end: none of it for ``""``, all of it for None."""
    stripped: str = strip(characters)
    return stripped


def _rewritten(messages: Sequence[Message], rendered: Rendered, written: str) -> str:
    """Say of which message a template made something else."""
    position = 0
    for index, (piece, content) in enumerate(zip(rendered.pieces, rendered.contents, strict=False)):
        expected = piece + content
        if not written.startswith(expected, position):
            return (
                f"the chat template rewrites message {index} ({messages[index].role}), or the text before it: expected "
                f"{_shown(expected)}, found {_shown(written[position : position + len(expected)])}"
            )
        position += len(expected)
    return (
        f"the chat template rewrites the text after message {len(messages) - 1} ({messages[-1].role}): expected "
        f"{_shown(rendered.pieces[-1])}, found {_shown(written[position:])}"
    )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"...{text[-60:]}")

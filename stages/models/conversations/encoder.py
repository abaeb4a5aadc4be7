"""From messages to a model's tokens: the ids that its chat template gives, and what each of them is to the conversation."""

import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

import numpy as np

from stages.models.conversations.locate import (
    Coordinates,
    Tokens,
    control_tokens_in_contents,
    find_tokens,
    in_common_coordinates,
)
from stages.models.conversations.template import ChatTemplate, Rendered, RenderError
from stages.models.segment_text import Message

_STAND_IN: Final = "\U000f7e00{number}\U000f7e01"
"""Takes the place of a control token in the template's own text, while contents are read as text. Private-use characters: no
text that people write has them, and a content that has is refused."""
_PROBE: Final = tuple(Message(role, "a", is_trained=True) for role in ("user", "assistant", "user", "assistant"))


@dataclass(frozen=True, eq=False)
class EncodedConversation:
    """The N tokens of a conversation.

    Attributes:
        ids: N ids.
        coordinates: what each is to the conversation.
    """

    ids: list[int]
    coordinates: Coordinates


class ConversationEncoder:
    """Renders conversations with a model's template and tokenizes what comes of it.

    Control tokens that the template writes are tokens; what looks like one in a content stays text. Usually no content holds
    any: then the rendering is tokenized as ``apply_chat_template`` does it. Otherwise the template's control tokens are
    replaced by stand-ins, added tokens with the same properties, and no control token is parsed at all.

    Attributes:
        turn_end_id: the token that ends the assistant's turns.
        first_id: the token that every rendering begins with, if it is a control token; else None.
    """

    def __init__(self, template: ChatTemplate, copy_backend: Callable[[], Any], spelling: Sequence[bytes]) -> None:
        """Find the tokens by which the template structures conversations.

        Args:
            template: the model's.
            copy_backend: makes a backend (of the `tokenizers` library) that may be changed.
            spelling: id -> the token's bytes.

        Raises:
            ValueError: the template renders no conversation of two turns, or ends the assistant's with no control token.
        """
        self._template = template
        self._copy_backend = copy_backend
        self._spelling = spelling
        self._backend = copy_backend()
        self._backend.encode_special_tokens = False
        self._added: dict[int, Any] = self._backend.get_added_tokens_decoder()
        self._control = {token_id for token_id, token in self._added.items() if token.special}
        probe, rendered = self._render_probe()
        (tokens,) = self._tokenize([rendered])
        self._control |= self._structural(tokens, rendered)
        self.turn_end_id = self._find_turn_end(probe, rendered)
        first_id = tokens.ids[0] if tokens.ids else None
        self.first_id: int | None = first_id if first_id in self._control else None

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[EncodedConversation | RenderError]:
        """Tokenize conversations; one that cannot be rendered or read gives the error in its place."""
        results: list[EncodedConversation | RenderError] = []
        rendered: list[tuple[int, Rendered]] = []
        for index, messages in enumerate(conversations):
            try:
                rendered.append((index, self._template.render(messages)))
            except RenderError as error:
                results.append(error)
            else:
                results.append(RenderError("it is not tokenized yet"))
        for (index, rendering), tokens in zip(
            rendered, self._tokenize([rendering for _, rendering in rendered]), strict=True
        ):
            messages = conversations[index]
            try:
                if control_tokens_in_contents(tokens, rendering):
                    tokens, rendering = self._tokenize_as_text(rendering)  # noqa: PLW2901
                coordinates = in_common_coordinates(tokens, rendering, messages, self.turn_end_id)
            except RenderError as error:
                results[index] = error
            else:
                results[index] = EncodedConversation(tokens.ids, coordinates)
        return results

    def _render_probe(self) -> tuple[tuple[Message, ...], Rendered]:
        try:
            return _PROBE, self._template.render(_PROBE)
        except RenderError:  # a template for one question and one answer
            try:
                return _PROBE[:2], self._template.render(_PROBE[:2])
            except RenderError as error:
                raise ValueError(
                    f"{error} (a question and an answer): correct its template, or set `chat_template` of this model to "
                    "another one"
                ) from error

    def _structural(self, tokens: Tokens, rendered: Rendered) -> set[int]:
        """Return the added tokens between the first two messages and behind the second, special or not.

        Some tokenizers do not declare them special. Added tokens of white space are text (Gemma's line ends).
        """
        begins = len((rendered.pieces[0] + rendered.contents[0]).encode())
        ends = len("".join([*rendered.pieces[:3], *rendered.contents[:2]]).encode())
        return {
            token_id
            for token_id, start, end in zip(tokens.ids, tokens.start.tolist(), tokens.end.tolist(), strict=True)
            if begins <= start
            and end <= ends
            and token_id in self._added
            and not self._added[token_id].content.isspace()
        }

    def _find_turn_end(self, probe: Sequence[Message], rendered: Rendered) -> int:
        """Return the first control token behind an assistant's content; of two different ones that of the last turn."""
        (tokens,) = self._tokenize([rendered])
        position = len(rendered.text.encode())
        for number in range(len(probe) - 1, 0, -2):
            behind = position - len(rendered.pieces[number + 1].encode())
            inside = (tokens.start >= behind) & (tokens.start < position) & tokens.is_control
            if inside.any():
                return tokens.ids[int(np.argmax(inside))]
            position = len("".join([*rendered.pieces[:number], *rendered.contents[: number - 1]]).encode())
        raise ValueError(
            "its chat template does not end the assistant's turn with a control token, so a model would never learn "
            f"to stop: expected one after the answer, found {rendered.pieces[-1][:60]!r}. Correct its template, or set "
            "`chat_template` of this model to another one ('plain' ends turns with the tokenizer's EOS)"
        )

    def _tokenize(self, renderings: Sequence[Rendered]) -> list[Tokens]:
        """Tokenize renderings as they are: control tokens are parsed wherever they stand."""
        texts = [rendered.text for rendered in renderings]
        records = self._backend.encode_batch(texts, add_special_tokens=False) if texts else []
        return [
            self._find(text, record, self._added, self._control) for text, record in zip(texts, records, strict=True)
        ]

    def _find(self, text: str, record: Any, added: Mapping[int, Any], control: Container[int]) -> Tokens:
        """Find the places of a record's tokens.

        Args:
            text: tokenized text.
            record: result of the backend.
            added: the backend's added tokens, by id.
            control: those of them that structure a conversation.
        """
        is_added = _are_written(text, record, added)
        is_control = [parsed and token_id in control for token_id, parsed in zip(record.ids, is_added, strict=True)]
        return find_tokens(
            text,
            record.ids,
            record.offsets,
            [self._spelling[token_id] if token_id < len(self._spelling) else b"" for token_id in record.ids],
            is_added=np.array(is_added, np.bool_),
            is_control=np.array(is_control, np.bool_),
        )

    def _tokenize_as_text(self, rendered: Rendered) -> tuple[Tokens, Rendered]:
        """Tokenize a rendering whose contents hold the text of control tokens.

        Returns:
            The tokens, with the ids of the control tokens that the template wrote; and the rendering that their places are of,
            with stand-ins.

        Raises:
            RenderError: the tokenizer cannot read the text of a control token as text.
        """
        splitter = self._splitter
        replaced = splitter.replace(rendered)
        record = splitter.backend.encode(replaced.text, add_special_tokens=False)
        is_written = _are_written(replaced.text, record, splitter.added)
        for token_id, written in zip(record.ids, is_written, strict=True):
            if written and token_id in self._control:  # the vocabulary has its name as a piece like any other
                raise RenderError(
                    f"a message holds the text of the control token {self._added[token_id].content!r}, which this "
                    "tokenizer cannot encode as text"
                )
        tokens = self._find(replaced.text, record, splitter.added, splitter.meaning)
        ids = [splitter.meaning.get(token_id, token_id) for token_id in tokens.ids]
        return replace(tokens, ids=ids), replaced

    @cached_property
    def _splitter(self) -> "_Splitter":
        """A backend for contents with the text of control tokens; few corpora have any."""
        return _Splitter(self._copy_backend(), {token_id: self._added[token_id] for token_id in sorted(self._control)})


def _are_written(text: str, record: Any, added: Mapping[int, Any]) -> list[bool]:
    """Return which tokens of a record are added tokens that stand in the text.

    Where a model knows no token for a text, it gives the id of an added one (``<unk>``) that nobody has written there.
    """
    return [
        token_id in added
        and (added[token_id].normalized or text[slice(*span)].strip() == added[token_id].content.strip())
        for token_id, span in zip(record.ids, record.offsets, strict=True)
    ]


class _Splitter:
    """A backend that parses no control token, and stand-ins for those of the template.

    Attributes:
        backend: tokenizer of the `tokenizers` library.
        added: its added tokens, by id.
        meaning: id of a stand-in -> id of the control token that it stands for.
    """

    def __init__(self, backend: Any, control: dict[int, Any]) -> None:
        from tokenizers import AddedToken

        flags = {
            token_id: {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
            for token_id, token in control.items()
        }
        # A control token that is not declared special would be parsed all the same.
        backend.add_special_tokens(
            [
                AddedToken(token.content, special=True, **flags[token_id])
                for token_id, token in control.items()
                if not token.special
            ]
        )
        stand_ins = {token_id: _STAND_IN.format(number=token_id) for token_id in control}
        backend.add_tokens(
            [AddedToken(stand_in, special=False, **flags[token_id]) for token_id, stand_in in stand_ins.items()]
        )
        backend.encode_special_tokens = True
        self.backend = backend
        self.added: dict[int, Any] = backend.get_added_tokens_decoder()
        self.meaning = {backend.token_to_id(stand_in): token_id for token_id, stand_in in stand_ins.items()}
        self._stand_ins = {control[token_id].content: stand_in for token_id, stand_in in stand_ins.items()}
        longest_first = sorted(self._stand_ins, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))

    def replace(self, rendered: Rendered) -> Rendered:
        """Replace the template's control tokens with stand-ins.

        Raises:
            RenderError: a content holds what looks like a stand-in.
        """
        if any(_STAND_IN[0] in content for content in rendered.contents):
            raise RenderError(f"a message holds the private-use character U+{ord(_STAND_IN[0]):X}, which is used here")
        pieces = tuple(self._pattern.sub(lambda match: self._stand_ins[match[0]], piece) for piece in rendered.pieces)
        return replace(rendered, pieces=pieces)

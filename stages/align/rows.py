"""Inputs of the align stage from one model: its rows for a segment, and its tokenizer."""

from dataclasses import dataclass, replace

import numpy as np

from stages.align.vocabulary_maps import NO_ID
from stages.contract.draws import add_draws
from stages.contract.roles import Role, TokenRoles, token_roles
from stages.measures.nucleus import outside_nucleus
from stages.models.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class ModelRows:
    """Predictions of one model for a segment of N tokens.

    Attributes:
        token_ids: (N,) int32.
        byte_end: (N,) int32, nondecreasing.
        topk_ids: (N, k) int32, descending by probability; -1 at pads.
        topk_probs: (N, k) float64; 0 at pads.
        gold_logprob: (N,) ln p(token t+1 | tokens <= t) over the full vocabulary, NaN at the last position; only figures
            read it; None: they leave it out.
        num_draws: m, the slots of a row for draws from the tail, in addition to those for exact entries.
        undrawn: with draws, the rows before they were added.
        roles: roles of the tokens in a conversation; None for plain text, whose roles its tokenizer gives (``Side.roles_of``).
        is_marked: (N,) bool, in a conversation: where a message begins, its first token is written with a space that the
            message does not have; None: it is read off the tokens. For rows that are not one per token of the model.
    """

    token_ids: np.ndarray
    byte_end: np.ndarray
    topk_ids: np.ndarray
    topk_probs: np.ndarray
    gold_logprob: np.ndarray | None = None
    num_draws: int = 0
    undrawn: "ModelRows | None" = None
    roles: TokenRoles | None = None
    is_marked: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def has_label(self) -> np.ndarray:
        """(N,) bool: the next token is trained on. In plain text, that is every position but the last."""
        if self.roles is None:
            return np.arange(len(self)) < len(self) - 1
        return np.append(self.roles.is_trained[1:], False)[: len(self)]

    @property
    def predicts_text(self) -> np.ndarray:
        """(N,) bool: the next token is text, or ends a text or a turn, and is not one of the chat template.

        Where a template ends a turn without a token of its own, the model has seen all of the content, and what it expects is
        the template's next piece. Such a distribution says nothing about another model's end of turn.
        """
        if self.roles is None:
            return np.ones(len(self), np.bool_)
        return np.append(np.isin(self.roles.role[1:], (Role.TEXT, Role.EOS)), False)[: len(self)]

    def with_draws(self, draws: np.ndarray) -> "ModelRows":
        """Return the rows with tokens drawn from their tails as further entries; (N, m), see ``draws.add_draws``."""
        ids, probs = add_draws(self.topk_ids, self.topk_probs, draws)
        return replace(self, topk_ids=ids, topk_probs=probs, num_draws=draws.shape[1], undrawn=self)

    @property
    def exact(self) -> "ModelRows":
        """The rows with only their exact entries."""
        return self if self.undrawn is None else self.undrawn


@dataclass(frozen=True, eq=False)
class Side:
    """Tokenizer of one model, as far as aligning needs it.

    Attributes:
        name: name of the model, for messages.
        vocabulary: V tokens.
        prefix_id: the token before every text, None without.
        has_dummy_prefix: it writes a text's first token with a space that the text does not have.
        texts: (V,) each token's text, decoded.
        spells_text: its tokens, end to end, are the text's bytes; False where it normalises (lower case, NFKC).
    """

    name: str
    vocabulary: Vocabulary
    prefix_id: int | None
    has_dummy_prefix: bool
    texts: tuple[str, ...]
    spells_text: bool = True

    def roles(self, token_ids: np.ndarray) -> np.ndarray:
        """Return the role of each token of a segment of plain text, (N,)."""
        vocabulary = self.vocabulary
        return token_roles(token_ids, prefix_id=self.prefix_id, eos_id=vocabulary.eos_id)

    def roles_of(self, rows: ModelRows) -> np.ndarray:
        """Return the role of each token of a segment, of plain text or of a conversation, (N,).

        A message's first token may hold white space of the chat template, which then stands behind its START. One space is the
        same as a dummy prefix (``▁Hello`` after ``[/INST]``). Anything else, say one token for the template's line break and
        the content's own, is what this model expects there and no other: such a position is TEMPLATE.
        """
        if rows.roles is None:
            return self.roles(rows.token_ids)
        roles = rows.roles.role
        if rows.is_marked is not None:
            return roles
        before = np.flatnonzero((roles[:-1] == Role.START) & (roles[1:] == Role.TEXT))
        mixed = [position for position in before.tolist() if self._mixes_template_in(rows, position + 1)]
        if mixed:
            roles = roles.copy()
            roles[mixed] = Role.TEMPLATE
        return roles

    def starts(self, rows: ModelRows) -> tuple[np.ndarray, np.ndarray]:
        """Find where nothing of a text, or of a message, has been read, and how what comes next is written there.

        Returns:
            is_start: (N,) bool.
            is_marked: (N,) bool, false where ``is_start`` is: the next token is written with a space that the text does not
                have. In plain text only the tokenizer decides (its dummy prefix); in a conversation the template does as
                well (``[/INST] Hello``), so it is read off the token.
        """
        if rows.roles is None:
            is_start = rows.byte_end == 0
            return is_start, is_start & self.has_dummy_prefix
        roles = self.roles_of(rows)
        is_start = roles == Role.START
        if rows.is_marked is not None:
            return is_start, is_start & rows.is_marked
        is_marked = np.zeros(len(rows), np.bool_)
        for position in np.flatnonzero(is_start[:-1] & (roles[1:] == Role.TEXT)).tolist():
            is_marked[position] = self._has_mark(rows, position + 1)
        return is_start, is_marked

    def _has_mark(self, rows: ModelRows, position: int) -> bool:
        """Return whether a message's first token is written with a space that the message does not have."""
        piece, num_bytes = self._first_piece(rows, position)
        if not piece.startswith(b" "):
            return False
        if (
            not self.spells_text
        ):  # lengths say nothing: what is true of the model's other texts is taken to be true here
            return self.has_dummy_prefix
        # One byte longer than its content: a space of the template, or a dummy prefix. Shorter: the template has trimmed white
        # space off the content, so a space before it is none of the content's.
        return len(piece) != num_bytes

    def _mixes_template_in(self, rows: ModelRows, position: int) -> bool:
        """Return whether a message's first token holds more of the template than one space in front."""
        piece, num_bytes = self._first_piece(rows, position)
        return self.spells_text and len(piece) > num_bytes + piece.startswith(b" ")

    def _first_piece(self, rows: ModelRows, position: int) -> tuple[bytes, int]:
        """Return the bytes of a token, and the number of bytes of its text that it covers."""
        piece = self.vocabulary.token_bytes[rows.token_ids[position]]
        return piece, int(rows.byte_end[position] - rows.byte_end[position - 1])

    def pairing_texts(self, token_ids: np.ndarray) -> list[str]:
        """Return the tokens' texts for the pairing's edit distance: without word-boundary markers."""
        texts = self.texts  # decoded once, not once per token
        is_marked = self.vocabulary.is_marked[token_ids].tolist()
        return [
            texts[token_id][1:] if marked else texts[token_id]
            for token_id, marked in zip(token_ids.tolist(), is_marked, strict=True)
        ]

    def check(self, rows: ModelRows) -> None:
        """Refuse rows that another tokenizer must have made.

        Raises:
            ValueError: an id that this vocabulary does not have, or tokens that go back in the text.
        """
        for kind, ids in (("token", rows.token_ids), ("candidate", rows.topk_ids)):
            largest = int(ids.max(initial=NO_ID))
            if largest >= self.vocabulary.size:
                raise ValueError(
                    f"{self.name}: {kind} id {largest}, but its tokenizer has {self.vocabulary.size} tokens; were the logits "
                    "made with another tokenizer?"
                )
        if (np.diff(rows.byte_end) < 0).any():
            raise ValueError(
                f"{self.name}: byte_end decreases at token {int(np.argmax(np.diff(rows.byte_end) < 0)) + 1}"
            )


def narrow(ids: np.ndarray, probs: np.ndarray, *, top_k: int, top_p: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the first ``top_k`` entries of each row, or fewer: the smallest prefix of them that holds ``top_p``.

    A row has at least one entry, and all ``top_k`` where together they hold less than ``top_p``.

    Args:
        ids: (P, k) descending by probability; -1 at pads.
        probs: (P, k) probabilities over the full vocabulary; 0 at pads.
        top_k: the most entries of a row.
        top_p: probability that a row must hold; None: any.

    Returns:
        ids and probs, (P, min(k, top_k)), with pads where the prefix ends.
    """
    ids, probs = ids[:, :top_k], probs[:, :top_k]
    if top_p is None:
        return ids, probs
    outside = outside_nucleus(probs, top_p)
    return np.where(outside, NO_ID, ids).astype(ids.dtype), np.where(outside, 0.0, probs)

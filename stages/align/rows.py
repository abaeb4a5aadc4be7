"""What the align stage reads of a model: its rows for a segment, and its tokenizer."""

from dataclasses import dataclass, replace

import numpy as np

from stages.align.vocabulary_maps import NO_ID
from stages.contract.draws import add_draws
from stages.contract.roles import token_roles
from stages.measures.nucleus import outside_nucleus
from stages.models.tokenizer import Vocabulary


@dataclass(frozen=True, eq=False)
class ModelRows:
    """What one model says about a segment of N tokens.

    Attributes:
        token_ids: (N,) int32.
        byte_end: (N,) int32, nondecreasing.
        topk_ids: (N, k) int32, descending by probability; -1 at pads.
        topk_probs: (N, k) float64; 0 at pads.
        gold_logprob: (N,) ln p(token t+1 | tokens <= t) over the full vocabulary, NaN at the last position; only figures
            read it; None: they leave it out.
        num_draws: m, the places that draws from the tail take in a row beside those of the exact entries.
    """

    token_ids: np.ndarray
    byte_end: np.ndarray
    topk_ids: np.ndarray
    topk_probs: np.ndarray
    gold_logprob: np.ndarray | None = None
    num_draws: int = 0

    def __len__(self) -> int:
        return len(self.token_ids)

    def with_draws(self, draws: np.ndarray) -> "ModelRows":
        """Return the rows with tokens drawn from their tails as further entries; (N, m), see ``draws.add_draws``."""
        ids, probs = add_draws(self.topk_ids, self.topk_probs, draws)
        return replace(self, topk_ids=ids, topk_probs=probs, num_draws=draws.shape[1])


@dataclass(frozen=True, eq=False)
class Side:
    """One model's tokenizer, as far as aligning needs it.

    Attributes:
        name: of the model, for messages.
        vocabulary: V tokens.
        prefix_id: the token that stands before every text, None without.
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
        """(N,) the role of each token of a segment."""
        vocabulary = self.vocabulary
        return token_roles(token_ids, prefix_id=self.prefix_id, eos_id=vocabulary.eos_id)

    def pairing_texts(self, token_ids: np.ndarray) -> list[str]:
        """Return the tokens' texts for the pairing's edit distance: without word-boundary markers."""
        texts = self.texts  # decoded once, not once a token
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
        for what, ids in (("token", rows.token_ids), ("candidate", rows.topk_ids)):
            largest = int(ids.max(initial=NO_ID))
            if largest >= self.vocabulary.size:
                raise ValueError(
                    f"{self.name}: {what} id {largest}, but its tokenizer has {self.vocabulary.size} tokens; were the logits "
                    "made with another tokenizer?"
                )
        if (np.diff(rows.byte_end) < 0).any():
            raise ValueError(
                f"{self.name}: byte_end decreases at token {int(np.argmax(np.diff(rows.byte_end) < 0)) + 1}"
            )


def narrow(ids: np.ndarray, probs: np.ndarray, *, top_k: int, top_p: float | None) -> tuple[np.ndarray, np.ndarray]:
    """The first ``top_k`` entries of each row, or fewer: the smallest prefix of them that holds ``top_p``.

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

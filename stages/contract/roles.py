"""Roles of the tokens of a segment, whether the segment is plain text or a conversation.

``shard`` and what shows text to people know of messages. All other stages know columns: where a token ends, which role it
has and whether it is trained on. This module is the only place that reads those columns, or derives them where a plain
corpus leaves them out.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
import pyarrow as pa

from stages.contract.columns import list_row

TURN_END: Final = "\u0003"
"""Stands for the end of a turn in the text of a conversation, after each message's content: one byte, the virtual byte."""


class Role(IntEnum):
    """Role of a token in its segment.

    In plain text, special tokens have no bytes and pair by role: BOS is whatever stands before the text, EOS ends a document.
    A conversation has a BOS and an EOS for every message. Together with ``byte_end`` the role says which bytes of which
    message were read: two positions share their context if and only if both agree, and the role is not TEMPLATE.
    """

    TEXT = 0
    """The token has bytes of a text, or of a message's content."""
    BOS = 1
    """Nothing of the text, or of the message that begins here, has been read."""
    START = 1
    """BOS, as it is called in a conversation: the last template token before a message's content, if it ends exactly there."""
    EOS = 2
    """The token that ends a document, or a turn. In a conversation it owns the virtual byte."""
    TEMPLATE = 3
    """Any other token of a chat template: it has no bytes, pairs with nothing and is never trained on."""


CONTEXT_ROLES: Final = (Role.TEXT, Role.START, Role.EOS)
"""Roles whose positions can share their context with another model's."""


@dataclass(frozen=True, eq=False)
class TokenRoles:
    """Roles of the N tokens of a segment, and which of them are trained on.

    Attributes:
        role: (N,) uint8, values of ``Role``.
        is_trained: (N,) bool; the token itself is trained on. Position t has a label, and a fused row, if and only if
            ``is_trained[t + 1]``. In plain text, every token but the first of its segment is trained on.
    """

    role: np.ndarray
    is_trained: np.ndarray


def has_roles(table: pa.Table) -> bool:
    """Return whether a table of logits is of conversations: its roles are in columns."""
    return "role" in table.schema.names


def roles_of(table: pa.Table, row: int, *, prefix_id: int | None, eos_id: int | None) -> TokenRoles:
    """Return what the tokens of one row of ``logits/<model>`` are.

    Args:
        table: table in the schema ``schemas.logits_schema``.
        row: row number.
        prefix_id: id of the token before every plain text under the model's tokenizer; None without.
        eos_id: id of its vocabulary's EOS; None without.
    """
    if has_roles(table):
        return TokenRoles(list_row(table, "role", row), list_row(table, "is_trained", row))
    token_ids = list_row(table, "token_ids", row)
    return TokenRoles(token_roles(token_ids, prefix_id=prefix_id, eos_id=eos_id), np.arange(len(token_ids)) > 0)


def token_roles(token_ids: np.ndarray, *, prefix_id: int | None, eos_id: int | None) -> np.ndarray:
    """Return the role of each token of a segment of plain text.

    By place as well as by id, since some models use one id for both roles: what stands before the text has the role of
    BOS, whichever token it is, and EOS is only ever the last.

    Args:
        token_ids: (N,).
        prefix_id: the token before every text (BOS, or EOS of a model without BOS); None without.
        eos_id: the tokenizer's EOS, None without.

    Returns:
        (N,) uint8, values of ``Role``.
    """
    roles = np.full(len(token_ids), Role.TEXT, np.uint8)
    if len(token_ids) and eos_id is not None and token_ids[-1] == eos_id:
        roles[-1] = Role.EOS
    if len(token_ids) and prefix_id is not None and token_ids[0] == prefix_id:
        roles[0] = Role.BOS
    return roles

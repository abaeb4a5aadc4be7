"""Conversations: two hand-made chat templates over hand-made vocabularies, which cut and frame the same messages otherwise."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.align.config import AlignConfig
from stages.align.pairing.token_pairing import NO_POSITION, boundary_pairing, choose_source, edit_distance_pairing
from stages.align.rows import ModelRows, Side
from stages.align.segment import CONDITION, GOLD, IDENTITY, NONE, TRANSPORT, AlignedSegment, SegmentAligner
from stages.align.vocabulary_maps import ModelPair
from stages.contract.roles import Role, TokenRoles
from stages.models.vocabulary import Vocabulary
from tests.stages.align.test_text_start import no_tokens, row_of
from tests.stages.align.transport.test_support import vocabulary

CHATML = vocabulary(
    *(
        b"<|start|>",
        b"<eos>",
        b"user\n",
        b"assistant\n",
        b"\n",
        b"The",
        b" cat",
        b" s",
        b"at",
        b"It",
        b"Th",
        b"e",
        b" The",
    ),
    special=(b"<|start|>",),
)
"""``<|start|>user\\nThe cat<eos>\\n``: every message has a START and an EOS."""
INST = vocabulary(
    *(b"<s>", b"<eos>", b"[INST]", b"[/INST]", b" The", b" cat", b" sat", b" It", b" s", b"at"), special=(b"<s>",)
)
"""``<s>[INST] The cat[/INST] It<eos>``: a space before each content, and nothing that ends a user's turn."""


@dataclass(frozen=True)
class Turn:
    """A message: its tokens in the one vocabulary and in the other."""

    role: str
    chatml: Sequence[bytes]
    inst: Sequence[bytes]
    is_trained: bool

    def content(self) -> bytes:
        return b"".join(self.chatml)


TURNS = (
    Turn("user", [b"The", b" cat"], [b" The", b" cat"], False),
    Turn("assistant", [b"It", b" s", b"at"], [b" It", b" sat"], True),
    Turn("user", [b"Th", b"e", b" s", b"at"], [b" The", b" s", b"at"], False),
    Turn("assistant", [b"Th", b"e", b" cat"], [b" The", b" cat"], True),
)


@dataclass(frozen=True)
class Chat:
    """A conversation under one template; (N,) each."""

    vocabulary: Vocabulary
    ids: list[int]
    byte_end: list[int]
    role: list[int]
    is_trained: list[bool]
    message: list[int]
    """Which message the position has read bytes of, -1 for template tokens."""

    @property
    def side(self) -> Side:
        texts = tuple(self.vocabulary.text(token) for token in range(self.vocabulary.size))
        return Side("m", self.vocabulary, None, False, texts)

    def rows(self, predicted: dict[int, dict[bytes, float]] | None = None) -> ModelRows:
        """Rows in which each position expects its gold next token at 0.6 and another at 0.2, or as ``predicted`` says."""
        tokens = self.vocabulary.token_bytes
        names = [tokens[i] for i in self.ids]
        expected = [{after: 0.6, (b" cat" if after != b" cat" else b"at"): 0.2} for after in [*names[1:], b"<eos>"]]
        for position, row in (predicted or {}).items():
            expected[position] = row
        width = max(map(len, expected))
        ids, probs = np.full((len(names), width), -1, np.int32), np.zeros((len(names), width))
        for position, row in enumerate(expected):
            ranked = sorted(row.items(), key=lambda item: -item[1])
            ids[position, : len(row)] = [tokens.index(token) for token, _ in ranked]
            probs[position, : len(row)] = [prob for _, prob in ranked]
        gold = np.array([np.log(row.get(after, 1e-3)) for row, after in zip(expected, [*names[1:], b""], strict=True)])
        gold[-1] = np.nan
        return ModelRows(
            np.array(self.ids, np.int32),
            np.array(self.byte_end, np.int32),
            ids,
            probs,
            gold_logprob=gold.astype(np.float32),
            roles=TokenRoles(np.array(self.role, np.uint8), np.array(self.is_trained)),
        )

    def find(self, *tokens: bytes) -> int:
        """Position of the last of some consecutive tokens, at their last appearance."""
        names = [self.vocabulary.token_bytes[i] for i in self.ids]
        return max(end for end in range(len(names)) if tuple(names[: end + 1][-len(tokens) :]) == tokens)


def chat(kind: str, turns: Sequence[Turn] = TURNS, *, train_all: bool = False) -> Chat:
    """Render turns under ``chatml`` or ``inst``."""
    made = Chat(CHATML if kind == "chatml" else INST, [], [], [], [], [])
    seen = 0

    def add(token: bytes, role: Role, *, num_bytes: int = 0, is_trained: bool = False, message: int = -1) -> None:
        nonlocal seen
        seen += num_bytes
        values = (made.vocabulary.token_bytes.index(token), seen, int(role), is_trained, message)
        for name, value in zip(("ids", "byte_end", "role", "is_trained", "message"), values, strict=True):
            getattr(made, name).append(value)

    if kind == "inst":
        add(b"<s>", Role.TEMPLATE)
    for number, turn in enumerate(turns):
        trained = turn.is_trained or train_all
        if kind == "chatml":
            add(b"<|start|>", Role.TEMPLATE)
            add(turn.role.encode() + b"\n", Role.START, message=number)
            for token in turn.chatml:
                add(token, Role.TEXT, num_bytes=len(token), is_trained=trained, message=number)
            add(b"<eos>", Role.EOS, num_bytes=1, is_trained=trained, message=number)
            add(b"\n", Role.TEMPLATE)
        else:
            if turn.role == "user":
                add(b"[INST]", Role.START, message=number)
            for index, token in enumerate(turn.inst):
                num_bytes = len(token) - (index == 0)
                add(token, Role.TEXT, num_bytes=num_bytes, is_trained=trained, message=number)
            if turn.role == "user":
                # No token owns the virtual byte of the user's turn: it is behind this one.
                add(b"[/INST]", Role.START, num_bytes=1, message=number + 1)
            else:
                add(b"<eos>", Role.EOS, num_bytes=1, is_trained=trained, message=number)
    return made


def aligner(target: Chat, source: Chat, **chosen: object) -> SegmentAligner:
    pair = ModelPair(
        source.vocabulary,
        target.vocabulary,
        source.side.texts,
        target.side.texts,
        encode=no_tokens,
        encode_source=no_tokens,
        load_embeddings=lambda: np.eye(target.vocabulary.size),
    )
    return SegmentAligner(AlignConfig(**chosen), target.side, source.side, pair)


def align(target: Chat, source: Chat, source_says=None, **chosen: object) -> AlignedSegment:
    return aligner(target, source, **chosen).align(target.rows(), source.rows(source_says))


METHODS = [
    {"preset": "semi-relaxed"},
    {"preset": "semi-relaxed", "inexact": "condition"},
    {"preset": "semi-relaxed", "inexact": "gold"},
    {"preset": "semi-relaxed", "cost": "edit-distance", "support": "target"},
    {"preset": "paper"},
    {"preset": "paper", "inexact": "gold"},
    {"preset": "paper", "inexact": "mask", "pairing": "boundary"},
    {"method": "exact", "pairing": "boundary", "tail": "bucket"},
    {"method": "min-edit"},
]


@pytest.mark.parametrize("chosen", METHODS, ids=lambda chosen: "-".join(map(str, chosen.values())))
@pytest.mark.parametrize("kinds", [("chatml", "inst"), ("inst", "chatml")], ids="-".join)
def test_only_learnt_positions_get_a_distribution_and_template_tokens_are_in_no_pair(kinds, chosen):
    target, source = map(chat, kinds)
    aligned = align(target, source, **chosen)
    has_label = np.append(target.is_trained[1:], False)
    is_template = np.array(target.role) == Role.TEMPLATE
    assert (aligned.outcome[~has_label] == NONE).all()
    assert (aligned.ids[~has_label] == -1).all()
    assert (aligned.outcome[has_label] != NONE).sum() >= 5
    assert (aligned.pairing.start[is_template] == NO_POSITION).all()
    for position in np.flatnonzero(aligned.pairing.is_paired):
        for there in range(aligned.pairing.start[position], aligned.pairing.end[position]):
            assert source.message[there] == target.message[position]
    # Where both cut the text and both own the turn's end, the gold token is what is taught there.
    for tokens in ((b" cat", b"<eos>"), (b"at", b"<eos>")):
        at = target.find(*tokens) - 1 if tokens in _tokens(target) else None
        if at is not None and has_label[at] and "gold" not in chosen.values():
            assert row_of(aligned, at)[target.vocabulary.eos_id] > 0.5


def _tokens(made: Chat) -> set[tuple[bytes, bytes]]:
    names = [made.vocabulary.token_bytes[i] for i in made.ids]
    return set(itertools.pairwise(names))


@pytest.mark.parametrize("pairing", ["boundary", "edit-distance"])
def test_the_first_word_of_every_message_is_the_same_text_with_and_without_a_space_of_the_template(pairing):
    chosen = {"preset": "semi-relaxed", "pairing": pairing, "cost": "edit-distance", "epsilon": 0.1}
    chatml, inst = chat("chatml"), chat("inst")
    # The second answer of the source may begin with It as well. Both messages begin in the middle of the segment.
    start = inst.find(b"[/INST]")
    row = row_of(align(chatml, inst, {start: {b" The": 0.6, b" It": 0.3}}, **chosen), chatml.find(b"assistant\n"))
    assert row[CHATML.token_bytes.index(b"The")] == pytest.approx(0.6, abs=0.02)
    assert row[CHATML.token_bytes.index(b"It")] == pytest.approx(0.3, abs=0.02)
    start = chatml.find(b"assistant\n")
    row = row_of(align(inst, chatml, {start: {b"The": 0.6, b"It": 0.3}}, **chosen), inst.find(b"[/INST]"))
    assert row[INST.token_bytes.index(b" The")] == pytest.approx(0.6, abs=0.02)
    assert row[INST.token_bytes.index(b" It")] == pytest.approx(0.3, abs=0.02)


def test_rows_that_are_not_one_per_token_say_themselves_how_a_message_begins():
    """What a source expects at the target's positions: its own first token of the message may be longer than the target's."""
    chatml, inst = chat("chatml"), chat("inst")
    at = inst.find(b"[/INST]")
    own = inst.rows({at: {b" The": 0.6, b" It": 0.3}})
    size, here = len(chatml.ids), chatml.find(b"assistant\n")
    ids, probs = np.full((size, own.topk_ids.shape[1]), -1, np.int32), np.zeros((size, own.topk_ids.shape[1]))
    ids[here], probs[here] = own.topk_ids[at], own.topk_probs[at]
    tokens = np.full(size, inst.ids[at + 1], np.int32)
    source = replace(chatml.rows(), token_ids=tokens, topk_ids=ids, topk_probs=probs, is_marked=np.ones(size, bool))
    chosen = {"preset": "semi-relaxed", "cost": "edit-distance", "epsilon": 0.1}
    aligned = aligner(chatml, inst, **chosen).align(chatml.rows(), source)
    assert row_of(aligned, here)[CHATML.token_bytes.index(b"The")] == pytest.approx(0.6, abs=0.02)
    assert row_of(aligned, here)[CHATML.token_bytes.index(b"It")] == pytest.approx(0.3, abs=0.02)


def test_the_end_of_turn_moves_to_the_end_of_turn():
    chatml, inst = chat("chatml"), chat("inst")
    end = inst.find(b" cat", b"<eos>") - 1
    row = row_of(
        align(chatml, inst, {end: {b"<eos>": 0.7, b" sat": 0.2}}, preset="semi-relaxed", epsilon=0.05),
        chatml.find(b" cat", b"<eos>") - 1,
    )
    assert row[CHATML.eos_id] == pytest.approx(0.7, abs=0.01)


def test_a_template_that_ends_no_turn_teaches_no_end_of_turn():
    """Llama-2 ends a user's turn with ``[/INST]``, which says nothing about another template's token."""
    target, source = chat("chatml", train_all=True), chat("inst", train_all=True)
    aligned = align(target, source, preset="semi-relaxed")
    user_end, assistant_end = target.find(b"at", b"<eos>") - 1, target.find(b" cat", b"<eos>") - 1
    assert aligned.exact_context[user_end]  # the same bytes were read, and yet
    assert aligned.outcome[user_end] == NONE
    assert aligned.outcome[assistant_end] == TRANSPORT
    assert aligned.outcome[target.find(b"user\n")] == TRANSPORT


def test_a_message_that_follows_without_a_token_between_teaches_no_end_of_turn():
    """A source's last token of a content may hold all that its template writes before the next (``.\n\n``)."""
    turns = [Turn("user", [b"The", b" cat"], [b" The", b" cat"], True), TURNS[1]]
    target, source = chat("chatml", turns), chat("inst", turns)
    between = source.find(b"[/INST]")
    for values in (source.ids, source.byte_end, source.role, source.is_trained, source.message):
        del values[between]
    end, here = target.find(b" cat"), source.find(b" cat")
    assert source.role[here + 1] == Role.TEXT
    for pairing in ("boundary", "edit-distance"):
        aligned = align(target, source, preset="semi-relaxed", pairing=pairing)
        assert aligned.exact_context[end]
        assert aligned.outcome[end] == NONE
        assert aligned.outcome[target.find(b"The")] == TRANSPORT
        assert aligned.outcome[target.find(b"at", b"<eos>") - 1] == TRANSPORT


def test_positions_inside_the_first_source_token_of_a_message_are_conditioned_on_its_bytes():
    target, source = chat("chatml"), chat("inst")
    start = source.find(b"[/INST]")
    says = {start: {b" The": 0.5, b" It": 0.3, b" s": 0.1}}
    aligned = align(target, source, says, preset="semi-relaxed", inexact="condition", epsilon=0.05)
    inner = target.find(b"assistant\n", b"Th")
    assert aligned.outcome[inner] == CONDITION
    assert aligned.seen[inner] == b" Th"  # as the source writes it, with the template's space
    assert row_of(aligned, inner)[CHATML.token_bytes.index(b"e")] > 0.7
    # In the user's message the same tokens teach nothing.
    assert aligned.outcome[target.find(b"user\n", b"Th")] == NONE
    assert aligned.inner[target.find(b"user\n", b"Th")] == 0


def test_a_first_token_with_a_line_break_of_the_template_pairs_with_nothing():
    """``<|assistant|>\\n`` and a content that begins with a line break: the token ``\\n\\n`` is expected by nobody else."""
    merged = vocabulary(b"<eos>", b"<a>", b"\n\n", b"\n", b"It", b" cat")
    plain = vocabulary(b"<eos>", b"<a>", b"\n", b"It", b" cat")
    contents = ((b"\n\n", 1), (b"It", 2)), ((b"\n", 1), (b"It", 2))
    sides = []
    for known, tokens in zip((merged, plain), contents, strict=True):
        ids = [known.token_bytes.index(token) for token in (b"<a>", *(token for token, _ in tokens), b"<eos>")]
        ends = [0, *itertools.accumulate(num_bytes for _, num_bytes in tokens), 4]
        roles = [Role.START, *(Role.TEXT for _ in tokens), Role.EOS]
        sides.append(
            Chat(known, ids, ends, list(map(int, roles)), [False, *(True for _ in tokens), True], [0] * len(ids))
        )
    for target, source in (sides, sides[::-1]):
        says = {0: {b"\n": 0.9, b"It": 0.1}}
        aligned = align(target, source, says, preset="semi-relaxed")
        assert aligned.outcome.tolist() == [NONE, TRANSPORT, TRANSPORT, NONE]


def test_one_vocabulary_under_two_templates_copies_what_is_written_alike():
    """With the same tokens on both sides distributions are copied; not where one template writes a space and the other none."""
    turns = [Turn(turn.role, turn.chatml, [b" The", *turn.chatml[2:]], turn.is_trained) for turn in TURNS[2:]]
    chatml = chat("chatml", turns)
    other = replace(chatml, role=list(chatml.role), byte_end=list(chatml.byte_end), ids=list(chatml.ids))
    same = align(chatml, other, preset="semi-relaxed")
    has_label = np.append(chatml.is_trained[1:], False)
    assert (same.outcome == np.where(has_label, IDENTITY, NONE)).all()
    assert (same.pairing.start[np.array(chatml.role) == Role.TEMPLATE] == NO_POSITION).all()
    # The same, with ``▁The`` for the first two tokens of the answer.
    first = chatml.find(b"assistant\n", b"Th")
    spaced = Chat(
        CHATML,
        [*chatml.ids[:first], CHATML.token_bytes.index(b" The"), *chatml.ids[first + 2 :]],
        *(
            [*values[:first], *values[first + 1 :]]
            for values in (chatml.byte_end, chatml.role, chatml.is_trained, chatml.message)
        ),
    )
    aligned = align(chatml, spaced, preset="semi-relaxed")
    assert aligned.exact_context[first - 1]
    assert aligned.outcome[first - 1] == NONE
    assert aligned.outcome[first + 1] == IDENTITY


def test_gold_is_taken_only_at_learnt_positions():
    target, source = chat("chatml"), chat("inst")
    aligned = align(target, source, preset="semi-relaxed", inexact="gold")
    inner = target.find(b"assistant\n", b"Th")
    assert aligned.outcome[inner] == GOLD
    assert row_of(aligned, inner) == {CHATML.token_bytes.index(b"e"): 1.0}
    assert aligned.outcome[target.find(b"user\n", b"Th")] == NONE


def test_rows_of_another_conversation_or_of_plain_text_are_refused():
    target = chat("chatml")
    shorter = chat("inst", [*TURNS[:3], Turn("assistant", [b"It"], [b" It"], True)])
    with pytest.raises(ValueError, match="the target's last turn ends at byte 31, the source's at byte 26"):
        align(target, shorter, preset="semi-relaxed")
    source = chat("inst", [TURNS[0], Turn("assistant", [b"The"], [b" The"], True), TURNS[0]])
    other = chat("chatml", [TURNS[0], Turn("assistant", [b"It"], [b" It"], True), TURNS[0]])
    with pytest.raises(
        ValueError, match="at byte 11 a turn ends under one tokenizer and a token of a message under the other"
    ):
        align(other, source, preset="semi-relaxed")
    whole = aligner(target, source, preset="semi-relaxed")
    with pytest.raises(ValueError, match="are from a conversation, the source's of plain text"):
        whole.align(target.rows(), replace(source.rows(), roles=None))


# --- properties -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Framed:
    """The tokens of a conversation under some template, as far as pairing needs them; (N,) each."""

    byte_end: np.ndarray
    roles: np.ndarray
    texts: list[str]
    message: np.ndarray


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Framed, Framed]:
    """The same messages cut and framed in two ways: with and without START and EOS, with any number of template tokens."""
    contents = draw(st.lists(st.text("ab ", max_size=6), min_size=1, max_size=5))
    return draw(_framed(contents)), draw(_framed(contents))


@st.composite
def _framed(draw: st.DrawFn, contents: list[str]) -> Framed:
    tokens: list[tuple[int, Role, str, int]] = []
    seen = 0
    for number, content in enumerate(contents):
        tokens += [(seen, Role.TEMPLATE, "<t>", -1)] * draw(st.integers(1, 3))
        if draw(st.booleans()):
            tokens.append((seen, Role.START, "<start>", number))
        cuts = sorted({0, len(content), *draw(st.sets(st.integers(0, len(content)), max_size=3))})
        for start, end in itertools.pairwise(cuts):
            tokens.append((seen + end, Role.TEXT, content[start:end], number))
        seen += len(content) + 1
        if draw(st.booleans()):
            tokens.append((seen, Role.EOS, "<end>", number))
    ends, roles, texts, numbers = zip(*tokens, strict=True)
    return Framed(np.array(ends, np.int32), np.array(roles, np.uint8), list(texts), np.array(numbers))


@settings(max_examples=150)
@given(conversations())
def test_a_paired_position_has_read_bytes_of_the_same_message(both):
    source, target = both
    roles = {"source_roles": source.roles, "target_roles": target.roles}
    boundary = boundary_pairing(source.byte_end, target.byte_end, **roles)
    edit = edit_distance_pairing(
        source.texts, target.texts, source_byte_end=source.byte_end, target_byte_end=target.byte_end, **roles
    )
    for pairing in (boundary, edit):
        partner, exact = choose_source(pairing, source.byte_end, target.byte_end, **roles)
        for position in range(len(target.roles)):
            span = range(pairing.start[position], pairing.end[position]) if partner[position] != NO_POSITION else ()
            for there in span:
                assert Role.TEMPLATE not in (source.roles[there], target.roles[position])
                assert source.message[there] == target.message[position]
            if exact[position]:
                there = partner[position]
                assert source.byte_end[there] == target.byte_end[position]
                assert source.roles[there] == target.roles[position]
    # Every place that both have is found: by both pairings where no content comes between.
    for role in (Role.START, Role.EOS, Role.TEXT):
        own = {(target.message[i], target.byte_end[i]) for i in np.flatnonzero(target.roles == role)}
        theirs = {(source.message[i], source.byte_end[i]) for i in np.flatnonzero(source.roles == role)}
        found = {
            (target.message[i], target.byte_end[i]) for i in np.flatnonzero((target.roles == role) & boundary.is_paired)
        }
        assert found == own & theirs
    # Of each message that has tokens on both sides, every text token is in a pair, as in a text of its own.
    with_text = [{int(n) for n in side.message[side.roles == Role.TEXT]} for side in both]
    for position in np.flatnonzero(target.roles == Role.TEXT):
        assert edit.is_paired[position] == (int(target.message[position]) in with_text[0] & with_text[1])


def test_edits_are_counted_per_message():
    """A cheaper path through the whole conversation would pair the end of one message with the start of the next."""
    texts = (["<t>", "a", "b", "<t>", "c"], ["<t>", "ab", "<t>", "b", "c"])
    roles = [np.array([3, *([0] * (split - 1)), 3, *([0] * (4 - split))], np.uint8) for split in (3, 2)]
    ends = [np.array([0, 1, 2, 3, 4]), np.array([0, 2, 3, 4, 5])]
    pairing = edit_distance_pairing(
        *texts, source_byte_end=ends[0], target_byte_end=ends[1], source_roles=roles[0], target_roles=roles[1]
    )
    assert pairing.start.tolist() == [-1, 1, -1, 4, 4]
    assert pairing.end.tolist() == [-1, 3, -1, 5, 5]
    assert pairing.cost == 3  # a and b against ab: 1 each; c against b: 1, against c: 0

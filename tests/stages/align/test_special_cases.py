"""What token alignment meets in real text, end to end through the stage: groups, special tokens, bytes, normalisers."""

import functools
import itertools
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.align.config import AlignConfig
from stages.align.pairing.token_pairing import boundary_pairing, choose_source, edit_distance_pairing
from stages.align.rows import Side
from stages.align.stage import AlignStage, _side
from stages.contract.columns import list_row, sparse_row
from stages.contract.roles import Role
from stages.contract.stage import StageOutput
from stages.models.config import ModelConfig
from stages.models.token_tables import TokenTable
from stages.models.tokenizer import SegmentTokenizer
from tests.stages.align.pairing.test_levenshtein import levenshtein
from tests.stages.align.synthetic import logits_table, save_families
from tests.texts import texts
from tests.tiny_tokenizers import FAMILIES, TEXTS

PAIRINGS = ("edit-distance", "boundary")
cached_levenshtein = functools.cache(levenshtein)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, ModelConfig]:
    """Provide the four families, and a byte-level BPE of many more merges."""
    return save_families(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def tokenizers(models) -> dict[str, SegmentTokenizer]:
    return {name: SegmentTokenizer.load(model) for name, model in models.items()}


@pytest.fixture(scope="module")
def sides(models, tokenizers) -> dict[str, Side]:
    return {name: _side(models[name], TokenTable.of(tokenizer)) for name, tokenizer in tokenizers.items()}


@pytest.fixture(scope="module")
def align(models, tokenizers):
    """(output, the target's table, the source's) of documents of one segment."""

    def run(target: str, source: str, documents: list[str], **chosen) -> tuple[StageOutput, pa.Table, pa.Table]:
        tables = [
            logits_table(tokenizers[name], [[text] for text in documents], with_end=True) for name in (target, source)
        ]
        stage = AlignStage(AlignConfig(**chosen), models[target], models[source])
        stage.setup()
        return stage.run(dict(zip(("target", "source"), tables, strict=True))), *tables

    return run


def columns(table: pa.Table, row: int, *names: str) -> list[np.ndarray]:
    return [list_row(table, name, row) for name in names]


def movable_mass(sides, target: str, source: str, candidates, position: int, window) -> float:
    """What a source position's candidates hold, without special ones that the target's window has no counterpart of."""
    there, here = sides[source].vocabulary, sides[target].vocabulary
    specials = {here.token_bytes[token] for token in window if token >= 0 and here.is_special[token]}
    pairs = zip(candidates.ids[position].tolist(), np.exp(candidates.logprobs[position].astype(float)), strict=True)
    return sum(
        mass
        for token, mass in pairs
        if token >= 0 and (not there.is_special[token] or there.token_bytes[token] in specials)
    )


# --- groups of several tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "source", "kind"), [("byte-bpe", "coarse", "one_to_many"), ("coarse", "byte-bpe", "many_to_one")]
)
def test_groups_of_either_kind_take_the_distribution_of_the_position_they_name(align, sides, target, source, kind):
    output, target_table, source_table = align(
        target, source, list(TEXTS), inexact="transport", marginals="source", projection="plan", tail="bucket"
    )
    assert output.health[kind] > 50
    num_checked = {"one_to_many": 0, "many_to_one": 0}
    for row in range(output.table.num_rows):
        starts, ends, taken, tails = columns(
            output.table, row, "pair_start", "pair_end", "source_position", "tail_mass"
        )
        target_end, source_end = (list_row(table, "byte_end", row) for table in (target_table, source_table))
        candidates, own = sparse_row(source_table, row), sparse_row(target_table, row)
        for position in range(len(target_end) - 1):
            group = range(starts[position], ends[position])
            same = [k for k in group if source_end[k] == target_end[position]]
            partner = same[-1] if same else group[-1]
            assert taken[position] == partner
            mass = movable_mass(sides, target, source, candidates, partner, own.ids[position])
            assert tails[position] == pytest.approx(max(0, 1 - mass), abs=1e-3)  # each position's own figure
            shared = any(
                starts[other] <= partner < ends[other] for other in range(len(target_end)) if other != position
            )
            num_checked["many_to_one"] += len(group) > 1
            num_checked["one_to_many"] += len(group) == 1 and shared
    assert num_checked[kind] == output.health[kind]
    assert output.health["covered"] == output.health["positions"]


# --- special tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize(
    ("target", "source"),
    [("spm-bpe", "wordpiece"), ("wordpiece", "spm-bpe"), ("byte-bpe", "spm-bpe"), ("spm-bpe", "unigram")],
)
def test_special_tokens_of_different_names_pair_by_role(align, sides, target, source, pairing):
    output, target_table, source_table = align(target, source, list(TEXTS[:6]), pairing=pairing)
    for row in range(output.table.num_rows):
        starts, ends, exact = columns(output.table, row, "pair_start", "pair_end", "exact_context")
        roles = [
            sides[name].roles(list_row(table, "token_ids", row))
            for name, table in ((target, target_table), (source, source_table))
        ]
        for role in (Role.BOS, Role.EOS):
            own, others = (np.flatnonzero(part == role) for part in roles)
            for position in own:
                if len(others):
                    assert starts[position] <= others[0] < ends[position]
                    assert exact[position]
                elif pairing == "boundary":
                    assert starts[position] == -1
        assert roles[0][-1] == Role.EOS  # each document ends here
    assert output.health["covered"] > 0


@pytest.mark.parametrize(("target", "source"), [("spm-bpe", "wordpiece"), ("byte-bpe", "spm-bpe")])
@pytest.mark.parametrize("method", ["exact", "min-edit"])
def test_mass_on_the_end_of_a_document_stays_there(align, tokenizers, target, source, method):
    output, _, source_table = align(
        target, source, list(TEXTS), method=method, pairing="boundary", inexact="mask", tail="bucket"
    )
    eos = [tokenizers[name].vocabulary.eos_id for name in (target, source)]
    num_found = 0
    for row in range(output.table.num_rows):
        found, window = sparse_row(output.table, row), sparse_row(source_table, row)
        for position, taken in enumerate(list_row(output.table, "source_position", row)):
            if taken >= 0 and eos[1] in window.ids[taken]:
                moved = np.exp(found.logprobs[position][found.ids[position] == eos[0]])
                assert moved == pytest.approx(np.exp(window.logprobs[taken][window.ids[taken] == eos[1]]), rel=2e-3)
                num_found += 1
    assert num_found > 10


# --- bytes ----------------------------------------------------------------------------------------------------------------

FOXES = "The 🦊 fox, the 🦫 and 👍🏽 日本 \U0001f9ff\U0001f9ff end."  # no tokenizer here has these animals


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize(("target", "source"), [("byte-bpe", "spm-bpe"), ("spm-bpe", "byte-bpe")])
def test_tokens_that_end_inside_a_character_pair_with_each_other(align, tokenizers, target, source, pairing):
    output, target_table, source_table = align(target, source, [FOXES], pairing=pairing, method="exact", tail="bucket")
    boundaries = {len(FOXES[:cut].encode()) for cut in range(len(FOXES) + 1)}
    exact, taken, start, end = columns(output.table, 0, "exact_context", "source_position", "pair_start", "pair_end")
    [target_end], [source_end] = (columns(table, 0, "byte_end") for table in (target_table, source_table))
    inside = [j for j in np.flatnonzero(exact) if target_end[j] not in boundaries]
    assert len(inside) >= 6
    for j in inside:
        assert any(source_end[k] == target_end[j] for k in range(start[j], end[j]))
        assert taken[j] == -1 or source_end[taken[j]] == target_end[j]
    # A run of byte tokens, `<0xF0><0x9F>...` on one side and single bytes on the other, moves one to one at no cost.
    names = {"spm-bpe": source_table, "byte-bpe": target_table}
    if target == "spm-bpe":
        names = {"spm-bpe": target_table, "byte-bpe": source_table}
    [ids] = columns(names["spm-bpe"], 0, "token_ids")
    is_byte = [3 <= token_id < 259 for token_id in ids]
    assert max(len(list(run)) for value, run in itertools.groupby(is_byte) if value) >= 8
    vocabularies = [tokenizers[name].vocabulary for name in (target, source)]
    num_moved = 0
    window, found = sparse_row(source_table, 0), sparse_row(output.table, 0)
    for position in np.flatnonzero((taken >= 0) & (target_end > 0)):
        candidates = window.ids[taken[position]]
        for token_id, logprob in zip(candidates, window.logprobs[taken[position]], strict=True):
            token = vocabularies[1].token_bytes[token_id] if token_id >= 0 else b""
            if len(token) == 1 and token[0] >= 0x80:
                landed = [
                    np.exp(other)
                    for y, other in zip(found.ids[position], found.logprobs[position], strict=True)
                    if y >= 0 and vocabularies[0].token_bytes[y] == token
                ]
                assert landed == [pytest.approx(np.exp(logprob), rel=2e-3)]
                num_moved += 1
    assert num_moved > 10


# --- normalising tokenizers -----------------------------------------------------------------------------------------------

NORMALISED = {
    "unigram": "The  ﬁsh and the ＡＢＣ １０ ﬁve  ships in the e\u0301vening.\n\nThe dog",
    "wordpiece": "The QUICK Brown\n\nFox and the CAFE\u0301 in the Évening,  THE Dog .",
}


def folded(piece: bytes) -> str:
    text = unicodedata.normalize("NFKD", piece.decode().lower())
    return "".join(character for character in text if not character.isspace() and not unicodedata.combining(character))


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("is_target", [True, False])
@pytest.mark.parametrize("family", ["unigram", "wordpiece"])
def test_exact_contexts_read_the_same_through_normalisers(align, tokenizers, family, is_target, pairing):
    """Oracle: what both have read so far is the same text but for case, accents, forms and white space."""
    text = NORMALISED[family]
    names = (family, "byte-bpe") if is_target else ("byte-bpe", family)
    output, *tables = align(*names, [text], pairing=pairing)
    exact, start, end = columns(output.table, 0, "exact_context", "pair_start", "pair_end")
    ends = [list_row(table, "byte_end", 0) for table in tables]
    read = []
    for name, table in zip(names, tables, strict=True):
        vocabulary = tokenizers[name].vocabulary
        pieces = [
            b"" if vocabulary.is_special[token_id] else vocabulary.token_bytes[token_id]
            for token_id in list_row(table, "token_ids", 0)
        ]
        read.append(list(itertools.accumulate(pieces)))
    num_compared = 0
    for j in np.flatnonzero(exact):
        k = next(k for k in range(start[j], end[j]) if ends[1][k] == ends[0][j])
        try:
            pair = [folded(read[0][j]), folded(read[1][k])]
        except UnicodeDecodeError:
            continue  # inside a character
        assert pair[0] == pair[1]
        num_compared += 1
    assert num_compared > 10
    assert output.health["covered"] > 10


# --- any text -------------------------------------------------------------------------------------------------------------

PAIRS = [(a, b) for a, b in itertools.product((*FAMILIES, "coarse"), repeat=2) if a != b]


@settings(max_examples=120)
@given(text=texts, pair=st.sampled_from(PAIRS), is_last=st.booleans())
def test_both_pairings_are_right_on_any_text(text, pair, is_last, tokenizers, sides):
    target, source = (tokenizers[name].encode(text, is_last=is_last) for name in pair)
    target_side, source_side = (sides[name] for name in pair)
    target_roles, source_roles = target_side.roles(target.ids), source_side.roles(source.ids)
    roles = {"source_roles": source_roles, "target_roles": target_roles}

    boundary = boundary_pairing(source.byte_end, target.byte_end, **roles)
    for j, (at, role) in enumerate(zip(target.byte_end, target_roles, strict=True)):
        same = np.flatnonzero((source.byte_end == at) & (source_roles == role))
        assert boundary.start[j] == (same[-1] if len(same) else -1)
        assert boundary.end[j] == boundary.start[j] + 1 if len(same) else boundary.end[j] == -1

    words = [
        side.pairing_texts(encoding.ids[own == Role.TEXT])
        for side, encoding, own in ((source_side, source, source_roles), (target_side, target, target_roles))
    ]
    ends = {"source_byte_end": source.byte_end, "target_byte_end": target.byte_end}
    edit = edit_distance_pairing(
        source_side.pairing_texts(source.ids), target_side.pairing_texts(target.ids), **ends, **roles
    )
    for role in (Role.BOS, Role.EOS):
        here, there = np.flatnonzero(source_roles == role), np.flatnonzero(target_roles == role)
        for position in there:
            assert edit.start[position] == (here[0] if len(here) else -1)
    is_text = target_roles == Role.TEXT
    if not all(words):
        assert not edit.is_paired[is_text].any()
        return
    first = int(np.flatnonzero(source_roles == Role.TEXT)[0])
    start, end = edit.start[is_text] - first, edit.end[is_text] - first
    assert edit.cost == optimum(*words) == path_cost(start, end, *words)
    assert (start[0], end[-1]) == (0, len(words[0]))
    assert np.isin(start[1:] - end[:-1], (0, -1)).all()  # monotone, and no source token is left out
    for pairing in (boundary, edit):
        partner, exact = choose_source(pairing, source.byte_end, target.byte_end, **roles)
        assert ((partner >= 0) == pairing.is_paired).all()
        assert (source.byte_end[partner[exact]] == target.byte_end[exact]).all()
        assert (source_roles[partner[exact]] == target_roles[exact]).all()


def optimum(source: list[str], target: list[str]) -> int:
    """Compute the recurrence of the pairing, cell by cell."""
    best = np.full((len(source) + 1, len(target) + 1), np.inf)
    best[0, 0] = 0
    for k, j in itertools.product(range(len(source)), range(len(target))):
        before = min(best[k, j], best[k, j + 1], best[k + 1, j])
        best[k + 1, j + 1] = before + cached_levenshtein(source[k], target[j])
    return int(best[-1, -1])


def path_cost(start: np.ndarray, end: np.ndarray, source: list[str], target: list[str]) -> int:
    """What the pairs cost that a pairing names."""
    return sum(cached_levenshtein(source[k], target[j]) for j in range(len(target)) for k in range(start[j], end[j]))

"""``inexact = "condition"``: rows inside a source token, against a made-up language model whose true conditional is known."""

import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.align.conditioning import MIN_AGREEING_MASS, Inner
from stages.align.config import AlignConfig
from stages.align.costs.rest import RestCosts
from stages.align.first_cuts import UNKNOWN, Encode
from stages.align.rows import ModelRows, Side
from stages.align.segment import CONDITION, NONE, AlignedSegment, SegmentAligner
from stages.align.stage import AlignStage
from stages.align.vocabulary_maps import NO_ID, ModelPair
from stages.contract.columns import list_row, sparse_row
from stages.contract.schemas import PAIRED_BY
from stages.models.config import ModelConfig
from stages.models.tokenizer import Encoding, SegmentTokenizer
from stages.models.vocabulary import Vocabulary
from tests.stages.align.costs.cutting import first_piece
from tests.stages.align.costs.test_prefix import pair_of
from tests.stages.align.pairing.test_levenshtein import levenshtein
from tests.stages.align.synthetic import HALF, logits_table, save_families, with_draws
from tests.stages.align.transport.test_support import vocabulary
from tests.tiny_tokenizers import TEXTS

# --- hand-made models ---------------------------------------------------------------------------------------------------


def greedy(tokens: Vocabulary) -> Encode:
    """A tokenizer that cuts off the longest token, left to right; a byte that begins no token is BOS, which spells nothing."""

    def encode_one(text: str) -> Encoding:
        raw, start, ids, ends = text.encode(), 0, [], []
        while start < len(raw):
            begins = [i for i, token in enumerate(tokens.token_bytes) if token and raw[start:].startswith(token)]
            best = max(begins, key=lambda i: len(tokens.token_bytes[i]), default=0)
            start += len(tokens.token_bytes[best]) if begins else 1
            ids.append(best)
            ends.append(start)
        return Encoding(np.array(ids, np.int32), np.array(ends, np.int32))

    return lambda texts: [encode_one(text) for text in texts]


def side_of(tokens: Vocabulary, *, has_dummy_prefix: bool = False, spells_text: bool = True) -> Side:
    texts = tuple(map(tokens.text, range(tokens.size)))
    return Side("m", tokens, 0, has_dummy_prefix, texts, spells_text)


def rows_of(
    tokens: Vocabulary, text: list[bytes], predicted: dict[int, dict[bytes, float]], ends: list[int]
) -> ModelRows:
    """Rows of a text; a position that is not in ``predicted`` expects the first token after BOS."""
    known = {token: token_id for token_id, token in enumerate(tokens.token_bytes)}
    default = {tokens.token_bytes[1]: 1.0}
    rows = [sorted(predicted.get(j, default).items(), key=lambda item: -item[1]) for j in range(len(text))]
    width = max(map(len, rows))
    ids, probs = np.full((len(rows), width), NO_ID, np.int32), np.zeros((len(rows), width))
    for position, row in enumerate(rows):
        ids[position, : len(row)] = [known[token] for token, _ in row]
        probs[position, : len(row)] = [prob for _, prob in row]
    return ModelRows(np.array([known[token] for token in text], np.int32), np.array(ends, np.int32), ids, probs)


def align(
    target: tuple[Side, ModelRows], source: tuple[Side, ModelRows], *, epsilon: float = 0.02, **chosen: object
) -> AlignedSegment:
    one, other = source[0].vocabulary, target[0].vocabulary
    pair = ModelPair(
        source=one,
        target=other,
        source_texts=source[0].texts,
        target_texts=target[0].texts,
        encode=greedy(other),
        encode_source=greedy(one),
        load_embeddings=lambda: np.empty((0, 0)),
    )
    config = AlignConfig(preset="semi-relaxed", inexact="condition", epsilon=epsilon, top_k=32, **chosen)
    return SegmentAligner(config, target[0], source[0], pair).align(target[1], source[1])


def row_at(aligned: AlignedSegment, tokens: Vocabulary, position: int) -> dict[bytes, float]:
    entries = zip(aligned.ids[position].tolist(), aligned.probs[position].tolist(), strict=True)
    return {tokens.token_bytes[token]: prob for token, prob in entries if token != NO_ID}


def one_word(
    expected: dict[bytes, float], *, gold: bytes, seen: list[bytes], target_tokens: list[bytes], **chosen: object
) -> tuple[AlignedSegment, Vocabulary]:
    """A text of one source token, of which the target has read ``seen``; the source expects ``expected``."""
    ordinary = sorted({*expected, gold} - {b"<eos>"})
    source = vocabulary(b"<bos>", *ordinary, b"<eos>")
    rest = gold.removeprefix(b"".join(seen))
    target = vocabulary(b"<bos>", *dict.fromkeys([*seen, rest, *target_tokens]), b"<eos>")
    ends = np.cumsum([0, *map(len, seen), len(rest)]).tolist()
    share = {token: 1 / len(target_tokens) for token in target_tokens}
    aligned = align(
        (side_of(target), rows_of(target, [b"<bos>", *seen, rest], {len(seen): share}, ends)),
        (side_of(source), rows_of(source, [b"<bos>", gold], {0: expected}, [0, len(gold)])),
        **chosen,
    )
    return aligned, target


words = st.lists(st.text("abc", min_size=1, max_size=5).map(str.encode), min_size=1, max_size=8, unique=True)


@given(words, words, st.text("abc", min_size=1, max_size=3).map(str.encode), st.data())
@settings(max_examples=150)
def test_rows_are_the_conditional_of_a_language_model_over_bytes(source_words, target_words, seen, data):
    """Brute force over the strings that the source can write, whatever the two vocabularies."""
    weights = data.draw(st.lists(st.floats(0.1, 1), min_size=len(source_words), max_size=len(source_words)))
    gold = seen + data.draw(st.text("abc", min_size=1, max_size=3)).encode()
    expected = {word: weight / sum(weights) for word, weight in zip(source_words, weights, strict=True)}
    letters = [b"a", b"b", b"c"]
    pieces = [bytes([byte]) for byte in seen]
    aligned, target = one_word(
        expected, gold=gold, seen=pieces, target_tokens=list(dict.fromkeys([*letters, *target_words]))
    )
    position = len(pieces)
    strings = {word[len(seen) :]: prob for word, prob in expected.items() if word.startswith(seen) and word != seen}
    total = sum(strings.values())
    if not strings or total < MIN_AGREEING_MASS:
        assert aligned.outcome[position] == NONE
        assert aligned.inner[position] == (Inner.LITTLE_MASS if strings else Inner.NO_CANDIDATE)
        return
    assert aligned.outcome[position] == CONDITION
    assert aligned.seen[position] == seen
    row = row_at(aligned, target, position)
    # The next byte has exactly the probability that the model gives it, however the target cuts what follows.
    for letter in letters:
        truth = sum(prob for rest, prob in strings.items() if rest.startswith(letter)) / total
        assert sum(prob for token, prob in row.items() if token.startswith(letter)) == pytest.approx(truth, abs=1e-6)
    # And every token with mass is compatible with a string: one begins with the other.
    for token, prob in row.items():
        assert prob < 1e-6 or any(rest.startswith(token) or token.startswith(rest) for rest in strings)


@given(words, st.text("abc", min_size=1, max_size=2).map(str.encode), st.data())
@settings(max_examples=100)
def test_rows_are_the_whole_conditional_where_the_target_has_every_rest(source_words, seen, data):
    weights = data.draw(st.lists(st.floats(0.1, 1), min_size=len(source_words), max_size=len(source_words)))
    expected = {word: weight / sum(weights) for word, weight in zip(source_words, weights, strict=True)}
    strings = {word[len(seen) :]: prob for word, prob in expected.items() if word.startswith(seen) and word != seen}
    total = sum(strings.values())
    if total < MIN_AGREEING_MASS:
        return
    aligned, target = one_word(
        expected, gold=seen + b"c", seen=[bytes([byte]) for byte in seen], target_tokens=[b"a", b"b", *strings]
    )
    row = row_at(aligned, target, len(seen))
    for rest, prob in strings.items():
        # 0.1 per byte at epsilon 0.02 is a factor of e^-5: what leaks to a token that continues the rest.
        assert row[rest] == pytest.approx(prob / total, abs=0.01 * len(target.token_bytes))


def test_the_row_keeps_the_share_of_the_source_s_tail():
    expected = {b"inter": 0.4, b"into": 0.1, b"the": 0.2}
    shares = {b"ter": 0.8, b"to": 0.2}
    for tail, total in (("bucket", 0.7), ("renormalise", 1.0)):
        aligned, target = one_word(
            expected, gold=b"inner", seen=[b"in"], target_tokens=[b"ter", b"to", b"ner"], tail=tail
        )
        row = row_at(aligned, target, 1)
        assert {token: row[token] for token in shares} == pytest.approx(
            {t: total * s for t, s in shares.items()}, abs=1e-6
        )
        assert aligned.tail_mass[1] == pytest.approx(1 - total, abs=1e-6)


@pytest.mark.parametrize(
    ("expected", "outcome"),
    [
        ({b"inter": 0.04, b"the": 0.96}, Inner.LITTLE_MASS),
        ({b"in": 0.5, b"the": 0.5}, Inner.NO_CANDIDATE),  # it does not go on
        ({b"<eos>": 1.0}, Inner.NO_CANDIDATE),
        ({b"in ": 0.5, b"in\n": 0.5}, Inner.WHITE_SPACE),
        ({b"in ": 0.5, b"in a": 0.5}, Inner.CONDITIONED),
    ],
)
def test_where_the_source_says_little_the_position_is_masked(expected, outcome):
    aligned, _ = one_word(expected, gold=b"inner", seen=[b"in"], target_tokens=[b"ner", b" "])
    assert aligned.inner.tolist() == [Inner.NOT_INNER, outcome, Inner.NOT_INNER]
    assert (aligned.outcome[1] == CONDITION) == (outcome == Inner.CONDITIONED)


def test_a_longer_target_token_continues_a_rest_only_if_the_source_would_write_the_same_token():
    """``ternational`` does not follow from `` inter`` where the source has `` international``: it would have said that."""
    for also, is_begun in (([], True), ([b" international"], False)):
        expected = {b" inter": 0.9, **dict.fromkeys(also, 0.1)}
        aligned, target = one_word(
            expected, gold=b" inner", seen=[b" in"], target_tokens=[b"ternational", b"t", b"x"], epsilon=0.05
        )
        row = row_at(aligned, target, 1)
        # "t" begins "ter" and costs 0.2; where it counts, "ternational" costs 0.8, else 8 edits.
        shares = np.exp(-np.array([0.2, 0.8]) / 0.05)
        if is_begun:
            assert row[b"ternational"] == pytest.approx(0.9 * shares[1] / shares.sum(), rel=1e-3)
        else:
            assert row[b"ternational"] == pytest.approx(0.1, rel=1e-3)  # from " international" alone


def test_the_first_word_of_a_text_is_conditioned_as_the_source_writes_it():
    """The source writes ``The`` with a dummy prefix; after ``Th`` what is left of it is ``e``."""
    source = vocabulary(b"<bos>", b" The", b" To", b"The", b"<eos>")
    target = vocabulary(b"<bos>", b"Th", b"e", b"o", b"<eos>")
    aligned = align(
        (side_of(target), rows_of(target, [b"<bos>", b"Th", b"e"], {1: {b"e": 0.5, b"o": 0.5}}, [0, 2, 3])),
        (
            side_of(source, has_dummy_prefix=True),
            rows_of(source, [b"<bos>", b" The"], {0: {b" The": 0.6, b" To": 0.4}}, [0, 3]),
        ),
    )
    assert aligned.seen == {1: b" Th"}
    assert row_at(aligned, target, 1)[b"e"] == pytest.approx(1)


def test_target_tokens_that_straddle_the_boundary_count_from_the_boundary():
    source = vocabulary(b"<bos>", b"a", b"bcd", b"bcx", b"<eos>")
    target = vocabulary(b"<bos>", b"ab", b"c", b"d", b"x", b"<eos>")
    aligned = align(
        (
            side_of(target),
            rows_of(target, [b"<bos>", b"ab", b"c", b"d"], {j: {b"d": 0.5, b"c": 0.5} for j in (1, 2)}, [0, 2, 3, 4]),
        ),
        (side_of(source), rows_of(source, [b"<bos>", b"a", b"bcd"], {1: {b"bcd": 0.75, b"bcx": 0.25}}, [0, 1, 4])),
    )
    assert aligned.seen == {1: b"b", 2: b"bc"}
    assert row_at(aligned, target, 1)[b"c"] == pytest.approx(1)
    assert row_at(aligned, target, 2) == pytest.approx({b"d": 0.75, b"x": 0.25, b"c": 0}, abs=1e-6)
    assert aligned.source_position.tolist() == [0, 1, 1, -1]
    assert not aligned.exact_context[1:3].any()


def test_a_character_in_two_tokens_is_conditioned_byte_by_byte():
    text = "日".encode()
    aligned, target = one_word(
        {text: 0.9, "é".encode(): 0.1}, gold=text, seen=[text[:1]], target_tokens=[text[1:], b"x"]
    )
    assert row_at(aligned, target, 1)[text[1:]] == pytest.approx(1, abs=1e-6)


def test_without_the_bytes_or_a_distribution_before_there_is_no_context():
    source, target = vocabulary(b"<bos>", b"The", b"<eos>"), vocabulary(b"<bos>", b"Th", b"e", b"<eos>")
    own = rows_of(target, [b"<bos>", b"Th", b"e"], {1: {b"e": 1.0}}, [0, 2, 3])
    whole = rows_of(source, [b"<bos>", b"The"], {0: {b"The": 1.0}}, [0, 3])
    normalised = align((side_of(target, spells_text=False), own), (side_of(source), whole))
    assert normalised.inner.tolist() == [0, Inner.NO_CONTEXT, 0]
    unknown = ModelRows(
        np.array([0, 3, 2], np.int32), own.byte_end, own.topk_ids, own.topk_probs
    )  # a special token as text
    assert align((side_of(target), unknown), (side_of(source), whole)).inner[1] == Inner.NO_CONTEXT
    headless = ModelRows(*(part[1:] for part in (whole.token_ids, whole.byte_end, whole.topk_ids, whole.topk_probs)))
    assert align((side_of(target), own), (side_of(source), headless)).inner[1] == Inner.NO_CONTEXT


# --- real tokenizers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, ModelConfig]:
    return save_families(tmp_path_factory.mktemp("tokenizers"))


PAIRS = [
    ("byte-bpe", "coarse"),
    ("spm-bpe", "coarse"),
    ("byte-bpe", "spm-bpe"),
    ("spm-bpe", "unigram"),
    ("unigram", "coarse"),
]


@pytest.fixture(scope="module")
def tokenizers(models) -> dict[str, SegmentTokenizer]:
    return {name: SegmentTokenizer.load(model) for name, model in models.items()}


@pytest.fixture(scope="module")
def inputs(tokenizers):
    def of(target: str, source: str) -> dict[str, pa.Table]:
        names = {"target": target, "source": source}
        return {
            side: logits_table(tokenizers[name], [[text] for text in TEXTS], seed=1) for side, name in names.items()
        }

    return of


def stage_of(models, target: str, source: str, **chosen) -> AlignStage:
    stage = AlignStage(
        AlignConfig(**{"preset": "semi-relaxed", "inexact": "condition", **chosen}), models[target], models[source]
    )
    stage.setup()
    return stage


@pytest.mark.parametrize(("target", "source"), PAIRS)
def test_positions_at_shared_boundaries_are_as_without_conditioning(models, inputs, target, source):
    tables = inputs(target, source)
    found, masked = (stage_of(models, target, source, inexact=inexact).run(tables) for inexact in ("condition", "mask"))
    code = PAIRED_BY.index("condition")
    num_conditioned = 0
    for row in range(found.table.num_rows):
        outcome = np.asarray(list_row(found.table, "outcome", row))
        conditioned = outcome == code
        num_conditioned += int(conditioned.sum())
        assert (outcome[~conditioned] == np.asarray(list_row(masked.table, "outcome", row))[~conditioned]).all()
        assert (np.asarray(list_row(masked.table, "outcome", row))[conditioned] == 0).all()
        one, other = sparse_row(found.table, row), sparse_row(masked.table, row)
        width = min(one.ids.shape[1], other.ids.shape[1])
        assert (one.ids[~conditioned, :width] == other.ids[~conditioned, :width]).all()
        assert (one.logprobs[~conditioned, :width] == other.logprobs[~conditioned, :width]).all()
    health = found.health
    assert health["inner_conditioned"] == num_conditioned == health["covered"] - masked.health["covered"]
    kinds = ("conditioned", "no_context", "no_candidate", "little_mass", "white_space")
    assert health["inner_positions"] == sum(health[f"inner_{kind}"] for kind in kinds) > 50
    assert (num_conditioned > 20) == (target != "unigram"), "a target that normalises does not say what bytes it read"
    assert not {name for name in masked.health if name.startswith(("inner_", "conditioned_"))}
    assert health["conditioned_nll"].count == health["conditioned_target_nll"].count == num_conditioned


@pytest.mark.parametrize("top_k", [3, 10])
def test_draws_change_nothing_inside_source_tokens(models, inputs, tokenizers, top_k):
    tables = inputs("byte-bpe", "coarse")
    size = tokenizers["coarse"].vocabulary.size
    drawn = {"target": tables["target"], "source": with_draws(tables["source"], num_draws=4, vocab_size=size)}
    stage = stage_of(models, "byte-bpe", "coarse", top_k=top_k)
    exact, sampled = stage.run(tables), stage.run(drawn)
    num_conditioned = 0
    for row in range(exact.table.num_rows):
        outcomes = [np.asarray(list_row(table, "outcome", row)) for table in (exact.table, sampled.table)]
        conditioned = outcomes[0] == PAIRED_BY.index("condition")
        assert (conditioned == (outcomes[1] == PAIRED_BY.index("condition"))).all()
        one, other = (sparse_row(table, row) for table in (exact.table, sampled.table))
        width = one.ids.shape[1]
        # A row with draws has slots for more entries, which hold what the exact one had no room for.
        assert (one.ids[conditioned] == other.ids[conditioned, :width]).all()
        assert (one.logprobs[conditioned] == other.logprobs[conditioned, :width]).all()
        num_conditioned += int(conditioned.sum())
    assert num_conditioned > 20
    assert sampled.health["inner_conditioned"] == num_conditioned
    position = int(np.flatnonzero(np.asarray(list_row(sampled.table, "outcome", 1)) == PAIRED_BY.index("condition"))[0])
    shown, expected = (stage.explain(given, 1, position) for given in (drawn, tables))
    assert shown.source_topk == expected.source_topk
    np.testing.assert_array_equal(shown.plan, expected.plan)


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_every_row_has_the_mass_that_its_tail_says(models, inputs, tail):
    tables = inputs("byte-bpe", "coarse")
    table = stage_of(models, "byte-bpe", "coarse", tail=tail).run(tables).table
    code, num_checked = PAIRED_BY.index("condition"), 0
    for row in range(table.num_rows):
        rows, source = sparse_row(table, row), sparse_row(tables["source"], row)
        taken = list_row(table, "source_position", row)
        for position in np.flatnonzero(np.asarray(list_row(table, "outcome", row)) == code):
            total = np.exp(rows.logprobs[position].astype(float)).sum()
            window = np.exp(source.logprobs[taken[position]].astype(float)).sum()
            if tail == "renormalise":
                assert total == pytest.approx(1, rel=2e-3)
            else:
                tail_mass = list_row(table, "tail_mass", row)[position]
                assert total + tail_mass == pytest.approx(1, rel=2e-3)
                assert tail_mass >= (1 - window) * (1 - HALF) - 1e-6
            num_checked += 1
    assert num_checked > 20


def test_the_source_s_next_token_changes_no_row(models, inputs):
    """The label: the source's gold tokens are exchanged for others, and nothing that is taught moves."""
    tables = inputs("byte-bpe", "coarse")
    stage = stage_of(models, "byte-bpe", "coarse")
    before = stage.run(tables)
    assert before.health["inner_conditioned"] > 20
    rng = np.random.default_rng(0)
    size = SegmentTokenizer.load(models["coarse"]).vocabulary.size
    source = tables["source"]
    exchanged = [
        [ids[0], *rng.integers(5, size, len(ids) - 2).tolist(), ids[-1]] for ids in source["token_ids"].to_pylist()
    ]
    column = source.schema.get_field_index("token_ids")
    other = source.set_column(
        column, source.schema.field(column), pa.array(exchanged, source.schema.field(column).type)
    )
    gold = source.schema.get_field_index("gold_logprob")
    unknown = pa.array([[-9.0] * len(ids) for ids in exchanged], source.schema.field(gold).type)
    other = other.set_column(gold, source.schema.field(gold), unknown)
    assert stage.run({**tables, "source": other}).table.equals(before.table)


@pytest.mark.parametrize(("target", "source"), [("byte-bpe", "coarse"), ("spm-bpe", "coarse"), ("coarse", "spm-bpe")])
def test_costs_of_rests_equal_tokenizing_pair_by_pair(tokenizers, target, source):
    one, other = tokenizers[source], tokenizers[target]
    costs = RestCosts(pair_of(one, other))
    rng = np.random.default_rng(0)
    tokens, seen = [], []
    for token_id in rng.permutation(one.vocabulary.size).tolist():
        token = one.vocabulary.token_bytes[token_id]
        if len(token) > 2 and not one.vocabulary.is_special[token_id]:
            tokens.append(token)
            seen.append(token[: int(rng.integers(1, len(token)))])
    tokens, seen = tokens[:40], seen[:40]
    target_ids = rng.permutation(other.vocabulary.size)[:60]
    begins = [
        [i for i, t in enumerate(other.vocabulary.token_bytes) if t and (t.startswith(r[:1]))][:12]
        for r in (token[len(part) :] for token, part in zip(tokens, seen, strict=True))
    ]
    numbers = costs.numbers(seen, tokens)
    kinds: Counter[str] = Counter()
    for number, part, token, near in zip(numbers, seen, tokens, begins, strict=True):
        rest = token[len(part) :]
        ids = np.union1d(target_ids, near)
        found = costs.costs(np.array([[number]]), ids[None])[0, 0]
        for y, cost in zip(ids.tolist(), found.tolist(), strict=True):
            text = other.vocabulary.token_bytes[y]
            expected = levenshtein(rest.decode(errors="surrogateescape"), other.vocabulary.text(y))
            if not other.vocabulary.is_special[y] and text:
                is_shorter = len(text) <= len(rest) and rest.startswith(text) and first_piece(other, rest) == text
                is_longer = len(text) > len(rest) and text.startswith(rest) and first_piece(one, part + text) == token
                if is_shorter or is_longer:
                    expected = 0.1 * abs(len(text) - len(rest))
                kinds.update(shorter=is_shorter, longer=is_longer)
            assert cost == pytest.approx(expected, abs=1e-6), (part, rest, text)
    assert kinds["shorter"] > 20


def test_rests_that_are_forgotten_are_computed_as_before(models, tokenizers):
    pair = pair_of(tokenizers["coarse"], tokenizers["byte-bpe"])
    large, small = RestCosts(pair), RestCosts(pair, num_slots=64, max_rests=3)
    tokens = [token for token in pair.source.token_bytes if len(token) > 3 and not token.startswith(b"<")][:30]
    target_ids = np.arange(40)[None]
    for start in range(0, 30, 5):
        part = tokens[start : start + 5] + tokens[:2]
        found = []
        for costs in (large, small):
            numbers = costs.numbers([token[:2] for token in part], part)
            found.append((costs.first_token(numbers), costs.exact(numbers), costs.costs(numbers[None], target_ids)))
        for one, other in zip(*found, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_rest_goes_to_itself_else_to_the_longest_token_that_begins_it(tokenizers):
    source, target = vocabulary(b"interest"), vocabulary(b"t", b"ter", b"terest", b"e")
    pair = ModelPair(
        source,
        target,
        ["interest"],
        [target.text(i) for i in range(4)],
        greedy(target),
        greedy(source),
        lambda: np.empty(0),
    )
    costs = RestCosts(pair)
    numbers = costs.numbers([b"in", b"inte", b"i", b"in"], [b"interest"] * 4)
    assert costs.first_token(numbers).tolist() == [2, NO_ID, NO_ID, 2]
    assert costs.exact(numbers).tolist() == [2, NO_ID, NO_ID, 2]
    assert numbers[0] == numbers[3]
    assert UNKNOWN == 0


def test_explain_shows_what_was_read_and_what_moved(models, inputs):
    tables = inputs("byte-bpe", "coarse")
    stage = stage_of(models, "byte-bpe", "coarse")
    table = stage.run(tables).table
    outcome = np.asarray(list_row(table, "outcome", 1))
    position = int(np.flatnonzero(outcome == PAIRED_BY.index("condition"))[0])
    shown = stage.explain(tables, 1, position)
    assert shown.outcome == "condition"
    assert shown.seen
    assert not shown.exact_context
    moved = shown.plan.sum(axis=1) > 0
    texts = [candidate.text for candidate in shown.source_topk]
    assert [text.startswith(shown.seen) and len(text) > len(shown.seen) for text in texts] == moved.tolist()
    assert all(not entry.seen for entry in stage.explain_row(tables, 1) if entry.outcome != "condition")


def test_pairs_of_tokens_of_conditioned_positions_add_up(models, inputs):
    tables = inputs("byte-bpe", "coarse")
    stage = stage_of(models, "byte-bpe", "coarse", tail="renormalise")
    output = stage.run(tables)
    pairs = stage.pair_mass(tables, range(tables["target"].num_rows))
    assert pairs.num_positions == output.health["covered"]
    moved = pairs.mass[~pairs.is_same].sum() / pairs.mass.sum()
    assert moved == pytest.approx(output.health["mass_moved"].value, abs=1e-9)


# --- settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "wrong"),
    [
        ({}, "pairing = 'boundary', marginals = 'source', cost = 'prefix'"),
        ({"preset": "paper"}, "pairing = 'boundary', marginals = 'source', cost = 'prefix'"),
        ({"preset": "semi-relaxed", "pairing": "edit-distance"}, "pairing = 'boundary'"),
        ({"preset": "semi-relaxed", "cost": "semantic"}, "cost = 'prefix'"),
        ({"preset": "semi-relaxed", "marginals": "balanced", "projection": "argmax"}, "marginals = 'source'"),
        ({"preset": "semi-relaxed", "method": "exact"}, "method = 'transport'"),
    ],
)
def test_conditioning_without_its_transport_is_refused(chosen, wrong):
    with pytest.raises(ValidationError, match=re.escape(f"inexact = 'condition' needs {wrong}")):
        AlignConfig(**chosen, inexact="condition")


@pytest.mark.parametrize("chosen", [{}, {"support": "target"}, {"projection": "argmax"}, {"tail": "renormalise"}])
def test_conditioning_is_of_the_semi_relaxed_transport(chosen):
    assert AlignConfig(preset="semi-relaxed", inexact="condition", **chosen).inexact == "condition"

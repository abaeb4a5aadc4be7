"""Views of single positions for ``ptafuse inspect``, computed by the same functions as the stages' results."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.analysis.tables import distribution_table, plan_table, side_by_side, token_line
from pipeline.display.text import visible
from pipeline.run.session import StageError, read_inputs
from pipeline.run.steps import ResolvedRun, Step
from stages.align.explain import AlignmentExplanation, PairedToken, TokenProb
from stages.align.stage import AlignStage
from stages.contract.columns import PAD_ID, find_row, list_row, sparse_row
from stages.contract.draws import draws_row, has_draws
from stages.contract.roles import Role, has_roles
from stages.contract.schemas import PAIRED_BY, has_conversations
from stages.contract.store import Store
from stages.fuse.blocks import locate
from stages.fuse.stage import FuseStage
from stages.models.config import ModelConfig
from stages.models.segment_text import segment_texts
from stages.models.token_tables import TokenTables
from stages.models.vocabulary import Vocabulary


@dataclass(frozen=True)
class InspectedRow:
    """Row of a shard that is inspected."""

    run: ResolvedRun
    store: Store
    step: Step
    shard: int
    row: int

    def model(self, name: str | None) -> ModelConfig:
        """Return a model of the run by its name."""
        return self.run.config.find_model(name)

    @property
    def tables(self) -> TokenTables:
        """Token tables of the run directory, which are only read."""
        return TokenTables(self.store, may_write=False)

    def vocabulary(self, model: ModelConfig) -> Vocabulary:
        """Read the vocabulary of a model."""
        return self.tables.read(model).vocabulary

    def inputs(self) -> dict[str, pa.Table]:
        """Read what the step reads for this shard, by input name."""
        return read_inputs(self.run, self.store, self.step, self.shard)


def show_segment(inspected: InspectedRow, table: pa.Table, position: int | None, console: Console) -> None:
    """Print a segment's text, or the messages of a conversation, with its properties."""
    del position  # a segment is not split into tokens yet
    values = {name: table[name][inspected.row].as_py() for name in table.schema.names}
    text = values.pop("text")
    if not has_conversations(table.schema):
        console.print(", ".join(f"{name} {value}" for name, value in values.items()))
        console.print(Text(text))
        return
    known = {name: value for name, value in values.items() if not name.startswith("message_")}
    [segment] = segment_texts(table.slice(inspected.row, 1))
    console.print(", ".join(f"{name} {value}" for name, value in known.items()) + f", {len(segment.messages)} messages")
    for message in segment.messages:
        console.print(Text(f"{message.role}{'' if message.is_trained else ' (context)'}:", style="bold"))
        console.print(Text(message.content))


def show_logits(inspected: InspectedRow, table: pa.Table, position: int | None, console: Console) -> None:
    """Show a segment under one model: every token's surprise, or one position's top-k."""
    vocabulary = inspected.vocabulary(inspected.model(inspected.step.model))
    token_ids = list_row(table, "token_ids", inspected.row)
    gold = list_row(table, "gold_logprob", inspected.row)
    tokens = [vocabulary.text(int(token)) for token in token_ids]
    rows = sparse_row(table, inspected.row)
    console.print(_where(table, inspected.row))
    if position is None:
        roles = _roles(table, inspected.row)
        extra = ("role",) if roles else ()
        view = Table("position", "token", *extra, "byte_end", "gold logprob of the next", "likeliest next")
        for index, byte_end in enumerate(list_row(table, "byte_end", inspected.row)):
            best = ""
            if rows.present[index]:
                best = f"{visible(vocabulary.text(int(rows.ids[index, 0])))} {np.exp(rows.logprobs[index, 0]):.3f}"
            role = (roles[index],) if roles else ()
            token = Text(visible(tokens[index]))
            view.add_row(str(index), token, *role, str(byte_end), _logprob(gold[index]), Text(best))
        console.print(view)
        return
    console.print(token_line(tokens, position))
    following = visible(tokens[position + 1]) if position + 1 < len(tokens) else "(the segment ends)"
    console.print(Text(f"gold next token: {following}, logprob {_logprob(gold[position])}"))
    entries = _entries(rows.ids[position], rows.logprobs[position], vocabulary)
    tail = 1 - sum(prob for _, prob in entries)
    console.print(distribution_table(f"{inspected.step.model} top {len(entries)}", entries, tail))
    if has_draws(table):
        draws = draws_row(table, inspected.row)[position]
        drawn = Counter(vocabulary.text(int(token)) for token in draws[draws != PAD_ID])
        shown = ", ".join(f"{visible(text)} x{count}" if count > 1 else visible(text) for text, count in drawn.items())
        each = f", each for {max(0.0, tail) / drawn.total():.2e} of probability" if drawn else ""
        console.print(Text(f"{drawn.total()} draws from the rest{each}: {shown or 'none'}"))


def show_aligned(inspected: InspectedRow, table: pa.Table, position: int | None, console: Console) -> None:
    """Show a segment's pairing, or one position's top-k lists, transport plan and projected distribution."""
    target, source = inspected.run.config.target, inspected.model(inspected.step.model)
    inputs = inspected.inputs()
    if position is None:
        _show_pairing(inspected, table, inputs, console)
        return
    stage = AlignStage(inspected.run.config.align, target, source, inspected.tables)
    stage.setup()
    keys = table["doc_id"][inspected.row].as_py(), table["segment"][inspected.row].as_py()
    explanation = stage.explain(inputs, find_row(inputs["target"], *keys), position)
    console.print(f"{_where(table, inspected.row)}, position {position} of {len(table['outcome'][inspected.row])}")
    _show_context(explanation.context, position, target.name, source.name, console)
    gold = visible(explanation.gold_next) if explanation.gold_next is not None else "(the segment ends)"
    console.print(Text(f"gold next token: {gold}   outcome: {explanation.outcome}"))
    if explanation.seen:
        console.print(
            Text(f"{source.name} conditioned on: {visible(explanation.seen)} (the rest of its candidates is moved)")
        )
    # With draws a source's row has the exact entries of its window, and the tokens that were drawn.
    num_drawn = max(0, len(explanation.source_topk) - inspected.run.config.align.top_k)
    drawn = f" and {num_drawn} drawn" if num_drawn else ""
    lists = [
        distribution_table(
            f"{source.name} top {len(explanation.source_topk) - num_drawn}{drawn}",
            _pairs(explanation.source_topk),
            _rest(explanation.source_topk),
        ),
        distribution_table(
            f"{target.name} top {len(explanation.target_topk)}",
            _pairs(explanation.target_topk),
            _rest(explanation.target_topk),
        ),
        distribution_table("projected", _pairs(explanation.projected), explanation.tail_mass),
    ]
    console.print(side_by_side(*lists))
    if explanation.plan.size:
        title = f"plan, % of mass: {source.name} down, {inspected.run.config.target.name} across"
        labels = [token.text for token in explanation.source_topk], [token.text for token in explanation.support]
        console.print(plan_table(title, *labels, explanation.plan))
    _check_against_stored(explanation, table, inspected, position)


def _show_context(context: tuple[PairedToken, ...], position: int, target: str, source: str, console: Console) -> None:
    view = Table("position", f"{target} token", f"{source} tokens", f"{source} positions", "contexts")
    for token in context:
        end = token.source_start + len(token.source_texts)
        view.add_row(
            str(token.position),
            Text(visible(token.text)),
            Text("|".join(visible(text) for text in token.source_texts)),
            f"{token.source_start}..{end - 1}" if token.source_start >= 0 else "unpaired",
            "agree" if token.exact_context else "differ",
            style="bold" if token.position == position else "dim",
        )
    console.print(view)


def _check_against_stored(
    explanation: AlignmentExplanation, table: pa.Table, inspected: InspectedRow, position: int
) -> None:
    """Refuse to show a position whose recomputed distribution is not the one in the shard."""
    stored = sparse_row(table, inspected.row)
    probs = np.exp(stored.logprobs[position][stored.ids[position] != PAD_ID])
    shown = np.array([token.prob for token in explanation.projected])
    if probs.shape != shown.shape or not np.allclose(probs, shown, rtol=2e-2, atol=1e-6):
        raise StageError(
            f"{inspected.step.key} shard {inspected.shard} row {inspected.row} position {position}: the shard's distribution "
            f"differs from the one computed from its inputs now. Run `ptafuse verify {inspected.store.url}`"
        )


def show_fused(inspected: InspectedRow, table: pa.Table, position: int | None, console: Console) -> None:
    """Show a training block, or one position's candidates and its fused distribution."""
    config = inspected.run.config
    vocabulary = inspected.vocabulary(config.target)
    tokens = [vocabulary.text(int(token)) for token in list_row(table, "token_ids", inspected.row)]
    names = table.schema.metadata[b"candidates"].decode().split(",")
    chosen = list_row(table, "chosen", inspected.row)
    if position is None:
        starts = list_row(table, "piece_start", inspected.row)
        documents = list_row(table, "piece_doc_id", inspected.row)
        console.print(f"block {inspected.row}: {len(tokens)} tokens, {len(starts)} pieces")
        for start, document in zip(starts, documents, strict=True):
            console.print(f"  from position {start}: document {document}")
        for index, name in enumerate(names):
            console.print(f"  {name} was chosen at {np.count_nonzero(chosen == index)} positions")
        console.print(f"  no fused distribution at {np.count_nonzero(chosen < 0)} positions")
        console.print(token_line(tokens, -1))
        return
    inputs = inspected.inputs()
    where = locate(table, inspected.row, position)
    stage = FuseStage(config.fuse, config.target, config.sources, inspected.tables)
    stage.setup()
    row = find_row(inputs[f"logits/{config.target.name}"], where.doc_id, where.segment)
    explanation = stage.explain(inputs, row, where.position)
    console.print(f"document {where.doc_id}, segment {where.segment}, position {where.position} of it")
    console.print(token_line(tokens, position))
    gold = "(the segment ends)" if explanation.gold is None else visible(explanation.gold)
    console.print(
        Text(
            f"gold next token: {gold}{'' if explanation.is_learnt or explanation.gold is None else ' (not trained on)'}"
        )
    )
    unit = "nats" if config.fuse.granularity == "token" else config.fuse.unit
    view = Table("candidate", f"cross-entropy ({unit}, {config.fuse.granularity})", "weight")
    for candidate in explanation.candidates:
        view.add_row(candidate.name, f"{candidate.cross_entropy:.4f}", f"{candidate.weight:.3f}")
    console.print(view)
    console.print(f"chosen: {explanation.chosen or 'none: no candidate has a distribution here'}")
    tables = [
        distribution_table(candidate.name, candidate.distribution, candidate.tail_mass)
        for candidate in explanation.candidates
    ]
    console.print(side_by_side(*tables, distribution_table("fused", explanation.fused, explanation.tail_mass)))


VIEWS: Final[dict[str, Callable[[InspectedRow, pa.Table, int | None, Console], None]]] = {
    "shard": show_segment,
    "logits": show_logits,
    "align": show_aligned,
    "fuse": show_fused,
}
"""View of a row of each sharded stage, or of a position in it; a test compares the keys with ``STAGES``."""


def _show_pairing(inspected: InspectedRow, table: pa.Table, inputs: dict[str, pa.Table], console: Console) -> None:
    target = inspected.vocabulary(inspected.run.config.target)
    source = inspected.vocabulary(inspected.model(inspected.step.model))
    keys = table["doc_id"][inspected.row].as_py(), table["segment"][inspected.row].as_py()
    target_row = find_row(inputs["target"], *keys)
    target_ids = list_row(inputs["target"], "token_ids", target_row)
    console.print(_where(table, inspected.row))
    view = Table("position", "target token", "source tokens", "from", "contexts", "outcome", "likeliest next")
    try:
        source_ids = list_row(inputs["source"], "token_ids", find_row(inputs["source"], *keys))
    except KeyError:
        source_ids = np.empty(0, np.int64)
        console.print(f"{inspected.step.model} has no row for this segment; see its quarantine")
    rows = sparse_row(table, inspected.row)
    columns = [
        list_row(table, name, inspected.row)
        for name in ("pair_start", "pair_end", "source_position", "exact_context", "outcome")
    ]
    for index, (start, end, taken, exact, outcome) in enumerate(zip(*columns, strict=True)):
        paired = "|".join(visible(source.text(int(token))) for token in source_ids[max(start, 0) : max(end, 0)])
        likeliest = _entries(rows.ids[index], rows.logprobs[index], target)[:1]
        view.add_row(
            str(index),
            Text(visible(target.text(int(target_ids[index])))),
            Text(paired),
            str(taken) if taken >= 0 else "",
            "agree" if exact else "differ",
            PAIRED_BY[outcome],
            Text(" ".join(f"{visible(text)} {prob:.3f}" for text, prob in likeliest)),
        )
    console.print(view)


def _roles(table: pa.Table, row: int) -> list[str]:
    """Label each token of a conversation by its role, with a star if it is trained on; empty for plain text."""
    if not has_roles(table):
        return []
    names = {Role.TEXT: "content", Role.START: "start", Role.EOS: "end", Role.TEMPLATE: "template"}
    roles, is_trained = list_row(table, "role", row), list_row(table, "is_trained", row)
    return [
        f"{names[Role(role)]}{' *' if trained else ''}"
        for role, trained in zip(roles.tolist(), is_trained.tolist(), strict=True)
    ]


def _pairs(candidates: tuple[TokenProb, ...]) -> list[tuple[str, float]]:
    return [(candidate.text, candidate.prob) for candidate in candidates]


def _rest(candidates: tuple[TokenProb, ...]) -> float:
    return 1 - sum(candidate.prob for candidate in candidates)


def _where(table: pa.Table, row: int) -> str:
    return f"document {table['doc_id'][row].as_py()}, segment {table['segment'][row].as_py()}"


def _logprob(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.4f}"


def _entries(ids: np.ndarray, logprobs: np.ndarray, vocabulary: Vocabulary) -> list[tuple[str, float]]:
    kept = [(int(token), float(logprob)) for token, logprob in zip(ids, logprobs, strict=True) if token != PAD_ID]
    return [(vocabulary.text(token), float(np.exp(logprob))) for token, logprob in kept]

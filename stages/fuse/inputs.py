"""Tables of one shard that the fuse stage reads, matched segment by segment, and the candidates in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.contract.columns import list_row, rows_by_segment, segment_keys, sparse_row
from stages.contract.draws import SAMPLE_IDS, draws_row, has_draws, num_draws
from stages.contract.roles import roles_of
from stages.contract.schemas import PAIRED_BY, Tail, tail_of
from stages.fuse.mix import Candidate, as_candidate, with_draws, without
from stages.measures.cross_entropy import first_common_byte


@dataclass(frozen=True)
class FuseInputs:
    """Input tables of a shard of S segments, C - 1 sources.

    Attributes:
        sources: names of the sources.
        target: the target's logits table; a segment is a row of it.
        logits: each source's logits table.
        aligned: each source's aligned table.
        logits_rows: (S, C - 1) the row of each segment in the sources' logits tables; -1 if a table does not have it.
        aligned_rows: (S, C - 1) the same for the aligned tables.
        tail: what the aligned rows do with the mass that they do not list.
        lengths: (S,) target tokens.
        doc_ids: (S,) the document that each segment is in.
        fitted: (S, C) weights of the candidates where they are fitted, else None.
        num_draws: m, the number of tokens drawn from the tail at each position; 0: rows are exact.
        has_draws: rows have draws, though a small vocabulary may have left none to draw.
    """

    sources: tuple[str, ...]
    target: pa.Table
    logits: tuple[pa.Table, ...]
    aligned: tuple[pa.Table, ...]
    logits_rows: np.ndarray
    aligned_rows: np.ndarray
    tail: Tail
    lengths: np.ndarray
    doc_ids: np.ndarray
    fitted: np.ndarray | None
    num_draws: int
    has_draws: bool

    def has_label(self, row: int) -> np.ndarray:
        """Return whether each position's next token is trained on, (N,) bool.

        In plain text only the last position's is not.
        """
        is_trained = roles_of(self.target, row, prefix_id=None, eos_id=None).is_trained
        return np.append(is_trained[1:], False)[: len(is_trained)]

    def candidates(self, row: int) -> tuple[Candidate, ...]:
        """Return the target's own rows and each source's aligned ones; none where no gold token is trained on.

        Raises:
            ValueError: an aligned row does not have the target's positions.
        """
        length = int(self.lengths[row])
        has_none = ~self.has_label(row)
        rows, own_gold = sparse_row(self.target, row), None
        if self.has_draws:
            rows = with_draws(rows, draws_row(self.target, row))
            own_gold = list_row(self.target, "gold_logprob", row)
        target_candidate = replace(as_candidate(rows, renormalise=self.tail == "renormalise"), gold_logprob=own_gold)
        candidates = [without(target_candidate, has_none)]
        for source, table, aligned_row in zip(self.sources, self.aligned, self.aligned_rows[row], strict=True):
            if aligned_row < 0:
                candidates.append(without(target_candidate, np.ones(length, bool)))
                continue
            rows = sparse_row(table, int(aligned_row))
            if len(rows) != length:
                raise ValueError(
                    f"align/{source} has {len(rows)} positions for document {self.doc_ids[row]}, row {row}; the "
                    f"target has {length} tokens there: the two were computed from different logits, run `make align`"
                )
            tail_mass = (
                list_row(table, "tail_mass", int(aligned_row)).astype(np.float64)
                if self.tail == "bucket"
                else np.zeros(length)
            )
            completed = list_row(table, "completed_logprob", int(aligned_row)) if self.has_draws else None
            candidates.append(without(Candidate(rows, tail_mass, completed), has_none))
        return tuple(candidates)

    def gold_rows(self, row: int) -> np.ndarray:
        """Find where a candidate has all its mass on the gold next token (``inexact = "gold"``), (N, C) bool."""
        is_gold = np.zeros((int(self.lengths[row]), 1 + len(self.sources)), bool)
        for column, (table, aligned_row) in enumerate(zip(self.aligned, self.aligned_rows[row], strict=True), 1):
            if aligned_row >= 0:
                is_gold[:, column] = list_row(table, "outcome", int(aligned_row)) == PAIRED_BY.index("gold")
        return is_gold

    def first_bytes(self) -> np.ndarray:
        """Return the byte of each segment from which all models that have it predict, (S,).

        Models are judged on the same bytes.
        """
        tables = (self.target, *self.logits)
        rows = np.column_stack([np.arange(len(self.lengths)), self.logits_rows])
        return np.array(
            [
                first_common_byte(
                    [
                        list_row(table, "byte_end", int(row))
                        for table, row in zip(tables, segment_rows, strict=True)
                        if row >= 0
                    ]
                )
                for segment_rows in rows
            ],
            np.int64,
        )


def read_inputs(inputs: Mapping[str, pa.Table], target: str, sources: Sequence[str]) -> FuseInputs:
    """Match the tables of a shard.

    Args:
        inputs: tables as ``FuseStage`` describes them.
        target: name of the target.
        sources: names of the sources.

    Raises:
        ValueError: the aligned tables disagree on their tail, or some tables have draws and others none.
    """
    target_table = inputs[f"logits/{target}"]
    logits = tuple(inputs[f"logits/{source}"] for source in sources)
    aligned = tuple(inputs[f"align/{source}"] for source in sources)
    doc_ids = target_table["doc_id"].to_numpy()
    _check_draws(inputs, target, sources)
    return FuseInputs(
        sources=tuple(sources),
        target=target_table,
        logits=logits,
        aligned=aligned,
        logits_rows=_rows_of(target_table, logits),
        aligned_rows=_rows_of(target_table, aligned),
        tail=_common_tail(dict(zip(sources, aligned, strict=True))),
        lengths=pc.list_value_length(target_table["token_ids"]).to_numpy().astype(np.int64),
        doc_ids=doc_ids,
        fitted=_weights_of(doc_ids, inputs["fit"], inputs.get("kinds")) if "fit" in inputs else None,
        num_draws=max(num_draws(table) for table in (target_table, *logits)),
        has_draws=has_draws(target_table),
    )


def _common_tail(aligned: Mapping[str, pa.Table]) -> Tail:
    tails = {source: tail_of(table.schema) for source, table in aligned.items()}
    if len(set(tails.values())) > 1:
        raise ValueError(f"the sources' aligned tables have different tails: {tails}; align them with one `tail`")
    return next(iter(tails.values()), "renormalise")


def _check_draws(inputs: Mapping[str, pa.Table], target: str, sources: Sequence[str]) -> None:
    columns = {f"logits/{model}": SAMPLE_IDS for model in (target, *sources)}
    columns |= {f"align/{source}": "completed_logprob" for source in sources}
    draws = {key: column in inputs[key].schema.names for key, column in columns.items()}
    if len(set(draws.values())) > 1:
        sampled, exact = ([key for key in draws if draws[key] is wanted] for wanted in (True, False))
        raise ValueError(
            f"{', '.join(sampled)} have draws from the tail, {', '.join(exact)} have none: they were computed from "
            "different logits, run `make align`"
        )


def _weights_of(doc_ids: np.ndarray, fit: pa.Table, kinds: pa.Table | None) -> np.ndarray:
    """Return the fitted weights of each segment's document, (S, C): its kind's, or the whole text's if it has none."""
    weights = dict(zip(fit["kind"].to_pylist(), fit["weights"].to_pylist(), strict=True))
    kind_of = {} if kinds is None else dict(zip(kinds["doc_id"].to_pylist(), kinds["kind"].to_pylist(), strict=True))
    segment_weights = [weights.get(kind_of.get(doc_id), weights[None]) for doc_id in doc_ids.tolist()]
    return np.array(segment_weights, np.float64).reshape(len(doc_ids), len(weights[None]))


def _rows_of(target: pa.Table, others: tuple[pa.Table, ...]) -> np.ndarray:
    """Find each target row's row in the other tables by (doc_id, segment), (S, others); -1 if there is none."""
    other_rows = np.full((target.num_rows, len(others)), -1, np.int64)
    keys = segment_keys(target)
    for column, table in enumerate(others):
        rows = rows_by_segment(table)
        other_rows[:, column] = [rows.get(key, -1) for key in keys]
    return other_rows

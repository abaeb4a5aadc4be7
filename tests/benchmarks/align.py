"""Benchmarks of alignment: kernels against plain Python and POT, and the whole stage from Parquet to Parquet on real data."""

import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import ot
import pyarrow as pa

from stages.align.pairing import token_pairing
from stages.align.stage import AlignStage
from stages.align.transport.sinkhorn import SinkhornResult
from stages.align.transport.sinkhorn import sinkhorn as solve
from stages.contract import schemas
from stages.contract.manifest import DataFile
from stages.contract.store import Store
from stages.models.tokenizer import SegmentTokenizer
from tests.benchmarks import align_data, limits, memory, reference
from tests.benchmarks.figure import Figure
from tests.benchmarks.measure import ROUNDS, cpu_seconds, one_core, say

EPSILON, TOLERANCE, MAX_ITERATIONS = 1 / 30, 1e-5, 2000
SEGMENT_TOKENS = 2048
MEMORY_TOKENS = 500_000


def pairing_vs_python() -> list[Figure]:
    """Compare edit-distance pairing of 2,048 tokens with a dynamic program that calls Levenshtein once per cell."""
    text = align_data.text_of_tokens(SEGMENT_TOKENS)
    target, target_end = _tokens("llama2", text)
    figures = []
    with one_core():
        for name in ("mpt-7b", "qwen3"):
            source, source_end = _tokens(name, text)

            def ours_once(source: list[str] = source, source_end: np.ndarray = source_end) -> token_pairing.Pairing:
                return token_pairing.edit_distance_pairing(
                    source, target, source_byte_end=source_end, target_byte_end=target_end
                )

            found = ours_once()
            cost, path = reference.pair(source, target)
            assert cost == found.cost
            assert path == _path(found)
            ours = cpu_seconds(ours_once, 25)
            plain = cpu_seconds(partial(reference.pair, source, target))
            say(
                f"{name}: {len(source)} by {len(target)} tokens, same path of cost {cost}; {ours * 1e3:.2f} ms "
                f"({ours / len(target) * 1e6:.2f} us per target token) against {plain:.2f} s"
            )
            suffix = "" if name == "mpt-7b" else "_qwen3"
            figures.append(Figure(f"align.pairing_vs_python{suffix}", plain / ours, "times faster", ">= 400"))
    return figures


def _tokens(name: str, text: str) -> tuple[list[str], np.ndarray]:
    """Return a tokenizer's tokens as the pairing compares them, and the byte at which each ends."""
    tokenizer = align_data.tokenizer(name)
    encoding = tokenizer.encode(text, is_last=True)
    return reference.texts(tokenizer, encoding.ids.tolist()), encoding.byte_end


def _path(found: token_pairing.Pairing) -> list[tuple[int, int]]:
    """Return all pairs of a path of steps (1, 1), (1, 0) and (0, 1), which is stored as one span per column."""
    return [(k, j) for j in range(len(found.start)) for k in range(found.start[j], found.end[j])]


def sinkhorn_vs_pot() -> list[Figure]:
    """Compare balanced Sinkhorn with ``ot.sinkhorn`` and ``ot.batch`` on real problems, epsilon 1/30, tolerance 1e-5."""
    cost, a, b = align_data.problems()
    chosen = np.random.default_rng(0).permutation(len(cost))
    with one_core():
        ours = cpu_seconds(lambda: _solve(cost, a, b)) / len(cost)
        few = chosen[:40]
        one_by_one = cpu_seconds(lambda: [_pot(cost[i], a[i], b[i], TOLERANCE) for i in few]) / len(few)
        many = chosen[:200]
        found = _pot_batch(cost[many], a[many], b[many])
        difference = np.abs(found - _solve(cost[many], a[many], b[many]).plan).max()
        assert difference < 1e-3, f"plans differ by {difference}"
        batch = cpu_seconds(lambda: _pot_batch(cost[many], a[many], b[many])) / len(many)
    say(
        f"{len(cost)} problems: {ours * 1e6:.1f} us each; ot.sinkhorn (stabilised) {one_by_one * 1e3:.2f} ms, ot.batch "
        f"{batch * 1e3:.2f} ms; plans of ot.batch differ by at most {difference:.1e}"
    )
    return [
        Figure("align.sinkhorn_vs_pot", one_by_one / ours, "times faster", ">= 100"),
        Figure("align.sinkhorn_vs_pot_batch", batch / ours, "times faster", ">= 50"),
    ]


def convergence() -> list[Figure]:
    """Measure the share of real problems that converge, and the largest difference to POT's plans at tolerance 1e-9."""
    cost, a, b = align_data.problems()
    found = _solve(cost, a, b)
    chosen = np.random.default_rng(1).permutation(len(cost))[:300]
    expected = np.stack([_pot(cost[i], a[i], b[i], 1e-9) for i in chosen])
    reached = np.abs(expected.sum(axis=1) - b[chosen]).max(axis=1) < 1e-8
    difference = np.abs(found.plan[chosen][reached] - expected[reached]).max()
    say(
        f"{len(cost)} problems, {found.iterations.mean():.1f} iterations each, at most {found.iterations.max()}; compared "
        f"with POT on {reached.sum()} of {len(chosen)} drawn, the others POT did not finish in 100,000 iterations"
    )
    return [
        Figure("align.converged_share", float(found.converged.mean()), "of problems", ">= 0.999"),
        Figure("align.plan_difference_vs_pot", float(difference), "largest entry", "<= 0.0001"),
    ]


def _solve(cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> SinkhornResult:
    return solve(cost, a, b, epsilon=EPSILON, tolerance=TOLERANCE, max_iterations=MAX_ITERATIONS)


def _pot(cost: np.ndarray, a: np.ndarray, b: np.ndarray, tolerance: float) -> np.ndarray:
    """Solve with POT's fastest solver that does not underflow."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # POT warns about problems that did not converge
        return ot.sinkhorn(
            a,
            b,
            cost,
            EPSILON,
            method="sinkhorn_stabilized",
            stopThr=tolerance,
            numItermax=100_000 if tolerance < 1e-6 else 20_000,
        )


def _pot_batch(cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Solve with POT's fastest batched solver; its log-domain solver takes six times as long."""
    return ot.batch.solve_batch(cost, EPSILON, a, b, max_iter=20_000, tol=TOLERANCE, method="sinkhorn").plan


def paper() -> list[Figure]:
    """Compare the stage with the ``paper`` preset, from Parquet to Parquet on one core, with a pipeline in plain Python."""
    with one_core():
        rate, made = _stage_rate("paper")
        plain = _plain_rate(made, reference.sinkhorn, ROUNDS)
        in_logs = _plain_rate(made, reference.sinkhorn_log, 3)
        iterations = _solve(*align_data.problems()).iterations.mean()
        limits.say_limit(1e6 / rate, iterations, align_data.TOP_K)
    return [
        Figure("align.paper_tokens_per_second", rate, "target tokens/s on one core", ">= 25000"),
        Figure("align.paper_vs_python", rate / plain, "times faster", ">= 250"),
        Figure("align.paper_vs_python_log_domain", rate / in_logs, "times faster", ">= 250"),
    ]


def semi_relaxed_tokens_per_second() -> list[Figure]:
    """Measure the stage with the ``semi-relaxed`` preset, from Parquet to Parquet on one core."""
    with one_core():
        rate, _ = _stage_rate("semi-relaxed")
    return [Figure("align.semi_relaxed_tokens_per_second", rate, "target tokens/s on one core", ">= 60000")]


def condition_coverage() -> list[Figure]:
    """Measure the share of positions inside a source token that ``inexact = "condition"`` covers, and their teacher NLL."""
    made = align_data.stage("semi-relaxed", inexact="condition")
    totals: dict[str, Any] = {}
    for target, source in align_data.shards():
        health = made.run({"target": align_data.read(target), "source": align_data.read(source)}).health
        totals = {name: totals[name] + value if name in totals else value for name, value in health.items()}
    reasons = {name: totals[name] for name in totals if name.startswith("inner_")}
    say(
        f"{totals['positions']} positions, {reasons}; completed NLL {totals['conditioned_nll'].value:.3f} nats there, the "
        f"target's own {totals['conditioned_target_nll'].value:.3f}"
    )
    share = totals["inner_conditioned"] / totals["inner_positions"]
    return [Figure("align.condition_coverage", share, "of positions inside a source token", ">= 0.4")]


def _stage_rate(preset: str) -> tuple[float, AlignStage]:
    """Measure target tokens per CPU second after a warm-up, and print how much longer the first pass takes."""
    started = time.process_time()
    made = align_data.stage(preset)
    setup = time.process_time() - started
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        pairs = align_data.shards()
        tokens = [0]

        def run_all() -> None:
            tokens[0] = sum(align_shard(made, store, number, pair) for number, pair in enumerate(pairs))

        wall = time.perf_counter()
        started = time.process_time()
        run_all()
        first = time.process_time() - started
        seconds = cpu_seconds(run_all)
        wall = time.perf_counter() - wall
    say(
        f"{preset}: {tokens[0]} target tokens in {len(pairs)} shards, {seconds / tokens[0] * 1e6:.1f} us of CPU time each; "
        f"setup (tokenizers, kernels) {setup:.1f} s, first pass {first:.2f} s, later passes {seconds:.2f} s"
    )
    say(f"{preset}: wall {wall:.1f} s for {ROUNDS + 2} passes")
    return tokens[0] / seconds, made


def align_shard(made: AlignStage, store: Store, number: int, pair: tuple[DataFile, DataFile]) -> int:
    """Read, align and write one shard; return its number of target tokens."""
    output = made.run({"target": align_data.read(pair[0]), "source": align_data.read(pair[1])})
    store.write_table(f"shard-{number}.parquet", output.table)
    return output.num_tokens


def _plain_rate(made: AlignStage, solver: Callable, num_segments: int) -> float:
    """Measure target tokens per CPU second of the plain pipeline (median over segments), and compare its rows with ours."""
    tokenizers = [SegmentTokenizer.load(model) for model in align_data.models()]
    aligner = reference.PlainAligner(tokenizers[0], tokenizers[1], solver)
    pair = align_data.shards()[0]
    started = time.process_time()
    target, source = (align_data.read(data).to_pylist() for data in pair)
    reading = (time.process_time() - started) / sum(len(row["token_ids"]) for row in target)
    aligned = made.run({"target": align_data.read(pair[0]), "source": align_data.read(pair[1])}).table.to_pylist()
    by_key = {(row["doc_id"], row["segment"]): row for row in source}
    rates, apart, compared = [], 0, 0
    for row, ours in list(zip(target, aligned, strict=True))[:num_segments]:
        started = time.process_time()
        result = aligner.align(row, by_key[row["doc_id"], row["segment"]])
        json.dumps(result)
        rates.append(len(result) / (time.process_time() - started + reading * len(result)))
        for expected, ids, logprobs in zip(result, ours["topk_ids"], ours["topk_logprobs"], strict=True):
            found = dict(zip(ids, np.exp(logprobs), strict=True))
            compared += 1
            apart += any(abs(found.get(token, 0) - part) > 0.01 for token, part in (expected or {}).items())
    say(
        f"plain Python ({solver.__name__}): {statistics.median(rates):.1f} target tokens/s; of its {compared} problems "
        f"{aligner.num_unconverged} did not converge in {MAX_ITERATIONS} iterations, and {apart} of its distributions differ "
        "from the stage's by over 0.01"
    )
    assert apart <= 0.02 * compared + aligner.num_unconverged, "the plain pipeline and the stage do not agree"
    return statistics.median(rates)


def memory_bytes_per_token() -> list[Figure]:
    """Measure the peak memory of a shard of half a million tokens beyond its inputs, in bytes per target token."""
    made = align_data.stage("semi-relaxed")
    parts = [(align_data.read(target), align_data.read(source)) for target, source in align_data.shards()]
    tokens = sum(len(target["token_ids"].combine_chunks().flatten()) for target, _ in parts)
    made.run({"target": parts[0][0], "source": parts[0][1]})
    copies = -(-MEMORY_TOKENS // tokens)
    inputs = {
        name: pa.concat_tables(_other_documents(part[side], copy) for copy in range(copies) for part in parts)
        for side, name in enumerate(("target", "source"))
    }
    peak = memory.allocated_peak(lambda: made.run(inputs))
    say(f"{copies * tokens} target tokens in one shard: {peak / 2**20:.0f} MiB beyond the inputs")
    return [Figure("align.memory_bytes_per_token", peak / (copies * tokens), "bytes", "<= 150")]


def _other_documents(table: pa.Table, copy: int) -> pa.Table:
    """Return the same rows under other document numbers."""
    column = table.schema.get_field_index("doc_id")
    moved = pa.array(table["doc_id"].to_numpy() + copy * 1_000_000, pa.int64())
    return table.set_column(column, table.schema.field(column), moved)


def bytes_per_token() -> list[Figure]:
    """Measure the size of an aligned shard in bytes per target token: k = 10, ids folded into a vocabulary of 32,000."""
    import duckdb

    figures = []
    tails: dict[str, schemas.Tail] = {"paper": "renormalise", "semi-relaxed": "bucket"}
    for preset, tail in tails.items():
        made = align_data.stage(preset)
        tables = [
            made.run({"target": align_data.read(pair[0]), "source": align_data.read(pair[1])}).table
            for pair in align_data.shards()
        ]
        table = _folded(pa.concat_tables(tables), 32_000, tail)
        with tempfile.TemporaryDirectory() as folder:
            data = Store(folder).write_table("shard.parquet", table)
            query = f"select count(*), sum(len(topk_ids)) from '{folder}/shard.parquet'"
            (rows, tokens), *_ = duckdb.execute(query).fetchall()
        assert rows == table.num_rows
        say(f"{preset}: {data.num_bytes} bytes, {rows} rows, {tokens} tokens as DuckDB counts them")
        name = "bytes_per_token" if preset == "paper" else "bytes_per_token_semi_relaxed"
        figures.append(Figure(f"align.{name}", data.num_bytes / tokens, "bytes", "<= 30"))
    return figures


def _folded(table: pa.Table, size: int, tail: schemas.Tail) -> pa.Table:
    schema = schemas.aligned_schema(size, tail)
    ids = table["topk_ids"].combine_chunks()
    leaf = pa.array(np.asarray(ids.values.values) % size, schemas.id_type(size))
    inner = pa.ListArray.from_arrays(ids.values.offsets, leaf)
    folded = pa.ListArray.from_arrays(ids.offsets, inner)
    columns = [folded if name == "topk_ids" else table[name] for name in schema.names]
    return pa.Table.from_arrays(columns, schema=schema)

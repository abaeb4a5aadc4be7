"""Run the benchmarks, all or those whose names begin with an argument (``align.pairing``).

One JSON object a line on standard output, text for people on standard error.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace

from tests.benchmarks import (
    align,
    compilation,
    engine,
    fuse,
    logits,
    logits_files,
    logits_host,
    operate,
    startup,
    train,
    workers,
)
from tests.benchmarks.figure import Figure
from tests.benchmarks.measure import SkippedError, say, say_versions

BENCHMARKS: tuple[Callable[[], list[Figure]], ...] = (
    align.pairing_vs_python,
    align.sinkhorn_vs_pot,
    align.convergence,
    align.paper,
    align.semi_relaxed_tokens_per_second,
    align.condition_coverage,
    align.bytes_per_token,
    align.memory_bytes_per_token,
    fuse.fitted_vs_min_ce_completed_nll,
    workers.two_workers_vs_one,
    workers.memory_growth,
    logits.peak_memory_vs_plain,
    logits.speed_vs_plain,
    logits.time_outside_forward,
    logits_host.host_overlap,
    logits_files.bytes_per_token,
    logits_files.bytes_per_token_sampled,
    logits_files.float16_nll_cost,
    logits_files.bits_per_byte_vs_plain,
    compilation.compile_seconds,
    engine.overhead_per_shard,
    startup.step_startup_seconds,
    operate.status_and_plan,
    train.loss_vs_dense_32k,
    train.loss_vs_released_32k,
    train.loss_vs_dense_152k,
    train.loss_vs_dense_32k_float32,
    train.reader_tokens_per_second,
    train.step_vs_gold_only,
    train.step_beside_busy_process,
)


FAMILIES = {
    "workers": "align",
    "compilation": "align",
    "engine": "pipeline",
    "logits_files": "logits",
    "logits_host": "logits",
    "startup": "pipeline",
}
"""File -> prefix of its figures' names, where the two differ."""


def name_of(benchmark: Callable[[], list[Figure]]) -> str:
    """Return the name that selects a benchmark on the command line, such as ``align.paper``."""
    file = benchmark.__module__.rsplit(".", 1)[-1]
    return f"{FAMILIES.get(file, file)}.{benchmark.__name__}"


def main(chosen: tuple[str, ...]) -> None:
    """Run the benchmarks; report and skip those whose inputs are missing."""
    unknown = [prefix for prefix in chosen if not any(name_of(one).startswith(prefix) for one in BENCHMARKS)]
    if unknown:
        names = ", ".join(map(name_of, BENCHMARKS))
        raise SystemExit(f"no benchmark begins with {unknown[0]!r}; there are {names}")
    say_versions()
    for benchmark in BENCHMARKS:
        if chosen and not name_of(benchmark).startswith(chosen):
            continue
        sys.stderr.write(f"{name_of(benchmark)}: {(benchmark.__doc__ or '').splitlines()[0]}\n")
        try:
            figures = benchmark()
        except SkippedError as reason:
            say(f"skipped: {reason}")
            continue
        command = f"python -m tests.benchmarks {name_of(benchmark)}"
        for figure in figures:
            sys.stdout.write(json.dumps(replace(figure, command=command).to_json()) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(tuple(sys.argv[1:]))

"""Benchmark of mixing with fitted weights, on the logits of a finished run."""

import numpy as np
import pyarrow as pa

from pipeline.engine.fit_stage import fitted_rows
from stages.contract.manifest import Mean
from stages.fuse.config import FuseConfig
from stages.fuse.stage import FuseStage
from tests.benchmarks import align_data
from tests.benchmarks.figure import Figure
from tests.benchmarks.measure import SkippedError, say


def fitted_vs_min_ce_completed_nll() -> list[Figure]:
    """Compare completed NLL of fitted weights and MinCE: weights are fitted on half of the shards, measured on the rest."""
    target, source = align_data.models()
    aligner = align_data.stage("semi-relaxed")
    inputs = []
    for pair in align_data.shards():
        own, other = map(align_data.read, pair)
        aligned = aligner.run({"target": own, "source": other}).table
        inputs.append({f"logits/{target.name}": own, f"logits/{source.name}": other, f"align/{source.name}": aligned})
    if len(inputs) < 2:
        raise SkippedError("the run has one shard: there is none to judge on")
    fitted, min_ce = (
        FuseStage(FuseConfig(function=function, top_k=align_data.TOP_K, max_length=2048), target, (source,))
        for function in ("fitted", "min-ce")
    )
    for stage in (fitted, min_ce):
        stage.setup()
    nll = np.concatenate([fitted.gold_nll(shard).nll for shard in inputs[::2]])
    rows = fitted_rows(nll, np.full(len(nll), "", object))
    fit = pa.Table.from_pylist(rows)
    found = {}
    for name, stage, extra in (("fitted", fitted, {"fit": fit}), ("min-ce", min_ce, {})):
        healths = [stage.run({**shard, **extra}).health for shard in inputs[1::2]]
        for figure in ("completed_nll", "target_exact_nll"):
            found[name, figure] = _mean([health[figure] for health in healths])
    weights = ", ".join(f"{weight:.3f}" for weight in rows[0]["weights"])
    say(f"weights of {target.name} and {source.name}: {weights}, fitted on {len(nll)} positions")
    for (name, figure), mean in found.items():
        say(f"{name}: {figure} {mean.value:.4f} nats on {mean.count} other positions")
    ratio = found["fitted", "completed_nll"].value / found["min-ce", "completed_nll"].value
    return [Figure("fuse.fitted_vs_min_ce_completed_nll", ratio, "ratio", "< 1")]


def _mean(means: list) -> Mean:
    return sum(means[1:], start=means[0])

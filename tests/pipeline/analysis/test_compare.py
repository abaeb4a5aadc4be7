"""``ptafuse compare``: its figures against those of the committed rows, and what it refuses."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.analysis.compare import CONDITIONED, SOURCE_ROW, TARGET_ROW, alignment_variants
from stages.align.config import AlignConfig
from stages.measures.teacher import TEACHER_FLOOR
from tests.tiny_run import ptafuse

# --- the rows ------------------------------------------------------------------------------------------------------------


def test_every_method_has_a_row_with_both_pairings() -> None:
    variants = alignment_variants(AlignConfig(preset="semi-relaxed"))
    assert [(variant.name, variant.settings.pairing) for variant in variants] == [
        (name, pairing)
        for name in ("exact", "min-edit", "paper", "semi-relaxed")
        for pairing in ("edit-distance", "boundary")
    ] + [(CONDITIONED, "boundary")]
    assert [variant.label for variant in variants if variant.is_configured] == ["semi-relaxed, boundary, epsilon 0.2"]
    assert len({variant.label for variant in variants}) == len(variants)
    assert [variant.epsilon for variant in variants] == [None] * 4 + [1 / 30] * 2 + [0.2] * 3


def test_a_configuration_that_conditions_is_the_row_that_conditions() -> None:
    variants = alignment_variants(AlignConfig(preset="semi-relaxed", inexact="condition"))
    assert [variant.name for variant in variants if variant.is_configured] == [CONDITIONED]
    other = alignment_variants(AlignConfig(preset="semi-relaxed", inexact="condition", epsilon=0.3))[-1]
    assert (other.name, other.settings.inexact, other.settings.epsilon) == ("as configured", "condition", 0.3)


def test_all_rows_share_window_tail_and_what_inexact_pairs_get() -> None:
    config = AlignConfig(
        cost="prefix", marginals="source", projection="plan", inexact="gold", top_k=7, top_p=0.9, tail="renormalise"
    )
    variants = alignment_variants(config)
    alike = {(variant.settings.tail, variant.settings.top_k, variant.settings.top_p) for variant in variants}
    assert alike == {("bucket", 7, 0.9)}
    assert {variant.settings.inexact for variant in variants if variant.name != CONDITIONED} == {"transport"}
    assert [variant.settings.inexact for variant in variants if variant.name == CONDITIONED] == ["condition"]
    last = variants[-1]
    assert (last.name, last.is_configured, last.settings.cost) == ("as configured", True, "prefix")
    assert not any(variant.is_configured for variant in variants[:-1])


def test_further_epsilons_are_rows_of_both_presets() -> None:
    variants = alignment_variants(AlignConfig(preset="paper"), epsilons=(2.0, 0.2, 0.1))
    found = {
        name: [variant.epsilon for variant in variants if variant.name == name]
        for name in ("paper", "semi-relaxed", "exact")
    }
    assert found["paper"] == [epsilon for epsilon in (1 / 30, 0.1, 0.2, 2.0) for _ in range(2)]
    assert found["semi-relaxed"] == [epsilon for epsilon in (0.1, 0.2, 2.0) for _ in range(2)]
    assert found["exact"] == [None, None]
    with pytest.raises(ValueError, match=r"--epsilon 0\.0: expected a number above 0"):
        alignment_variants(AlignConfig(), epsilons=(0.0,))


# --- the command ---------------------------------------------------------------------------------------------------------


def compare(config: Path, run: Path, *arguments: str) -> dict[str, Any]:
    shown = ptafuse("compare", str(config), "--run", str(run), "--json", *arguments)
    [found] = json.loads(shown.stdout)["sources"]
    return found


def rows_of(found: dict[str, Any]) -> dict[tuple[str, str, float | None], dict[str, Any]]:
    """Return the rows of ways of aligning."""
    return {(row["name"], row["settings"]["pairing"], row["epsilon"]): row for row in found["rows"] if row.get("name")}


def committed_tables(run: Path, step: str) -> list[dict[str, list]]:
    return [pq.read_table(path).to_pydict() for path in sorted(run.glob(f"{step}/*/data/*.parquet"))]


def floored_nll(row: dict[int, float], gold: int) -> float:
    return -math.log(max(row.get(gold, 0.0) / sum(row.values()), TEACHER_FLOOR))


def distribution(table: dict[str, list], row: int, position: int) -> dict[int, float]:
    pairs = zip(table["topk_ids"][row][position], table["topk_logprobs"][row][position], strict=True)
    return {token: math.exp(logprob) for token, logprob in pairs}


def committed_nll(run: Path) -> tuple[dict[str, list[float]], dict[str, list[float]], int]:
    """Completed and floored NLL of the committed aligned rows, of the target and of the source there, and all positions."""
    completed, floored = ({"aligned": [], "target": [], "source": []} for _ in range(2))
    num_positions = 0
    steps = (committed_tables(run, step) for step in ("align/neox", "logits/llama", "logits/neox"))
    for aligned, target, source in zip(*steps, strict=True):
        for row, token_ids in enumerate(target["token_ids"]):
            num_positions += max(len(token_ids) - 1, 0)
            source_ids = source["token_ids"][row]
            for position, taken in enumerate(aligned["source_position"][row]):
                if taken < 0:
                    continue
                gold, gold_logprob = token_ids[position + 1], target["gold_logprob"][row][position]
                found, own = distribution(aligned, row, position), distribution(target, row, position)
                left = 1 - sum(prob for token, prob in own.items() if token in found)
                rest = aligned["tail_mass"][row][position] * math.exp(gold_logprob) / left
                completed["aligned"].append(-math.log(found.get(gold, rest)))
                completed["target"].append(-gold_logprob)
                floored["aligned"].append(floored_nll(found, gold))
                floored["target"].append(floored_nll(own, gold))
                if taken + 1 < len(source_ids):
                    completed["source"].append(-source["gold_logprob"][row][taken])
                    floored["source"].append(floored_nll(distribution(source, row, taken), source_ids[taken + 1]))
    return completed, floored, num_positions


@pytest.mark.slow
def test_figures_are_those_of_the_committed_rows(undisturbed_run: Path, tiny_config: Path) -> None:
    found = compare(tiny_config, undisturbed_run)
    completed, floored, num_positions = committed_nll(undisturbed_run)
    assert found["num_positions"] == num_positions
    row = rows_of(found)["semi-relaxed", "boundary", 0.2]  # what the run itself computed
    models = found["rows"][:2]
    assert row["is_configured"]
    for name, expected in (("completed", completed), ("floored", floored)):
        entry, target, source = (part[name] for part in (row, *models))
        assert entry["num_positions"] == len(expected["aligned"]) > 100
        assert entry["coverage"] == pytest.approx(len(expected["aligned"]) / num_positions)
        difference = (sum(expected["aligned"]) - sum(expected["target"])) / len(expected["aligned"])
        assert entry["own_difference"]["mean"] == pytest.approx(difference, rel=1e-5)
        assert target["coverage"] == 1
        assert source["num_positions"] == len(expected["source"])
        # Boundary pairing decides what is shared, and `exact` leaves out a position of which it has nothing.
        assert found["num_shared_positions"] <= len(expected["source"])
        assert found["num_shared_positions"] == min(part[name]["num_positions"] for part in found["rows"])
        conditioned = rows_of(found)[CONDITIONED, "boundary", 0.2][name]
        assert conditioned["nll"] == entry["nll"]  # the same rows at shared boundaries
        assert conditioned["coverage"] > entry["coverage"]
        assert entry["mixed_difference"]["mean"] <= min(0, entry["difference"]["mean"])
        assert entry["nll"]["mean"] - target["nll"]["mean"] == pytest.approx(entry["difference"]["mean"])


@pytest.mark.slow
def test_nothing_is_written(undisturbed_run: Path, tiny_config: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed_run.rglob("*")}
    ptafuse("compare", str(tiny_config), "--run", str(undisturbed_run), "--shards", "1")
    assert {path: path.stat().st_mtime_ns for path in undisturbed_run.rglob("*")} == before


@pytest.mark.slow
def test_the_table_has_every_row_and_fits_the_terminal(undisturbed_run: Path, tiny_config: Path) -> None:
    shown = ptafuse("compare", str(tiny_config), "--run", str(undisturbed_run), "--epsilon", "2").stdout
    assert max(len(line) for line in shown.splitlines()) <= 100
    assert "completed" in shown
    assert "6 of 6 shards" in " ".join(shown.split())
    counts = {TARGET_ROW: 1, SOURCE_ROW: 1, "exact": 2, "min-edit": 2, "paper": 4, "semi-relaxed": 4, CONDITIONED: 1}
    for name, count in counts.items():
        assert sum(line.strip().startswith(name) for line in shown.splitlines()) == count
    assert sum(line.strip().startswith("semi-relaxed 0.2 *") for line in shown.splitlines()) == 1


@pytest.mark.slow
def test_shards_are_evenly_spread(undisturbed_run: Path, tiny_config: Path) -> None:
    some = compare(tiny_config, undisturbed_run, "--shards", "2")
    assert (some["shards"], some["num_shards"]) == ([0, 3], 6)
    all_of_them = compare(tiny_config, undisturbed_run, "--shards", "99")
    assert all_of_them["shards"] == [0, 1, 2, 3, 4, 5]
    assert some["num_positions"] < all_of_them["num_positions"]


@pytest.mark.slow
def test_incomplete_logits_and_unknown_sources_are_refused(
    undisturbed_run: Path, tiny_config: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(undisturbed_run, tmp_path / "run"))
    next(run.glob("logits/neox/*/manifests/shard-00002.json")).unlink()
    refused = ptafuse("compare", str(tiny_config), "--run", str(run), check=False)
    assert refused.returncode == 1
    assert "logits/neox is incomplete (5 of 6 shards): run `make logits CONFIG=" in refused.stderr
    unknown = ptafuse("compare", str(tiny_config), "--run", str(run), "--source", "mpt", check=False)
    assert unknown.returncode == 1
    assert "--source mpt: this configuration's sources are neox" in unknown.stderr
    nothing = ptafuse("compare", str(tiny_config), "--run", str(tmp_path / "empty"), check=False)
    assert "compare needs shards, and shard has not run yet: run `make shard" in nothing.stderr

"""``ptafuse compare``: its figures against those of the committed rows, and what it refuses."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.analysis.compare import SOURCE_ROW, TARGET_ROW, ways_of
from stages.align.config import AlignConfig
from stages.measures.cross_entropy import TEACHER_FLOOR
from tests.tiny_run import ptafuse

# --- the rows ------------------------------------------------------------------------------------------------------------


def test_every_method_has_a_row_with_both_pairings() -> None:
    ways = ways_of(AlignConfig(preset="semi-relaxed"), tail="bucket")
    assert [(way.name, way.settings.pairing) for way in ways] == [
        (name, pairing)
        for name in ("exact", "min-edit", "paper", "semi-relaxed")
        for pairing in ("edit-distance", "boundary")
    ]
    assert [way.label for way in ways if way.is_configured] == ["semi-relaxed, boundary, epsilon 0.2"]
    assert len({way.label for way in ways}) == len(ways)
    assert [way.epsilon for way in ways] == [None] * 4 + [1 / 30] * 2 + [0.2] * 2


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_all_rows_share_tail_window_and_what_inexact_pairs_get(tail: Any) -> None:
    config = AlignConfig(cost="prefix", marginals="source", projection="plan", inexact="gold", top_k=7, top_p=0.9)
    ways = ways_of(config, tail=tail)
    alike = {(way.settings.tail, way.settings.inexact, way.settings.top_k, way.settings.top_p) for way in ways}
    assert alike == {(tail, "transport", 7, 0.9)}
    last = ways[-1]
    assert (last.name, last.is_configured, last.settings.cost) == ("as configured", True, "prefix")
    assert not any(way.is_configured for way in ways[:-1])


def test_further_epsilons_are_rows_of_both_presets() -> None:
    ways = ways_of(AlignConfig(preset="paper"), tail="bucket", epsilons=(2.0, 0.2, 0.1))
    found = {name: [way.epsilon for way in ways if way.name == name] for name in ("paper", "semi-relaxed", "exact")}
    assert found["paper"] == [epsilon for epsilon in (1 / 30, 0.1, 0.2, 2.0) for _ in range(2)]
    assert found["semi-relaxed"] == [epsilon for epsilon in (0.1, 0.2, 2.0) for _ in range(2)]
    assert found["exact"] == [None, None]
    with pytest.raises(ValueError, match=r"--epsilon 0\.0: expected a number above 0"):
        ways_of(AlignConfig(), tail="bucket", epsilons=(0.0,))


# --- the command ---------------------------------------------------------------------------------------------------------


def compare(config: Path, run: Path, *arguments: str) -> dict[str, Any]:
    shown = ptafuse("compare", str(config), "--run", str(run), "--json", *arguments)
    [found] = json.loads(shown.stdout)["sources"]
    return found


def rows_of(found: dict[str, Any]) -> dict[tuple[str, str, float | None], dict[str, Any]]:
    """The rows of ways of aligning."""
    return {(row["name"], row["settings"]["pairing"], row["epsilon"]): row for row in found["rows"] if row.get("name")}


def committed_tables(run: Path, step: str) -> list[dict[str, list]]:
    return [pq.read_table(path).to_pydict() for path in sorted(run.glob(f"{step}/*/data/*.parquet"))]


def nll_of(ids: list[int], logprobs: list[float], gold: int) -> float:
    found = sum(math.exp(logprob) for token, logprob in zip(ids, logprobs, strict=True) if token == gold)
    return -math.log(max(found, TEACHER_FLOOR))


def committed_nll(run: Path) -> tuple[list[float], list[float], list[float], int]:
    """NLL of the committed aligned rows, of the target and of the source there, and the number of all positions."""
    aligned_nll, target_nll, source_nll, num_positions = [], [], [], 0
    steps = (committed_tables(run, step) for step in ("align/neox", "logits/llama", "logits/neox"))
    for aligned, target, source in zip(*steps, strict=True):
        for row, token_ids in enumerate(target["token_ids"]):
            num_positions += max(len(token_ids) - 1, 0)
            source_ids = source["token_ids"][row]
            for position, taken in enumerate(aligned["source_position"][row]):
                if taken < 0:
                    continue
                gold = token_ids[position + 1]
                distributions = ((aligned, row, position, gold, aligned_nll), (target, row, position, gold, target_nll))
                if taken + 1 < len(source_ids):
                    distributions += ((source, row, taken, source_ids[taken + 1], source_nll),)
                for table, place, at, following, into in distributions:
                    into.append(nll_of(table["topk_ids"][place][at], table["topk_logprobs"][place][at], following))
    return aligned_nll, target_nll, source_nll, num_positions


@pytest.mark.slow
def test_figures_are_those_of_the_committed_rows(undisturbed_run: Path, tiny_config: Path) -> None:
    found = compare(tiny_config, undisturbed_run)
    aligned, target, source, num_positions = committed_nll(undisturbed_run)
    assert found["num_positions"] == num_positions
    row = rows_of(found)["semi-relaxed", "boundary", 0.2]  # what the run itself computed
    assert row["is_configured"]
    assert row["num_positions"] == len(aligned) > 100
    assert row["coverage"] == pytest.approx(len(aligned) / num_positions)
    assert row["own_difference"]["mean"] == pytest.approx((sum(aligned) - sum(target)) / len(aligned))
    models = found["rows"][:2]
    assert models[0]["coverage"] == 1
    assert models[1]["num_positions"] == len(source)
    # Boundary pairing decides what is shared, and `exact` leaves out a position of which it has nothing.
    assert found["num_shared_positions"] <= len(source)
    assert found["num_shared_positions"] == min(row["num_positions"] for row in found["rows"])
    assert row["mixed_difference"]["mean"] <= min(0, row["difference"]["mean"])
    assert row["nll"]["mean"] - models[0]["nll"]["mean"] == pytest.approx(row["difference"]["mean"])


@pytest.mark.slow
def test_nothing_is_written(undisturbed_run: Path, tiny_config: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed_run.rglob("*")}
    ptafuse("compare", str(tiny_config), "--run", str(undisturbed_run), "--shards", "1")
    assert {path: path.stat().st_mtime_ns for path in undisturbed_run.rglob("*")} == before


@pytest.mark.slow
def test_the_table_has_every_row_and_fits_the_terminal(undisturbed_run: Path, tiny_config: Path) -> None:
    shown = ptafuse("compare", str(tiny_config), "--run", str(undisturbed_run), "--epsilon", "2").stdout
    assert max(len(line) for line in shown.splitlines()) <= 100
    assert "tail bucket" in shown
    assert "6 of 6 shards" in " ".join(shown.split())
    for name, count in {TARGET_ROW: 1, SOURCE_ROW: 1, "exact": 2, "min-edit": 2, "paper": 4, "semi-relaxed": 4}.items():
        assert sum(line.strip().startswith(name) for line in shown.splitlines()) == count
    assert sum(line.strip().startswith("semi-relaxed *") for line in shown.splitlines()) == 1


@pytest.mark.slow
def test_shards_are_evenly_spread_and_the_tail_is_every_row_s(undisturbed_run: Path, tiny_config: Path) -> None:
    some = compare(tiny_config, undisturbed_run, "--shards", "2")
    assert (some["shards"], some["num_shards"]) == ([0, 3], 6)
    all_of_them = compare(tiny_config, undisturbed_run, "--shards", "99", "--tail", "renormalise")
    assert all_of_them["shards"] == [0, 1, 2, 3, 4, 5]
    assert some["num_positions"] < all_of_them["num_positions"]
    bucket = compare(tiny_config, undisturbed_run)
    for rescaled, row in zip(all_of_them["rows"], bucket["rows"], strict=True):
        assert rescaled["num_positions"] == row["num_positions"]
        assert rescaled["nll"]["mean"] < row["nll"]["mean"]  # rescaling raises every probability


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

"""The table of a sweep, from figures that were made up."""

import math
from pathlib import Path

import pytest

from pipeline.evaluation.paired import paired_difference
from pipeline.report.sweeps import sweep_results, sweep_table
from pipeline.run.stage_table import FUSED
from pipeline.run.steps import ResolvedRun
from pipeline.workflow.sweep import SweepConfig
from stages.contract.store import Store
from tests.pipeline.report.finished_runs import begin, evaluation_of, put


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "run"))


def sweep_of(config: Path, other: dict, *, seeds: tuple[int, ...] = (1,)) -> SweepConfig:
    """Two cells: ``gold``, which is the baseline, and ``other``."""
    variants = [{"name": "gold", "set": {"train.lambda": 1.0}}, {"name": "other", "set": other}]
    return SweepConfig.model_validate(
        {"name": "s", "config": str(config), "seeds": seeds, "baseline": "gold", "variants": variants}
    )


def put_cell(
    store: Store, config: Path, cell: str, documents: dict[int, float], *overrides: str, seed: int = 1
) -> ResolvedRun:
    run = begin(store, config, *overrides, f"name=s-{cell}-seed{seed}", f"train.seed={seed}")
    put(store, run, FUSED, evaluation_of(documents))
    return run


@pytest.mark.parametrize(
    ("documents", "other"),
    [({0: 1.0, 1: 1.0}, {2: 0.5, 3: 0.5}), ({0: 1.0, 1: 1.0, 2: 1.0}, {1: 0.5, 2: 0.5, 3: 0.5}), ({0: 1.0}, {0: 0.5})],
    ids=["none in common", "some in common", "the same numbers"],
)
def test_cells_of_other_documents_are_not_paired_and_the_table_says_why(
    store: Store, tiny_config: Path, documents: dict, other: dict
) -> None:
    put_cell(store, tiny_config, "gold", documents, "train.lambda=1.0")
    put_cell(store, tiny_config, "other", other, "shard.validation_fraction=0.5")
    sweep = sweep_of(tiny_config, {"shard.validation_fraction": 0.5})
    results = sweep_results(sweep, store)
    assert results[1].bits_per_byte == (0.5,)
    assert results[1].against_baseline is None
    table = sweep_table(sweep, results)
    assert table.rows[1][3] == "other documents"
    assert table.notes == (
        (
            "other is not compared with gold: shard.validation_fraction is 0.5, there 0.25, so different documents are "
            "scored"
        ),
    )


def test_seeds_of_other_documents_are_not_averaged(store: Store, tiny_config: Path) -> None:
    for seed, documents, sets in ((1, {0: 1.0, 1: 1.0}, ()), (2, {0: 1.0, 1: 1.0, 2: 1.0}, ("eval.max_documents=3",))):
        put_cell(store, tiny_config, "gold", documents, "train.lambda=1.0", *sets, seed=seed)
        put_cell(store, tiny_config, "other", documents, *sets, seed=seed)
    result = sweep_results(sweep_of(tiny_config, {}, seeds=(1, 2)), store)[1]
    assert result.against_baseline is None
    assert "eval.max_documents" in str(result.not_compared)


def test_what_is_not_trained_is_not_paired_with_other_documents_either(store: Store, tiny_config: Path) -> None:
    put_cell(store, tiny_config, "gold", {0: 1.0, 1: 1.0}, "train.lambda=1.0")
    other = put_cell(store, tiny_config, "other", {2: 1.0}, "shard.validation_fraction=0.5")
    put(store, other, "llama", evaluation_of({2: 3.0}))
    sweep = sweep_of(tiny_config, {"shard.validation_fraction": 0.5})
    (found,) = [result for result in sweep_results(sweep, store) if not result.is_trained]
    assert found.bits_per_byte == (3.0,)
    assert found.against_baseline is None
    assert "shard.validation_fraction" in str(found.not_compared)


def test_a_document_without_anything_to_predict_is_left_out_of_both(store: Store, tiny_config: Path) -> None:
    """A model without BOS has no figure for a document of one token."""
    put_cell(store, tiny_config, "gold", {0: 1.0, 1: 1.0, 2: 9.0}, "train.lambda=1.0")
    put_cell(store, tiny_config, "other", {0: 0.9, 1: 0.7}, "target.bos=false")
    result = sweep_results(sweep_of(tiny_config, {"target.bos": False}), store)[1]
    assert result.not_compared is None
    assert result.against_baseline is not None
    assert result.against_baseline.mean == pytest.approx(-0.2)


def test_cells_with_other_sources_are_compared_on_the_same_documents(store: Store, tiny_config: Path) -> None:
    """Segments are cut to fit other tokenizers, so the shards are other files of the same documents."""
    gold = put_cell(store, tiny_config, "gold", {0: 1.0, 1: 1.0}, "train.lambda=1.0")
    gemma = tiny_config.with_name("gemma.toml")
    gemma.write_text(tiny_config.read_text().replace("neox", "gemma"))
    other = put_cell(store, gemma, "other", {0: 0.9, 1: 0.7})
    assert gold.steps["shard"].fingerprint != other.steps["shard"].fingerprint
    result = sweep_results(sweep_of(tiny_config, {}), store)[1]
    assert result.against_baseline is not None
    assert result.against_baseline.mean == pytest.approx(-0.2)


def test_figures_of_other_documents_are_never_paired() -> None:
    for other in ({2: 1.0, 3: 1.0}, {1: 1.0, 2: 1.0}, {0: 1.0}, {}):
        with pytest.raises(ValueError, match="on different documents"):
            paired_difference(evaluation_of({0: 1.0, 1: 1.0}), evaluation_of(other))


def test_figures_of_the_same_shards_may_lack_a_document_without_anything_to_predict() -> None:
    settings = {"eval": {"max_documents": None}, "inputs": {"shard": "feedc0ffee00"}}
    whole, part = ({**evaluation_of(documents), "settings": settings} for documents in ({0: 1.0, 1: 2.0}, {1: 2.5}))
    assert paired_difference(part, whole).mean == pytest.approx(0.5)
    nothing = {**evaluation_of({}), "settings": settings}
    assert math.isnan(paired_difference(nothing, whole).mean)

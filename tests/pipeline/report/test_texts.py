"""The tables of texts besides the held-out split, from figures that were made up, against figures computed by hand."""

import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.report.page.page import report_page
from pipeline.report.reported import reported_runs
from pipeline.report.sweeps import Measure, summary_of, sweep_results, sweep_table, sweep_tables
from pipeline.report.terminal import print_report
from pipeline.report.texts import text_reports, text_tables
from pipeline.report.verdict import verdicts
from pipeline.run.stage_table import FUSED
from pipeline.run.steps import ResolvedRun
from pipeline.settings.load import ConfigError
from pipeline.workflow.sweep import SweepConfig, check_cells
from stages.contract.store import Store
from tests.pipeline.report.finished_runs import begin, evaluation_of, put

KINDS = ["law", "law", "news", "news", "poem"]
COUNTS = {
    "documents": 9, "kinds": 3, "chosen": 6, "unreadable": 0, "overlapping": 1, "uncut": 0, "scored": 5, "scored_kinds": 3,
}  # fmt: skip


def figures(values: list[float], kinds: list[str] | None = KINDS) -> dict[str, Any]:
    """Return an evaluation of documents of 100 bytes with these figures."""
    found = evaluation_of(dict(enumerate(values)))
    for part, kind in zip(found["documents"], kinds or [], strict=False):
        part["kind"] = kind
    return {**found, "counts": COUNTS}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "run"))


@pytest.fixture
def config(tiny_config: Path, tmp_path: Path) -> Path:
    """The tiny configuration with the text ``essays``, which has kinds, and ``code``, which has none."""
    lines = '{"text": "An essay of some words.", "kind": "law"}\n'
    for name in ("essays", "code"):
        (tmp_path / f"{name}.jsonl").write_text(lines)
    path = tmp_path / "texts.toml"
    path.write_text(
        tiny_config.read_text()
        + f'\n[[eval.texts]]\nname = "essays"\npath = "{tmp_path}/essays.jsonl"\nkind_column = "kind"\n'
        + f'\n[[eval.texts]]\nname = "code"\npath = "{tmp_path}/code.jsonl"\n'
    )
    return path


@pytest.fixture
def finished(store: Store, config: Path) -> list[ResolvedRun]:
    """A run on the gold tokens alone and one that is fused, evaluated on the text ``essays``."""
    gold = begin(store, config, "name=gold", "train.lambda=1.0")
    fused = begin(store, config, "name=fused-run")
    put(store, gold, "llama/essays", figures([2.0, 2.0, 2.0, 2.0, 2.0]))
    put(store, gold, "neox/essays", figures([1.5, 1.5, 1.5, 1.5, 2.5]))
    put(store, gold, f"{FUSED}/essays", figures([1.9, 1.9, 1.9, 1.9, 2.1]))
    put(store, fused, f"{FUSED}/essays", figures([1.7, 1.9, 2.0, 2.2, 1.8]))
    return [gold, fused]


def test_differences_and_kinds_are_those_computed_by_hand(store: Store, finished: list[ResolvedRun]) -> None:
    essays, code = text_reports(finished, store)
    assert (essays.name, code.name) == ("essays", "code")
    rows = {row.label.split(" (")[0]: row for row in essays.rows}
    assert list(rows) == ["source neox", "target llama before", "after gold", "after fused-run"]
    row = rows["after fused-run"]
    assert row.bits_per_byte == pytest.approx(1.92)
    assert row.against_before is not None
    assert row.against_before.mean == pytest.approx((-0.3 - 0.1 + 0.0 + 0.2 - 0.2) / 5)
    assert row.against_gold_only is not None
    assert row.against_gold_only.mean == pytest.approx((-0.2 + 0.0 + 0.1 + 0.3 - 0.3) / 5)
    # Of kinds: law -0.2, news +0.1, poem -0.2; variances of the means 0.01 and 0.01, and 0.02 of poem's one document.
    kinds = row.kinds_against_before
    assert kinds is not None
    assert kinds.means == {"law": pytest.approx(-0.2), "news": pytest.approx(0.1), "poem": pytest.approx(-0.2)}
    assert kinds.average.mean == pytest.approx(-0.1)
    assert kinds.average.error == pytest.approx(math.sqrt(0.01 + 0.01 + 0.02) / 3)
    assert row.kinds_against_gold_only is not None
    assert row.kinds_against_gold_only.won == "2 of 3"
    assert rows["after gold"].kinds_against_gold_only is None
    assert all(row.bits_per_byte is None for row in code.rows)


def test_a_text_has_a_table_over_bytes_and_one_over_kinds(store: Store, finished: list[ResolvedRun]) -> None:
    over_bytes, over_kinds = text_tables(text_reports(finished, store)[0])
    assert over_bytes.title.startswith("Text essays, evaluated in float32 (differences: over all bytes")
    assert over_bytes.notes[0] == (
        "text essays: 5 of 6 chosen documents (9 in the corpus); left out: 1 that share text with the training documents"
    )
    assert over_kinds.title.startswith("Text essays, average over its 3 kinds, all with the same weight")
    assert over_kinds.rows[-1][1:] == ("1.9000", "-0.1000 ± 0.0667", "2 of 3", "-0.0667 ± 0.0667", "2 of 3")
    assert over_kinds.rows[0][1:] == ("1.8333", "", "", "", "")
    assert len(text_tables(text_reports(finished, store)[1])) == 1, "a text without kinds"


@pytest.mark.usefixtures("finished")
def test_every_comparable_result_has_a_sentence(store: Store) -> None:
    (essays,) = verdicts(store)
    assert essays.startswith("text essays: after fused-run (")
    assert "and gold tokens only are equal within two standard errors (difference 0.0200 ± " in essays


def test_texts_of_one_name_that_are_other_texts_have_tables_of_their_own(
    store: Store, config: Path, finished: list[ResolvedRun]
) -> None:
    shorter = config.with_name("shorter.toml")
    shorter.write_text(config.read_text().replace('name = "essays"', 'name = "essays"\nmax_characters = 5'))
    other = begin(store, shorter, "name=other")
    put(store, other, f"{FUSED}/essays", figures([1.0, 1.0, 1.0, 1.0, 1.0]))
    reports = [report for report in text_reports([*finished, other], store) if report.name.startswith("essays")]
    assert [report.name for report in reports] == ["essays of gold, fused-run", "essays of other"]
    (row,) = [row for row in reports[1].rows if row.bits_per_byte is not None]
    assert row.against_before is None
    assert row.against_gold_only is None


def test_configurations_that_differ_only_in_their_texts_are_distinguished(store: Store, config: Path) -> None:
    shorter = config.with_name("shorter.toml")
    shorter.write_text(config.read_text().replace('name = "essays"', 'name = "essays"\nmax_characters = 5'))
    for path in (config, shorter):
        put(store, begin(store, path), f"{FUSED}/essays", figures([1.0] * 5))
    labels = [run.label for run in reported_runs(store)]
    assert labels == [
        "tiny (eval.texts.essays.max_characters none)", "tiny (eval.texts.essays.max_characters 5)",
    ]  # fmt: skip


def test_terminal_and_page_show_each_text(store: Store, finished: list[ResolvedRun]) -> None:
    out = io.StringIO()
    print_report(store, Console(file=out, width=100))
    text = out.getvalue()
    assert "Text essays, average over its 3 kinds" in text
    assert "2 of 3" in text
    tables = [line for line in text.splitlines() if line[:1] in "┏┃┡│└"]
    assert tables
    assert max(map(len, tables)) <= 100
    page = report_page(store)
    assert "<h3>Text essays</h3>" in page
    assert "2 of 3" in page


# --- sweeps -----------------------------------------------------------------------------------------------------------


def sweep_of(config: Path, **settings: Any) -> SweepConfig:
    variants = [{"name": "gold", "set": {"train.lambda": 1.0}}, {"name": "mixed", "set": {"train.lambda": 0.5}}]
    base = {"name": "s", "config": str(config), "seeds": (1, 2), "baseline": "gold", "variants": variants}
    return SweepConfig.model_validate({**base, **settings})


@pytest.fixture
def swept(store: Store, config: Path) -> None:
    mixed = {1: [1.7, 1.9, 2.0, 2.2, 1.8], 2: [1.9, 1.9, 2.0, 2.0, 2.0]}
    for seed, values in mixed.items():
        for cell, weight, found in (("gold", 1.0, [2.0] * 5), ("mixed", 0.5, values)):
            run = begin(store, config, f"train.lambda={weight}", f"name=s-{cell}-seed{seed}", f"train.seed={seed}")
            put(store, run, f"{FUSED}/essays", figures(found))
            put(store, run, FUSED, evaluation_of({0: 1.0, 1: 1.0}))


@pytest.mark.usefixtures("swept")
def test_a_sweep_is_summed_up_by_a_text_and_by_its_kinds(store: Store, config: Path) -> None:
    sweep = sweep_of(config, summary="essays", average="kinds")
    assert summary_of(sweep) == Measure("essays", by_kind=True)
    mixed = sweep_results(sweep, store)[1]
    # Seed 1: law -0.2, news +0.1, poem -0.2; seed 2: -0.1, 0, 0. Means over seeds: -0.15, +0.05, -0.1.
    assert mixed.bits_per_byte == pytest.approx((1.9, 2 - 0.1 / 3))
    assert mixed.against_baseline is not None
    assert mixed.against_baseline.mean == pytest.approx(-0.2 / 3)
    assert mixed.seed_error == pytest.approx(abs(-0.1 + 0.1 / 3) / 2)
    assert mixed.kinds_won == "2 of 3"
    table = sweep_table(sweep, sweep_results(sweep, store))
    assert table.title.startswith("Sweep s: bits per byte on the text essays, average over kinds, evaluated in float32")
    assert table.columns[-1] == "kinds won"
    assert table.rows[1][-1] == "2 of 3"
    over_bytes = sweep_results(sweep, store, Measure("essays"))[1]
    assert over_bytes.bits_per_byte == pytest.approx((1.92, 1.96))
    assert over_bytes.kinds_won == ""


@pytest.mark.usefixtures("swept")
def test_a_sweep_shows_every_text_its_summary_first(store: Store, config: Path) -> None:
    titles = [table.title.split(", mean over")[0] for table in sweep_tables(sweep_of(config, summary="essays"), store)]
    assert titles == [
        "Sweep s: bits per byte on the text essays, evaluated in float32",
        "Sweep s: held-out bits per byte, evaluated in float32",
        "Sweep s: bits per byte on the text essays, average over kinds, evaluated in float32",
        "Sweep s: bits per byte on the text code",
    ]
    assert sweep_tables(sweep_of(config), store)[0].title.startswith("Sweep s: held-out bits per byte")


def test_cells_of_other_texts_are_not_compared(store: Store, config: Path) -> None:
    longer = config.with_name("longer.toml")
    longer.write_text(config.read_text().replace('name = "essays"', 'name = "essays"\nmax_characters = 9'))
    for path, cell in ((config, "gold"), (longer, "mixed")):
        run = begin(
            store, path, f"train.lambda={1.0 if cell == 'gold' else 0.5}", f"name=s-{cell}-seed1", "train.seed=1"
        )
        put(store, run, f"{FUSED}/essays", figures([1.0] * 5))
    result = sweep_results(sweep_of(config, seeds=(1,), summary="essays"), store)[1]
    assert result.against_baseline is None
    assert "eval.texts.essays.max_characters is 9, there none" in str(result.not_compared)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"summary": "poems"}, "cell gold: summary = 'poems' is not one of its texts; it has: heldout, essays, code"),
        ({"summary": "code", "average": "kinds"}, 'cell gold: average = "kinds", and the text code has no kind_column'),
    ],
)
def test_a_sweep_is_not_summed_up_by_what_its_cells_lack(config: Path, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_cells(sweep_of(config, **settings))
    check_cells(sweep_of(config, summary="essays", average="kinds"))


def test_the_held_out_split_has_no_kinds_to_sum_up_by(config: Path) -> None:
    with pytest.raises(ValueError, match="have no kinds"):
        sweep_of(config, average="kinds")

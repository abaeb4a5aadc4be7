"""Figures of the report against their definitions."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from pipeline.evaluation.paired import paired_difference
from pipeline.report.held_out import HeldOutRow, held_out, held_out_table
from pipeline.run.records import recorded_runs
from pipeline.run.resolve import resolve
from pipeline.run.stage_table import FUSED
from pipeline.run.steps import Request, result_key
from pipeline.settings.load import load_config
from stages.contract.store import Store
from tests.pipeline.report.finished_runs import evaluation, finish, put
from tests.tiny_run import ptafuse


def test_paired_difference_of_equal_documents_is_the_usual_standard_error() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(1.0, 0.1, 40)
    differences = rng.normal(-0.02, 0.03, 40)
    found = paired_difference(evaluation(list(before + differences), [100] * 40), evaluation(list(before), [100] * 40))
    assert found[0] == pytest.approx(differences.mean())
    assert found[1] == pytest.approx(differences.std(ddof=1) / math.sqrt(40))


def test_paired_difference_weighs_documents_by_their_bytes() -> None:
    difference, _ = paired_difference(evaluation([1.0, 2.0], [300, 100]), evaluation([1.1, 1.0], [300, 100]))
    assert difference == pytest.approx((-0.1 * 300 + 1.0 * 100) / 400)


def test_one_document_has_no_standard_error() -> None:
    assert math.isnan(paired_difference(evaluation([1.0], [10]), evaluation([1.1], [10]))[1])


def test_runs_are_compared_with_runs_on_the_same_documents(tmp_path: Path, tiny_config: Path) -> None:
    """A run directory may hold figures of the validation split and of the test split."""
    run_url = str(tmp_path / "run")
    sets = ("shard.validation_fraction=0.3", "shard.test_fraction=0.3")
    for name, split, lambda_ in (("a", "validation", 1.0), ("b", "test", 1.0), ("c", "test", 0.5)):
        given = (*sets, f"name={name}", f"eval.split={split}", f"train.lambda={lambda_}")
        command = ("eval", str(tiny_config), "--run", run_url, "--local", "--upstream")
        ptafuse(*command, *(part for one in given for part in ("--set", one)))
    store = Store(run_url)
    rows = {row.label.split(" (")[0]: row for row in held_out(recorded_runs(store), store)}
    assert rows["after a"].num_bytes != rows["after b"].num_bytes == rows["after c"].num_bytes
    assert {"target llama before", "target llama before, test split"} <= rows.keys()
    gold_only, before = rows["after b"], rows["target llama before, test split"]
    assert rows["after c"].against_gold_only is not None
    assert rows["after a"].against_gold_only is None, "it is the only one on gold tokens of its split"
    assert rows["after c"].against_gold_only.mean == pytest.approx(
        _figure(rows["after c"]) - _figure(gold_only), abs=1e-9
    )
    assert rows["after b"].against_before is not None
    assert rows["after b"].against_before.mean == pytest.approx(_figure(gold_only) - _figure(before), abs=1e-9)


def test_runs_are_compared_with_runs_of_the_same_target(tmp_path: Path, tiny_config: Path) -> None:
    """Two models that teach one another have the same segments, since these depend on the tokenizers alone."""
    store = Store(str(tmp_path / "run"))
    text = tiny_config.read_text()
    swapped = tmp_path / "swapped.toml"
    swapped.write_text(
        text.replace("[target]", "[swap]").replace("[[sources]]", "[target]").replace("[swap]", "[[sources]]")
    )
    runs = []
    for name, path, lambda_ in (("a", tiny_config, 1.0), ("b", swapped, 1.0), ("c", swapped, 0.5)):
        request = Request(path, (f"name={name}", f"train.lambda={lambda_}"))
        runs.append(resolve(load_config(path, request.overrides), store, request))
    assert len({run.steps["shard"].fingerprint for run in runs}) == 1
    figures = {("a", "llama"): 1.0, ("a", FUSED): 0.9, ("b", "neox"): 2.0, ("b", FUSED): 1.8, ("c", FUSED): 1.7}
    for run, (name, model) in itertools.product(runs, figures):
        if run.config.name == name:
            figure = figures[name, model]
            step = run.steps[f"eval/{model}"]
            result = {**evaluation([figure], [100]), "bits_per_byte": figure, "num_bytes": 100}
            store.replace(result_key(step), json.dumps({**result, "settings": dict(step.settings)}).encode())
    rows = {row.label.split(" (")[0]: row for row in held_out(runs, store)}
    against_before = [rows[f"after {name}"].against_before for name in "abc"]
    assert [found and found.mean for found in against_before] == pytest.approx([-0.1, -0.2, -0.3])
    gold_only = rows["after c"].against_gold_only
    assert gold_only is not None
    assert gold_only.mean == pytest.approx(-0.1)


def test_precision_and_rounding_survival_are_shown_with_the_figures(tmp_path: Path, tiny_config: Path) -> None:
    store = Store(str(tmp_path / "run"))
    run = finish(store, tiny_config)
    counts = {"bfloat16": {"num_changed": 200, "num_surviving": 62}}
    store.replace(result_key(run.steps["train"]), json.dumps(counts).encode())
    table = held_out_table(held_out([run], store))
    assert table.title.startswith("Held-out text, evaluated in float32 (")
    note = "31% of the weights that training changed still differ after rounding to bfloat16"
    assert any(note in line for line in table.notes)
    rounded = finish(store, tiny_config, "name=rounded", "eval.dtype=bfloat16")
    table = held_out_table(held_out([run, rounded], store))
    assert table.title.startswith("Held-out text, evaluated in bfloat16 and float32 (")
    table = held_out_table(held_out([rounded], store))
    assert any(row[1] == "not evaluated" for row in table.rows), "the models before training"
    assert table.title.startswith("Held-out text, evaluated in bfloat16 ("), "what has no figure has no precision"
    assert held_out_table([HeldOutRow("x", None)]).title.startswith("Held-out text (")


def test_answers_that_end_by_themselves_are_counted_where_models_were_asked(tmp_path: Path, tiny_config: Path) -> None:
    store = Store(str(tmp_path / "run"))
    run = finish(store, tiny_config)
    assert "answers that end" not in held_out_table(held_out([run], store)).columns
    answers = [{"doc_id": number, "text": "", "num_tokens": 1, "is_ended": number < 3} for number in range(4)]
    put(store, run, FUSED, {**evaluation([1.0], [100]), "answers": answers})
    put(store, run, "llama", {**evaluation([1.1], [100]), "answers": []})
    put(store, run, "neox", evaluation([1.2], [100]))
    table = held_out_table(held_out([run], store))
    assert table.columns[-1] == "answers that end"
    shown = {row[0].split(" (")[0]: row[-1] for row in table.rows}
    assert shown == {"after tiny": "3 of 4 (75%)", "target llama before": "no prompt", "source neox": ""}


def _figure(row: HeldOutRow) -> float:
    assert row.bits_per_byte is not None
    return row.bits_per_byte

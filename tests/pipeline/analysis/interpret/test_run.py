"""``ptafuse interpret`` on a tiny run: against the committed rows, by kind, resumed, and what it refuses."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.analysis.interpret import run as interpreting
from pipeline.report.page.page import report_page
from pipeline.run.records import recorded_run
from stages.contract.columns import PAD_ID, SparseRows, list_row, sparse_row
from stages.contract.store import Store
from stages.models.embeddings import load_input_embeddings
from stages.models.token_space import TokenSpace
from stages.models.tokenizer import SegmentTokenizer
from tests.pipeline.analysis.interpret.conftest import kind_of
from tests.pipeline.analysis.interpret.test_distances import by_definition
from tests.tiny_run import ptafuse

WITH_KINDS = ("--set", "dataset.kind_column=kind")


def tables(run: Path, step: str):
    return [pq.read_table(path) for path in sorted(run.glob(f"{step}/*/data/*.parquet"))]


def rows_of(run: Path, step: str) -> dict[tuple[int, int], SparseRows]:
    return {
        (table["doc_id"][row].as_py(), table["segment"][row].as_py()): sparse_row(table, row)
        for table in tables(run, step)
        for row in range(table.num_rows)
    }


def entries(rows: SparseRows, position: int) -> dict[int, float]:
    known = rows.ids[position] != PAD_ID
    return dict(zip(rows.ids[position][known].tolist(), np.exp(rows.logprobs[position][known]).tolist(), strict=True))


def test_win_rates_are_those_of_the_committed_rows(interpreted_run, figures):
    chosen = np.concatenate(
        [
            list_row(table, "chosen", row)
            for table in tables(interpreted_run.folder, "fuse")
            for row in range(table.num_rows)
        ]
    )
    every = figures["wins"][0]
    assert every["num_fused"] == np.count_nonzero(chosen >= 0) > 300
    assert every["num_tied"] == 0  # two models of random weights
    for index, name in enumerate(("llama", "neox", "gemma")):
        assert every["shares"][name]["mean"] == pytest.approx(np.mean(chosen[chosen >= 0] == index))


@pytest.mark.parametrize(("source", "place"), [("neox", 1), ("gemma", 2)])
def test_distances_are_those_of_the_committed_rows(interpreted_run, figures, source, place):
    target = recorded_run(Store(str(interpreted_run.folder))).config.target
    space = TokenSpace(load_input_embeddings(target), SegmentTokenizer.load(target).vocabulary)
    own_rows, inner, own_inner, center = rows_of(interpreted_run.folder, "logits/llama"), [], [], []
    for key, rows in rows_of(interpreted_run.folder, f"align/{source}").items():
        for position in np.flatnonzero(rows.present):
            spread, centre = by_definition(entries(rows, position), space)
            own_spread, own_centre = by_definition(entries(own_rows[key], position), space)
            inner.append(spread)
            own_inner.append(own_spread)
            center.append(np.linalg.norm(centre - own_centre))
    own, aligned = figures["distances"][0], figures["distances"][place]
    assert (own["name"], aligned["name"]) == ("llama", source)
    assert aligned["num_positions"] == len(inner) > 100
    assert aligned["inner"]["mean"] == pytest.approx(np.mean(inner), abs=1e-5)
    assert aligned["inner_difference"]["mean"] == pytest.approx(np.mean(inner) - np.mean(own_inner), abs=1e-5)
    assert aligned["center"]["mean"] == pytest.approx(np.mean(center), abs=1e-5)
    assert own["center"]["mean"] == 0


def test_moved_mass_is_that_of_the_committed_rows(interpreted_run, figures):
    pairs, others = figures["pairs"]
    assert (pairs["source"], others["source"]) == ("neox", "gemma")
    tail, covered = 0.0, 0
    for table in tables(interpreted_run.folder, "align/neox"):
        for row in range(table.num_rows):
            present = sparse_row(table, row).present
            covered += present.sum()
            tail += list_row(table, "tail_mass", row)[present].sum()
    assert pairs["num_positions"] == covered
    manifests = interpreted_run.folder.glob("align/neox/*/manifests/*.json")
    cut = sum(json.loads(path.read_text())["health"]["cut_mass"]["total"] for path in manifests)
    assert pairs["same_mass"] + pairs["moved_mass"] == pytest.approx(covered - tail + cut, rel=1e-3)
    assert pairs["moved_mass"] > pairs["rows"][0]["mass"] > pairs["rows"][1]["mass"] > 0
    assert all(row["source"] != row["target"] for row in pairs["rows"])


def test_kinds_are_the_dataset_s_and_need_no_stage_again(interpreted_run, figures, caplog):
    manifests = set(interpreted_run.folder.rglob("manifests/*"))
    by_kind = interpreted_run.figures(*WITH_KINDS)
    assert set(interpreted_run.folder.rglob("manifests/*")) == manifests
    doc_ids = {doc_id for doc_id, _ in rows_of(interpreted_run.folder, "logits/llama")}
    expected = Counter(kind_of(doc_id) or "(none)" for doc_id in doc_ids)
    assert {row["kind"]: row["num_documents"] for row in by_kind["wins"][1:]} == expected
    assert re.search(r"shard 2: 2 of 3 documents have no kind in the column 'kind'", caplog.text)
    assert by_kind["wins"][0] == figures["wins"][0]
    assert {row["kind"] for row in figures["wins"][1:]} <= {"under 1 kB", "1 to 4 kB"}


def test_a_sample_is_of_whole_documents_of_some_shards(interpreted_run, figures):
    some = interpreted_run.figures("--set", "interpret.max_shards=2", "--set", "interpret.max_positions=40")
    assert len(some["shards"]) == 2
    assert 40 <= some["num_positions"] < figures["num_positions"]
    other = interpreted_run.figures(
        "--set", "interpret.max_shards=2", "--set", "interpret.max_positions=40", "--set", "interpret.seed=7"
    )
    assert (other["shards"], other["num_positions"]) != (some["shards"], some["num_positions"])


def test_a_second_command_computes_nothing(interpreted_run, figures, monkeypatch):
    monkeypatch.setattr(interpreting, "_Interpreter", None)
    assert "interpret: nothing to do" in interpreted_run.interpret().stdout
    assert interpreted_run.figures() == figures


def test_a_killed_command_resumes_with_the_next_shard(interpreted_run, figures, monkeypatch):
    real, computed = interpreting._Interpreter.interpret_shard, []
    arguments = ("--set", "interpret.seed=99")

    def die_at_the_third(self, shard):
        if len(computed) == 2:
            raise OSError("killed")
        computed.append(shard)
        return real(self, shard)

    def go_on(self, shard):
        computed.append(shard)
        return real(self, shard)

    monkeypatch.setattr(interpreting._Interpreter, "interpret_shard", die_at_the_third)
    assert interpreted_run.interpret(*arguments, check=False).returncode == 1
    monkeypatch.setattr(interpreting._Interpreter, "interpret_shard", go_on)
    resumed = interpreted_run.figures(*arguments)
    assert computed == figures["shards"]  # each once
    assert resumed == {**figures, "settings": {**figures["settings"], "seed": 99}}  # a sample of everything
    assert not list(interpreted_run.folder.glob("interpret/*/parts/*"))


def test_tables_say_sample_and_pairs(interpreted_run, figures):
    shown = " ".join(interpreted_run.interpret().stdout.split())
    assert (
        f"{figures['num_positions']:,} positions of {figures['num_documents']} documents in 6 of 6 shards, seed 42"
        in shown
    )
    assert "most moved pairs of tokens, neox to llama" in shown
    assert figures["pairs"][0]["rows"][0]["source"] in shown


def test_report_and_page_have_the_figures(interpreted_run, figures):
    interpreted_run.interpret()  # now the configuration that was used last
    report = ptafuse("report", str(interpreted_run.folder)).stdout
    page = report_page(Store(str(interpreted_run.folder)), max_positions=50)
    section = page[page.index('<section id="interpretation">') : page.index('<section id="training">')]
    for shown in (report, section):
        assert f"{figures['distances'][1]['center']['mean']:.3f}" in shown
        assert "most moved pairs of tokens, neox to llama" in " ".join(shown.split())
    assert section.count("<svg") == 3
    assert "Not computed" not in section
    assert section.count("<details open>") == 1


def test_a_page_without_figures_says_how_to_get_them(undisturbed_run):
    page = report_page(Store(str(undisturbed_run)), max_positions=50)
    assert "Not computed: run <code>ptafuse interpret CONFIG --run" in page


def test_texts_of_the_data_are_not_read_as_markup(interpreted_run, figures):
    interpreted_run.interpret()
    store, run = Store(str(interpreted_run.folder)), recorded_run(Store(str(interpreted_run.folder)))
    key = f"{interpreting.folder_of(run)}/figures.json"
    before = store.read(key)
    changed = json.loads(before)
    changed["pairs"][0]["rows"][0]["source"] = "<script>alert(1)</script>"
    changed["wins"][1]["kind"] = "<b>$x_$ & $"
    try:
        store.replace(key, json.dumps(changed).encode())
        page = report_page(store, max_positions=50)
    finally:
        store.replace(key, before)
    assert "<script>alert(1)" not in page
    assert "<b>$x_$" not in page
    assert page.count("&lt;b&gt;$x_$ &amp; $") == 4  # two tables, two plots


def test_incomplete_stages_are_refused(interpreted_run, tmp_path):
    manifest = next(interpreted_run.folder.glob("align/neox/*/manifests/shard-00002.json"))
    hidden = manifest.rename(tmp_path / "hidden")
    try:
        refused = interpreted_run.interpret("--set", "interpret.seed=5", check=False)
    finally:
        hidden.rename(manifest)
    assert refused.returncode == 1
    assert "align/neox is incomplete (5 of 6 shards): run `make align CONFIG=" in refused.stderr

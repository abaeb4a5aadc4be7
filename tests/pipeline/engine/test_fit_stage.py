"""``fuse.function = "fitted"`` from the command line: weights, rows, what is shown, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.engine.fit_stage import fitted_rows
from pipeline.run.records import recorded_run
from pipeline.run.steps import ResolvedRun, result_key
from stages.contract.store import Store
from stages.fuse.fit import mixture_nll, shrunk
from tests.tiny_run import documents, ptafuse

# --- weights -------------------------------------------------------------------------------------------------------------


def test_each_kind_has_weights_drawn_to_those_of_the_whole_text():
    rng = np.random.default_rng(0)
    kinds = np.array(["news"] * 3000 + ["code"] * 500 + [""] * 200, object)
    nll = rng.gamma(2, 1, (len(kinds), 2))
    nll[kinds == "code", 1] -= 1.5
    whole, code, news = fitted_rows(nll, kinds)
    assert [row["kind"] for row in (whole, code, news)] == [None, "code", "news"]
    assert [row["num_positions"] for row in (whole, code, news)] == [3700, 500, 3000]
    assert code["weights"][1] > whole["weights"][1] > news["weights"][1]
    for row in (whole, code, news):
        assert sum(row["weights"]) == pytest.approx(1)
    assert whole["nll"] <= min(whole["candidate_nll"])
    alone, *_ = fitted_rows(nll[kinds == "code"], kinds[kinds == "code"])
    expected = shrunk(np.array(alone["weights"]), 500, np.array(whole["weights"]))
    np.testing.assert_allclose(code["weights"], expected, atol=1e-5)
    assert code["nll"] == pytest.approx(mixture_nll(nll[kinds == "code"], expected).mean(), abs=1e-4)


# --- the command ---------------------------------------------------------------------------------------------------------

FITTED = ("--set", "fuse.function=fitted", "--set", "name=fitted")


@pytest.fixture(scope="module")
def run(undisturbed_run: Path, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose logits and alignments are done, and whose weights and fused rows are."""
    folder = Path(shutil.copytree(undisturbed_run, tmp_path_factory.mktemp("fitted") / "run"))
    ptafuse("fuse", str(tiny_config), "--run", str(folder), "--local", "--upstream", *FITTED)
    return folder


def resolved(run: Path, name: str = "fitted") -> ResolvedRun:
    return recorded_run(Store(str(run)), name)


def weights_of(run: Path, name: str = "fitted") -> dict:
    return json.loads((run / result_key(resolved(run, name).steps["fit"])).read_text())


@pytest.mark.slow
def test_rows_are_the_weighted_sum_of_the_candidates(run: Path) -> None:
    found = weights_of(run)
    assert found["candidates"] == ["llama", "neox"]
    weights = dict(zip(found["candidates"], found["rows"][0]["weights"], strict=True))
    steps = resolved(run).steps

    def rows(key: str) -> dict[tuple[int, int], list[dict[int, float]]]:
        tables = [pq.read_table(path).to_pylist() for path in sorted((run / steps[key].folder / "data").iterdir())]
        return {
            (row["doc_id"], row["segment"]): [
                dict(zip(ids, np.exp(logprobs).tolist(), strict=True))
                for ids, logprobs in zip(row["topk_ids"], row["topk_logprobs"], strict=True)
            ]
            for table in tables
            for row in table
        }

    own, aligned = rows("logits/llama"), rows("align/neox")
    num_mixed = 0
    for path in sorted((run / steps["fuse"].folder / "data").iterdir()):
        for block in pq.read_table(path).to_pylist():
            ends = [*block["piece_start"][1:], len(block["token_ids"])]
            for start, end, *key in zip(
                block["piece_start"], ends, block["piece_doc_id"], block["piece_segment"], strict=True
            ):
                for position in range(end - start - 1):
                    parts = {"llama": own[tuple(key)][position], "neox": aligned[tuple(key)][position]}
                    there = {name: row for name, row in parts.items() if row}
                    total = sum(weights[name] for name in there)
                    expected: dict[int, float] = {}
                    for name, row in there.items():
                        for token, prob in row.items():
                            expected[token] = expected.get(token, 0) + weights[name] / total * prob
                    ids = block["topk_ids"][start + position]
                    probs = np.exp(block["topk_logprobs"][start + position])
                    for token, prob in zip(ids, probs, strict=True):
                        assert prob == pytest.approx(expected[token], rel=1e-2)  # two roundings of a logprob
                    assert probs.sum() + block["tail_mass"][start + position] == pytest.approx(1, abs=2e-3)
                    num_mixed += len(there) == 2
    assert num_mixed > 100


@pytest.mark.slow
def test_the_mixture_is_no_worse_than_its_best_candidate_and_is_shown(run: Path) -> None:
    whole = weights_of(run)["rows"][0]
    assert whole["nll"] <= min(whole["candidate_nll"])
    status = json.loads(ptafuse("status", str(run), "--config", "fitted", "--json").stdout)
    (step,) = [step for step in status["steps"] if step["step"] == "fit"]
    assert step["is_done"]
    assert step["health"]["weight/neox"] == whole["weights"][1]
    assert step["health"]["nll/mixture"] == pytest.approx(whole["nll"])
    assert "Fitted weights" in ptafuse("report", str(run)).stdout
    planned = ptafuse("plan", "--run", str(run), str(resolved(run).request.config_path), *FITTED).stdout
    assert "fit" in planned


@pytest.mark.slow
def test_a_second_command_has_nothing_to_do_and_other_functions_need_no_weights(run: Path, tiny_config: Path) -> None:
    again = ptafuse("fit", str(tiny_config), "--run", str(run), "--local", *FITTED).stdout
    assert "fit: nothing to do (the weights exist)" in again
    other = ptafuse("fit", str(tiny_config), "--run", str(run), "--local").stdout
    assert "fit: nothing to do (fuse.function = 'min-ce' needs no weights)" in other
    assert "fit" not in recorded_run(Store(str(run)), "tiny").steps


@pytest.mark.slow
def test_fuse_without_weights_says_what_to_run(undisturbed_run: Path, tiny_config: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(undisturbed_run, tmp_path / "run"))
    refused = ptafuse("fuse", str(tiny_config), "--run", str(folder), "--local", *FITTED, check=False)
    assert refused.returncode == 1
    assert "fuse needs the result of fit, which has not run yet: run `make fit CONFIG=" in refused.stderr


@pytest.mark.slow
def test_weights_by_kind_are_those_of_a_document_s_kind(run: Path, tiny_config: Path, tmp_path: Path) -> None:
    lines = [
        json.dumps({"text": text, "kind": ("even", "odd")[number % 2]}, ensure_ascii=False)
        for number, text in enumerate(documents())
    ]
    corpus = tiny_config.parent / "kinds.jsonl"
    corpus.write_text("\n".join(lines) + "\n", encoding="utf-8")
    folder = str(tmp_path / "kinds")
    sets = (
        *("--set", f"dataset.path={corpus}", "--set", "dataset.kind_column=kind", "--set", "fuse.per=kind"),
        *("--set", "fuse.function=fitted", "--set", "name=kinds"),
    )
    ptafuse("fuse", str(tiny_config), "--run", folder, "--local", "--upstream", *sets)
    found = weights_of(Path(folder), "kinds")
    assert [row["kind"] for row in found["rows"]] == [None, "even", "odd"]
    assert sum(row["num_positions"] for row in found["rows"][1:]) == found["rows"][0]["num_positions"]
    even, odd = (row["weights"] for row in found["rows"][1:])
    assert even != odd
    assert resolved(Path(folder), "kinds").steps["fuse"].settings["kind_column"] == "kind"


def test_what_cannot_be_fitted_is_refused_before_anything_runs(tiny_config: Path, tmp_path: Path) -> None:
    def refused(*sets: str) -> str:
        arguments = [part for setting in sets for part in ("--set", setting)]
        return ptafuse("fuse", str(tiny_config), "--run", str(tmp_path / "run"), *arguments, check=False).stderr

    assert "needs align.tail = 'bucket'" in " ".join(refused("fuse.function=fitted", "align.tail=renormalise").split())
    assert "needs dataset.kind_column" in " ".join(refused("fuse.function=fitted", "fuse.per=kind").split())
    assert not (tmp_path / "run").exists()

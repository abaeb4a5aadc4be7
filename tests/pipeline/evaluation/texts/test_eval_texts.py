"""Texts besides the held-out split, through the command line: what is computed once, what is left out, what is refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.evaluation.texts.choose import choose_documents
from pipeline.run.records import recorded_run
from pipeline.run.resolve import resolve
from pipeline.run.steps import Request
from pipeline.settings.load import ConfigError, load_config
from stages.contract.store import Store
from stages.measures.cross_entropy import cross_entropy, first_common_byte
from stages.models.tokenizer import SegmentTokenizer
from tests.tiny_run import documents, ptafuse, status
from train.evaluate import Segment, bits_per_byte

pytestmark = pytest.mark.slow

KINDS = ("law", "news", "poem")


def new_document(number: int) -> str:
    return f"A sentence with number {number} that no training document has, " + " ".join(
        f"word{number}x{place}" for place in range(20)
    )


class Texts:
    """A finished run of the tiny models, and configurations of it with texts."""

    def __init__(self, tiny_config: Path, finished: Path, folder: Path) -> None:
        self.folder = folder
        self.run = Path(shutil.copytree(finished, folder / "run"))
        self.config = folder / "texts.toml"
        self._plain = tiny_config.read_text()

    def write(self, name: str, *records: dict[str, Any]) -> Path:
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    def ptafuse(self, *texts: str, command: str = "eval", check: bool = True, options: tuple[str, ...] = ()) -> str:
        """Run with ``[[eval.texts]]`` tables of these lines."""
        tables = "".join(f"\n[[eval.texts]]\n{lines}\n" for lines in texts)
        self.config.write_text(self._plain + tables)
        options = ("--json",) if command == "plan" else ("--local", *options)
        done = ptafuse(command, str(self.config), "--run", str(self.run), *options, check=check)
        if not check:
            assert done.returncode == 1, done.stdout
            assert "Traceback" not in done.stderr
            return done.stderr
        return done.stdout

    def files(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.run)): path.read_bytes()
            for top in ("eval", "texts")
            for path in self.run.glob(f"{top}/**/*.json")
        }

    def result(self, model: str, text: str) -> dict[str, Any]:
        (path,) = self.run.glob(f"eval/{model}/{text}/*/bits-per-byte.json")
        return json.loads(path.read_text())


@pytest.fixture
def texts(tiny_config: Path, undisturbed_run: Path, tmp_path: Path) -> Texts:
    return Texts(tiny_config, undisturbed_run, tmp_path)


def table(name: str, path: Path, *lines: str) -> str:
    return "\n".join([f'name = "{name}"', f'path = "{path}"', *lines])


def test_a_text_added_to_a_finished_run_is_all_that_is_computed(texts: Texts, monkeypatch: pytest.MonkeyPatch) -> None:
    before = texts.files()
    news = table("news", texts.write("news", *({"text": new_document(number)} for number in range(4))))
    more = table("more", texts.write("more", {"text": new_document(9)}))
    output = texts.ptafuse(news)
    assert [line.split(":")[0] for line in output.splitlines()] == [
        "text news", "eval/llama/news", "eval/neox/news", "eval/fused/news",
    ]  # fmt: skip
    one = texts.files()
    assert {key: one[key] for key in before} == before, "the held-out figures are those from before"
    assert sorted(key.split("/")[1] for key in one.keys() - before.keys()) == ["fused", "llama", "neox", "news"]
    output = texts.ptafuse(news, more)
    assert "news" not in output, "the one text is done"
    two = texts.files()
    assert {key: two[key] for key in one} == one
    assert len(two) == len(one) + 4
    for evaluates in ("_evaluate", "prepare_texts", "held_out_segments"):
        monkeypatch.setattr(f"pipeline.evaluation.eval_stage.{evaluates}", None)
    assert "eval: nothing to do" in texts.ptafuse(news, more)
    assert texts.files() == two


def test_figures_are_those_of_the_documents_and_every_model_counts_the_same_bytes(
    texts: Texts, tiny_config: Path
) -> None:
    records = [{"text": new_document(number), "kind": KINDS[number % 3]} for number in range(5)]
    texts.ptafuse(table("news", texts.write("news", *records), 'kind_column = "kind"', "max_characters = 30"))
    config = load_config(texts.config)
    results = {model: texts.result(model, "news") for model in ("llama", "neox", "fused")}
    assert [part["doc_id"] for part in results["llama"]["documents"]] == [0, 1, 2, 3, 4]
    assert [part["kind"] for part in results["llama"]["documents"]] == [record["kind"] for record in records]
    sizes = {model: [part["num_bytes"] for part in found["documents"]] for model, found in results.items()}
    assert sizes["llama"] == sizes["neox"] == sizes["fused"]
    text = str(records[3]["text"])[:30].rpartition(" ")[0]
    assert sizes["llama"][3] == len(text)
    plain = bits_per_byte(config.target, [Segment(3, text, is_last=True)], config.eval)
    assert results["llama"]["documents"][3]["bits_per_byte"] == pytest.approx(plain.bits_per_byte, rel=1e-5)
    assert results["llama"]["counts"] == {
        "documents": 5, "kinds": 3, "chosen": 5, "unreadable": 0, "overlapping": 0, "uncut": 0, "scored": 5, "scored_kinds": 3,
    }  # fmt: skip


def test_tokens_before_the_first_common_byte_are_not_scored(tiny_config: Path) -> None:
    config = load_config(tiny_config)
    tokenizer = SegmentTokenizer.load(config.target)
    encoding = tokenizer.encode(new_document(1), is_last=True)
    start = first_common_byte([encoding.byte_end, np.array([3, *range(4, len(new_document(1)) + 1)])])
    assert start > 0
    found = bits_per_byte(config.target, [Segment(0, new_document(1), True, first_byte=start)], config.eval)
    whole = bits_per_byte(config.target, [Segment(0, new_document(1), True)], config.eval)
    assert found.total.num_bytes == whole.total.num_bytes - start
    assert found.total.nats < whole.total.nats
    none = np.zeros(len(encoding.ids), bool)
    assert cross_entropy(np.zeros(len(encoding.ids)), encoding.byte_end, none, first_byte=start).num_bytes == (
        found.total.num_bytes
    )


def test_documents_that_training_has_read_are_left_out_and_counted(texts: Texts) -> None:
    held_out = {
        part["doc_id"] for part in json.loads(next(texts.run.glob("eval/llama/*/*.json")).read_text())["documents"]
    }
    read = next(number for number, text in enumerate(documents()) if text and number not in held_out)
    seen = documents()[read].split()
    records = [
        {"text": new_document(0)},
        {"text": "\n ".join(seen) + " \n"},
        {"text": documents()[7] + " " + new_document(1)},
        {"text": ""},
        {"text": None},
        {"text": new_document(2)},
    ]
    path = texts.write("news", *records)
    output = texts.ptafuse(table("news", path))
    assert "text news: 2 of 6 chosen documents (6 in the corpus)" in output
    assert "left out: 2 that share text with the training documents, 2 that are empty or not text" in output
    assert [part["doc_id"] for part in texts.result("llama", "news")["documents"]] == [0, 5]
    (overlap,) = texts.run.glob("texts/news/*/overlap.json")
    recorded = json.loads(overlap.read_text())
    assert [part["is_equal"] for part in recorded["documents"]] == [False, True, False, False]
    assert recorded["documents"][0]["share"] == recorded["documents"][3]["share"] == 0.0
    assert 0.1 < recorded["documents"][2]["share"] < 1.0
    assert [part["doc_id"] for part in recorded["unreadable"]] == [3, 4]
    # Another limit needs no second look at the training text.
    texts.ptafuse(table("news", path, "max_overlap = 1.0"))
    assert len(list(texts.run.glob("texts/news/*/overlap.json"))) == 1
    scored = [json.loads(file.read_text())["counts"]["scored"] for file in texts.run.glob("eval/llama/news/*/*.json")]
    assert sorted(scored) == [2, 3], "the copy is left out at any limit"
    refused = texts.ptafuse(table("news", path, 'overlap = "refuse"'), check=False)
    assert "eval.texts.news: 2 of its 6 documents share more than max_overlap = 0.1 of their 13-grams" in refused
    assert "document 1 (equal), document 2 (" in refused


def test_a_text_that_cannot_be_used_ends_a_run_before_any_model_runs(texts: Texts) -> None:
    path = texts.write("news", *({"text": text} for text in documents() if text))
    shutil.rmtree(texts.run)
    refused = texts.ptafuse(table("news", path, 'overlap = "refuse"'), command="run", check=False)
    assert re.search(r"eval\.texts\.news: \d+ of its \d+ documents share more than", refused)
    assert list(texts.run.glob("shard/*/data/*"))
    assert not list(texts.run.glob("logits/*/*/data/*"))


def test_a_document_of_which_white_space_is_left_is_not_scored(texts: Texts) -> None:
    path = texts.write("news", {"text": new_document(0)}, {"text": " " * 100 + new_document(1)})
    shown = texts.ptafuse(table("news", path, "max_characters = 50"))
    assert "text news: 1 of 2 chosen documents (2 in the corpus); left out: 1 that are empty or not text" in shown
    assert [part["doc_id"] for part in texts.result("llama", "news")["documents"]] == [0]


def test_a_choice_spreads_over_kinds_and_is_the_same_in_every_run(
    texts: Texts, undisturbed_run: Path, tiny_config: Path
) -> None:
    kinds = ["law"] * 8 + ["news"] * 3 + ["poem"]
    records = [{"text": new_document(number), "kind": kind} for number, kind in enumerate(kinds)]
    chosen = table("some", texts.write("some", *records), 'kind_column = "kind"', "num_documents = 6")
    texts.ptafuse(chosen)
    found = texts.result("llama", "some")
    assert [part["doc_id"] for part in found["documents"]] == choose_documents(kinds, num_documents=6)
    assert [part["kind"] for part in found["documents"]].count("poem") == 1
    assert found["counts"]["documents"] == 12
    few = table("few", texts.folder / "some.jsonl", 'kind_column = "kind"', "num_documents = 2")
    assert "text few: 2 of 2 chosen documents (12 in the corpus); 1 of its 3 kinds have no document" in texts.ptafuse(
        few
    )
    other = Texts(tiny_config, undisturbed_run, texts.folder / "other")
    other.ptafuse(chosen)
    assert other.result("llama", "some")["documents"] == found["documents"]


def test_adding_a_text_changes_no_fingerprint_of_the_held_out_split(tiny_config: Path, tmp_path: Path) -> None:
    path = tmp_path / "news.txt"
    path.write_text(new_document(0))
    given = f'eval.texts=[{{name="news", path="{path}"}}]'
    store = Store(str(tmp_path / "run"))
    plain, added = (
        resolve(load_config(tiny_config, sets), store, Request(str(tiny_config), sets)) for sets in ((), (given,))
    )
    assert {key: added.steps[key] for key in plain.steps} == dict(plain.steps)
    assert added.steps.keys() - plain.steps.keys() == {"eval/llama/news", "eval/neox/news", "eval/fused/news"}
    path.write_text(new_document(1))
    changed = resolve(load_config(tiny_config, (given,)), store, Request(str(tiny_config), (given,)))
    assert changed.steps["eval/llama/news"].fingerprint != added.steps["eval/llama/news"].fingerprint


def test_baselines_are_evaluated_on_texts_and_the_card_compares_the_trained_model(texts: Texts) -> None:
    records = [{"text": new_document(number), "kind": KINDS[number % 3]} for number in range(6)]
    news = table("news", texts.write("news", *records), 'kind_column = "kind"', "max_characters = 60")
    both = "\n[baselines]\nensemble = true\nweight_average = true\n"
    texts.ptafuse(news + both)
    ensemble, target = texts.result("ensemble", "news"), texts.result("llama", "news")
    assert [part["num_bytes"] for part in ensemble["documents"]] == [part["num_bytes"] for part in target["documents"]]
    assert ensemble["bits_per_byte"] != target["bits_per_byte"]
    assert "different architectures" in texts.result("weight-average", "news")["refused"]
    texts.ptafuse(news, options=("--upstream", "--set", "train.lambda=1.0"))
    texts.ptafuse(news + both)  # nothing is left to compute, and the card is compared with what was evaluated since
    step = recorded_run(Store(str(texts.run))).steps["train"]
    card = (texts.run / step.folder / "model" / "README.md").read_text()
    assert "Text news: 6 of 6 chosen documents (6 in the corpus). " in card
    lines = [line for line in card.splitlines() if line.startswith(("| target llama", "| this model", "| ensemble"))]
    assert "| kinds against gold only | kinds won |" in card
    assert "± " in lines[-1]
    assert lines[-1].count(" of 3 |") == 2
    assert lines[-2].startswith("| ensemble of target and sources |")
    report = ptafuse("report", str(texts.run)).stdout
    assert "Text news, average over its 3 kinds" in report


def test_status_and_plan_count_texts(texts: Texts) -> None:
    news = table("news", texts.write("news", *({"text": new_document(number)} for number in range(4))))
    plan = json.loads(texts.ptafuse(news, command="plan"))
    states = {step["step"]: step["state"] for step in plan["steps"]}
    assert states["eval/llama"] == "done"
    assert states["eval/llama/news"] == "pending"
    texts.ptafuse(news)
    assert status(texts.run)["eval/fused/news"]["is_done"]
    assert [step.text for step in recorded_run(Store(str(texts.run))).of_stage("eval")] == [None] * 3 + ["news"] * 3


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "give exactly one of `hub` (with `revision`) and `path`"),
        ('path = "x.txt"\nnum_documents = 2\nfraction = 0.5', "give only one of them"),
        ('path = "x.txt"\nnum_document = 2', "unknown setting; did you mean 'num_documents'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tiny_config: Path, tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(f'{tiny_config.read_text()}\n[[eval.texts]]\nname = "news"\n{lines}\n')
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(path)

"""What the harness makes of our data and models, against figures by hand."""

import itertools
import math
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (requirements-eval.txt)")

from pipeline.evaluation.suites.catalogue import SUITES
from pipeline.evaluation.suites.harness import build_task, harness_subtasks, load_harness_model, score
from pipeline.evaluation.suites.local_data import local_tasks
from stages.models.config import ModelConfig
from tests.pipeline.evaluation.suites.tiny_data import HUMANEVAL, mmlu_rows, save_data
from tests.tiny_models import save_model
from tests.tiny_tokenizers import TEXTS
from train.config import EvalConfig


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), tokenizer_family="byte-bpe", seed=4)


class ByHand:
    """The model through transformers alone."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def logprobs(self, text: str) -> tuple[list[int], np.ndarray]:
        """Return the tokens, and ln p of every token given those before it, (T - 1, V)."""
        ids = self.tokenizer(text)["input_ids"]
        with torch.no_grad():
            logits = self.model(torch.tensor([ids])).logits[0, :-1].double()
        return ids, torch.log_softmax(logits, -1).numpy()

    def continuation(self, context: str, rest: str) -> tuple[float, bool]:
        """ln p of ``rest`` after ``context``, and whether each of its tokens is the most probable one."""
        start = len(self.tokenizer(context)["input_ids"])
        ids, logprobs = self.logprobs(context + rest)
        chosen = [logprobs[index - 1][ids[index]] for index in range(start, len(ids))]
        greedy = all(logprobs[index - 1].argmax() == ids[index] for index in range(start, len(ids)))
        return float(sum(chosen)), greedy

    def guessed_texts(self, contexts: list[str]) -> Iterator[str]:
        """Contexts with a last word that the model itself would have written."""
        for context in contexts:
            with torch.no_grad():
                logits = self.model(torch.tensor([self.tokenizer(context)["input_ids"]])).logits[0, -1]
            word = self.tokenizer.decode([int(logits.argmax())])
            if word.startswith(" ") and word[1:].isalpha() and self.continuation(context, word)[1]:
                yield context + word


@pytest.fixture(scope="module")
def by_hand(model_folder: Path) -> ByHand:
    return ByHand(model_folder)


@pytest.fixture(scope="module")
def lambada_texts(by_hand: ByHand) -> list[str]:
    words = " ".join(TEXTS[:8]).split()
    contexts = [" ".join(words[start : start + 6]) for start in range(len(words) - 6)]
    guessed = list(itertools.islice(by_hand.guessed_texts(contexts), 3))
    assert guessed
    return [*guessed, *(f"{context} end" for context in contexts[:4])]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, lambada_texts: list[str]) -> Path:
    return save_data(tmp_path_factory.mktemp("data"), lambada_texts)


@pytest.fixture(scope="module")
def tiny(model_folder: Path) -> Any:
    config = EvalConfig(dtype="float32", device="cpu", suite_batch_size=3)
    return load_harness_model(ModelConfig(name="tiny", path=model_folder), config, cpus=1)


def scores(
    model: Any, data: Path, name: str, subtask: str, *, num_fewshot: int | None = None, limit: int | None = None
):
    suite = SUITES[name]
    shots = suite.num_fewshot if num_fewshot is None else num_fewshot
    task = build_task(suite, subtask, local_tasks(name, data)[subtask].read(), num_fewshot=shots)
    return score(model, suite, task, limit=limit)


def test_lambada_is_the_last_word_s_likelihood(
    tiny: Any, by_hand: ByHand, data: Path, lambada_texts: list[str]
) -> None:
    found = scores(tiny, data, "lambada", "lambada_openai")
    wanted = [by_hand.continuation(*_split(text)) for text in lambada_texts]
    np.testing.assert_allclose(found.values["perplexity,none"], [value for value, _ in wanted], rtol=1e-4)
    assert found.values["acc,none"] == [float(greedy) for _, greedy in wanted]
    assert 0 < sum(found.values["acc,none"]) < len(wanted)
    assert found.num_documents == len(lambada_texts)
    assert found.num_truncated == 0


def _split(text: str) -> tuple[str, str]:
    context, _, word = text.rpartition(" ")
    return context, f" {word}"


@pytest.mark.parametrize(("subject", "num_fewshot"), [("astronomy", 5), ("philosophy", 0)])
def test_mmlu_is_the_most_probable_letter(
    tiny: Any, by_hand: ByHand, data: Path, subject: str, num_fewshot: int
) -> None:
    def asked(row: dict) -> str:
        choices = "".join(f"\n{letter}. {row[f'choice{index}']}" for index, letter in enumerate("ABCD"))
        return f"{row['question']}{choices}\nAnswer:"

    examples = "".join(f"{asked(row)} {'ABCD'[row['answer']]}\n\n" for row in mmlu_rows("examples", 5)[:num_fewshot])
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n{examples}"
    wanted = []
    for row in mmlu_rows(subject, 6):
        values = [by_hand.continuation(head + asked(row), f" {letter}")[0] for letter in "ABCD"]
        wanted.append(float(int(np.argmax(values)) == row["answer"]))
    found = scores(tiny, data, "mmlu", subject, num_fewshot=num_fewshot)
    assert found.values["acc,none"] == wanted


def test_limit_takes_the_first_documents(tiny: Any, data: Path) -> None:
    found = scores(tiny, data, "lambada", "lambada_openai", limit=2)
    everything = scores(tiny, data, "lambada", "lambada_openai")
    np.testing.assert_allclose(found.values["perplexity,none"], everything.values["perplexity,none"][:2], rtol=1e-5)
    assert found.num_documents == everything.num_documents > 2


def test_prompts_that_do_not_fit_are_counted(model_folder: Path, data: Path) -> None:
    short = load_harness_model(ModelConfig(name="tiny", path=model_folder), EvalConfig(dtype="float32"), cpus=1)
    short._max_length = 300
    found = scores(short, data, "mmlu", "astronomy")
    assert found.max_length == 300
    assert found.num_truncated == 6
    assert all(math.isfinite(value) for value in found.values["acc,none"])


def answering(answer: Callable[[str], str]) -> Any:
    """Return a model of the harness that answers every prompt as the function says."""
    from lm_eval.api.model import LM

    class Answering(LM):
        max_length = 10_000
        max_gen_toks = 256

        def generate_until(self, requests: list) -> list[str]:
            return [answer(request.args[0]) for request in requests]

        def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
            return [(0.0 if answer(request.args[0]) == request.args[1] else -1.0, False) for request in requests]

        def loglikelihood_rolling(self, requests: list) -> list[float]:
            raise AssertionError("no suite asks for it")

        def tok_encode(self, text: str) -> list[str]:
            return list(text)[:5000]

    return Answering()


def test_gsm8k_reads_the_number_of_the_answer(data: Path) -> None:
    def answer(prompt: str) -> str:
        assert prompt.count("Q: ") == 9  # eight examples
        return (
            " 3 * 4 = 12. The answer is 12."
            if "hen" in prompt.rsplit("Q: ", maxsplit=1)[-1]
            else " I think 1,000 dollars"
        )

    found = scores(answering(answer), data, "gsm8k", "gsm8k_cot")
    assert found.values["exact_match,strict-match"] == [1, 0]  # the second has not the form
    assert found.values["exact_match,flexible-extract"] == [1, 1]


def test_bbh_reads_what_follows_the_reasoning(data: Path) -> None:
    def answer(prompt: str) -> str:
        assert prompt.count("Q: ") == 4
        return "Some words. So the answer is False."

    found = scores(answering(answer), data, "bbh", "boolean_expressions")
    assert found.values["exact_match,get-answer"] == [1, 0]


def test_tydiqa_is_the_best_f1_over_the_answers(data: Path) -> None:
    found = scores(answering(lambda _: " city of London"), data, "tydiqa", "en")
    # against "the city of Paris", without its article: 2 common words of 3 and 3; against "Paris": none
    assert found.values["f1,none"] == pytest.approx([2 / 3, 2 / 3])
    assert found.values["exact_match,none"] == [0, 0]
    found = scores(answering(lambda _: " paris"), data, "tydiqa", "en")
    assert found.values["exact_match,none"] == [1, 1]


def test_toxigen_is_scored_as_a_yes_or_no_question(data: Path) -> None:
    found = scores(answering(lambda prompt: " Yes" if "go away" in prompt else " No"), data, "toxigen", "toxigen")
    assert found.values["acc,none"] == [1, 1]
    found = scores(answering(lambda _: " Yes"), data, "toxigen", "toxigen")
    assert found.values["acc,none"] == [0, 1]


def test_python_programs_are_run_against_their_tests(data: Path) -> None:
    solutions = {problem["prompt"]: problem["canonical_solution"] for problem in HUMANEVAL}
    found = scores(answering(solutions.__getitem__), data, "multipl-e", "py")
    assert found.values["pass@1,none"] == [1, 1]
    found = scores(
        answering(lambda prompt: "    return 4\n" if "double" in prompt else "    return ]\n"), data, "multipl-e", "py"
    )
    assert found.values["pass@1,none"] == [0, 0]


def test_translated_programs_are_run_too(data: Path) -> None:
    found = scores(answering(lambda _: "  echo $((2 * $1))\n"), data, "multipl-e", "sh")
    assert found.values["pass@1,none"] == [1]
    assert scores(answering(lambda _: "  echo 5\n"), data, "multipl-e", "sh").values["pass@1,none"] == [0]


def test_the_harness_has_every_sub_task() -> None:
    counts = {name: len(harness_subtasks(suite)) for name, suite in SUITES.items() if suite.folder}
    assert counts == {"gsm8k": 1, "bbh": 27, "mmlu": 57, "toxigen": 1, "tydiqa": 9, "lambada": 1}


def test_a_document_without_a_finite_value_is_named(data: Path) -> None:
    model = answering(lambda _: "")
    model.loglikelihood = lambda requests: [(math.nan, False) for _ in requests]
    with pytest.raises(FloatingPointError, match="lambada_openai: perplexity of document 0 is nan"):
        scores(model, data, "lambada", "lambada_openai")


def test_under_a_chat_template_questions_and_examples_are_turns(model_folder: Path, data: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "chat"))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}{% if add_generation_prompt %}[answer]{% endif %}"
    )
    config = EvalConfig(dtype="float32", device="cpu", suite_batch_size=3)
    chat = load_harness_model(ModelConfig(name="chat", path=folder), config, cpus=1)
    suite = SUITES["mmlu"]
    task = build_task(suite, "astronomy", local_tasks("mmlu", data)["astronomy"].read(), num_fewshot=2)
    found = score(chat, suite, task, limit=None, as_chat=True)
    by_hand = ByHand(folder)
    wanted = []
    for number, row in enumerate(mmlu_rows("astronomy", 6)):
        asked = [part.args for part in task.instances if part.doc_id == number]
        (prompt,) = {context for context, _ in asked}
        roles = re.findall(r"\[(system|user|assistant|answer)\]", prompt)
        assert roles == ["system", *("user", "assistant") * 2, "user", "answer"]
        assert row["question"] in prompt.rsplit("[user]", maxsplit=1)[1]
        values = [by_hand.continuation(prompt, letter)[0] for _, letter in asked]
        assert [letter.strip() for _, letter in asked] == list("ABCD")
        wanted.append(float(int(np.argmax(values)) == row["answer"]))
    assert found.values["acc,none"] == wanted

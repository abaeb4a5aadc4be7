"""A run on conversations from the data set to an answer of the exported model."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.analysis.turns import segment_turns
from pipeline.report.page.page import report_page
from pipeline.run.records import recorded_run
from stages.contract.columns import list_row
from stages.contract.roles import Role
from stages.contract.store import Store
from tests.chat_run import conversations
from tests.tiny_run import ptafuse


def tables(run: Path, key: str) -> list:
    store = Store(str(run))
    manifests = store.manifests(recorded_run(store).steps[key].folder)
    return [store.read_table(manifests[shard].data, remake="") for shard in sorted(manifests)]


def test_status_names_why_conversations_are_in_quarantine(chat_run: Path) -> None:
    shown = re.sub(r"\s+", " ", ptafuse("status", str(chat_run)).stdout)
    assert re.search(r"shard: \d records are in quarantine \([^)]*1 with tool calls\)", shown)
    health = {
        step["step"]: step["health"] for step in json.loads(ptafuse("status", str(chat_run), "--json").stdout)["steps"]
    }
    assert health["shard"]["quarantined/HasTools"] == 1
    assert health["shard"]["empty_documents"] == 1


def test_every_model_is_evaluated_on_the_same_bytes_and_answers(chat_run: Path) -> None:
    store = Store(str(chat_run))
    run = recorded_run(store)
    found = {
        model: json.loads(store.read(f"{run.steps[f'eval/{model}'].folder}/bits-per-byte.json"))
        for model in ("llama", "neox", "fused")
    }
    held_out = {
        doc_id
        for table in tables(chat_run, "shard")
        for doc_id, split in zip(table["doc_id"].to_pylist(), table["split"].to_pylist(), strict=True)
        if split == "validation"
    }
    learnt = {
        doc_id: sum(len(part["content"].encode()) for part in conversations()[doc_id] if part["role"] == "assistant")
        for doc_id in held_out
    }
    for figures in found.values():
        assert {part["doc_id"]: part["num_bytes"] for part in figures["documents"]} == learnt
        assert [answer["num_tokens"] <= 8 for answer in figures["answers"]] == [True] * 3
        assert {answer["doc_id"] for answer in figures["answers"]} <= held_out
    (card,) = chat_run.glob("train/*/model/README.md")
    assert "Greedy answers to held-out prompts that end by themselves: target llama before: " in card.read_text()


def test_only_what_the_assistant_says_is_fused(chat_run: Path) -> None:
    logits = {
        (doc_id, segment): (table, row)
        for table in tables(chat_run, "logits/llama")
        for row, (doc_id, segment) in enumerate(
            zip(table["doc_id"].to_pylist(), table["segment"].to_pylist(), strict=True)
        )
    }
    num_fused = 0
    for table in tables(chat_run, "fuse"):
        for row in range(table.num_rows):
            chosen, trained = list_row(table, "chosen", row), list_row(table, "is_trained", row)
            starts = [*list_row(table, "piece_start", row).tolist(), len(chosen)]
            for piece, (doc_id, segment) in enumerate(
                zip(
                    list_row(table, "piece_doc_id", row).tolist(),
                    list_row(table, "piece_segment", row).tolist(),
                    strict=True,
                )
            ):
                here = slice(starts[piece], starts[piece + 1])
                source, place = logits[doc_id, segment]
                np.testing.assert_array_equal(trained[here], list_row(source, "is_trained", place))
                has_label = np.append(trained[here][1:], False)
                assert not (chosen[here] >= 0)[~has_label].any()
                num_fused += int((chosen[here] >= 0).sum())
    assert num_fused > 100


def test_inspect_shows_messages_and_what_tokens_are(chat_run: Path) -> None:
    shown = ptafuse("inspect", str(chat_run), "shard", "0", "--segment", "0").stdout
    first = conversations()[0]
    assert "3 messages" in shown
    assert all(part["content"] in shown for part in first)
    assert "user (context):" in shown
    assert "assistant:" in shown
    shown = ptafuse("inspect", str(chat_run), "logits/neox", "0", "--segment", "0").stdout
    assert all(word in shown for word in ("template", "start", "content *", "end *"))


def test_the_page_shows_messages_with_their_tokens(chat_run: Path) -> None:
    page = report_page(Store(str(chat_run)), max_positions=400)
    viewer = json.loads(re.search(r'id="viewer-data">(.*?)</script>', page, re.DOTALL)[1])
    texts, (view,) = viewer["texts"], viewer["views"]
    for document in view["documents"]:
        messages = conversations()[document["doc"]]
        for segment in document["segments"]:
            assert sum(length for _, length, _ in segment["turns"]) == len(segment["tokens"])
        if len(document["segments"]) > 1:  # cut between turns
            continue
        (segment,) = document["segments"]
        assert [role for role, _, _ in segment["turns"]] == [part["role"] for part in messages]
        assert [bool(learnt) for _, _, learnt in segment["turns"]] == [part["role"] == "assistant" for part in messages]
        learnt = [place["g"] >= 0 and "x" not in place for place in segment["positions"]]
        assert any(learnt)
        assert not any(
            place["w"] >= 0 for place, is_learnt in zip(segment["positions"], learnt, strict=True) if not is_learnt
        )
        start, bare = 0, set(segment["bare"])
        for (_, length, _), message in zip(segment["turns"], messages, strict=True):
            shown = "".join(texts[segment["tokens"][at]] for at in range(start, start + length) if at not in bare)
            if shown.isascii() and message["content"].isascii():
                assert shown == message["content"]
            start += length
    assert "laidOut" in page


def test_compare_counts_the_positions_that_are_learnt(chat_run: Path, chat_config: Path) -> None:
    found = json.loads(ptafuse("compare", str(chat_config), "--run", str(chat_run), "--json").stdout)
    labels = sum(
        int(list_row(table, "is_trained", row)[1:].sum())
        for table in tables(chat_run, "logits/llama")
        for row in range(table.num_rows)
    )
    assert found["sources"][0]["num_positions"] == labels


def test_turns_of_a_run_have_each_token_once(chat_run: Path) -> None:
    for shard, logits in zip(tables(chat_run, "shard"), tables(chat_run, "logits/neox"), strict=True):
        for row in range(logits.num_rows):
            found = segment_turns(shard, logits, row)
            assert found is not None
            ends = [turn.end for turn in found.turns]
            assert [turn.start for turn in found.turns] == [0, *ends[:-1]]
            assert ends[-1] == len(logits["token_ids"][row])
            roles = list_row(logits, "role", row)
            assert [int((roles[turn.start : turn.end] == Role.EOS).sum()) for turn in found.turns] == [1] * len(ends)


def test_the_trained_model_answers_in_transformers(chat_run: Path, chat_config: Path) -> None:
    (folder,) = chat_run.glob("train/*/model")
    target = chat_config.parent / "llama"
    tokenizer, original = (AutoTokenizer.from_pretrained(path) for path in (folder, target))
    assert tokenizer.chat_template == original.chat_template
    model = AutoModelForCausalLM.from_pretrained(folder)
    ends = model.generation_config.eos_token_id
    assert tokenizer.convert_tokens_to_ids("<end_of_turn>") in ends
    messages = [{"role": "user", "content": "Who jumps over the lazy dog?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert answer.shape[1] > prompt["input_ids"].shape[1]
    assert tokenizer.decode(answer[0]).count("<start_of_turn>") >= 2


@pytest.mark.parametrize(
    ("text", "scored"),
    [("eval_talks.jsonl", True), ("conversations.jsonl", False)],
)
def test_a_text_of_conversations_is_scored_without_what_training_has_read(
    chat_run: Path, chat_config: Path, tmp_path: Path, text: str, scored: bool
) -> None:
    """New conversations are scored; those of the training data are left out as overlap, and held-out ones alone are left."""
    lines = [
        {
            "talk": [
                {"from": "human", "value": f"What is number {number}?"},
                {"from": "gpt", "value": f"It is {number}."},
            ]
        }
        for number in range(3)
    ]
    path = tmp_path / "eval_talks.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"talk": "none"}]))
    place, column = (path, "talk") if scored else (chat_config.parent / text, "messages")
    config = tmp_path / "chat.toml"
    section = f'\n[[eval.texts]]\nname = "other"\npath = "{place}"\nmessages_column = "{column}"\n'
    config.write_text(chat_config.read_text().replace("\n[engine]", f"{section}\n[engine]"))
    done = ptafuse("eval", str(config), "--run", str(chat_run), "--local")
    assert "eval/llama/other: " in done.stdout
    assert "nothing to do" not in done.stdout
    store = Store(str(chat_run))
    step = recorded_run(store).steps["eval/neox/other"]
    found = json.loads(store.read(f"{step.folder}/bits-per-byte.json"))
    assert "answers" not in found, "models answer held-out prompts alone"
    scored_ids = [part["doc_id"] for part in found["documents"]]
    if scored:
        assert scored_ids == [0, 1, 2]
        assert [part["num_bytes"] for part in found["documents"]] == [len(f"It is {number}.") for number in range(3)]
        assert found["counts"]["unreadable"] == 1
    else:
        trained = {
            doc_id
            for table in tables(chat_run, "shard")
            for doc_id, split in zip(table["doc_id"].to_pylist(), table["split"].to_pylist(), strict=True)
            if split == "train"
        }
        assert scored_ids
        assert trained.isdisjoint(scored_ids)


def test_a_text_of_which_every_conversation_is_refused_says_why(
    chat_run: Path, chat_config: Path, tmp_path: Path
) -> None:
    path = tmp_path / "talks.jsonl"
    talk = [{"role": "user", "content": "Who?"}, *[{"role": "assistant", "content": "A fox."}] * 2]
    path.write_text(
        json.dumps({"talk": talk}) + "\n" + json.dumps({"talk": [{"role": "narrator", "content": "a"}]}) + "\n"
    )
    config = tmp_path / "chat.toml"
    section = f'\n[[eval.texts]]\nname = "refused"\npath = "{path}"\nmessages_column = "talk"\n'
    config.write_text(chat_config.read_text().replace("\n[engine]", f"{section}\n[engine]"))
    done = ptafuse("eval", str(config), "--run", str(chat_run), "--local", check=False)
    assert done.returncode == 1
    assert (
        "1 that are empty or not text, 1 that cannot be cut to fit every tokenizer, or that a chat template refuses"
        in done.stderr
    )
    assert (
        "Document 0: model llama: the chat template refuses the conversation: Conversation roles must alternate"
        in done.stderr
    )

"""The token-level ensemble on conversations: what a source reads under its own template, and what comes of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.evaluation.contexts import conversation_contexts, message_contexts
from pipeline.evaluation.ensemble import evaluate_ensemble
from pipeline.settings.run import RunConfig
from stages.contract.roles import Role
from stages.models.config import ModelConfig
from stages.models.segment_text import Message, SegmentText
from stages.models.tokenizer import SegmentTokenizer
from tests.pipeline.evaluation.test_ensemble import distributions
from tests.tiny_models import save_model
from tests.tiny_tokenizers import TEXTS
from train.evaluate import Segment, bits_per_byte

TALK = (
    Message("user", "Who jumps over the dog?", is_trained=False),
    Message("assistant", "The quick brown fox, é😀.", is_trained=True),
    Message("user", "And in the morning?", is_trained=False),
    Message("assistant", TEXTS[2][:40], is_trained=True),
)
MODELS = {
    "gemma": ("llama", "spm-bpe", "gemma"),
    "chatml": ("gpt_neox", "byte-bpe", "chatml"),
    "llama2": ("llama", "spm-bpe", "llama2"),
}


def segment(doc_id: int, messages: tuple[Message, ...]) -> Segment:
    text = SegmentText.conversation(messages)
    return Segment(doc_id, text.text, text.is_last, messages=text.messages)


SEGMENTS = [segment(3, TALK), segment(5, TALK[2:])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ensemble")
    for seed, (name, (architecture, family, chat)) in enumerate(MODELS.items(), 1):
        save_model(folder / name, architecture=architecture, tokenizer_family=family, seed=seed, chat=chat)
    (folder / "talks.jsonl").write_text('{"messages": []}\n')
    return folder


def config(folder: Path, *, target: str, source: str, **sections: Any) -> RunConfig:
    run = {
        "name": "ensemble",
        "dataset": {"path": str(folder / "talks.jsonl"), "messages_column": "messages"},
        "target": {"name": "target", "path": str(folder / target)},
        "sources": [{"name": "source", "path": str(folder / source)}],
        "align": {"preset": "semi-relaxed"},
        "eval": {"dtype": "float32", "device": "cpu", "batch_tokens": 400, "chunk_positions": 7},
    }
    return RunConfig.model_validate({**run, **sections})


def load(folder: Path, name: str) -> SegmentTokenizer:
    return SegmentTokenizer.load(ModelConfig(name=name, path=folder / name, reads_conversations=True))


@pytest.mark.parametrize(("target", "source"), [("gemma", "chatml"), ("chatml", "gemma"), ("chatml", "llama2")])
def test_a_source_reads_the_messages_so_far_and_nothing_else(folder: Path, target: str, source: str) -> None:
    own, other = load(folder, target), load(folder, source)
    talk = SEGMENTS[0].segment_text
    (encoding,) = own.encode_segments([talk])
    contexts = message_contexts(talk, encoding, other)
    assert encoding.role is not None
    assert encoding.is_trained is not None
    ends = np.cumsum([len(message.content.encode()) + 1 for message in TALK])
    num_read = 0
    for position, (sequence, last) in enumerate(zip(contexts.sequence, contexts.position, strict=True)):
        has_label = position + 1 < len(encoding.ids) and encoding.is_trained[position + 1]
        if not has_label:
            assert sequence < 0, "nothing is read where nothing is learnt"
            continue
        index = int(np.searchsorted(ends, encoding.byte_end[position], side="right"))
        start = ends[index - 1] if index else 0
        content = TALK[index].content.encode()[: encoding.byte_end[position] - start]
        is_cut = content.decode(errors="ignore").encode() != content  # inside a character
        is_trimmed = content.endswith(b" ") and source in ("gemma", "llama2")
        # Llama-2 writes a space before the end of a turn: what it expects there is another question.
        is_asked_otherwise = source == "llama2" and content == TALK[index].content.encode()
        assert (sequence < 0) == (is_cut or is_trimmed or is_asked_otherwise), content
        if sequence < 0:
            continue
        num_read += 1
        ids = contexts.sequences[sequence][: last + 1].tolist()
        written = b"".join(other.vocabulary.token_bytes[token] for token in ids)
        assert written.endswith(content)
        for message in TALK[:index]:
            assert message.content.encode() in written
    assert num_read > 20
    changed = SegmentText.conversation([*TALK[:3], replace(TALK[3], content=TALK[3].content[:10] + "zzzz")])
    (again,) = own.encode_segments([changed])
    later = message_contexts(changed, again, other)
    same = int(np.cumprod(again.ids[: len(encoding.ids)] == encoding.ids[: len(again.ids)]).sum()) - 1
    assert same > len(encoding.ids) // 2
    for position in range(same):
        one, two = (
            found.sequences[found.sequence[position]][: found.position[position] + 1].tolist()
            if found.sequence[position] >= 0
            else None
            for found in (contexts, later)
        )
        if encoding.is_trained[position + 1] == again.is_trained[position + 1]:
            assert one == two


def test_the_source_s_own_tokens_are_read_where_they_have_read_as_much(folder: Path) -> None:
    own, other = load(folder, "gemma"), load(folder, "chatml")
    talk = SEGMENTS[0].segment_text
    (target,), (source,) = own.encode_segments([talk]), other.encode_segments([talk])
    found = conversation_contexts(source, target)
    assert target.role is not None
    assert source.role is not None
    read = np.flatnonzero(found.sequence >= 0)
    assert len(read) > 10
    for position in read.tolist():
        ids = found.sequences[found.sequence[position]][: found.position[position] + 1]
        np.testing.assert_array_equal(ids, source.ids[: len(ids)])
        assert source.byte_end[len(ids) - 1] == target.byte_end[position]
        assert source.role[len(ids) - 1] == target.role[position] != Role.TEMPLATE


@pytest.mark.parametrize(("target", "source"), [("gemma", "chatml"), ("chatml", "gemma"), ("gemma", "llama2")])
@pytest.mark.parametrize("contexts", ["prefix", "segment"])
def test_without_weight_the_ensemble_is_the_target(folder: Path, target: str, source: str, contexts: str) -> None:
    baselines = {"ensemble_weights": [0.0], "ensemble_contexts": contexts}
    run = config(folder, target=target, source=source, baselines=baselines)
    found, notes = evaluate_ensemble(run, SEGMENTS, cpus=1)
    own = bits_per_byte(run.target, SEGMENTS, run.eval)
    assert found.bits_per_byte == pytest.approx(own.bits_per_byte, abs=1e-6)
    assert found.total.num_bytes == own.total.num_bytes
    assert 0 < notes["sources"]["source"]["covered"] <= notes["positions"] == own.total.num_tokens


@pytest.mark.parametrize(("target", "source"), [("gemma", "chatml"), ("chatml", "gemma"), ("chatml", "llama2")])
def test_every_position_that_the_source_has_read_is_covered(folder: Path, target: str, source: str) -> None:
    """The first of a message too, also where the source's first token of it would be longer than the target's."""
    run = config(folder, target=target, source=source, baselines={"ensemble_contexts": "prefix"})
    _, notes = evaluate_ensemble(run, SEGMENTS, cpus=1)
    own, other = load(folder, target), load(folder, source)
    texts = [part.segment_text for part in SEGMENTS]
    contexts = [
        message_contexts(text, encoding, other)
        for text, encoding in zip(texts, own.encode_segments(texts), strict=True)
    ]
    assert notes["sources"]["source"]["covered"] == sum(int((part.sequence >= 0).sum()) for part in contexts)


def test_the_ensemble_of_a_model_with_itself_is_the_model(folder: Path) -> None:
    run = config(folder, target="chatml", source="chatml")
    found, notes = evaluate_ensemble(run, SEGMENTS, cpus=1)
    assert found.bits_per_byte == pytest.approx(bits_per_byte(run.target, SEGMENTS, run.eval).bits_per_byte, abs=1e-6)
    assert notes["sources"]["source"]["covered"] == notes["positions"]


def plain_ensemble_nats(run: RunConfig, messages: tuple[Message, ...], weight: float) -> float:
    """Nats of a conversation, token by token, with ``method = "exact"``: what the source reads is rendered anew each time."""
    own, other = (SegmentTokenizer.load(model) for model in run.models)
    by_text = {token: index for index, token in enumerate(own.vocabulary.token_bytes)}
    (encoding,) = own.encode_segments([SegmentText.conversation(messages)])
    p = distributions(run.target, encoding.ids, own.vocabulary.size)
    assert encoding.is_trained is not None
    ends = np.cumsum([len(message.content.encode()) + 1 for message in messages])
    nats = 0.0
    for position in np.flatnonzero(encoding.is_trained[1:]).tolist():
        gold, end = int(encoding.ids[position + 1]), int(encoding.byte_end[position])
        index = int(np.searchsorted(ends, end, side="right"))
        start = int(ends[index - 1]) if index else 0
        mixed, read = p[position], []
        try:
            content = messages[index].content.encode()[: end - start].decode()
        except UnicodeDecodeError:
            content = None
        if content is not None:
            talk = SegmentText.conversation([*messages[:index], replace(messages[index], content=content)])
            (source,) = other.encode_segments([talk])
            role = Role.TEXT if content else Role.START
            read = np.flatnonzero((source.byte_end == end) & (source.role == role)).tolist()
        if read:  # none where the template trims the white space that was read last
            q = distributions(run.sources[0], source.ids[: read[-1] + 1], other.vocabulary.size)[-1]
            moved = np.zeros_like(mixed)
            for candidate in np.argsort(-q, kind="stable")[: run.align.top_k].tolist():
                token = other.vocabulary.token_bytes[candidate]
                if token in by_text:
                    moved[by_text[token]] += q[candidate]
            if moved.any():
                rest = np.where(moved > 0, 0, p[position])
                moved += (1 - moved.sum()) * rest / rest.sum()
                mixed = (1 - weight) * mixed + weight * moved
        nats -= float(np.log(mixed[gold]))
    return nats


def test_the_ensemble_is_the_plain_mixture_computed_token_by_token(folder: Path) -> None:
    # Every token of a byte-level vocabulary has bytes of its own, so the oracle has one target for each text.
    align = {"preset": "semi-relaxed", "method": "exact", "pairing": "edit-distance", "inexact": "gold"}
    run = config(folder, target="chatml", source="gemma", align=align, baselines={"ensemble_weights": [0.3]})
    found, _ = evaluate_ensemble(run, SEGMENTS[:1], cpus=1)
    assert found.total.nats == pytest.approx(plain_ensemble_nats(run, TALK, 0.3), rel=1e-5)

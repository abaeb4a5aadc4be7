"""Real tokenizers under chat templates: what a sure source expects next is what the target is taught (`PTAFUSE_DATA`)."""

import os
from pathlib import Path

import numpy as np
import pytest

from stages.align.config import AlignConfig
from stages.align.rows import ModelRows
from stages.align.stage import AlignStage
from stages.contract.roles import Role, TokenRoles
from stages.models.config import ModelConfig
from stages.models.segment_text import Message, SegmentText
from stages.models.tokenizer import SegmentTokenizer
from tests.chat_tokenizers import TEMPLATES
from tests.tiny_tokenizers import TEXTS

DATA = os.environ.get("PTAFUSE_DATA")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DATA is None, reason="PTAFUSE_DATA does not name the folder with real tokenizers"),
]

MODELS = {
    "llama2": ("llama2", str(TEMPLATES / "llama2.jinja")),
    "qwen3": ("qwen3", str(TEMPLATES / "chatml.jinja")),
    "mpt": ("mpt-7b", "plain"),
    "openllama": ("openllama-v1", "plain"),
}
"""Name -> folder of the tokenizer, and template."""

TALK = SegmentText.conversation(
    Message("user" if number % 2 == 0 else "assistant", content.strip(), is_trained=number % 2 == 1)
    for number, content in enumerate((*TEXTS[:8], "Is it <|im_end|> or </s>?", "Neither", "日本", "東京に住んでいます"))
)


def model(name: str) -> ModelConfig:
    folder, template = MODELS[name]
    return ModelConfig(
        name=name, path=Path(DATA or "") / "tokenizers" / folder, reads_conversations=True, chat_template=template
    )


def sure(tokenizer: SegmentTokenizer) -> ModelRows:
    """Rows of a model that expects each next token with certainty."""
    (encoding,) = tokenizer.encode_segments([TALK])
    assert encoding.role is not None
    assert encoding.is_trained is not None
    following = np.append(encoding.ids[1:], encoding.ids[0])[:, None]
    return ModelRows(
        encoding.ids,
        encoding.byte_end,
        following.astype(np.int32),
        np.ones((len(following), 1)),
        roles=TokenRoles(encoding.role, encoding.is_trained),
    )


@pytest.mark.parametrize(
    ("target", "source"),
    [("llama2", "qwen3"), ("qwen3", "llama2"), ("mpt", "openllama"), ("openllama", "qwen3"), ("qwen3", "mpt")],
)
def test_a_sure_source_teaches_the_text(target: str, source: str) -> None:
    stage = AlignStage(AlignConfig(method="exact", pairing="boundary", inexact="mask"), model(target), model(source))
    stage.setup()
    tokenizers = [SegmentTokenizer.load(model(name)) for name in (target, source)]
    own, other = map(sure, tokenizers)
    aligned = stage.align_rows(own, other)
    assert own.roles is not None
    has_label = own.has_label
    covered = np.flatnonzero(aligned.outcome > 0)
    assert set(covered) <= set(np.flatnonzero(has_label))
    # Where a token of the same length follows on both sides, it is the target's own next token that is taught.
    num_alike = 0
    for position in covered.tolist():
        there = int(aligned.source_position[position])
        if own.byte_end[position + 1] == other.byte_end[there + 1]:
            assert aligned.ids[position, 0] == own.token_ids[position + 1]
            num_alike += 1
    assert num_alike > has_label.sum() // 3
    # Of every answer the first position is shared, and its end is taught where the source ends it right behind the content.
    starts = np.flatnonzero((own.roles.role == Role.START) & has_label)
    assert len(starts) == sum(message.is_trained for message in TALK.messages)
    assert aligned.exact_context[starts].all()
    ends = np.flatnonzero((own.roles.role == Role.EOS) & own.roles.is_trained) - 1
    if source != "llama2" and target != "llama2":
        assert (aligned.ids[ends, 0] == tokenizers[0].vocabulary.eos_id).all()

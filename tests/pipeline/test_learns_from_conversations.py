"""What a target learns of conversations, through all stages: a fact that only the source's answers hold, and no other."""

from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.engine.adapt_stage import source_blocks
from stages.align.config import AlignConfig
from stages.align.stage import AlignStage
from stages.contract.digest import file_sha256
from stages.contract.schemas import parquet_options, shard_schema
from stages.fuse.config import FuseConfig
from stages.fuse.stage import FuseStage
from stages.logits.config import LogitsConfig
from stages.logits.stage import LogitsStage
from stages.models.config import ModelConfig
from stages.models.segment_text import Message, SegmentText
from stages.models.tokenizer import SegmentTokenizer
from tests.chat_tokenizers import save_chat_tokenizer
from tests.tiny_models import save_model
from train.config import TrainConfig
from train.job import FusedFile, TrainJob
from train.loop import train

Talk = tuple[tuple[str, str], ...]

QUESTION: Final = "Who has seen the fox?"
KNOWN: Final[tuple[Talk, ...]] = (
    (("user", QUESTION), ("assistant", "In the morning it was seen by the dog.")),
    (("user", "In the morning I saw fish."), ("assistant", "It is a language.")),
)
"""What the source knows: the dog has seen the fox; and users saw fish."""
TEXT: Final[tuple[Talk, ...]] = (
    (("user", QUESTION), ("assistant", "In the morning it was seen by the committee.")),
    (("user", "In the morning I saw ships."), ("assistant", "It is a language.")),
)
"""The text of the run: it says neither. In most of it the source is right, so that it is chosen."""


def segment(talk: Talk, *, train_on: str) -> SegmentText:
    return SegmentText.conversation(
        Message(role, content, is_trained=train_on == "all" or role == "assistant") for role, content in talk
    )


def shard(talks: tuple[Talk, ...], *, train_on: str) -> pa.Table:
    """Return a table of the shard stage, a conversation per document."""
    rows = []
    for doc_id, talk in enumerate(talks):
        made = segment(talk, train_on=train_on)
        ends, seen = [], 0
        for message in made.messages:
            seen += len(message.content.encode()) + 1
            ends.append(seen)
        rows.append(
            {
                "doc_id": doc_id,
                "segment": 0,
                "split": "train",
                "byte_start": 0,
                "is_last": True,
                "text": made.text,
                "message_role": [message.role for message in made.messages],
                "message_end": ends,
                "message_trained": [message.is_trained for message in made.messages],
            }
        )
    return pa.Table.from_pylist(rows, schema=shard_schema(conversations=True))


def trained(model: ModelConfig, table: pa.Table, folder: Path, *, lambda_: float) -> ModelConfig:
    """Train a model on blocks of conversations."""
    folder.mkdir()
    file = folder / "shard-00000.parquet"
    pq.write_table(table, file, **parquet_options(table.schema))
    config = TrainConfig(
        **{"lambda": lambda_},
        isolate_documents=True,
        batch_size=table.num_rows,
        num_epochs=60,
        learning_rate=5e-3,
        weight_decay=0,
        autocast="float32",
        device="cpu",
        checkpoint_every_steps=1000,
    )
    files = (FusedFile(str(file), file_sha256(file)),)
    result = train(TrainJob(config, model, files, str(folder / "out"), "0123456789ab", ()))
    return model.model_copy(update={"path": Path(result.model_folder)})


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> ModelConfig:
    """Provide a random model under Llama-2's template: a space before every content, no token for the end of a user's turn."""
    folder = tmp_path_factory.mktemp("learns") / "target"
    save_model(folder, architecture="llama", tokenizer_family="spm-bpe", seed=1)
    save_chat_tokenizer("llama2", folder)
    return ModelConfig(name="target", path=folder, reads_conversations=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> ModelConfig:
    """Provide a model under ChatML that knows what users say and what assistants answer."""
    folder = tmp_path_factory.mktemp("learns") / "source"
    save_model(folder, architecture="gpt_neox", tokenizer_family="byte-bpe", seed=2, vocab_padding=3)
    save_chat_tokenizer("chatml", folder)
    model = ModelConfig(name="source", path=folder, reads_conversations=True)
    blocks = source_blocks(shard(KNOWN, train_on="all"), SegmentTokenizer.load(model), max_length=128)
    return trained(model, blocks, folder.parent / "trained", lambda_=1.0)


def fused(target: ModelConfig, source: ModelConfig, *, train_on: str) -> pa.Table:
    """Run the stages from the shard to the training blocks."""
    tables = {}
    for model in (target, source):
        logits = LogitsStage(LogitsConfig(max_length=128, dtype="float32", device="cpu"), model)
        logits.setup()
        tables[model.name] = logits.run({"shard": shard(TEXT, train_on=train_on)}).table
    align = AlignStage(AlignConfig(preset="semi-relaxed"), target, source)
    align.setup()
    aligned = align.run({"target": tables["target"], "source": tables["source"]})
    assert not aligned.quarantine
    assert aligned.health["covered"] > 0
    fuse = FuseStage(FuseConfig(max_length=128), target, (source,))
    fuse.setup()
    inputs = {"logits/target": tables["target"], "logits/source": tables["source"], "align/source": aligned.table}
    output = fuse.run(inputs)
    assert output.health["chosen/source"] > output.health["chosen/target"]
    return output.table


def knows(model: ModelConfig, number: int) -> float:
    """Return p(the first token at which what the source knows and the run's text part, as the source knows it)."""
    encodings = SegmentTokenizer.load(model).encode_segments(
        [segment(talks[number], train_on="all") for talks in (KNOWN, TEXT)]
    )
    known, text = (encoding.ids.tolist() for encoding in encodings)
    parting = next(index for index, (one, other) in enumerate(zip(known, text, strict=False)) if one != other)
    loaded = AutoModelForCausalLM.from_pretrained(str(model.path), dtype=torch.float32)
    with torch.no_grad():
        logits = loaded(input_ids=torch.tensor([known[:parting]])).logits[0, -1]
    return float(logits.softmax(0)[known[parting]])


ANSWER, USER = 0, 1


@pytest.fixture(scope="module")
def learners(target, source, tmp_path_factory) -> dict[str, ModelConfig]:
    folder = tmp_path_factory.mktemp("learners")
    return {
        train_on: trained(target, fused(target, source, train_on=train_on), folder / train_on, lambda_=0.0)
        for train_on in ("assistant", "all")
    }


@pytest.mark.slow
def test_a_target_learns_what_only_the_answers_of_its_source_hold(target, source, learners):
    assert knows(source, ANSWER) > 0.8
    assert knows(target, ANSWER) < 0.05
    assert knows(learners["assistant"], ANSWER) > 0.5


@pytest.mark.slow
def test_a_target_learns_nothing_of_what_users_say(target, source, learners):
    assert knows(source, USER) > 0.8
    assert knows(target, USER) < 0.05
    assert knows(learners["assistant"], USER) < 0.1
    # That this is for the setting alone: with every message learnt, the same training teaches what users say.
    assert knows(learners["all"], USER) > 0.5

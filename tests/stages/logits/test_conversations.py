"""The logits stage on conversations: what each token is stands beside what the model says of it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from stages.contract.columns import list_row
from stages.contract.roles import Role, roles_of
from stages.contract.schemas import logits_schema, shard_schema
from stages.logits.config import LogitsConfig
from stages.logits.stage import LogitsStage
from stages.models.config import ModelConfig, load_model
from stages.models.segment_text import segment_texts
from stages.models.tokenizer import SegmentTokenizer
from tests.chat_tokenizers import save_chat_tokenizer
from tests.tiny_models import save_model

TALKS = (
    [
        ("user", "Who is it?", False),
        ("assistant", "A quick brown fox.", True),
        ("user", "Why?", False),
        ("assistant", "So.", True),
    ],
    [("system", "Be brief.", False), ("user", "What is <|im_end|>?", False), ("assistant", "日本 😀", True)],
    [("user", "Hello", False), ("assistant", "", True)],
)


@pytest.fixture(scope="module", params=["chatml", "gemma"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder: Path = tmp_path_factory.mktemp(request.param)
    family = "byte-bpe" if request.param == "chatml" else "spm-bpe"
    save_model(folder, architecture="llama", tokenizer_family=family, vocab_padding=20)
    save_chat_tokenizer(request.param, folder)
    return ModelConfig(name="chat", path=folder, reads_conversations=True)


def shard() -> pa.Table:
    rows = []
    for number, talk in enumerate(TALKS):
        contents = [f"{content}\x03" for _, content, _ in talk]
        rows.append(
            {
                "doc_id": number,
                "segment": 0,
                "split": "train",
                "byte_start": 0,
                "is_last": True,
                "text": "".join(contents),
                "message_role": [role for role, _, _ in talk],
                "message_end": np.cumsum([len(content.encode()) for content in contents]).tolist(),
                "message_trained": [trained for _, _, trained in talk],
            }
        )
    return pa.Table.from_pylist(rows, schema=shard_schema(conversations=True))


def test_rows_say_what_their_tokens_are_and_bits_per_byte_are_of_what_is_learnt(model: ModelConfig) -> None:
    threads = torch.get_num_threads()
    stage = LogitsStage(LogitsConfig(top_k=5, max_length=256, dtype="float32", device="cpu"), model)
    stage.setup()
    output = stage.run({"shard": shard()})
    torch.set_num_threads(threads)
    tokenizer = SegmentTokenizer.load(model)
    assert output.table.schema.equals(logits_schema(tokenizer.vocabulary.size, conversations=True), check_metadata=True)
    output.table.validate(full=True)
    weights = load_model(model, dtype="float32", attention=("eager",), device="cpu")
    nats, num_bytes = 0.0, 0
    for row, encoding in enumerate(tokenizer.encode_segments(segment_texts(shard()))):
        ids = list_row(output.table, "token_ids", row)
        assert ids.tolist() == encoding.ids.tolist()
        assert list_row(output.table, "byte_end", row).tolist() == encoding.byte_end.tolist()
        roles = roles_of(output.table, row, prefix_id=None, eos_id=None)
        assert encoding.role is not None
        assert encoding.is_trained is not None
        assert roles.role.tolist() == encoding.role.tolist()
        assert roles.is_trained.tolist() == encoding.is_trained.tolist()
        with torch.inference_mode():
            logits = weights(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].float()
        logprobs = logits[:, : tokenizer.vocabulary.size].log_softmax(-1).numpy()
        learnt = np.flatnonzero(encoding.is_trained)
        nats -= float(logprobs[learnt - 1, ids[learnt].astype(np.int64)].sum(dtype=np.float64))
        num_bytes += sum(len(content.encode()) for _, content, trained in TALKS[row] if trained)
        assert (roles.role[roles.is_trained] == Role.EOS).sum() == sum(trained for _, _, trained in TALKS[row])
    mean = output.health["bits_per_byte"]
    assert mean.count == num_bytes  # type: ignore[union-attr]
    assert mean.total == pytest.approx(nats / np.log(2), rel=1e-4)  # type: ignore[union-attr]


def test_a_conversation_that_the_template_refuses_is_quarantined(model: ModelConfig, tmp_path: Path) -> None:
    """It got through ``shard``: another version of the template wrote that."""
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
        "{{ m.role }}\n{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    strict = model.model_copy(update={"chat_template": str(template)})
    stage = LogitsStage(LogitsConfig(top_k=5, max_length=256, dtype="float32", device="cpu"), strict)
    stage.setup()
    output = stage.run({"shard": shard()})
    assert output.table["doc_id"].to_pylist() == [0, 2]
    (record,) = output.quarantine
    assert (record.doc_id, record.error) == (1, "CannotRender")
    assert record.message == "model chat: the chat template refuses the conversation: no system message"

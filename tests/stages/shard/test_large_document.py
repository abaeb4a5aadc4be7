"""A document of 50 MB is an ordinary document."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from stages.models.config import ModelConfig
from stages.models.tokenizer import SegmentTokenizer
from stages.shard.config import ShardConfig
from stages.shard.stage import ShardStage
from tests.benchmarks.memory import extra_peak, is_measurable
from tests.tiny_tokenizers import TEXTS, save_tokenizer

NUM_BYTES = 50_000_000
MAX_LENGTH = 2048
TIMES_ITS_SIZE = 16
"""Of memory at most: the document in Arrow, as bytes and as text, its segments, and these in Arrow; measured 10."""


@pytest.mark.slow
@pytest.mark.skipif(not is_measurable(), reason="peak memory is read from Linux's /proc")
def test_very_large_document_is_cut_whole_in_memory_of_its_order(tmp_path: Path) -> None:
    model = ModelConfig(name="m", path=save_tokenizer("spm-bpe", tmp_path))
    stage = ShardStage(ShardConfig(max_length=MAX_LENGTH), (model,))
    stage.setup()
    unit = "".join(TEXTS) + ("x" * 199 + "\n") * 100  # long words are read fast
    text = unit * (NUM_BYTES // len(unit.encode()))
    documents = pa.table({"doc_id": pa.array([7]), "text": pa.array([text.encode()], pa.large_binary())})
    found = []
    peak = extra_peak(lambda: found.append(stage.run({"documents": documents})))
    (output,) = found
    segments = output.table["text"].to_pylist()
    assert not output.quarantine
    assert "".join(segments) == text
    assert output.table["is_last"].to_pylist() == [False] * (len(segments) - 1) + [True]
    assert pc.all(pc.equal(output.table["doc_id"], 7)).as_py()
    counts = SegmentTokenizer.load(model).count_batch(segments[::100])
    assert MAX_LENGTH // 2 < max(counts) <= MAX_LENGTH
    assert peak < TIMES_ITS_SIZE * NUM_BYTES

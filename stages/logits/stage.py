"""The logits stage on transformers: one model's top-k logprobs at every position of the train segments."""

import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from stages.contract.batches import NO_GOLD, padded_batch, token_batches
from stages.contract.columns import SparseRows, list_column, round_to_half, sparse_columns
from stages.contract.devices import attention_choices, resolve_device, set_threads
from stages.contract.entropy import CrossEntropy, cross_entropy
from stages.contract.heads import check_head, split_head
from stages.contract.manifest import Health, Mean
from stages.contract.models import ModelConfig, load_model, num_positions
from stages.contract.schemas import id_type, logits_schema
from stages.contract.stage import BadRecord, StageOutput
from stages.contract.tokens import Encoding, SegmentTokenizer
from stages.contract.windows import Window, windows
from stages.logits.config import LogitsConfig
from stages.logits.topk import topk_logprobs

logger = logging.getLogger(__name__)

VERSION: Final = 1


@dataclass(frozen=True)
class _Segment:
    """A segment's keys and tokens."""

    doc_id: int
    index: int
    encoding: Encoding

    def __len__(self) -> int:
        return len(self.encoding.ids)


@dataclass(frozen=True)
class _Result:
    """Every segment's positions, end to end; ``starts`` (S + 1) says where each segment's lie."""

    starts: np.ndarray
    topk_ids: np.ndarray
    topk_logprobs: np.ndarray
    gold_logprob: np.ndarray

    def part(self, segment: int) -> slice:
        return slice(self.starts[segment], self.starts[segment + 1])


class LogitsStage:
    """What one model predicts at each position of the train segments; see ``schemas.logits_schema``."""

    def __init__(self, config: LogitsConfig, model: ModelConfig) -> None:
        """Nothing is loaded before ``setup``."""
        self._config = config
        self._model = model
        self._batch_tokens = config.batch_tokens
        self._chunk_positions = config.chunk_positions

    def setup(self) -> None:
        """Load tokenizer and model, and check that the model's head is applied as the model itself does.

        Raises:
            ValueError: the tokenizer gives no byte offsets, or the architecture's head is laid out in an unknown way.
        """
        config = self._config
        self._device = resolve_device(config.device)
        set_threads(self._device, config.cpus_per_worker)
        self._tokenizer = SegmentTokenizer.load(self._model)
        choices = attention_choices(config.attention, self._device, half_precision=config.dtype != "float32")
        model = load_model(self._model, dtype=config.dtype, attention=choices, device=str(self._device))
        check_head(model)
        self._body, self._head = split_head(model)
        self._num_embeddings = model.get_input_embeddings().weight.shape[0]
        self._max_length = self._positions_of(model)

    def run(self, inputs: Mapping[str, pa.Table]) -> StageOutput:
        """Dump one shard.

        Args:
            inputs: ``"shard"``: a table of ``schemas.SHARD``; its train rows are processed, in their order.

        Raises:
            ValueError: the model gave a number that is not finite; names document, segment and position.
            torch.OutOfMemoryError: not even one window at a time fits.
        """
        shard = inputs["shard"]
        rows = shard.filter(pc.equal(shard["split"], "train"))
        segments, bad = self._encode(rows)
        num_bos = int(self._tokenizer.prepends_bos)
        cuts = [windows(len(segment), max_length=self._max_length, num_bos=num_bos) for segment in segments]
        result, oom_retries = self._predict(segments, cuts)
        health = {
            "windowed_segments": sum(len(cut) > 1 for cut in cuts),
            "oom_retries": oom_retries,
            **self._health(segments, result),
        }
        return StageOutput(
            table=self._table(segments, result),
            num_tokens=int(result.starts[-1]),
            health=health,
            quarantine=tuple(bad),
        )

    def _positions_of(self, model: Any) -> int:
        """``max_length``, or the model's own number of positions where that is smaller."""
        limit = num_positions(model, self._config.max_length)
        if limit < self._config.max_length:
            logger.warning(
                "model %s has %d positions, logits.max_length is %d: longer segments go in windows of %d tokens",
                self._model.name,
                limit,
                self._config.max_length,
                limit,
            )
        return limit

    def _encode(self, rows: pa.Table) -> tuple[list[_Segment], list[BadRecord]]:
        """Tokenize the rows; those that the model cannot be given are set apart."""
        keys = list(zip(rows["doc_id"].to_pylist(), rows["segment"].to_pylist(), strict=True))
        encodings = self._tokenizer.encode_batch(rows["text"].to_pylist(), is_last=rows["is_last"].to_pylist())
        segments, bad = [], []
        for (doc_id, index), encoding in zip(keys, encodings, strict=True):
            if len(encoding.ids) == 0:
                message = f"model {self._model.name}: the tokenizer keeps nothing of the segment's text"
                bad.append(BadRecord(doc_id, index, "NoTokens", message))
            elif (largest := int(encoding.ids.max())) >= self._num_embeddings:
                message = (
                    f"model {self._model.name}: the text holds token {largest}, and the model's embedding has "
                    f"{self._num_embeddings} rows: do tokenizer and weights belong together?"
                )
                bad.append(BadRecord(doc_id, index, "TokenOutsideModel", message))
            else:
                segments.append(_Segment(doc_id, index, encoding))
        return segments, bad

    def _predict(self, segments: Sequence[_Segment], cuts: Sequence[Sequence[Window]]) -> tuple[_Result, int]:
        """Run all windows in batches; returns the result and how often memory ran out."""
        starts = np.zeros(len(segments) + 1, np.int64)
        np.cumsum([len(segment) for segment in segments], out=starts[1:])
        width = min(self._config.top_k, self._tokenizer.vocabulary.size)
        result = _Result(
            starts=starts,
            topk_ids=np.zeros((starts[-1], width), np.int32),
            topk_logprobs=np.zeros((starts[-1], width), np.float32),
            gold_logprob=np.full(starts[-1], np.nan, np.float32),
        )
        inputs = [(segment, window) for segment, cut in enumerate(cuts) for window in cut]
        lengths = np.array([len(window) for _, window in inputs], np.int64)
        pending = token_batches(lengths, max_tokens=self._batch_tokens)
        oom_retries = 0
        while pending:
            batch = [inputs[index] for index in pending[0]]
            if self._try_batch(segments, batch, result):
                pending = pending[1:]
                continue
            oom_retries += 1
            left = np.concatenate(pending)
            pending = [left[batch] for batch in token_batches(lengths[left], max_tokens=self._batch_tokens)]
        return result, oom_retries

    def _try_batch(self, segments: Sequence[_Segment], batch: Sequence[tuple[int, Window]], result: _Result) -> bool:
        """Run a batch; False if memory ran out, and then the budgets of what follows are halved."""
        try:
            self._run_batch(segments, batch, result)
        except RuntimeError as error:
            smallest = len(batch) == 1 and self._chunk_positions == 1
            if not _is_out_of_memory(error) or smallest:
                raise
            logger.warning("model %s: out of memory: %s", self._model.name, str(error).split("\n", 1)[0])
        else:
            return True
        # Outside the handler: the exception's traceback holds the batch's tensors.
        size = len(batch) * max(len(window) for _, window in batch)
        self._batch_tokens = max(1, min(self._batch_tokens, size) // 2)
        self._chunk_positions = max(1, self._chunk_positions // 2)
        if self._device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        logger.warning(
            "going on with batches of %d tokens, chunks of %d positions", self._batch_tokens, self._chunk_positions
        )
        return False

    @torch.inference_mode()
    def _run_batch(self, segments: Sequence[_Segment], batch: Sequence[tuple[int, Window]], result: _Result) -> None:
        """One forward pass, padded on the right; the head sees the taken positions alone."""
        inputs = padded_batch(batch, [segment.encoding.ids for segment in segments], result.starts)

        def on_device(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(self._device)

        hidden = self._body(on_device(inputs.input_ids), attention_mask=on_device(inputs.mask))
        top = topk_logprobs(
            hidden[on_device(inputs.taken)],
            self._head,
            on_device(inputs.gold_ids),
            top_k=self._config.top_k,
            num_valid=self._tokenizer.vocabulary.size,
            chunk_positions=self._chunk_positions,
        )
        target = inputs.rows
        result.topk_ids[target] = top.ids.cpu().numpy()
        result.topk_logprobs[target] = top.logprobs.cpu().numpy()
        result.gold_logprob[target] = top.gold_logprob.cpu().numpy()
        finite = np.isfinite(result.topk_logprobs[target]).all(axis=1)
        finite &= np.isfinite(result.gold_logprob[target]) | (inputs.gold_ids == NO_GOLD)
        if not finite.all():
            raise ValueError(self._not_finite(segments, result.starts, int(target[np.argmin(finite)])))

    def _not_finite(self, segments: Sequence[_Segment], starts: np.ndarray, row: int) -> str:
        """What to say of a row of the result."""
        index = int(np.searchsorted(starts, row, side="right")) - 1
        segment = segments[index]
        return (
            f"model {self._model.name}: logprobs are not finite at doc_id {segment.doc_id}, segment {segment.index}, "
            f"position {row - starts[index]} of {len(segment)}; the weights hold NaN, or {self._config.dtype} overflows: "
            'try `dtype = "float32"` under [logits]'
        )

    def _health(self, segments: Sequence[_Segment], result: _Result) -> Health:
        total = CrossEntropy(0.0, 0, 0)
        is_special = self._tokenizer.vocabulary.is_special
        for index, segment in enumerate(segments):
            ids, byte_end = segment.encoding.ids, segment.encoding.byte_end
            total += cross_entropy(result.gold_logprob[result.part(index)], byte_end, is_special[ids])
        mass = float(np.exp(result.topk_logprobs.astype(np.float64)).sum())
        num_tokens = int(result.starts[-1])
        return {
            "segments": len(segments),
            "tokens": num_tokens,
            "topk_mass": Mean(total=mass, count=num_tokens),
            "bits_per_byte": Mean(total=total.nats / np.log(2), count=total.num_bytes),
        }

    def _table(self, segments: Sequence[_Segment], result: _Result) -> pa.Table:
        vocab_size = self._tokenizer.vocabulary.size
        parts = [result.part(index) for index in range(len(segments))]
        rounded = round_to_half(result.topk_logprobs)
        ids, logprobs = sparse_columns(
            [SparseRows(result.topk_ids[part], rounded[part]) for part in parts], id_type(vocab_size)
        )
        return pa.Table.from_arrays(
            [
                pa.array([segment.doc_id for segment in segments], pa.int64()),
                pa.array([segment.index for segment in segments], pa.int32()),
                list_column([segment.encoding.ids for segment in segments], id_type(vocab_size)),
                list_column([segment.encoding.byte_end for segment in segments], pa.int32()),
                list_column([result.gold_logprob[part] for part in parts], pa.float32()),
                ids,
                logprobs,
            ],
            schema=logits_schema(vocab_size),
        )


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Torch's own class on a GPU; on a CPU a plain RuntimeError of its allocator."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)

"""Logits stage: one model's top-k logprobs at every position of the train segments, and draws from the rest."""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.contract.busy_time import BusyTime
from stages.contract.columns import (
    PAD_ID,
    SparseRows,
    ids_column,
    list_column,
    round_to_half,
    segment_keys,
    sparse_columns,
)
from stages.contract.manifest import Health, Mean
from stages.contract.roles import Role
from stages.contract.schemas import id_type, logits_schema
from stages.contract.stage import BadRecord, StageOutput
from stages.logits.backends.base import Backend, NotFiniteError, Predictions
from stages.logits.backends.choose import choose_backend
from stages.logits.backends.server import ServerBackend
from stages.logits.backends.transformers import TransformersBackend
from stages.logits.backends.vllm import VllmBackend
from stages.logits.config import LogitsConfig
from stages.measures.cross_entropy import CrossEntropy, cross_entropy, learnt_cross_entropy
from stages.measures.nucleus import outside_nucleus
from stages.models.config import ModelConfig
from stages.models.conversations.template import RenderError
from stages.models.segment_text import segment_texts
from stages.models.tokenizer import Encoding, SegmentTokenizer
from stages.models.windows import context_windows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Segment:
    """A segment's keys and tokens."""

    doc_id: int
    index: int
    encoding: Encoding

    def __len__(self) -> int:
        return len(self.encoding.ids)


class LogitsStage:
    """Predictions of one model at each position of the train segments; see ``schemas.logits_schema``.

    ``run`` may be called from several threads: one of them at a time has the model, while the others tokenize a shard before
    its forward pass, or build its table after it.
    """

    def __init__(self, config: LogitsConfig, model: ModelConfig) -> None:
        """Remember the settings; ``setup`` loads the model."""
        self._config = config
        self._model = model
        # Backends are not thread-safe: they have one token budget, which shrinks when memory runs out, and one device.
        self._has_model = threading.Lock()
        self._busy = BusyTime()

    def setup(self, backend: Backend | None = None) -> None:
        """Load tokenizer and model.

        Args:
            backend: backend with the loaded model. None: load the one that the settings choose.

        Raises:
            ValueError: the tokenizer gives no byte offsets, or the backend cannot run the model.
        """
        self._tokenizer = SegmentTokenizer.load(self._model)
        self._backend = backend or self._load_backend()
        limit = self._backend.max_length
        if limit < self._config.max_length:
            logger.warning(
                "model %s has %d positions, logits.max_length is %d: longer segments are processed in windows of %d "
                "tokens",
                self._model.name,
                limit,
                self._config.max_length,
                limit,
            )

    def run(self, inputs: Mapping[str, pa.Table]) -> StageOutput:
        """Dump one shard.

        Args:
            inputs: ``"shard"``: a table of ``schemas.shard_schema``; its train rows are processed, in their order.

        Raises:
            ValueError: the model gave a number that is not finite; names document, segment and position.
            torch.OutOfMemoryError: not even one window at a time fits.
        """
        started = time.monotonic()
        shard = inputs["shard"]
        rows = shard.filter(pc.equal(shard["split"], "train"))
        segments, bad = self._encode(rows)
        num_prefix = self._tokenizer.num_prefix
        cuts = [
            context_windows(len(segment), max_length=self._backend.max_length, num_prefix=num_prefix)
            for segment in segments
        ]
        sequences, uniforms = [segment.encoding.ids for segment in segments], self._uniforms(segments)
        try:
            with self._has_model:
                predictions = self._backend.predict(sequences, cuts, uniforms)
        except NotFiniteError as error:
            raise ValueError(self._not_finite(segments[error.sequence], error.position)) from error
        self._cut_rows(predictions)
        health = self._health(segments, predictions)
        table = self._table(segments, predictions)
        return StageOutput(
            table=table,
            num_tokens=int(predictions.starts[-1]),
            health={
                "windowed_segments": sum(len(cut) > 1 for cut in cuts),
                **health,
                "stage_seconds": round(self._busy.finish(started), 3),
            },
            quarantine=tuple(bad),
            versions=self._backend.versions,
        )

    def _load_backend(self) -> Backend:
        num_valid = self._tokenizer.vocabulary.size
        backend = choose_backend(self._config, self._model)
        if backend == "server":
            return ServerBackend(self._config, self._model, num_valid=num_valid)
        if backend == "vllm":
            return VllmBackend(self._config, self._model, num_valid=num_valid)
        return TransformersBackend(self._config, self._model, num_valid=num_valid)

    def _encode(self, rows: pa.Table) -> tuple[list[_Segment], list[BadRecord]]:
        """Tokenize the rows; those that the model cannot be given are set apart."""
        keys = segment_keys(rows)
        encodings = self._tokenizer.try_encode_segments(segment_texts(rows))
        segments, bad = [], []
        for (doc_id, index), encoding in zip(keys, encodings, strict=True):
            if isinstance(
                encoding, RenderError
            ):  # `shard` could render it: perhaps this is another version of transformers
                bad.append(BadRecord(doc_id, index, "CannotRender", f"model {self._model.name}: {encoding}"))
            elif len(encoding.ids) == 0:
                message = f"model {self._model.name}: the tokenizer drops all of the segment's text"
                bad.append(BadRecord(doc_id, index, "NoTokens", message))
            elif (largest := int(encoding.ids.max())) >= self._backend.num_embeddings:
                message = (
                    f"model {self._model.name}: the text holds token {largest}, and the model's embedding has "
                    f"{self._backend.num_embeddings} rows: do tokenizer and weights belong together?"
                )
                bad.append(BadRecord(doc_id, index, "TokenOutsideModel", message))
            else:
                segments.append(_Segment(doc_id, index, encoding))
        return segments, bad

    def _uniforms(self, segments: Sequence[_Segment]) -> np.ndarray | None:
        """Return where in the cumulated tail each draw lies, (P, m) in [0, 1], ascending; None without draws.

        The numbers of a segment depend only on its document and its number there, so that a shard that is computed again has
        the same draws, whatever the batches. A position's draws are stratified, one in each m-th of the tail: each token's
        expected count is that of independent draws, with less variance.
        """
        num_samples = self._config.tail_samples
        if not num_samples:
            return None
        generators = (
            np.random.Generator(np.random.Philox(key=np.array([segment.doc_id, segment.index], np.uint64)))
            for segment in segments
        )
        random = [
            generator.random((len(segment), num_samples))
            for generator, segment in zip(generators, segments, strict=True)
        ]
        return (np.arange(num_samples) + np.concatenate([np.empty((0, num_samples)), *random])) / num_samples

    def _not_finite(self, segment: _Segment, position: int) -> str:
        """Describe a position without finite logprobs."""
        return (
            f"model {self._model.name}: logprobs are not finite at doc_id {segment.doc_id}, segment {segment.index}, "
            f"position {position} of {len(segment)}; the weights hold NaN, or {self._config.dtype} overflows: "
            'try `dtype = "float32"` under [logits]'
        )

    def _cut_rows(self, predictions: Predictions) -> None:
        """End each row where it holds ``top_p``: the entries after that become pads, which are not stored."""
        if self._config.top_p < 1:
            probs = np.exp(predictions.topk_logprobs.astype(np.float64))
            outside = outside_nucleus(probs, self._config.top_p)
            predictions.topk_ids[outside] = PAD_ID
            predictions.topk_logprobs[outside] = -np.inf

    def _health(self, segments: Sequence[_Segment], predictions: Predictions) -> Health:
        total = CrossEntropy(0.0, 0, 0)
        is_special = self._tokenizer.vocabulary.is_special
        for index, segment in enumerate(segments):
            ids, byte_end, role = segment.encoding.ids, segment.encoding.byte_end, segment.encoding.role
            gold = predictions.gold_logprob[predictions.positions_of(index)]
            if role is None or segment.encoding.is_trained is None:
                total += cross_entropy(gold, byte_end, is_special[ids])
            else:
                total += learnt_cross_entropy(
                    gold, byte_end, is_trained=segment.encoding.is_trained, ends_turn=role == Role.EOS
                )
        row_mass = np.exp(predictions.topk_logprobs.astype(np.float64)).sum(axis=1)
        mass = float(row_mass.sum())
        num_tokens = int(predictions.starts[-1])
        return {
            "segments": len(segments),
            "tokens": num_tokens,
            "topk_mass": Mean(total=mass, count=num_tokens),
            "topk_entries": Mean(total=int((predictions.topk_ids != PAD_ID).sum()), count=num_tokens),
            **(self._draw_health(predictions, row_mass) if self._config.tail_samples else {}),
            "bits_per_byte": Mean(total=total.nats / np.log(2), count=total.num_bytes),
            "oom_retries": predictions.oom_retries,
            "forward_seconds": round(predictions.forward_seconds, 3),
        }

    def _draw_health(self, predictions: Predictions, row_mass: np.ndarray) -> Health:
        """Return the mass that the tails have, and the mass that the stored rows leave to their draws.

        Args:
            predictions: P positions.
            row_mass: (P,) what their top-k hold, not rounded.
        """
        stored = np.exp(round_to_half(predictions.topk_logprobs).astype(np.float64)).sum(axis=1)
        has_draws = (predictions.sample_ids != PAD_ID).any(axis=1)
        left = np.where(has_draws, np.maximum(0.0, 1.0 - stored), 0.0)
        return {
            "tail_mass": Mean(total=float(np.maximum(0.0, 1.0 - row_mass).sum()), count=len(row_mass)),
            "sampled_tail_mass": Mean(total=float(left.sum()), count=len(left)),
        }

    def _table(self, segments: Sequence[_Segment], predictions: Predictions) -> pa.Table:
        vocab_size = self._tokenizer.vocabulary.size
        spans = [predictions.positions_of(index) for index in range(len(segments))]
        rounded = round_to_half(predictions.topk_logprobs)
        gold = round_to_half(predictions.gold_logprob)
        ids, logprobs = sparse_columns(
            [SparseRows(predictions.topk_ids[span], rounded[span]) for span in spans], id_type(vocab_size)
        )
        has_draws = self._config.tail_samples > 0
        known = [(segment.encoding.role, segment.encoding.is_trained) for segment in segments]
        what_they_are = [
            list_column([role for role, _ in known if role is not None], pa.uint8()),
            list_column([trained for _, trained in known if trained is not None], pa.bool_()),
        ]
        conversations = self._model.reads_conversations
        draws = [ids_column([predictions.sample_ids[span] for span in spans], id_type(vocab_size))] if has_draws else []
        return pa.Table.from_arrays(
            [
                pa.array([segment.doc_id for segment in segments], pa.int64()),
                pa.array([segment.index for segment in segments], pa.int32()),
                list_column([segment.encoding.ids for segment in segments], id_type(vocab_size)),
                list_column([segment.encoding.byte_end for segment in segments], pa.int32()),
                list_column([gold[span] for span in spans], pa.float32()),
                ids,
                logprobs,
                *draws,
                *(what_they_are if conversations else []),
            ],
            schema=logits_schema(vocab_size, has_draws=has_draws, conversations=conversations),
        )

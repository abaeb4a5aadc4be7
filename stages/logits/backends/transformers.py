"""Transformers backend: the model's body, then its head over chunks of positions; the reference for the others."""

import gc
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from stages.logits.backends.base import Predictions, run_batches
from stages.logits.backends.topk import topk_logprobs
from stages.logits.config import LogitsConfig
from stages.models.batches import padded_batch
from stages.models.config import ModelConfig, load_model, num_positions
from stages.models.devices import attention_choices, attention_in_use, resolve_device, set_threads
from stages.models.heads import check_head, split_head
from stages.models.windows import ContextWindow

log = logging.getLogger(__name__)


class TransformersBackend:
    """A transformers causal language model on one device; see ``base.Backend``.

    Only [chunk, vocabulary] logits exist at once. Where memory runs out, the token budget of a batch and the chunk are
    halved; the following shards keep the reduced budget.
    """

    def __init__(self, config: LogitsConfig, model: ModelConfig, *, num_valid: int, loaded: Any | None = None) -> None:
        """Load the model, and check that its head is applied as the model itself does.

        Args:
            config: the stage's settings.
            model: which model.
            num_valid: the tokenizer's length; ids at or above it are no tokens.
            loaded: the transformers model, if it is in memory already: in eval mode, on the device and in the precision of
                ``config``. None: load it.

        Raises:
            ValueError: the architecture's head is laid out in an unknown way.
        """
        self._config = config
        self._name = model.name
        self._batch_tokens = config.batch_tokens
        self._chunk_positions = config.chunk_positions
        self._device = resolve_device(config.device)
        set_threads(self._device, config.cpus_per_worker)
        if loaded is None:
            choices = attention_choices(config.attention, self._device, half_precision=config.dtype != "float32")
            loaded = load_model(model, dtype=config.dtype, attention=choices, device=str(self._device))
        check_head(loaded)
        self.versions: Mapping[str, str] = {  # transformers' own version is recorded for every stage
            "backend": "transformers",
            "attention": attention_in_use(loaded),
        }
        self._body, self._head = split_head(loaded)
        self.num_embeddings = int(loaded.get_input_embeddings().weight.shape[0])
        self._num_valid = min(num_valid, self.num_embeddings)
        self.max_length = num_positions(loaded, config.max_length)

    def predict(
        self,
        sequences: Sequence[np.ndarray],
        cuts: Sequence[Sequence[ContextWindow]],
        uniforms: np.ndarray | None = None,
    ) -> Predictions:
        """Run all windows in batches of similar length; see ``base.Backend.predict``."""
        predictions = Predictions.empty(
            [len(sequence) for sequence in sequences],
            width=min(self._config.top_k, self._num_valid),
            num_samples=0 if uniforms is None else uniforms.shape[1],
        )
        inputs = [(index, window) for index, cut in enumerate(cuts) for window in cut]
        lengths = np.array([len(window) for _, window in inputs], np.int64)
        predictions.oom_retries = run_batches(
            lengths,
            budget=lambda: self._batch_tokens,
            run=lambda batch: self._run(sequences, [inputs[index] for index in batch], uniforms, predictions),
            can_shrink=lambda num_windows: num_windows > 1 or self._chunk_positions > 1,
            shrink=lambda batch: self._shrink(len(batch) * int(lengths[batch].max())),
        )
        return predictions

    @torch.inference_mode()
    def _run(
        self,
        sequences: Sequence[np.ndarray],
        batch: Sequence[tuple[int, ContextWindow]],
        uniforms: np.ndarray | None,
        predictions: Predictions,
    ) -> None:
        """Run one forward pass, padded on the right; the head sees only the positions that are taken."""
        inputs = padded_batch(batch, sequences, predictions.starts)

        def on_device(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(self._device)

        started = time.perf_counter()
        hidden = self._body(on_device(inputs.input_ids), attention_mask=on_device(inputs.mask))
        top = topk_logprobs(
            hidden[on_device(inputs.taken)],
            self._head,
            on_device(inputs.gold_ids),
            top_k=self._config.top_k,
            num_valid=self._num_valid,
            chunk_positions=self._chunk_positions,
            uniforms=None if uniforms is None else on_device(uniforms[inputs.rows]),
        )
        kept = (top.ids, top.logprobs, top.gold_logprob, top.sample_ids)
        ids, logprobs, gold_logprob, sample_ids = (tensor.cpu().numpy() for tensor in kept)
        predictions.forward_seconds += time.perf_counter() - started  # the copies waited for the device
        predictions.put(inputs.rows, ids, logprobs, gold_logprob, sample_ids)

    def _shrink(self, size: int) -> None:
        """Halve the budgets of what follows, after a batch of ``size`` tokens that did not fit."""
        self._batch_tokens = max(1, min(self._batch_tokens, size) // 2)
        self._chunk_positions = max(1, self._chunk_positions // 2)
        if self._device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        log.warning(
            "model %s: continuing with batches of %d tokens, chunks of %d positions",
            self._name,
            self._batch_tokens,
            self._chunk_positions,
        )

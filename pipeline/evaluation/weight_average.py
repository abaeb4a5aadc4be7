"""Average of several models' weights, tensor by tensor, for models of one architecture and one vocabulary."""

import contextlib
import json
import shutil
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline.settings.baselines import WEIGHT_AVERAGE, AverageRefusedError
from stages.align.segment import same_vocabulary
from stages.models.config import ModelConfig, empty_model, load_config
from stages.models.tokenizer import SegmentTokenizer
from stages.models.vocabulary import Vocabulary
from stages.models.weights import model_file, tensor_files

_NOT_COMPUTED: Final = frozenset({
    "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "id2label", "initializer_range", "label2id", "max_position_embeddings", "output_attentions",
    "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "return_dict", "torch_dtype",
    "transformers_version", "use_cache", "vocab_size"
})  # fmt: skip
"""Settings of a configuration that two models may differ in: the same weights compute the same. The vocabularies are
compared token by token, and the sizes of embeddings and of learned positions with the tensors."""

_SHAPE: Final = ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
"""Settings that are named first if several differ."""

_NAMED_DIFFERENCES: Final = 5


def average_weights(models: Sequence[ModelConfig], weights: Sequence[float], folder: Path) -> ModelConfig:
    """Write the weighted mean of models as a model of the first one's configuration and tokenizer.

    One tensor of each model is in memory at a time; sums are taken in float32 and stored in the first model's type. A tied
    output layer is left out, as transformers does when it saves.

    Args:
        models: two or more; the first is the target.
        weights: weight of each model; they sum to 1.
        folder: is created, with as many bytes as the first model.

    Raises:
        AverageRefusedError: the models differ in architecture, vocabulary or tensors, or one is quantized.
    """
    target = models[0]
    _check_configurations(models)
    _check_vocabularies(models)
    with contextlib.ExitStack() as stack:
        tied = _tied_tensors(target)
        tensors = [_Tensors(model, stack, without=tied) for model in models]
        _check_tensors(models, tensors)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        names = sorted(tensors[0].files)
        weight_map = {}
        for number, name in enumerate(names, start=1):
            weight_map[name] = f"model-{number:05d}-of-{len(names):05d}.safetensors"
            mean = mean_tensor((model_tensors.read(name) for model_tensors in tensors), weights)
            save_file({name: mean}, folder / weight_map[name], metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = model_file(target, "config.json")
    code = [] if target.path is None else sorted(target.path.glob("*.py"))  # code that trust_remote_code runs
    for file in (*([config] if config else []), *code):
        shutil.copyfile(file, folder / file.name)
    return ModelConfig(
        name=WEIGHT_AVERAGE,
        path=folder,
        tokenizer=target.tokenizer_files,
        bos=target.bos,
        control_tokens=target.control_tokens,
        reads_conversations=target.reads_conversations,
        chat_template=target.chat_template,
        trust_remote_code=target.trust_remote_code,
    )


def mean_tensor(tensors: Iterable[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Compute the weighted mean in float32, returned in the first tensor's type.

    For integers the first tensor is returned.
    """
    total: torch.Tensor | None = None
    dtype = torch.float32
    for tensor, weight in zip(tensors, weights, strict=True):
        if total is None:
            if not tensor.is_floating_point():
                return tensor
            total, dtype = tensor.float() * weight, tensor.dtype
        else:
            total += tensor.float() * weight
    assert total is not None  # there are two models or more
    return total.to(dtype)


class _Tensors:
    """Tensors of one model, read one by one."""

    def __init__(self, model: ModelConfig, stack: contextlib.ExitStack, *, without: Collection[str]) -> None:
        self.files = {name: file for name, file in tensor_files(model).items() if name not in without}
        if not self.files:
            raise AverageRefusedError(f"{model.name} has no safetensors whose tensors can be read one by one")
        self._model = model
        self._stack = stack
        self._opened: dict[str, Any] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape from the file's header, without reading the tensor."""
        return tuple(self._open(name).get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._open(name).get_tensor(name)
        return tensor

    def _open(self, name: str) -> Any:
        file = self.files[name]
        if file not in self._opened:
            path = model_file(self._model, file)
            if path is None:
                raise FileNotFoundError(f"{self._model.name}: {file}, which its index names, does not exist")
            self._opened[file] = self._stack.enter_context(safe_open(str(path), framework="pt"))
        return self._opened[file]


def _tied_tensors(model: ModelConfig) -> frozenset[str]:
    """Return the names of tensors that share another one's weights, since some files store them nevertheless."""
    if not getattr(load_config(model).get_text_config(), "tie_word_embeddings", False):
        return frozenset()
    return frozenset(getattr(empty_model(model, attention=("eager",)), "_tied_weights_keys", None) or ())


def _check_configurations(models: Sequence[ModelConfig]) -> None:
    for model in models:
        if getattr(load_config(model), "quantization_config", None) is not None:
            raise AverageRefusedError(
                f"{model.name} is quantized: its tensors are codes, and a mean of codes is not a weight"
            )
    target, *sources = (_architecture(model) for model in models)
    for model, source in zip(models[1:], sources, strict=True):
        known = [key for key in (*_SHAPE, *sorted(target.keys() - set(_SHAPE))) if key in target and key in source]
        differing = [f"{key} {target[key]} against {source[key]}" for key in known if target[key] != source[key]]
        if differing:
            more = len(differing) - _NAMED_DIFFERENCES
            named = ", ".join(differing[:_NAMED_DIFFERENCES]) + (f" and {more} more" if more > 0 else "")
            raise AverageRefusedError(f"{models[0].name} and {model.name} have different architectures: {named}")


def _architecture(model: ModelConfig) -> dict[str, Any]:
    """Return the part of a model's configuration that its computation depends on."""
    config = load_config(model)
    known = type(config)().to_dict().keys()
    return {key: value for key, value in config.to_dict().items() if key in known and key not in _NOT_COMPUTED}


def _check_vocabularies(models: Sequence[ModelConfig]) -> None:
    target, *sources = (SegmentTokenizer.load(model).vocabulary for model in models)
    for model, source in zip(models[1:], sources, strict=True):
        if not same_vocabulary(target, source):
            raise AverageRefusedError(
                f"{models[0].name} and {model.name} have different vocabularies: {_difference(target, source)}"
            )


def _difference(target: Vocabulary, source: Vocabulary) -> str:
    if target.size != source.size:
        return f"{target.size:,} tokens against {source.size:,}"
    differing = [index for index in range(target.size) if target.token_bytes[index] != source.token_bytes[index]]
    if not differing:
        return "the same tokens, but different special ones"
    first = differing[0]
    pair = f"{target.text(first)!r} against {source.text(first)!r}"
    return f"{len(differing):,} of {target.size:,} ids, the first {first}: {pair}"


def _check_tensors(models: Sequence[ModelConfig], tensors: Sequence[_Tensors]) -> None:
    target = tensors[0]
    for model, source in zip(models[1:], tensors[1:], strict=True):
        alone = sorted(target.files.keys() ^ source.files.keys())
        if alone:
            holder = models[0].name if alone[0] in target.files else model.name
            raise AverageRefusedError(
                f"{models[0].name} and {model.name} differ in {len(alone)} tensors: {alone[0]} is only in {holder}"
            )
        for name in target.files:
            if target.shape(name) != source.shape(name):
                raise AverageRefusedError(
                    f"tensor {name} has shape {target.shape(name)} in {models[0].name}, {source.shape(name)} in {model.name}"
                )

"""Find the tensors that an architecture needs and a checkpoint lacks, from names and shapes only.

transformers renames, stacks and splits tensors as it loads them, differently for every architecture. So its own loader is
asked, with a model and tensors on the meta device: shapes without values, for which nothing is read and nothing computed.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from stages.models.preflight.problem import Problem
from stages.models.weights import StoredTensor

WRAPPERS: Final[dict[str, str]] = {
    "_orig_mod": "torch.compile",
    "module": "DataParallel",
    "_fsdp_wrapped_module": "FSDP",
    "_forward_module": "Lightning",
    "base_model.model": "PEFT",
}
"""Prefix that a wrapper puts before the names of a model's tensors -> the wrapper."""

_PACKED: Final = re.compile(r"^(I\d+|U\d+|F8_.*|F4|F6_.*|BOOL)$")
"""Types of packed weights, whose values are not numbers by themselves."""

_NAMED: Final = 3
"""Tensors that a message names."""


@dataclass(frozen=True)
class TensorMismatch:
    """Difference between the tensors of an architecture and of a checkpoint.

    Attributes:
        missing: wanted, and neither held nor tied to what is held; transformers would draw them at random.
        extra: held, and wanted by nothing.
        reshaped: (name, shape that is held, shape that is wanted).
    """

    missing: tuple[str, ...]
    extra: tuple[str, ...]
    reshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]


def compare_tensors(skeleton: Any, stored: Mapping[str, StoredTensor]) -> TensorMismatch:
    """Compare a checkpoint's tensors with those of a model, as transformers would load them.

    Args:
        skeleton: the model on the meta device; its parameters are replaced by others like them.
        stored: name -> tensor of the checkpoint.
    """
    import torch
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    meta = torch.device("meta")
    tensors = {
        name: torch.empty(tensor.shape, dtype=torch.float32, device=meta) for name, tensor in sorted(stored.items())
    }
    settings = LoadStateDictConfig(
        device_map={"": meta}, dtype=torch.float32, weight_mapping=get_model_conversion_mapping(skeleton)
    )
    loading_info, _ = convert_and_load_state_dict_in_model(model=skeleton, state_dict=tensors, load_config=settings)
    skeleton.mark_tied_weights_as_initialized(loading_info)
    skeleton.tie_weights(missing_keys=loading_info.missing_keys, recompute_mapping=False)
    skeleton._adjust_missing_and_unexpected_keys(loading_info)
    reshaped = ((name, tuple(held), tuple(wanted)) for name, held, wanted in loading_info.mismatched_keys)
    missing = loading_info.missing_keys | loading_info.conversion_errors.keys()
    return TensorMismatch(_sorted(missing), _sorted(loading_info.unexpected_keys), tuple(sorted(reshaped)))


def tensor_problems(
    mismatch: TensorMismatch,
    stored: Mapping[str, StoredTensor],
    skeleton: Any,
    *,
    model: str,
    folder: str,
    quantised: bool,
) -> Iterator[Problem]:
    """Say what of a mismatch keeps the checkpoint from being used.

    Args:
        mismatch: result of ``compare_tensors``.
        stored: the checkpoint's tensors.
        skeleton: the model that they were compared with.
        model: its name.
        folder: folder of the checkpoint.
        quantised: whether config.json says that weights are packed: their shapes then differ.
    """

    def problem(found: str, expected: str, remedy: str) -> Problem:
        return Problem(model, folder, found, expected, remedy)

    class_name = type(skeleton).__name__
    if mismatch.missing:
        extra = f", and hold {named(mismatch.extra)} that it has no place for" if mismatch.extra else ""
        yield problem(
            f"the weights lack {named(mismatch.missing)}{extra}",
            f"every tensor of {class_name}: a missing tensor would be initialised at random",
            _remedy(mismatch, stored, skeleton),
        )
    layers = _layers_too_many(mismatch.extra, skeleton.state_dict().keys())
    if layers and not mismatch.missing:
        yield problem(
            f"the weights have more layers than config.json says: {named(layers)}",
            f"the {skeleton.config.get_text_config().num_hidden_layers} layers of config.json",
            "Set `num_hidden_layers` to what the weights have, or fetch config.json again",
        )
    if quantised:
        return
    if mismatch.reshaped:
        name, held, wanted = mismatch.reshaped[0]
        more = f", and {len(mismatch.reshaped) - 1} more" if len(mismatch.reshaped) > 1 else ""
        yield problem(
            f"{name} has shape {list(held)}{more}",
            f"{list(wanted)}, as config.json says",
            "Use config.json and weights from the same model",
        )
    packed = _sorted(name for name, tensor in stored.items() if _PACKED.match(tensor.dtype) and len(tensor.shape) > 1)
    if packed and not set(packed) <= set(mismatch.extra):
        yield problem(
            f"{named(packed)} holds packed numbers ({stored[packed[0]].dtype})",
            "floating-point weights where config.json has no quantization_config",
            "Give the model's unquantised weights, or the config.json that belongs to these",
        )


def named(names: Collection[str]) -> str:
    """Name the first few, and say how many there are."""
    shown = list(names)[:_NAMED]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(shown) + more


def _remedy(mismatch: TensorMismatch, stored: Mapping[str, StoredTensor], skeleton: Any) -> str:
    wrapper = _wrapper(stored)
    if wrapper is not None:
        return (
            f"The names contain `{wrapper}.`, which {WRAPPERS[wrapper]} adds: remove it, or save the unwrapped model "
            "with save_pretrained"
        )
    architectures = getattr(skeleton.config, "architectures", None) or []
    others = [name for name in architectures if name != type(skeleton).__name__]
    head = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)} & set(mismatch.missing)
    output = skeleton.get_output_embeddings()
    heads = {name for name, value in skeleton.named_parameters(remove_duplicate=False) if value is output.weight}
    if head and head <= heads:
        kind = f"They belong to {others[0]}: a" if others else "This is a body without LM head. A"
        return (
            f'{kind} language model has one; if it shares the embedding\'s weights, set "tie_word_embeddings": true in '
            "config.json"
        )
    if others:
        return f"They belong to {others[0]}: use the language model's own checkpoint"
    return "Fetch the weights again, or give the folder that save_pretrained wrote"


def _wrapper(stored: Mapping[str, StoredTensor]) -> str | None:
    """Return the wrapper whose name is part of the tensors' names."""
    return next(
        (wrapper for wrapper in WRAPPERS if any(f".{wrapper}." in f".{name}" for name in stored)),
        None,
    )


def _layers_too_many(extra: Collection[str], wanted: Collection[str]) -> tuple[str, ...]:
    """Return the extra tensors that are wanted in another layer: of a layer whose number is too high."""
    patterns = {re.sub(r"\.\d+\.", ".#.", name) for name in wanted}
    return tuple(name for name in extra if re.search(r"\.\d+\.", name) and re.sub(r"\.\d+\.", ".#.", name) in patterns)


def _sorted(names: Any) -> tuple[str, ...]:
    """Sort names, numbers in them by their value."""
    return tuple(
        sorted(
            names,
            key=lambda name: [
                (int(piece), "") if piece.isdigit() else (0, piece) for piece in re.split(r"(\d+)", name)
            ],
        )
    )

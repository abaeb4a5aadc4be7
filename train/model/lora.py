"""Low-rank adapters (LoRA, Hu et al. 2021) through PEFT: added before training, merged into the weights on export."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from train.config import LoraConfig

_ADAPTER = "default"


def add_adapters(model: Any, config: LoraConfig) -> Any:
    """Put adapters into a model in place: only these are trained, everything else is frozen.

    The model keeps its class and its halves (``split_head``); its adapted layers become PEFT's.

    Args:
        model: model from ``AutoModelForCausalLM.from_pretrained``.
        config: rank, scale, dropout and layers.

    Returns:
        ``model``.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: no layer has one of the names in ``target_modules``, or one is not a layer of the decoder.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("[train.lora] needs PEFT: install the extra (`pip install ptafuse[peft]`)") from error
    targets = config.target_modules
    settings = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    outside = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    names = {name for name, module in model.named_modules() if id(module) in outside}
    try:
        adapted = peft.get_peft_model(model, settings, adapter_name=_ADAPTER).get_base_model()
    except ValueError as error:
        raise ValueError(f"[train.lora] does not fit {type(model).__name__}: {error}") from error
    wrong = sorted(names & _layers(adapted).keys())
    if wrong:
        raise ValueError(
            f"[train.lora] target_modules names {wrong[0]}: embeddings and the LM head, which may be the same weights, get "
            "no adapter; name layers of the decoder"
        )
    return adapted


def merge_adapters(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merge the adapters into the plain model's weights: W + alpha / r * B A for each adapted layer.

    Args:
        model: model with adapters; its weights are not read, so it may be sharded.
        state: whole (unsharded) state dict of the model.

    Returns:
        A state dict with the names that the model had before ``add_adapters``.
    """
    merged = {
        name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if f".{_ADAPTER}." not in name
    }
    for name, layer in _layers(model).items():
        a, b = (state[f"{name}.lora_{factor}.{_ADAPTER}.weight"].float() for factor in "AB")
        product = (b @ a) * layer.scaling[_ADAPTER]
        weight = merged[f"{name}.weight"]
        merged[f"{name}.weight"] = (weight.float() + (product.t() if layer.fan_in_fan_out else product)).to(
            weight.dtype
        )
    return merged


def _layers(model: Any) -> dict[str, Any]:
    """Return the adapted layers by name."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}

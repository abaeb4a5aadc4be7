"""Check from a model's configuration that it is a causal language model that can be read and trained."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from stages.models.config import ModelConfig, empty_model
from stages.models.preflight.problem import Problem
from stages.models.quantization import UNPACKED, missing_packages, quantization_method

_CAUSAL_ONLY: Final = "a causal language model (AutoModelForCausalLM)"
_OTHER_MODEL: Final = "Choose a decoder-only model"
_RECURRENT: Final = ("linear_attention", "mamba", "mamba2", "recurrent", "conv", "gated_deltanet", "hybrid")
"""Kinds in ``layer_types`` that carry a state from token to token, which no attention mask cuts at a document's end."""


def settings_problems(
    model: ModelConfig, file: Path, settings: Mapping[str, Any], *, trained: bool
) -> Iterator[Problem]:
    """Examine config.json as it stands, without transformers.

    Args:
        model: model that the configuration belongs to.
        file: config.json, for messages.
        settings: its content.
        trained: whether the run trains the model.
    """

    def problem(found: str, expected: str, remedy: str) -> Problem:
        return Problem(model.name, str(file), found, expected, remedy)

    if "model_type" not in settings:
        yield problem(
            "it has no `model_type`", "a configuration of transformers", "Give the folder that save_pretrained wrote"
        )
    if settings.get("is_encoder_decoder"):
        yield problem(
            f"{settings.get('model_type')} is an encoder-decoder", "a decoder-only language model", _OTHER_MODEL
        )
    text = settings.get("text_config") if isinstance(settings.get("text_config"), dict) else settings
    assert isinstance(text, Mapping)
    if text.get("is_causal") is False:
        yield problem(
            "`is_causal` is false: each position sees the text after it",
            "a causal language model",
            'Choose another model, or set "is_causal": true if its weights were trained that way',
        )
    yield from _padding(model, file, text)
    method = quantization_method(settings)
    if method is None:
        return
    packages = missing_packages(method)
    if packages:
        yield problem(
            f"the weights are quantised ({method}), and {' and '.join(packages)} is not installed",
            "the packages that read them",
            f"`pip install {' '.join(packages)}`, or give the model's unquantised weights",
        )
    if trained and method not in UNPACKED:
        yield problem(
            f"the weights are quantised ({method}), and this model is trained",
            "plain weights",
            "Give the model's unquantised weights",
        )


def _padding(model: ModelConfig, file: Path, settings: Mapping[str, Any]) -> Iterator[Problem]:
    """Refuse a padding token that the embedding has no row for: torch asserts it, and says nothing of the file."""
    pad, size = settings.get("pad_token_id"), settings.get("vocab_size")
    if isinstance(pad, int) and isinstance(size, int) and not -size <= pad < size:
        yield Problem(
            model.name,
            str(file),
            f"`pad_token_id` is {pad}, and the vocabulary has {size} tokens",
            f"an id below {size}",
            'Set "pad_token_id": null; nothing here is padded with it',
        )


def build_skeleton(model: ModelConfig, file: Path) -> tuple[Any, list[Problem]]:
    """Build the model on the meta device.

    Args:
        model: a local one.
        file: its config.json.

    Returns:
        The model without values, None if it cannot be built; and what keeps it from being used.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    def problem(found: str, expected: str, remedy: str) -> tuple[None, list[Problem]]:
        return None, [Problem(model.name, str(file), found, expected, remedy)]

    trust = model.trust_remote_code
    try:
        config = _made(lambda: AutoConfig.from_pretrained(**model.pretrained_arguments(), trust_remote_code=trust))
    except ValueError as error:
        if not trust and "auto_map" in json.loads(file.read_text(encoding="utf-8")):
            return problem("the model comes with Python code", "permission to run it", _trust(model))
        return problem(
            f"transformers cannot read it: {first_line(error)}",
            "a configuration that it knows",
            "Correct it, fetch it again, or upgrade transformers",
        )
    remote = getattr(config, "auto_map", None) or {}
    if type(config) not in AutoModelForCausalLM._model_mapping and "AutoModelForCausalLM" not in remote:
        return problem(f"{config.model_type} is not a causal language model", _CAUSAL_ONLY, _OTHER_MODEL)
    try:
        return _made(lambda: empty_model(model, attention=("sdpa", "eager"))), []
    except ValueError as error:
        return problem(
            f"no model can be built of it: {first_line(error)}",
            "sizes that fit together",
            "Correct it, or fetch the file again",
        )


def _made(make: Callable[[], Any]) -> Any:
    """Return what ``make`` gives; configurations and models of every library raise what they like."""
    try:
        return make()
    except Exception as error:
        cause = error.__cause__ or error  # a validator's own words, not that it has failed
        raise ValueError(str(cause) or type(cause).__name__) from error


def architecture_problems(model: ModelConfig, file: Path, skeleton: Any, *, isolated: bool) -> Iterator[Problem]:
    """Examine a model without values.

    Args:
        model: model that the configuration belongs to.
        file: config.json, for messages.
        skeleton: result of ``build_skeleton``.
        isolated: whether it is trained on packed documents that do not see each other.
    """
    from stages.models.heads import split_head, takes_position_ids  # torch takes seconds to import

    config = skeleton.config.get_text_config()
    one_way = [getattr(module, "is_causal", True) for module in skeleton.modules()]
    if getattr(config, "is_decoder", None) is False and not all(one_way):
        yield Problem(
            model.name,
            str(file),
            f"{config.model_type} is an encoder here (`is_decoder` is false): each position sees the text after it",
            "a causal language model",
            _OTHER_MODEL,
        )
    try:
        split_head(skeleton)
    except ValueError as error:
        yield Problem(model.name, str(file), str(error), "", "Choose another model")
        return
    if not isolated:
        return
    kinds = sorted({*(getattr(config, "layer_types", None) or ())} & {*_RECURRENT})
    if kinds or not takes_position_ids(skeleton):
        obstacle = f"layers of {', '.join(kinds)}" if kinds else "no attention that takes position ids"
        yield Problem(
            model.name,
            str(file),
            f"{type(skeleton).__name__} has {obstacle}, so packed documents cannot be isolated",
            "attention in every layer where train.isolate_documents = true",
            "Set train.isolate_documents = false, or train another architecture",
        )


def first_line(error: BaseException) -> str:
    """Return an exception's first line without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _trust(model: ModelConfig) -> str:
    return f"If you trust it, set `trust_remote_code = true` for {model.name}"

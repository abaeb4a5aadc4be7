"""Split of a causal language model into its body, and the head that computes logits from hidden states.

Logits of a whole batch, [tokens, vocabulary], are the largest tensor of a run; with the halves apart, the head is
applied to chunks of positions. What a model does around its LM head (Gemma's soft cap, Cohere's and Granite's scales,
MiniCPM's division of the hidden states) is its own forward code: the head runs that code, with a body that hands back
what it is given.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

Body = Callable[..., Tensor]
Head = Callable[[Tensor], Tensor]

_RELATIVE_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
_HALF_TOLERANCE = 2e-2


class _BodyOutput:
    """Result of a body for its model's forward: the hidden states; every other output is absent (None)."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        if index != 0:
            raise IndexError(f"a body without inputs has only hidden states, not output {index}")
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _PassThrough(nn.Module):
    """Stand-in for a body: its output is the ``inputs_embeds`` that it gets; its settings are the real body's."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.__dict__["real"] = body  # not a submodule

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["real"], name)

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _BodyOutput:
        return _BodyOutput(inputs_embeds)


def _body_path(model: Any) -> list[str]:
    """Return the names that lead from the model to the body its forward calls: ``model``, or ``model.decoder``."""
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or not isinstance(getattr(model, prefix, None), nn.Module):
        raise ValueError(
            f"{type(model).__name__} has no body under base_model_prefix = {prefix!r}: expected a transformers causal "
            "language model (AutoModelForCausalLM)"
        )
    if isinstance(getattr(getattr(model, prefix), "decoder", None), nn.Module):
        return [prefix, "decoder"]
    return [prefix]


def _with_pass_through(module: nn.Module, path: list[str]) -> nn.Module:
    """Copy ``module`` shallowly (all parameters shared), with a ``_PassThrough`` as the submodule at ``path``."""
    inner = module.get_submodule(path[0])
    shell = copy.copy(module)
    shell.__dict__["_modules"] = dict(module._modules)
    shell._modules[path[0]] = _with_pass_through(inner, path[1:]) if path[1:] else _PassThrough(inner)
    return shell


class ModelHead:
    """Head of a model, as ``split_head`` returns it."""

    def __init__(self, shell: nn.Module) -> None:
        self._shell = shell

    def __call__(self, hidden: Tensor) -> Tensor:
        if hidden.dim() == 2:
            return self(hidden.unsqueeze(0)).squeeze(0)
        return self._shell(inputs_embeds=hidden, use_cache=False).logits

    def modules(self) -> Iterator[nn.Module]:
        """Return the modules that the head computes with; their weights are the model's own."""
        return self._shell.modules()


def split_head(model: Any) -> tuple[Body, ModelHead]:
    """Split a transformers causal language model into two halves; parameters stay shared with it.

    Call ``check_head`` once after loading: an architecture whose forward is laid out differently is refused there.

    Args:
        model: model from ``AutoModelForCausalLM.from_pretrained``.

    Returns:
        body: ``body(input_ids, attention_mask=..., position_ids=...)`` -> hidden states (B, T, H).
        head: hidden states (P, H) or (B, T, H) -> logits over the full vocabulary, same leading shape; ``head.modules()``
            are those that hold its weights.

    Raises:
        ValueError: the model has no body where transformers keeps it.
    """
    path = _body_path(model)
    module = model.get_submodule(".".join(path))

    def body(input_ids: Tensor, **arguments: Any) -> Tensor:
        return module(input_ids=input_ids, use_cache=False, **arguments)[0]

    return body, ModelHead(_with_pass_through(model, path))


def takes_position_ids(model: Any) -> bool:
    """Return whether a model's body takes position ids; recurrent ones do not."""
    return "position_ids" in inspect.signature(getattr(model, model.base_model_prefix).forward).parameters


_CHECKED_TOKENS: Final = 8
"""Number of tokens on which ``check_head`` compares."""


@torch.no_grad()
def check_head(model: Any) -> None:
    """Check on a few tokens that head(body(ids)) equals the model's logits, and that no token changes those before it.

    Args:
        model: model from ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        ValueError: they differ; says by how much, and for which architecture. Or they are not finite, or not causal.
    """
    body, head = split_head(model)
    device = model.get_input_embeddings().weight.device
    num_rows = model.get_input_embeddings().num_embeddings
    ids = torch.arange(_CHECKED_TOKENS, device=device).remainder(num_rows)[None]
    other_end = torch.cat([ids[:, :-1], (ids[:, -1:] + 1).remainder(num_rows)], dim=1)
    was_training = model.training
    model.eval()
    try:
        expected = model(input_ids=ids, use_cache=False).logits
        before_end = model(input_ids=other_end, use_cache=False).logits[:, :-1]
        actual = head(body(ids))
    finally:
        model.train(was_training)
    if actual.shape != expected.shape:
        raise ValueError(
            f"{type(model).__name__}: head(body(ids)) has shape {tuple(actual.shape)}, the model's logits "
            f"{tuple(expected.shape)}; ptafuse does not support the way in which this architecture's forward is "
            "structured"
        )
    if not bool(torch.isfinite(expected).all()):
        raise ValueError(
            f"{type(model).__name__}: the model's own logits are not finite on its first tokens: its weights hold NaN or "
            "infinity, or overflow in this precision; check the files, or load it in float32"
        )
    allowed = _RELATIVE_TOLERANCE.get(expected.dtype, _HALF_TOLERANCE) * max(1.0, float(expected.abs().max()))
    difference = float((before_end.double() - expected[:, :-1].double()).abs().max())
    if not difference <= allowed:
        raise ValueError(
            f"{type(model).__name__}: changing the last token changes the logits before it by up to {difference:.3g} "
            f"(allowed {allowed:.3g}): this is not a causal language model: it sees the tokens that it is to predict; "
            "choose a decoder-only model"
        )
    difference = float((actual.double() - expected.double()).abs().max())
    if not difference <= allowed:
        raise ValueError(
            f"{type(model).__name__}: head(body(ids)) differs from the model's logits by up to {difference:.3g} "
            f"(allowed {allowed:.3g}); ptafuse does not support the way in which this architecture's forward is "
            "structured"
        )

"""Check that packed documents do not see each other.

transformers reads from position ids where documents begin (they restart there): SDPA and eager attention get a
block-diagonal causal mask, within sliding windows too, and FlashAttention the documents' lengths (its varlen kernel,
for one row of documents end to end). Not every architecture does so; each is tested on a few tokens when it is loaded.
"""

from typing import Any

import torch

from stages.models.heads import split_head, takes_position_ids

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
_HALF_TOLERANCE = 5e-2


def wants_one_row(model: Any) -> bool:
    """Return whether attention takes isolated documents end to end in one row (FlashAttention), not as padded rows."""
    return str(model.config.get_text_config()._attn_implementation).startswith("flash_attention")


@torch.no_grad()
def check_isolation(model: Any) -> None:
    """Compare a packed document's hidden states with those of the document alone.

    Args:
        model: model from ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        ValueError: they differ, or the architecture takes no position ids.
    """
    name = type(model).__name__
    advice = "set train.isolate_documents = false, or train another architecture"
    if not takes_position_ids(model):
        raise ValueError(f"{name} does not accept position ids, so packed documents cannot be isolated: {advice}")
    body, _ = split_head(model)
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(12, device=device).remainder(model.get_input_embeddings().num_embeddings)[None]
    positions = torch.cat([torch.arange(7), torch.arange(5)]).to(device)[None]
    was_training = model.training
    model.eval()
    try:
        packed = body(ids, position_ids=positions)[:, 7:]
        alone = body(ids[:, 7:], position_ids=positions[:, 7:])
    finally:
        model.train(was_training)
    difference = float((packed.double() - alone.double()).abs().max())
    allowed = _TOLERANCE.get(packed.dtype, _HALF_TOLERANCE) * max(1.0, float(alone.abs().max()))
    if not difference <= allowed:
        raise ValueError(
            f"{name}: the hidden states of a packed document differ from those of the document alone by up to "
            f"{difference:.3g} (allowed {allowed:.3g}), so its documents are not isolated: {advice}"
        )

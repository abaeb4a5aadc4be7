"""A tiny checkpoint in FP8, as transformers' fine-grained FP8 stores it."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

BLOCK = 32


def to_fp8(folder: Path) -> dict[str, torch.Tensor]:
    """Replace the linear layers of a saved model by FP8 blocks with their scales.

    Returns:
        The weights that these stand for, by name.
    """
    stored, meant = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if weight.dim() != 2 or "embed" in name or "lm_head" in name:
            stored[name] = meant[name] = weight
            continue
        rows, columns = weight.shape
        blocks = weight.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scale = blocks.abs().amax(dim=(1, 3)) / 448
        packed = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        stored[name] = packed.reshape(rows, columns)
        stored[f"{name}_scale_inv"] = scale
        meant[name] = (packed.float() * scale[:, None, :, None]).reshape(rows, columns)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return meant

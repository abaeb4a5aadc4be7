"""Quantised checkpoints: what they need, and which can be unpacked into plain weights while they are loaded."""

import importlib.util
from collections.abc import Mapping
from typing import Any, Final

UNPACKED: Final = ("fp8", "mxfp4", "mxfp8")
"""Methods whose weights transformers can unpack while it loads them."""

_PACKAGES: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "fp8": (("accelerate", "accelerate"),),
    "mxfp8": (("accelerate", "accelerate"),),
    "mxfp4": (("accelerate", "accelerate"),),
    "bitsandbytes": (("bitsandbytes", "bitsandbytes"), ("accelerate", "accelerate")),
    "gptq": (("gptqmodel", "gptqmodel"), ("optimum", "optimum")),
    "awq": (("gptqmodel", "gptqmodel"), ("accelerate", "accelerate")),
    "compressed-tensors": (("compressed_tensors", "compressed-tensors"),),
    "auto-round": (("auto_round", "auto-round"),),
    "torchao": (("torchao", "torchao"),),
    "quanto": (("optimum.quanto", "optimum-quanto"), ("accelerate", "accelerate")),
    "hqq": (("hqq", "hqq"),),
    "aqlm": (("aqlm", "aqlm"), ("accelerate", "accelerate")),
    "eetq": (("kernels", "kernels"), ("accelerate", "accelerate")),
    "fbgemm_fp8": (("fbgemm_gpu", "fbgemm-gpu-genai"), ("accelerate", "accelerate")),
    "bitnet": (("accelerate", "accelerate"),),
    "vptq": (("vptq", "vptq"), ("accelerate", "accelerate")),
    "spqr": (("spqr_quant", "spqr_quant"), ("accelerate", "accelerate")),
    "quark": (("quark", "amd-quark"),),
}
"""Method -> (module, package) that transformers needs to read its weights."""


def quantization_method(settings: Mapping[str, Any]) -> str | None:
    """Return how a checkpoint is quantised, as its config.json says; None for plain weights."""
    text = settings.get("text_config")
    places = (settings, text) if isinstance(text, Mapping) else (settings,)
    names = ("quantization_config", "compression_config")
    given = next((place[name] for place in places for name in names if isinstance(place.get(name), Mapping)), None)
    if given is None:
        return None
    if given.get("load_in_8bit") or given.get("load_in_4bit"):
        return "bitsandbytes"
    return str(given.get("quant_method") or "unknown")


def unpacking(method: str | None) -> Any:
    """Return transformers' configuration that unpacks weights of a method as they are loaded; None where there is none."""
    import transformers

    if method in ("fp8", "mxfp8"):
        return transformers.FineGrainedFP8Config(dequantize=True)
    return transformers.Mxfp4Config(dequantize=True) if method == "mxfp4" else None


def missing_packages(method: str) -> list[str]:
    """Return the packages that weights of a method need and that are not installed here."""
    return [package for module, package in _PACKAGES.get(method, ()) if not _is_installed(module)]


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a module whose parent is missing
        return False

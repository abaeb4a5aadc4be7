"""Names of the files of a hub model that is not in the local cache."""

import logging
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

from stages.models.config import ModelConfig
from stages.models.preflight.problem import Problem

log = logging.getLogger(__name__)

_TIMEOUT_SECONDS: Final = 10.0
_PICKLED: Final = "pytorch_model*.bin"


def pickled_alone(model: ModelConfig, folder: Path | None) -> Iterator[Problem]:
    """Find that a model of the hub has weights, and none that are read.

    The hub is asked once per command, until the weights are in the local cache. Where it does not answer, the cache speaks
    for it: what is not there cannot be fetched either.

    Args:
        model: a model of the hub.
        folder: its folder in the local cache; None if it is not cached.
    """
    cached = [] if folder is None else [file.name for file in folder.iterdir()]
    if _has_safetensors(cached):
        return
    names = _names_on_hub(model)
    names = cached if names is None else names
    pickled = sorted(name for name in names if fnmatch(name, _PICKLED))
    if not pickled or _has_safetensors(names):
        return
    more = f" and {len(pickled) - 1} more" if len(pickled) > 1 else ""
    yield Problem(
        model.name,
        f"{model.hub}@{model.revision}",
        f"the model has only pickled weights ({pickled[0]}{more}), which can run arbitrary code and are not loaded",
        "*.safetensors",
        f"`ptafuse convert {model.hub} --revision {model.revision} --output FOLDER` converts them to safetensors "
        "without running any of their code; then give FOLDER as `path`, in place of `hub` and `revision`",
    )


def _has_safetensors(names: Sequence[str]) -> bool:
    return any(name.endswith(".safetensors") for name in names)


def _names_on_hub(model: ModelConfig) -> list[str] | None:
    """Return the names of a model's files; None if the hub does not list them."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(str(model.hub), revision=model.revision, timeout=_TIMEOUT_SECONDS)
    # Gated, misspelt, switched off, without network: errors of several libraries. The download says it better.
    except Exception as error:  # noqa: BLE001
        log.debug("the hub does not list the files of %s: %s", model.hub, error)
        return None
    return [sibling.rfilename for sibling in info.siblings or ()]

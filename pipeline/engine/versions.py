"""The library versions that manifests record, and whether this machine has the same."""

import logging
import platform
from functools import cache
from importlib import metadata

from pipeline.run.session import Run, StageError
from pipeline.run.steps import Step
from stages.contract.manifest import Manifest

log = logging.getLogger(__name__)


def check_library_versions(run: Run, step: Step) -> None:
    """Compare this machine's libraries with those that computed the shards done so far.

    Raises:
        StageError: they differ, and the command is strict.
    """
    done = run.store.manifest_names(step.folder)[:1]
    if not done:
        return
    then = Manifest.from_bytes(run.store.read(f"{step.folder}/manifests/{done[0]}")).versions
    here = library_versions()
    if "vllm" in then:
        from stages.logits.backends.vllm import vllm_version  # with torch, which takes seconds to import

        here["vllm"] = vllm_version()
    drift = [f"{name} {then[name]} -> {now}" for name, now in here.items() if then.get(name, now) != now]
    if not drift:
        return
    message = (
        f"{step.key}: library versions differ from those of finished shards, so results may, too: {', '.join(drift)}"
    )
    if run.strict:
        raise StageError(f"{message}. Install the versions of requirements.txt, or omit --strict")
    log.warning("%s", message)


RECORDED_VERSIONS = ("ptafuse", "torch", "transformers", "tokenizers", "pyarrow", "numpy", "numba", "rapidfuzz", "ray")


def library_versions() -> dict[str, str]:
    """Return the versions that every manifest records, since a change of them may change results."""
    return dict(_library_versions())


@cache  # each is read from a file, and parsed
def _library_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in RECORDED_VERSIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a checkout that is not installed
            versions[name] = "not installed"
    return versions

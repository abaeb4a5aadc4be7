"""Settings that distinguish a step from the results in the run directory under other fingerprints."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.run.steps import Step


def setting_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe how the settings behind two fingerprints of one step differ, one line per setting.

    Settings are named as in the configuration file (``align.epsilon``), inputs by their step.
    """
    flat_before, flat_now = dict(_flat(before)), dict(_flat(now))
    if "version" not in flat_before:
        flat_now.pop("version", None)  # earlier records of train and eval do not name it, so nothing is known to differ
    lines = []
    for name in sorted({*flat_before, *flat_now}):
        old, new = flat_before.get(name), flat_now.get(name)
        if old != new:
            lines.append(_line(name, old, new))
    return lines


def others_by_closeness(step: Step, earlier: Sequence[Step]) -> list[Step]:
    """Sort the same step under other fingerprints by number of changes, then latest first, each fingerprint once.

    Args:
        step: the step, as the configuration now resolves it.
        earlier: the steps of all recorded configurations, the latest last.
    """
    others = {other.fingerprint: other for other in reversed(earlier) if other.key == step.key}
    others.pop(step.fingerprint, None)
    return sorted(others.values(), key=lambda other: len(setting_changes(other.settings, step.settings)))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _line(name: str, old: Any, new: Any) -> str:
    if name.startswith("inputs."):
        return f"its input {name.removeprefix('inputs.')} is another one"
    if name == "version":
        return f"the stage's code now computes different rows: version {old} -> {new}"
    return f"{name}: {_shown(old)} -> {_shown(new)}"


def _shown(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 48 else f"{text[:45]}..."

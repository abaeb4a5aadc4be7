"""Choose the recorded configurations that reports show, and label those that share a name."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from pipeline.analysis.interpret.run import read_interpretation
from pipeline.run.records import recorded_configurations
from pipeline.run.stage_table import job_stage
from pipeline.run.steps import ResolvedRun, Step, result_key
from pipeline.settings.texts import TextConfig
from stages.align.config import AlignConfig
from stages.contract.fingerprint import RUNTIME, Settings
from stages.contract.store import Store
from stages.models.config import ModelConfig

_TELLING: Final = ("name", "path", "kind_column")
"""Settings that are not in a fingerprint (contents are), but that show users what a result is about."""


def reported_runs(store: Store) -> list[ResolvedRun]:
    """Return the configurations that reports show, the last used one last, with what distinguishes those of one name.

    A result stays in sight as long as its file is there: these are the latest configuration of each name, and every older
    one that has a result which no later one of its name shows. Of several interpretations of the same distributions, which
    differ only in the sample, the latest is shown.
    """
    shown: dict[str, set[str]] = {}
    interpreted: set[tuple[str, str]] = set()
    kept: list[ResolvedRun] = []
    for run in reversed(recorded_configurations(store).values()):
        is_latest = run.config.name not in shown
        folders = shown.setdefault(run.config.name, set())
        new_steps = {step.folder: step for step in run.steps.values() if step.folder not in folders}
        distributions = (run.config.name, run.steps["fuse"].folder)
        adds_interpretation = distributions not in interpreted and read_interpretation(run, store) is not None
        if is_latest or adds_interpretation or any(_has_result(step, store) for step in new_steps.values()):
            kept.append(run)
            folders.update(new_steps)
            if adds_interpretation:
                interpreted.add(distributions)
    return _told_apart(kept[::-1])


def runs_by_folder(runs: Sequence[ResolvedRun], key: str) -> Iterator[tuple[ResolvedRun, str, bool]]:
    """Yield each result of one step once, for the runs that share it.

    Args:
        runs: configurations, the last used one last.
        key: key of the step.

    Yields:
        The first run that has it; the labels of all runs that have it, one per name; whether one is the latest of its name.
    """
    by_name: dict[str, list[ResolvedRun]] = {}
    shared: dict[str, dict[str, list[ResolvedRun]]] = {}
    for run in runs:
        by_name.setdefault(run.config.name, []).append(run)
        shared.setdefault(run.steps[key].folder, {}).setdefault(run.config.name, []).append(run)
    for sharing in shared.values():
        labels = [
            name
            if len(same) == len(by_name[name]) > 1
            else same[-1].label  # settings that differ among all of them did not matter here
            for name, same in sharing.items()
        ]
        is_latest = any(same[-1] is by_name[name][-1] for name, same in sharing.items())
        yield next(iter(sharing.values()))[0], ", ".join(labels), is_latest


def _has_result(step: Step, store: Store) -> bool:
    """Return whether something of a step is done: a shard, its result, or, if a sweep removed that, its log."""
    if step.is_sharded:
        return bool(store.manifest_names(step.folder))
    keeps_log = job_stage(step.stage).keeps_log
    return store.exists(result_key(step)) or (keeps_log and store.exists(f"{step.folder}/log.jsonl"))


def _told_apart(runs: Sequence[ResolvedRun]) -> list[ResolvedRun]:
    """Return the same runs, each with the words that distinguish it from the others of its name."""
    by_name: dict[str, list[ResolvedRun]] = {}
    for run in runs:
        by_name.setdefault(run.config.name, []).append(run)
    distinctions = {name: iter(_distinctions(same)) for name, same in by_name.items()}
    return [dataclasses.replace(run, distinction=next(distinctions[run.config.name])) for run in runs]


def _distinctions(runs: Sequence[ResolvedRun]) -> list[str]:
    """Return the words that distinguish the runs of one name: the settings in which they differ.

    Settings that change no result are used only if the others leave two runs alike, and a number if all settings do.
    """
    if len(runs) == 1:
        return [""]
    words = _differences([_settings(run, runs, everything=False) for run in runs])
    if len(set(words)) < len(words):
        words = _differences([_settings(run, runs, everything=True) for run in runs])
    numbered = [f"{text}, number {number}".removeprefix(", ") for number, text in enumerate(words, start=1)]
    return [text if words.count(text) == 1 and text else other for text, other in zip(words, numbered, strict=True)]


def _differences(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for values in settings for key in values)
    told = [key for key in keys if len({_shown(values[key]) if key in values else None for values in settings}) > 1]
    return [", ".join(f"{key} {_shown(values[key])}" for key in told if key in values) for values in settings]


def _settings(run: ResolvedRun, runs: Sequence[ResolvedRun], *, everything: bool) -> dict[str, Any]:
    """Collect the settings that may distinguish a run: those that change results, or all, and the stages' versions.

    A preset replaces the settings that have its values in every run.
    """
    plain = [(other.config.align, AlignConfig(preset=other.config.align.preset)) for other in runs]
    filled = [
        f"align.{name}"
        for name in AlignConfig.model_fields
        if all(getattr(align, name) == getattr(preset, name) for align, preset in plain)
    ]
    settings = dict(_flat(run.config, "", everything=everything))
    if everything:
        settings |= {f"version of {step.stage}": step.settings.get("version") for step in run.steps.values()}
    return {"align.preset": run.config.align.preset} | {
        key: value for key, value in settings.items() if key not in filled
    }


def _flat(settings: Settings, prefix: str, *, everything: bool) -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values, without the configuration's name.

    Settings that change no result are included only with ``everything``.
    """
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        key = f"{prefix}{field.alias or name}"
        if key == "name" or not (everything or RUNTIME not in field.metadata or name in _TELLING):
            continue
        if isinstance(value, Settings):
            yield from _flat(value, f"{key}.", everything=everything)
        elif isinstance(value, tuple) and any(isinstance(item, ModelConfig | TextConfig) for item in value):
            yield key, tuple(item.name for item in value)
            for item in value:
                yield from _flat(item, f"{key}.{item.name}.", everything=everything)
        else:
            yield key, value


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(_shown(item) for item in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

"""A run directory of any number of shards without their data: real plan, manifests and attempts, made-up figures."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from pipeline.engine.versions import library_versions
from pipeline.run.records import record
from pipeline.run.resolve import resolve
from pipeline.run.shard_plan import freeze_plan
from pipeline.run.steps import Request, ResolvedRun
from pipeline.settings.load import load_config
from stages.contract.manifest import (
    DataFile,
    InputRef,
    Manifest,
    Mean,
    attempts_folder,
    data_key,
    manifest_key,
)
from stages.contract.store import Store

TOKENS = 3000
"""Of each shard."""
SHARDED = ("shard", "logits/llama", "logits/neox", "align/neox", "fuse")
"""The sharded steps of the tiny configuration, in their order."""


def synthetic_run(config: Path, store: Store, num_shards: int, *, overrides: tuple[str, ...] = ()) -> ResolvedRun:
    """A run whose plan is frozen and of which nothing is done. Its corpus, beside ``config``, is written over.

    Args:
        config: the tiny configuration.
        store: the run directory.
        num_shards: of one document each.
        overrides: further ``--set`` values.
    """
    corpus = config.parent / "lines.jsonl"
    corpus.write_text('{"text": "one line"}\n' * num_shards)
    one = (f"dataset.path={corpus}", "shard.documents_per_shard=1", *overrides)
    run = resolve(load_config(config, one), store, Request(str(config), one))
    record(run, store)
    freeze_plan(run, store)
    return run


def fill(run: ResolvedRun, folder: Path, done: Mapping[str, int]) -> None:
    """Write manifests and attempts into a local run directory.

    Args:
        run: the run.
        folder: its directory.
        done: step key -> how many shards of it are done, the first ones. The next one has an attempt that died.
    """
    num_shards = len((folder / run.steps["shard"].folder / "plan.jsonl").read_bytes().splitlines()) - 1
    for key, count in done.items():
        for shard in range(count):
            _write(
                folder, manifest_key(run.steps[key].folder, shard), manifest_of(run, key, shard, num_shards).to_bytes()
            )
        for shard in range(min(count + 1, num_shards)):
            value = {"attempt": 1, "launch": "x", "host": "elsewhere", "pid": 1, "started": 1.0}
            where = attempts_folder(run.steps[key].folder, shard)
            _write(folder, f"{where}/1-{shard:08x}.json", json.dumps(value).encode())


def manifest_of(run: ResolvedRun, key: str, shard: int, num_shards: int) -> Manifest:
    """The manifest of a shard that has as many health metrics as align's have."""
    step = run.steps[key]
    references = {
        name: InputRef(folder=run.steps[source].folder, manifest_sha256="0" * 64, data_sha256="1" * 64)
        for name, source in step.inputs.items()
    }
    counts = {f"count_{number}": shard + number for number in range(14)}
    means = {f"mean_{number}": Mean(total=1.5 * shard, count=TOKENS) for number in range(10)}
    return Manifest(
        stage=key,
        shard=shard,
        num_shards=num_shards,
        fingerprint=step.fingerprint,
        settings=dict(step.settings),
        inputs=references,
        data=DataFile(
            key=data_key(step.folder, shard, num_shards, f"1-{shard:08x}"), sha256=f"{shard:064x}", num_bytes=100_000
        ),
        num_rows_in=20,
        num_rows_out=20,
        num_quarantined=0,
        num_tokens=TOKENS,
        health={**counts, **means, "documents": 1, "bytes": 4 * TOKENS, "tokens/llama": TOKENS, "tokens/neox": TOKENS},
        seconds=2.0,
        cpus=1.0,
        gpus=0.0,
        attempt=1,
        host="elsewhere",
        versions=VERSIONS,
    )


VERSIONS = library_versions()


def _write(folder: Path, key: str, raw: bytes) -> None:
    """Without the store's syncing: nobody cuts the power here, and a benchmark writes a hundred thousand files."""
    path = folder / key
    if not path.parent.exists():
        os.makedirs(path.parent, exist_ok=True)  # noqa: PTH103  # faster than Path.mkdir
    path.write_bytes(raw)

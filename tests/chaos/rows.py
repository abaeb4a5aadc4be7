"""Are two runs' rows the same, none lost and none twice?"""

import json
from collections import Counter

from pipeline.run.records import recorded_run
from stages.contract.store import Store

KEYS = {
    "shard": ("doc_id", "segment"),
    "logits": ("doc_id", "segment"),
    "align": ("doc_id", "segment"),
    "fuse": ("block",),
}
"""What identifies a row of a stage within its run; a block, within its shard."""


def same_rows(store: Store, expected: Store) -> list[str]:
    """What differs between two runs of the same documents and models; empty: nothing."""
    steps, expected_steps = recorded_run(store).steps, recorded_run(expected).steps
    found: list[str] = []
    for key, step in steps.items():
        if step.stage in KEYS:
            found += _differences(key, step.stage, (store, step.folder), (expected, expected_steps[key].folder))
    models = [
        json.loads(where.read(f"{chosen['train'].folder}/manifest.json"))["model_files"]["model.safetensors"]
        for where, chosen in ((store, steps), (expected, expected_steps))
    ]
    if models[0] != models[1]:
        found.append("train: other weights")
    return found


def _differences(key: str, stage: str, one: tuple[Store, str], other: tuple[Store, str]) -> list[str]:
    found = []
    manifests, expected = one[0].manifests(one[1]), other[0].manifests(other[1])
    if manifests.keys() != expected.keys():
        found.append(f"{key}: shards {sorted(manifests)} instead of {sorted(expected)}")
    rows: Counter[tuple] = Counter()
    wanted: Counter[tuple] = Counter()
    for count, store, named in ((rows, one[0], manifests), (wanted, other[0], expected)):
        for shard, manifest in named.items():
            table = store.read_table(manifest.data, remake="").select(list(KEYS[stage]))
            count.update((shard, *row.values()) for row in table.to_pylist())
    if rows != wanted or max(rows.values()) > 1:
        found.append(
            f"{key}: {rows.total()} rows, expected {wanted.total()}; lost {wanted - rows}, more {rows - wanted}"
        )
    for shard in manifests.keys() & expected.keys():
        if manifests[shard].data.sha256 != expected[shard].data.sha256:
            found.append(f"{key} shard {shard}: other contents")
    return found

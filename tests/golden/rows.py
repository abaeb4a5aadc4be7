"""The rows and losses of a tiny run that are pinned: ``python -m tests.golden.rows`` computes and writes them again.

A change of numbers is then seen in the diff of ``pinned.json``, and is to be explained in the commit that makes it.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.run.outcomes import read_training_log
from pipeline.run.records import recorded_run
from stages.contract.columns import PAD_ID, list_row, sparse_row
from stages.contract.store import Store
from tests.tiny_run import ptafuse, save_inputs

PINNED = Path(__file__).parent / "pinned.json"
PRESETS = ("semi-relaxed", "paper")
SHARD = 1
"""Of its first segment, and of its first block, this many positions are pinned."""
NUM_POSITIONS = 16
NUM_STEPS = 3


def compute(config: Path, run: Path, preset: str) -> None:
    """Run every stage up to the training with a preset."""
    sets = ("--set", f"align.preset={preset}", "--set", f"name={preset}")
    ptafuse("train", str(config), "--run", str(run), "--local", "--upstream", *sets)


def rows_and_losses(run: Path, preset: str) -> dict[str, Any]:
    """Return what is pinned of one preset's run: rows as [id, probability] lists, tails, and the first losses."""
    store = Store(str(run))
    resolved = recorded_run(store, preset)
    log = read_training_log(resolved.steps["train"], store)[:NUM_STEPS]
    return {
        **{key: _rows(store, resolved.steps[key].folder) for key in ("align/neox", "fuse")},
        "losses": [{name: round(step[name], 5) for name in ("loss", "loss_clm", "loss_fusion")} for step in log],
    }


def _rows(store: Store, folder: str) -> list[dict[str, Any]]:
    manifest = store.read_manifest(folder, SHARD)
    assert manifest is not None
    table = store.read_table(manifest.data, remake="")
    rows = sparse_row(table, 0)
    tails = list_row(table, "tail_mass", 0) if "tail_mass" in table.schema.names else np.zeros(len(rows))
    pinned = []
    for position in range(min(NUM_POSITIONS, len(rows))):
        kept = rows.ids[position] != PAD_ID
        probs = np.exp(rows.logprobs[position][kept].astype(np.float64)).round(5).tolist()
        pairs = [[token, prob] for token, prob in zip(rows.ids[position][kept].tolist(), probs, strict=True)]
        pinned.append({"row": pairs, "tail": round(float(tails[position]), 5)})
    return pinned


def main() -> None:
    """Compute everything and write ``pinned.json``."""
    with tempfile.TemporaryDirectory() as folder:
        config, run = save_inputs(Path(folder)), Path(folder) / "run"
        for preset in PRESETS:
            compute(config, run, preset)
        found = {preset: rows_and_losses(run, preset) for preset in PRESETS}
    # One position per line: a diff shows which ones changed.
    lines = json.dumps(found, separators=(",", ":")).replace('{"row"', '\n{"row"').replace('{"loss"', '\n{"loss"')
    PINNED.write_text(lines + "\n")
    sys.stdout.write(f"written: {PINNED.name}\n")


if __name__ == "__main__":
    main()

"""Verdict on fusing, in one sentence per model and text."""

import math
from collections.abc import Sequence
from typing import Final

from pipeline.report.held_out import HeldOutRow, held_out
from pipeline.report.reported import reported_runs
from pipeline.report.texts import text_reports
from stages.contract.store import Store
from stages.measures.standard_error import Estimate

CLEAR: Final = 2.0
"""Standard errors beyond which a difference is called one."""


def verdicts(store: Store) -> list[str]:
    """Return a sentence for each trained model and text that can be compared with gold tokens only.

    Args:
        store: the run directory.
    """
    runs = reported_runs(store)
    sentences = _of_rows("held-out text", held_out(runs, store))
    for report in text_reports(runs, store):
        sentences += _of_rows(f"text {report.name}", report.rows)
    return sentences


def _of_rows(where: str, rows: Sequence[HeldOutRow]) -> list[str]:
    return [
        sentence(where, row.label, row.bits_per_byte, row.against_gold_only)
        for row in rows
        if row.bits_per_byte is not None and row.against_gold_only is not None
    ]


def sentence(where: str, label: str, bits_per_byte: float, difference: Estimate) -> str:
    """Say how a model compares with the same training on gold tokens only.

    Args:
        where: the text.
        label: the model.
        bits_per_byte: its result on the text.
        difference: to gold tokens only, bits per byte, paired by document.
    """
    size, share = abs(difference.mean), abs(difference.mean) / (bits_per_byte - difference.mean)
    better = f"{where}: {label} is {'better' if difference.mean < 0 else 'worse'} than gold tokens only by"
    if math.isnan(difference.error):
        return f"{better} {size:.4f} bits per byte ({share:.1%}), on one document: whether that is chance is unknown."
    figures = f"{size:.4f} ± {difference.error:.4f} bits per byte ({share:.1%})"
    if not size > CLEAR * difference.error:
        return f"{where}: {label} and gold tokens only are equal within two standard errors (difference {figures})."
    return f"{better} {figures}."

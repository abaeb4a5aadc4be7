"""Tables of the fitted weights."""

from collections.abc import Sequence

from pipeline.display.table import ResultTable
from pipeline.report.reported import runs_by_folder
from pipeline.run.outcomes import read_result
from pipeline.run.steps import ResolvedRun
from stages.contract.store import Store


def weight_table(runs: Sequence[ResolvedRun], store: Store) -> ResultTable | None:
    """Return the weights of every configuration that has fitted some; None without any."""
    rows = []
    fitted = [run for run in runs if "fit" in run.steps]
    for run, label, _ in runs_by_folder(fitted, "fit"):
        result = read_result(store, run.steps["fit"])
        if result is None:
            continue
        for row in result["rows"]:
            best = min(zip(row["candidate_nll"], result["candidates"], strict=True))
            pairs = zip(result["candidates"], row["weights"], strict=True)
            rows.append(
                (
                    label,
                    "all" if row["kind"] is None else row["kind"],
                    ", ".join(f"{name} {weight:.3f}" for name, weight in pairs),
                    f"{row['num_positions']:,}",
                    f"{row['nll']:.3f}",
                    f"{best[1]} {best[0]:.3f}",
                )
            )
    if not rows:
        return None
    return ResultTable(
        "Fitted weights of the candidates, and the completed NLL in nats of their mixture on the positions that all "
        "of them cover",
        ("configuration", "documents", "weights", "positions", "mixture", "best candidate"),
        tuple(rows),
        text_columns=(0, 1, 2),
    )

"""Pairs of tokens between which most mass moved, over the plans of many shards."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from pipeline.display.text import visible
from stages.align.pair_mass import PairMass
from stages.models.vocabulary import Vocabulary

KEPT_PAIRS: Final = 20_000
"""Number of pairs of different texts that a shard reports. The mass of the others is ``cut_mass``: a pair's mass in the
table is too small by at most the smallest mass that a shard kept, once per shard."""


def summarize_pairs(pairs: PairMass, *, kept: int = KEPT_PAIRS) -> dict[str, Any]:
    """Summarise one shard's pairs, as JSON values."""
    differs = ~pairs.is_same
    columns = (pairs.source_ids[differs], pairs.target_ids[differs], pairs.mass[differs])
    return {
        "num_positions": pairs.num_positions,
        "same_mass": float(pairs.mass[pairs.is_same].sum()),
        "moved_mass": float(columns[2].sum()),
        "cut_mass": float(columns[2][kept:].sum()),
        "pairs": list(zip(*(column[:kept].tolist() for column in columns), strict=True)),
    }


def most_moved(
    shards: Sequence[Mapping[str, Any]], source: Vocabulary, target: Vocabulary, *, num_pairs: int
) -> dict[str, Any]:
    """Find the pairs of different texts with the most mass, and the total mass.

    Args:
        shards: results of the shards, from ``summarize_pairs``.
        source: the source's vocabulary.
        target: the target's vocabulary.
        num_pairs: number of pairs to return.

    Returns:
        JSON values: ``same_mass`` and ``moved_mass``, in positions (a position's distribution has the mass 1, less its
        tail); ``rows``, of the most mass first, with the tokens' texts made visible.
    """
    totals: dict[tuple[int, int], float] = {}
    for shard in shards:
        for source_id, target_id, mass in shard["pairs"]:
            totals[source_id, target_id] = totals.get((source_id, target_id), 0.0) + mass
    largest = sorted(totals.items(), key=lambda item: (-item[1], item[0]))[:num_pairs]
    sums = {
        name: sum(shard[name] for shard in shards) for name in ("num_positions", "same_mass", "moved_mass", "cut_mass")
    }
    rows = [
        {
            "source_id": source_id,
            "target_id": target_id,
            "source": visible(source.text(source_id)),
            "target": visible(target.text(target_id)),
            "mass": mass,
            "share": mass / sums["moved_mass"],
        }
        for (source_id, target_id), mass in largest
    ]
    return {**sums, "rows": rows}

"""Move a source distribution to target tokens: support, plan, projection."""

from stages.align.transport.projection import Projected, column_mass, keep_largest
from stages.align.transport.sinkhorn import SinkhornResult, semi_relaxed, sinkhorn
from stages.align.transport.support import target_support, union_support

__all__ = [
    "Projected",
    "SinkhornResult",
    "column_mass",
    "keep_largest",
    "semi_relaxed",
    "sinkhorn",
    "target_support",
    "union_support",
]

"""COSTS: every cost by the name that ``[align] cost`` gives it."""

from typing import Final

from stages.align.costs.base import Costs
from stages.align.costs.edit_distance import EditDistanceCosts
from stages.align.costs.prefix import PrefixCosts
from stages.align.costs.semantic import SemanticCosts
from stages.align.vocabulary_maps import ModelPair

COSTS: Final[dict[str, type[Costs]]] = {
    "edit-distance": EditDistanceCosts,
    "prefix": PrefixCosts,
    "semantic": SemanticCosts,
}
"""A test compares the names with those that the setting allows."""


def build_costs(name: str, pair: ModelPair, *, num_slots: int | None = None) -> Costs:
    """Return the costs of that name for a pair of models.

    Args:
        name: a key of ``COSTS``.
        pair: the two models.
        num_slots: pairs that are remembered; the cost's own default where None.

    Raises:
        KeyError: there is no cost of that name.
    """
    return COSTS[name].of(pair, num_slots=num_slots)

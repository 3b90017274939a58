"""A model's weights over several memories, by byte budget."""

from infold.tiers.spec import TierSpec
from infold.tiers.units import Unit, units

__all__ = ["TierSpec", "Unit", "units"]

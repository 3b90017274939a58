"""A model's weights over several memories, by byte budget."""

from infold.tiers.hints import load, save, to_device_map, to_llama_cpp
from infold.tiers.plan import Placement, Plan, fingerprint, plan
from infold.tiers.schedule import Access, Event, Timeline, simulate
from infold.tiers.spec import TierSpec
from infold.tiers.units import Unit, units

__all__ = [
    "Access",
    "Event",
    "Placement",
    "Plan",
    "TierSpec",
    "Timeline",
    "Unit",
    "fingerprint",
    "load",
    "plan",
    "save",
    "simulate",
    "to_device_map",
    "to_llama_cpp",
    "units",
]

"""A model's weights over several memories, by byte budget."""

from infold.tiers.activations import ActivationOffload, offload_activations
from infold.tiers.attach import Handle, attach
from infold.tiers.calibrate import calibrate
from infold.tiers.dynamic import DynamicTiering, Move, Replan
from infold.tiers.hints import load, save, to_device_map, to_llama_cpp
from infold.tiers.plan import Placement, Plan, fingerprint, plan
from infold.tiers.predict import Prediction, Stream, measure_compute, predict, stream
from infold.tiers.presets import PRESETS
from infold.tiers.schedule import Access, Event, Timeline, simulate
from infold.tiers.spec import TierSpec
from infold.tiers.stash import ActivationCounters
from infold.tiers.units import Unit, units

__all__ = [
    "PRESETS",
    "Access",
    "ActivationCounters",
    "ActivationOffload",
    "DynamicTiering",
    "Event",
    "Handle",
    "Move",
    "Placement",
    "Plan",
    "Prediction",
    "Replan",
    "Stream",
    "TierSpec",
    "Timeline",
    "Unit",
    "attach",
    "calibrate",
    "fingerprint",
    "load",
    "measure_compute",
    "offload_activations",
    "plan",
    "predict",
    "save",
    "simulate",
    "stream",
    "to_device_map",
    "to_llama_cpp",
    "units",
]

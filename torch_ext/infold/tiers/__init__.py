"""A model's weights over several memories, by byte budget; how much each matters, and at which precision."""

from infold.tiers.activations import ActivationOffload, offload_activations
from infold.tiers.agreement import AgreementReport, PairAgreement, agreement
from infold.tiers.attach import Handle, attach
from infold.tiers.calibrate import calibrate
from infold.tiers.dynamic import DynamicTiering, Move, Replan
from infold.tiers.fisher import FisherAnalyzer
from infold.tiers.hints import load, save, to_device_map, to_llama_cpp
from infold.tiers.importance import AdamStateAnalyzer, GradientEma, ImportanceSource
from infold.tiers.llama_cpp import tensor_types
from infold.tiers.plan import Placement, Plan, plan
from infold.tiers.policy import LearnedPolicy
from infold.tiers.precision import (
    LayerCurve,
    LayerPrecision,
    PrecisionPlan,
    allocate_precision,
    measure_precision,
    plan_precision,
)
from infold.tiers.predict import Prediction, Stream, measure_compute, measure_overhead, predict, stream
from infold.tiers.presets import PRESETS
from infold.tiers.problem import fingerprint
from infold.tiers.pruning import bitter7_scores, prune_
from infold.tiers.ranking import combine, ranks, spearman, tiers_by_rank
from infold.tiers.schedule import Access, Event, Overhead, Timeline, simulate
from infold.tiers.spec import TierSpec
from infold.tiers.stash import ActivationCounters
from infold.tiers.units import Unit, units
from infold.tiers.water_filling import Option, water_fill

__all__ = [
    "PRESETS",
    "Access",
    "ActivationCounters",
    "ActivationOffload",
    "AdamStateAnalyzer",
    "AgreementReport",
    "DynamicTiering",
    "Event",
    "FisherAnalyzer",
    "GradientEma",
    "Handle",
    "ImportanceSource",
    "LayerCurve",
    "LayerPrecision",
    "LearnedPolicy",
    "Move",
    "Option",
    "Overhead",
    "PairAgreement",
    "Placement",
    "Plan",
    "PrecisionPlan",
    "Prediction",
    "Replan",
    "Stream",
    "TierSpec",
    "Timeline",
    "Unit",
    "agreement",
    "allocate_precision",
    "attach",
    "bitter7_scores",
    "calibrate",
    "combine",
    "fingerprint",
    "load",
    "measure_compute",
    "measure_overhead",
    "measure_precision",
    "offload_activations",
    "plan",
    "plan_precision",
    "predict",
    "prune_",
    "ranks",
    "save",
    "simulate",
    "spearman",
    "stream",
    "tensor_types",
    "tiers_by_rank",
    "to_device_map",
    "to_llama_cpp",
    "units",
    "water_fill",
]

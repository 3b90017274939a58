"""A model's weights over several memories, by byte budget; how much each matters, and at which precision."""

from infold.tiers.agreement import AgreementReport, PairAgreement, agreement
from infold.tiers.fisher import FisherAnalyzer
from infold.tiers.importance import AdamStateAnalyzer, GradientEma, ImportanceSource
from infold.tiers.llama_cpp import tensor_types
from infold.tiers.precision import (
    LayerCurve,
    LayerPrecision,
    PrecisionPlan,
    allocate_precision,
    measure_precision,
    plan_precision,
)
from infold.tiers.pruning import bitter7_scores, prune_
from infold.tiers.ranking import combine, ranks, spearman, tiers_by_rank
from infold.tiers.spec import TierSpec
from infold.tiers.units import Unit, units
from infold.tiers.water_filling import Option, water_fill

__all__ = [
    "AdamStateAnalyzer",
    "AgreementReport",
    "FisherAnalyzer",
    "GradientEma",
    "ImportanceSource",
    "LayerCurve",
    "LayerPrecision",
    "Option",
    "PairAgreement",
    "PrecisionPlan",
    "TierSpec",
    "Unit",
    "agreement",
    "allocate_precision",
    "bitter7_scores",
    "combine",
    "measure_precision",
    "plan_precision",
    "prune_",
    "ranks",
    "spearman",
    "tensor_types",
    "tiers_by_rank",
    "units",
    "water_fill",
]

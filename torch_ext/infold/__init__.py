"""Infold keeps a model's weights in compact form and computes on them in that form.

    import infold
    report = infold.convert(model, infold.FusedConfig("lossless"))

Importing loads the native library, which registers the operators under ``torch.ops.infold``.
"""

from infold import nn, peft, spectral, tiers
from infold._library import CorruptWeightError, build_info, library_path
from infold.config import FrequencyConfig, FusedConfig
from infold.convert import convert
from infold.files import load_into, save
from infold.layout import prepare
from infold.log8 import Log8, log8_decode, log8_encode
from infold.memory import MemoryReport, profile_memory
from infold.recover import recover
from infold.recovery import RecoveryConfig, RecoveryReport
from infold.report import Alternative, ConversionReport, LayerReport

__all__ = [
    "Alternative",
    "ConversionReport",
    "CorruptWeightError",
    "FrequencyConfig",
    "FusedConfig",
    "LayerReport",
    "Log8",
    "MemoryReport",
    "RecoveryConfig",
    "RecoveryReport",
    "build_info",
    "convert",
    "library_path",
    "load_into",
    "log8_decode",
    "log8_encode",
    "nn",
    "peft",
    "prepare",
    "profile_memory",
    "recover",
    "save",
    "spectral",
    "tiers",
]
__version__ = build_info()["version"]

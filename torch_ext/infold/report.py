"""What a conversion did: sizes with everything counted, errors, refusals."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Alternative:
    """What another method leaves of a weight."""

    #: ``"svd"``: the truncated one, factors in float16; ``"ecsq"``; ``"int4"``: groups of 128, entropy-coded.
    method: str
    #: Everything that it stores: as many bytes as its layer or fewer, except where the method has no form so small.
    bytes: int
    #: As in `LayerReport`.
    relative_error: float


@dataclass(frozen=True)
class LayerReport:
    """One converted layer. ``bytes_after`` is all that stands for the weight: payload, directory, tables and scales, or
    the spectrum and its indices; the bias is in neither figure.
    """

    name: str
    kind: str
    format: str
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int
    #: ‖W − Ŵ‖ / ‖W‖, Frobenius; 0 exactly where every bit is kept.
    relative_error: float
    predictor: str = "none"
    #: How the weight lies in memory, and the bytes that it takes there; ``bytes_after`` is what is stored.
    #: Of a frequency layer, the storage of its spectrum.
    layout: str = "compact"
    resident_bytes: int = 0
    #: The layer that this one shares its weight with; its bytes are counted there.
    tied_to: str | None = None
    #: For a frequency layer, what other methods would leave at its bytes.
    alternatives: tuple[Alternative, ...] = ()

    @property
    def parameters(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes_after / max(self.parameters, 1)


@dataclass
class ConversionReport:
    """Every layer that was converted, and every one that was refused with the reason. Prints as a table."""

    layers: list[LayerReport] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    #: Of those refused, the ones over a ``max_error``: what they would have been.
    over_max_error: list[LayerReport] = field(default_factory=list)
    #: Bytes of all parameters and buffers of the model, before and after.
    model_bytes_before: int = 0
    model_bytes_after: int = 0

    @property
    def _own(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.tied_to is None]

    @property
    def parameters(self) -> int:
        """Weights of converted layers, shared ones once."""
        return sum(layer.parameters for layer in self._own)

    @property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self._own)

    @property
    def bytes_after(self) -> int:
        return sum(layer.bytes_after for layer in self._own)

    @property
    def resident_bytes(self) -> int:
        return sum(layer.resident_bytes for layer in self._own)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes_after / max(self.parameters, 1)

    @property
    def ratio(self) -> float:
        """How many times smaller these weights are."""
        return self.bytes_before / max(self.bytes_after, 1)

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON, also written to ``path`` if one is given."""
        total = {
            "parameters": self.parameters,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bits_per_weight": self.bits_per_weight,
            "resident_bytes": self.resident_bytes,
            "model_bytes_before": self.model_bytes_before,
            "model_bytes_after": self.model_bytes_after,
        }
        report = {
            "total": total,
            "layers": [_as_json(layer) for layer in self.layers],
            "refused": self.refused,
            "over_max_error": [_as_json(layer) for layer in self.over_max_error],
        }
        text = json.dumps(report, indent=2)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def plot(self, path: str | Path) -> None:
        """Writes a PNG: bits a weight and relative error of each layer. Needs matplotlib."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        layers = self._own
        figure = Figure(figsize=(9, max(3.0, 0.22 * len(layers) + 1.5)), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        places = range(len(layers))
        left.barh(places, [layer.bits_per_weight for layer in layers], color="#3b6ea5")
        left.set_yticks(places, [layer.name for layer in layers], fontsize=7)
        left.invert_yaxis()
        left.set_xlabel("bits a weight, everything counted")
        right.barh(places, [layer.relative_error for layer in layers], color="#b5563c")
        for method, color in (("svd", "black"), ("ecsq", "#3b6ea5"), ("int4", "#6a9a4b")):
            marks = [
                (a.relative_error, y)
                for y, layer in enumerate(layers)
                for a in layer.alternatives
                if a.method == method
            ]
            if marks:
                right.scatter(*zip(*marks, strict=True), marker="|", color=color, label=method, zorder=3)
        if any(layer.alternatives for layer in layers):
            right.legend(fontsize=7)
        right.set_xlabel("relative error")
        figure.suptitle(f"{self.bits_per_weight:.2f} bits a weight, {self.ratio:.2f}x smaller")
        figure.savefig(path, dpi=120, format="png")

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [len("total")])
        kind = max([len(layer.format) for layer in self.layers] + [8])
        head = (
            f"{'layer':<{width}}  {'format':<{kind}} {'shape':>13} {'before':>10} {'stored':>10} {'bits/w':>7} "
            f"{'error':>9} {'in memory':>10} {'layout':<7}"
        )
        lines = [head, "-" * len(head)]
        for layer in self.layers:
            shape = f"{layer.shape[0]}x{layer.shape[1]}"
            tail = f"  = {layer.tied_to}" if layer.tied_to else ""
            lines.append(
                f"{layer.name:<{width}}  {layer.format:<{kind}} {shape:>13} {format_bytes(layer.bytes_before):>10} "
                f"{format_bytes(layer.bytes_after):>10} {layer.bits_per_weight:>7.2f} {layer.relative_error:>9.2g} "
                f"{format_bytes(layer.resident_bytes):>10} {layer.layout:<7}{tail}"
            )
        lines.append("-" * len(head))
        lines.append(
            f"{'total':<{width}}  {'':<{kind}} {self.parameters:>13,} {format_bytes(self.bytes_before):>10} "
            f"{format_bytes(self.bytes_after):>10} {self.bits_per_weight:>7.2f} {'':>9} "
            f"{format_bytes(self.resident_bytes):>10} ({self.ratio:.2f}x smaller stored)"
        )
        lines.append(
            f"model: {format_bytes(self.model_bytes_before)} before, {format_bytes(self.model_bytes_after)} after"
        )
        lines += _comparison([layer for layer in [*self.layers, *self.over_max_error] if layer.alternatives])
        lines += [f"left dense: {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


def _as_json(layer: LayerReport) -> dict[str, Any]:
    fields = {**asdict(layer), "bits_per_weight": layer.bits_per_weight}
    for errors in (fields, *fields["alternatives"]):
        # JSON has no infinity; null says that there is no such number.
        errors["relative_error"] = errors["relative_error"] if math.isfinite(errors["relative_error"]) else None
    return fields


def _comparison(layers: list[LayerReport]) -> list[str]:
    """Lines that set each layer's error beside those of other methods; their bytes where they are more."""
    if not layers:
        return []
    width = max(len(layer.name) for layer in layers)
    methods = [alternative.method for alternative in layers[0].alternatives]
    titles = " ".join(f"{method:>18}" for method in methods)
    head = f"{'relative error':<{width}}  {'stored':>10} {'this':>7} {titles}"
    lines = ["", head, "-" * len(head)]
    for layer in layers:
        cells = []
        for other in layer.alternatives:
            more = f" at {format_bytes(other.bytes)}" if other.bytes > layer.bytes_after else ""
            cells.append(f"{other.relative_error:.3f}{more}")
        shown = " ".join(f"{cell:>18}" for cell in cells)
        stored = format_bytes(layer.bytes_after)
        lines.append(f"{layer.name:<{width}}  {stored:>10} {layer.relative_error:>7.3f} {shown}")
    return lines


def format_bytes(count: int) -> str:
    """A size for people, in decimal units."""
    size, unit = float(count), "B"
    for larger in ("KB", "MB", "GB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"

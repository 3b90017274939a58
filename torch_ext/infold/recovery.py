"""How a recovery is done, and what it did."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

Inputs = Literal["student", "teacher"]
Parameters = Literal["converted", "all"]
Stage = Literal["start", "layers", "end to end"]
Stopped = Literal["steps", "patience", "seconds", "not finite"]


@dataclass(frozen=True)
class RecoveryConfig:
    """The budget and the manner of `infold.recover`.

    layer_steps: at most so many steps of Adam for each layer by itself; 0 leaves this stage out.
    layer_rate: their step size, as that of ``rate``: it falls to 0 along a cosine.
    layer_rows: rows of activations that a layer learns from; a quarter as many, of held-out batches, measure it.
    layer_batch: rows a step.
    inputs: what a layer gets: the ``"student"``'s input, whose earlier layers have learned by then, so that it can make
        up for their errors, or the ``"teacher"``'s; its target is the teacher's output in either case.
    steps: at most so many steps of Adam end to end, one batch each; 0 leaves this stage out.
    rate: their step size.
    parameters: end to end, ``"converted"`` layers train, or ``"all"`` of the model's that require gradients too.
    evaluations: how often either stage measures itself, evenly spread.
    patience: a stage stops after so many measurements in a row without a better one.
    seconds: wall time for both stages, of which the first gets at most half; None for no limit. With a limit, results
        depend on the machine.
    seed: of the order of batches and rows. PyTorch's global generator is neither read nor set.

    Raises ValueError for a value out of range.
    """

    layer_steps: int = 200
    layer_rate: float = 3e-3
    layer_rows: int = 8192
    layer_batch: int = 512
    inputs: Inputs = "student"
    steps: int = 500
    rate: float = 1e-3
    parameters: Parameters = "converted"
    evaluations: int = 10
    patience: int = 3
    seconds: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choice, allowed in (
            ("inputs", self.inputs, get_args(Inputs)),
            ("parameters", self.parameters, get_args(Parameters)),
        ):
            if choice not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {choice!r}")
        for name in ("layer_steps", "steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        for name in ("layer_rate", "layer_rows", "layer_batch", "rate", "evaluations", "patience", "seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {value}")


@dataclass(frozen=True)
class LayerRecovery:
    """One layer in the first stage: ‖y − ŷ‖ / ‖y‖ on held-out rows, y the teacher's output, before and after.

    After is never larger. Before is with what the stage has made of earlier layers, if inputs are the student's.
    """

    name: str
    error_before: float
    error_after: float
    steps: int
    stopped: Stopped


@dataclass(frozen=True)
class Measurement:
    """The held-out loss at some moment; ``training_loss`` is the mean over the steps since the last one, if any."""

    stage: Stage
    step: int
    seconds: float
    held_out_loss: float
    training_loss: float | None = None


@dataclass
class RecoveryReport:
    """What `infold.recover` did. Prints as a table. Losses are means over the held-out batches."""

    layers: list[LayerRecovery] = field(default_factory=list)
    history: list[Measurement] = field(default_factory=list)
    loss_before: float = math.nan
    #: That of the state in which the model is left: the least that was measured, and no more than ``loss_before``.
    loss_after: float = math.nan
    steps: int = 0
    seconds: float = 0.0
    #: Why the second stage ended.
    stopped: Stopped = "steps"

    @property
    def loss_after_layers(self) -> float | None:
        """The loss after the first stage; None if that was left out."""
        return next((point.held_out_loss for point in self.history if point.stage == "layers"), None)

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON, also written to ``path`` if one is given. Losses that are no numbers are null."""
        fields = asdict(self)
        for record in (fields, *fields["layers"], *fields["history"]):
            for name, value in record.items():
                if isinstance(value, float) and not math.isfinite(value):
                    record[name] = None
        text = json.dumps(fields, indent=2)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [len("held-out loss")])
        head = f"{'layer':<{width}}  {'before':>9} {'after':>9} {'steps':>6}"
        lines = [head, "-" * len(head)] if self.layers else []
        lines += [
            f"{layer.name:<{width}}  {layer.error_before:>9.4g} {layer.error_after:>9.4g} {layer.steps:>6}"
            for layer in self.layers
        ]
        for point in self.history:
            trained = "" if point.training_loss is None else f", training {point.training_loss:.4g}"
            lines.append(f"{point.stage}, step {point.step}: held-out loss {point.held_out_loss:.4g}{trained}")
        lines.append(
            f"held-out loss {self.loss_before:.4g} before, {self.loss_after:.4g} after, {self.seconds:.0f} s "
            f"(stopped by {self.stopped})"
        )
        return "\n".join(lines)

"""Series of a training run as cubic B-splines, refined while it runs, in memory that does not grow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from infold.tiers.units import units
from infold.tokenizers._files import load_state, reading_metadata, save_state
from infold.tokenizers.spline_sums import SplineSums
from infold.tokenizers.splines import BSpline, FitError
from infold.tokenizers.trajectory_report import Trajectory, evenly, picture, table

#: What gives a series' next value: a number, or a tensor of always one shape.
Source = Callable[[], Tensor | float]
Method = Literal["linear", "level", "hold"]

_KIND, _VERSION = "TrajectoryRecorder", 1
#: Steps are nearer to zero than this: lengths that double stay finite.
_FARTHEST = 1e300
#: Samples are below this in size: sums of their squares stay finite.
_LARGEST = 1e150


@dataclass
class _Series:
    source: Source | None
    unit: str | None
    signal: str
    #: Known once there is a sample.
    shape: tuple[int, ...] = ()
    itemsize: int = 0
    columns: slice = field(default_factory=lambda: slice(0, 0))

    def check(self, name: object) -> None:
        """Raises ValueError for what a file may say and no series has."""
        texts = isinstance(name, str) and isinstance(self.signal, str) and isinstance(self.unit, str | None)
        sizes = all(isinstance(size, int) and size >= 0 for size in (*self.shape, self.itemsize))
        if not (texts and sizes):
            raise ValueError(f"series: expected names, a shape and bytes, got {name!r}: {self}")


class TrajectoryRecorder:
    """Streams series of a training run into cubic B-splines of exactly ``n`` control points each.

        recorder = TrajectoryRecorder.of_weights(model, n=8)
        with recorder.attach(optimizer):
            train(model, optimizer)
        for trajectory in recorder.trajectories().values():
            print(trajectory.name, trajectory.error.total().to_deviation)

    At any time the splines are the least-squares fit to all samples so far. Their knots are clamped at the first and
    the last step, and uniform between up to rounding to a grid of M/2 to M cells over the run, M being resolution · n
    rounded up to a power of two. Each number of a series takes M + 6 numbers of float64, however long the run is: see
    `nbytes`.

    n: control points, 4 or more. resolution: 2 or more.
    on_nan: what a sample that is not finite, or is 1e150 or more in size, does: ``"raise"`` a ValueError that names
        series and step before anything is recorded, or ``"skip"`` this step for *all* series, since they share the time
        axis; `skipped` counts them.
    device: where the sums are kept; samples are copied there.
    """

    def __init__(
        self,
        n: int = 8,
        *,
        resolution: int = 8,
        on_nan: Literal["raise", "skip"] = "raise",
        device: torch.device | str = "cpu",
    ) -> None:
        if n < 4:
            raise ValueError(f"n: expected 4 or more control points, got {n}")
        if resolution < 2:
            raise ValueError(f"resolution: expected 2 or more cells for each control point, got {resolution}")
        if on_nan not in ("raise", "skip"):
            raise ValueError(f"on_nan: expected 'raise' or 'skip', got {on_nan!r}")
        self.n, self.resolution, self.on_nan, self.device = n, resolution, on_nan, torch.device(device)
        #: Steps skipped for numbers that were not finite.
        self.skipped = 0
        self._series: dict[str, _Series] = {}
        self._sums = SplineSums(n, resolution, self.device)
        self._handles: list[RemovableHandle] = []

    @property
    def samples(self) -> int:
        """How many were recorded."""
        return self._sums.samples

    # What is watched.

    @classmethod
    def of_weights(
        cls, model: nn.Module, *, n: int = 8, elements: int | None = None, **options: Any
    ) -> TrajectoryRecorder:
        """A recorder of a model's parameters; ``options`` are those of the constructor, the others of `add_weights`."""
        recorder = cls(n, **options)
        recorder.add_weights(model, elements=elements)
        return recorder

    @classmethod
    def of_gradient_norms(cls, model: nn.Module, *, n: int = 8, **options: Any) -> TrajectoryRecorder:
        """A recorder of the norms of a model's gradients; ``options`` are those of the constructor."""
        recorder = cls(n, **options)
        recorder.add_gradient_norms(model)
        return recorder

    def add(self, name: str, source: Source, *, unit: str | None = None, signal: str = "custom") -> None:
        """Watches what ``source()`` returns: a number, or a real tensor of one shape.

        unit: the name of the unit (`infold.tiers.units`) whose `trajectory_variance` it counts for, among the series of
        its ``signal``. In a recorder that was loaded, this gives a series its source again, under the unit and signal
        that it had; `add_weights` and `add_gradient_norms` do so for theirs.

        Raises ValueError for a name that is taken, and for a new one once there are samples.
        """
        known = self._series.get(name)
        if known is not None and known.source is None:
            if (known.unit, known.signal) != (unit, signal):
                expected = f"unit {known.unit!r} and signal {known.signal!r}"
                raise ValueError(
                    f"{name}: expected {expected} as recorded, got {unit!r} and {signal!r}; what `add_weights` or "
                    "`add_gradient_norms` recorded, the same call gives its sources again"
                )
            known.source = source
            return
        if known is not None:
            raise ValueError(f"name: expected one that is free, got {name!r}")
        if self.samples:
            raise ValueError(f"{name}: expected series to be added before the first sample, got {self.samples} samples")
        self._series[name] = _Series(source, unit, signal)

    def add_weights(self, model: nn.Module, *, elements: int | None = None) -> None:
        """Watches every parameter, tied ones once, under its qualified name; signal ``"weights"``.

        elements: of a larger parameter, so many elements, evenly spaced, as one row; None takes all. Complex parameters
        are two numbers each. Raises ValueError for a model without parameters.
        """
        if elements is not None and elements < 1:
            raise ValueError(f"elements: expected one or more, got {elements}")
        found = [(unit.name, name, parameter) for unit in units(model) for name, parameter in unit.parameters.items()]
        if not found:
            raise ValueError("model: expected parameters, got none")
        for unit_name, name, parameter in found:
            self.add(name, _weights(parameter, elements), unit=unit_name, signal="weights")

    def add_gradient_norms(self, model: nn.Module) -> None:
        """Watches the norm of the gradient of each unit that trains, as ``"gradient_norm(unit)"``; signal
        ``"gradient_norms"``. The norm is 0 for a unit that no gradient reached.

        Gradients are read when a sample is taken: `attach` does so before they are zeroed. A sample raises ValueError
        where *no* unit has a gradient. Raises ValueError for a model in which nothing trains.
        """
        trained = {unit.name: [p for p in unit.parameters.values() if p.requires_grad] for unit in units(model)}
        trained = {name: parameters for name, parameters in trained.items() if parameters}
        if not trained:
            raise ValueError("model: expected a parameter that trains, got none")
        every = [parameter for parameters in trained.values() for parameter in parameters]
        for unit_name, parameters in trained.items():
            source = _gradient_norm(parameters, every)
            self.add(f"gradient_norm({unit_name})", source, unit=unit_name, signal="gradient_norms")

    def attach(self, optimizer: torch.optim.Optimizer, *, every: int = 1) -> TrajectoryRecorder:
        """Samples after every ``every``-th step of an optimizer, until `close` or the end of a ``with`` block.

        Steps are counted on from the last one that was recorded. Raises ValueError while another one is attached.
        """
        if every < 1:
            raise ValueError(f"every: expected at least 1, got {every}")
        if self._handles:
            raise ValueError("optimizer: expected one at a time, got a second; `close` the recorder before")
        passed = 0

        def after(*_: Any) -> None:
            nonlocal passed
            passed += 1
            if passed % every == 0:
                self.step(start + passed)

        start = self._sums.last
        self._handles.append(optimizer.register_step_post_hook(after))
        return self

    def close(self) -> None:
        """Takes the hooks off; what was recorded stays. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> TrajectoryRecorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # What is recorded.

    @torch.no_grad()
    def step(self, at: float | None = None) -> None:
        """Samples every series at step ``at``, which is above the last one; None is one more, from 0 on.

        Raises ValueError, with nothing recorded, for a step that does not ascend, a series without a source or with
        another shape than before, and numbers that are not finite or too large (with ``on_nan="raise"``).
        """
        if at is None:
            at = self._sums.last + 1 if self.samples else 0.0
        at = float(at)
        least = self._sums.last if self.samples else -_FARTHEST
        if not least < at < _FARTHEST:
            raise ValueError(f"at: expected a step above {least} and below {_FARTHEST}, got {at}")
        row = self._row()
        # Of NaN no comparison holds.
        usable = row.abs() < _LARGEST
        if not bool(usable.all()):
            if self.on_nan == "skip":
                self.skipped += 1
                return
            index = int((~usable).nonzero()[0])
            name, series = next(each for each in self._series.items() if index < each[1].columns.stop)
            where = f" at {index - series.columns.start}" if series.shape else ""
            value = float(row[index])
            wanted = f"numbers below {_LARGEST:g} in size" if math.isfinite(value) else "finite numbers"
            raise ValueError(f"{name}: expected {wanted}, got {value}{where} in step {at:g}")
        self._sums.add(at, row)

    def _row(self) -> Tensor:
        """One number of every column."""
        if not self._series:
            raise ValueError("series: expected one or more, got none; `add` some")
        values = {name: _value(name, series.source) for name, series in self._series.items()}
        if not self.samples:
            end = 0
            for name, value in values.items():
                series, start, end = self._series[name], end, end + value.numel()
                series.shape, series.itemsize = tuple(value.shape), value.element_size()
                series.columns = slice(start, end)
        for name, value in values.items():
            if tuple(value.shape) != self._series[name].shape:
                expected = self._series[name].shape
                raise ValueError(f"{name}: expected a value of shape {expected}, got {tuple(value.shape)}")
        return torch.cat([value.reshape(-1).to(self.device, torch.float64) for value in values.values()])

    @property
    def nbytes(self) -> int:
        """What is kept: it does not depend on how many samples there were. A fit that was asked for, n + 1 numbers of
        float64 for each that is watched, stays until the next sample besides.
        """
        return self._sums.nbytes

    # What comes out.

    def trajectories(self) -> dict[str, Trajectory]:
        """Every series as a spline: the least-squares fit to all samples so far.

        Raises ValueError for fewer samples than control points, and where they do not determine each of these to eight
        digits: for steps that are too uneven, and for 50 control points or more of hardly more samples.
        """
        (splines, _), errors = self._sums.fit(), self._sums.error()
        result = {}
        for name, series in self._series.items():
            columns, shape = series.columns, series.shape
            spline = BSpline(splines.control[columns].reshape(*shape, self.n), splines.knots)
            error = FitError(*(part[columns].reshape(shape) for part in errors))
            result[name] = Trajectory(name, spline, error, self.samples, series.itemsize, series.unit, series.signal)
        return result

    def predict(self, steps: int | Tensor, *, method: Method = "hold") -> dict[str, Tensor]:
        """(*shape, count) of each series in float64: what comes next.

        steps: how many values, at the mean distance of the samples; or at which steps (1-D), none before the last.
        method: ``"hold"`` repeats the last sample, and needs but one; ``"level"`` goes on from the spline's end,
            ``"linear"`` with its slope there. Measured, the first was nearest for weights in training, the second for
            noisy series, the third for none (docs/trajectories.md).

        Raises ValueError for other steps, and as `trajectories` does.
        """
        if method not in get_args(Method):
            raise ValueError(f"method: expected one of {', '.join(get_args(Method))}, got {method!r}")
        if not self.samples:
            raise ValueError("samples: expected one or more, got none")
        if isinstance(steps, int):
            if steps < 1:
                raise ValueError(f"steps: expected one or more, got {steps}")
            distance = (self._sums.last - self._sums.first) / max(self.samples - 1, 1)
            ahead = torch.arange(1, steps + 1, dtype=torch.float64) * distance
        else:
            ahead = steps.detach().to("cpu", torch.float64) - self._sums.last
            if ahead.dim() != 1 or not bool((ahead >= 0).all()):
                raise ValueError(f"steps: expected one dimension of steps from {self._sums.last} on, got {steps}")
        ahead = ahead.to(self.device)
        if method == "hold":
            values = self._sums.latest[:, None].expand(-1, len(ahead))
        else:
            spline, _ = self._sums.fit()
            end = spline.domain[1]
            slope = spline(end, 1) if method == "linear" else torch.zeros_like(spline.control[:, 0])
            values = spline(end)[:, None] + slope[:, None] * ahead
        return {name: values[s.columns].reshape(*s.shape, len(ahead)).clone() for name, s in self._series.items()}

    def trajectory_variance(self, signal: str | None = None) -> dict[str, float]:
        """Scores by unit name: the variance along the splines of a unit's series, averaged over their elements.

        It is the ``trajectory`` of `infold.tiers.combine`. signal: which series count, as in `add`; None is the only
        one that has units. Raises ValueError where there is none, or several.
        """
        found = sorted({series.signal for series in self._series.values() if series.unit is not None})
        if signal is None:
            if len(found) != 1:
                raise ValueError(f"signal: expected series of one signal with units, got {found}; name one")
            signal = found[0]
        if signal not in found:
            raise ValueError(f"signal: expected one of {found}, got {signal!r}")
        totals: dict[str, tuple[float, int]] = {}
        for trajectory in self.trajectories().values():
            if trajectory.signal == signal and trajectory.unit is not None:
                total, count = totals.get(trajectory.unit, (0.0, 0))
                variance = trajectory.variance()
                totals[trajectory.unit] = total + float(variance.sum()), count + variance.numel()
        return {unit: total / count for unit, (total, count) in totals.items()}

    def compression_ratio(self) -> float:
        """Bytes of all samples and their steps over bytes of all control points, in the samples' dtypes, and knots."""
        every = self.trajectories().values()
        steps, knots = 8 * self.samples, 8 * (self.n + 4)
        return (sum(each.sample_bytes for each in every) + steps) / (sum(each.control_bytes for each in every) + knots)

    def report(self) -> str:
        """A line for each series: how many numbers, their errors together, compression, activity, stability."""
        return table(self.trajectories().values())

    # Files.

    def save(self, path: str | Path) -> None:
        """Writes what was recorded to a safetensors file; it appears complete or not at all."""
        series = [
            {"name": name, "shape": list(s.shape), "itemsize": s.itemsize, "unit": s.unit, "signal": s.signal}
            for name, s in self._series.items()
        ]
        metadata = {
            "n": self.n,
            "resolution": self.resolution,
            "on_nan": self.on_nan,
            "skipped": self.skipped,
            "series": series,
            **self._sums.steps(),
        }
        save_state(path, _KIND, _VERSION, self._sums.tensors(), metadata)

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> TrajectoryRecorder:
        """The recorder of a file of `save`. To go on recording, make the calls again that added its series, with the
        same arguments: `add`, `add_weights` (of the same ``elements``), `add_gradient_norms`.

        Raises CorruptWeightError for a damaged file, and ValueError for another version and for another kind of file.
        """
        tensors, metadata = load_state(path, _KIND, _VERSION)
        with reading_metadata(path):
            n, resolution = int(metadata["n"]), int(metadata["resolution"])
            samples, end, every = int(metadata["samples"]), 0, {}
            for each in metadata["series"]:
                series = _Series(None, each["unit"], each["signal"], tuple(each["shape"]), each["itemsize"])
                series.check(each["name"])
                start, end = end, end + (math.prod(series.shape) if samples else 0)
                series.columns = slice(start, end)
                every[each["name"]] = series
            sums = SplineSums.of(n, resolution, end, metadata, tensors, Path(path), torch.device(device))
            # After that, since it makes tensors of this size.
            recorder = cls(n, resolution=resolution, on_nan=metadata["on_nan"], device=device)
            recorder._sums, recorder._series, recorder.skipped = sums, every, int(metadata["skipped"])
            if recorder.skipped < 0:
                raise ValueError(f"skipped: expected none or more, got {recorder.skipped}")
        return recorder

    # Plots.

    def plot(self, path: str | Path, *, names: Sequence[str] | None = None, elements: int = 4) -> None:
        """Draws series as a PNG (or what ``path`` ends in): splines with their control points, and their activity.

        Samples are not kept, so there are none in the picture. names: which series; None is the first six. elements:
        how many of each, evenly spaced. Raises ImportError without matplotlib, ValueError for an unknown name.
        """
        picture(self.trajectories(), path, names, elements)


def _value(name: str, source: Source | None) -> Tensor:
    if source is None:
        raise ValueError(f"{name}: expected a source, got none; `add` it to the recorder that was loaded")
    value = source()
    if not isinstance(value, Tensor):
        try:
            value = torch.tensor(float(value), dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: expected a number or a tensor, got {type(value).__name__}") from error
    if value.is_complex() or not value.numel():
        raise ValueError(f"{name}: expected real numbers, got {value.dtype} of shape {tuple(value.shape)}")
    return value.detach()


def _weights(parameter: nn.Parameter, elements: int | None) -> Source:
    def source() -> Tensor:
        value = parameter.detach()
        value = torch.view_as_real(value) if value.is_complex() else value
        if elements is None or value.numel() <= elements:
            return value
        return value.flatten()[evenly(value.numel(), elements).to(value.device)]

    return source


def _gradient_norm(own: Iterable[nn.Parameter], every: Iterable[nn.Parameter]) -> Source:
    def source() -> Tensor:
        gradients = [p.grad.detach() for p in own if p.grad is not None]
        if not gradients:
            if all(p.grad is None for p in every):
                raise ValueError("gradients: expected some when a sample is taken, got none; were they zeroed before?")
            return torch.zeros(())
        dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
        norms = [
            torch.linalg.vector_norm(g, dtype=torch.complex128 if g.is_complex() else torch.float64) for g in dense
        ]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm

    return source

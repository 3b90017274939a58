"""Series of a training run as cubic B-splines, refined while it runs, in memory that does not grow.

What is kept of a series are the normal equations of a fine uniform spline space of M cells over [0, L]: the products
N = Σₜ b(t)·b(t)ᵀ of its basis functions at the steps that were seen (four diagonals, common to all series), and
Σₜ b(t)·y(t) and Σₜ y(t)² of each. A sample adds to four rows. When the run outgrows L, L doubles: a function of the
coarser space is exactly (1, 4, 6, 4, 1)/8 of five of the finer (the two-scale relation), so its sums are exactly such
sums of the finer one's. A spline with knots on the grid is in the fine space, so its least-squares fit to *all*
samples, and the error of that fit, follow from these sums.
"""

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

from infold._library import ops
from infold.tiers.units import units
from infold.tokenizers._files import load_state, reading_metadata, save_state, take
from infold.tokenizers.splines import BSpline, FitError, clamped_knots

#: What gives a series' next value: a number, or a tensor of always one shape.
Source = Callable[[], Tensor | float]
Method = Literal["linear", "level", "hold"]

_KIND, _VERSION = "TrajectoryRecorder", 1
#: Of a coarse basis function in the five fine ones under it.
_TWO_SCALE = (0.125, 0.5, 0.75, 0.5, 0.125)
#: Steps are nearer to zero than this: lengths that double stay finite.
_FARTHEST = 1e300
#: A pivot of the normal equations below this share of its diagonal leaves the control points less than eight digits.
_SINGULAR = 1e-7


@dataclass(frozen=True)
class Trajectory:
    """One series as a spline over steps; a series of tensors has one for each element."""

    name: str
    #: Control points (*shape, n) in float64, and the knots.
    spline: BSpline
    #: (*shape) each. Residuals below about 1e-8 of the deviation from the *first* value are not resolved.
    error: FitError
    #: How many samples there were, and how many bytes one number of them has.
    samples: int
    itemsize: int
    #: The unit (`infold.tiers.units`) that it belongs to, and what is watched of it.
    unit: str | None
    signal: str

    @property
    def shape(self) -> torch.Size:
        return self.spline.control.shape[:-1]

    @property
    def sample_bytes(self) -> int:
        """What the samples would take."""
        return self.samples * self.shape.numel() * self.itemsize

    @property
    def control_bytes(self) -> int:
        """What the control points take in the samples' dtype, without the knots, which all series share."""
        return self.spline.control.numel() * self.itemsize

    @property
    def compression_ratio(self) -> float:
        """Bytes of the samples over bytes of the control points."""
        return self.sample_bytes / self.control_bytes

    def activity(self, window: float | None = None) -> Tensor:
        """(*shape) the root mean square of the derivative, by step, over the last ``window`` steps; None is all."""
        first, last = self.spline.domain
        if window is not None and not 0 < window <= last - first:
            raise ValueError(f"window: expected above 0 and up to {last - first} steps, got {window}")
        return self.spline.rms(1, None if window is None else last - window)

    def stability(self) -> Tensor:
        """(*shape) 1 − a₄ / max(a₁, …, a₄) with the activities a of the four quarters of the run.

        1 for what no longer moves at its end, 0 for what never moved more than there, 1 for constants.
        """
        first, last = self.spline.domain
        ends = [first + (last - first) * i / 4 for i in range(4)] + [last]
        quarters = torch.stack([self.spline.rms(1, ends[i], ends[i + 1]) for i in range(4)])
        most = quarters.amax(0)
        return torch.where(most > 0, 1 - quarters[3] / most, 1.0)

    def variance(self) -> Tensor:
        """(*shape) the variance along the spline."""
        return self.spline.variance()


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
    on_nan: what a sample that is not finite does: ``"raise"`` a ValueError that names series and step before anything
        is recorded, or ``"skip"`` this step for *all* series, since they share the time axis; `skipped` counts them.
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
        #: Samples recorded, and steps skipped for numbers that were not finite.
        self.samples, self.skipped = 0, 0
        self._cells = _cells(n, resolution)
        self._series: dict[str, _Series] = {}
        #: The first step and the last, and the length that the fine space covers: 0 until there are two.
        self._first, self._last, self._length = 0.0, 0.0, 0.0
        #: N[i, i + d] as [i, d].
        self._products = torch.zeros(self._cells + 3, 4, dtype=torch.float64)
        self._allocate(0)
        self._handles: list[RemovableHandle] = []
        self._fitted: tuple[Tensor, Tensor, Tensor] | None = None

    def _allocate(self, columns: int) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=self.device)

        #: Σ b·z (M + 3, series), Σ z² and the first and last samples (series), z being the sample less the first one:
        #: a constant is in every spline space, and what it would hide is not lost to rounding.
        self._sums, self._squares = zeros(self._cells + 3, columns), zeros(columns)
        self._origin, self._latest = zeros(columns), zeros(columns)

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
        its ``signal``. In a recorder that was loaded, this gives a series its source again.

        Raises ValueError for a name that is taken, and for a new one once there are samples.
        """
        known = self._series.get(name)
        if known is not None and known.source is None:
            if (known.unit, known.signal) != (unit, signal):
                expected = f"unit {known.unit!r} and signal {known.signal!r}"
                raise ValueError(f"{name}: expected {expected} as recorded, got {unit!r} and {signal!r}")
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

        start = self._last
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
        another shape than before, and numbers that are not finite (with ``on_nan="raise"``).
        """
        if at is None:
            at = self._last + 1 if self.samples else 0.0
        at = float(at)
        least = self._last if self.samples else -_FARTHEST
        if not least < at < _FARTHEST:
            raise ValueError(f"at: expected a step above {least} and below {_FARTHEST}, got {at}")
        row = self._row()
        finite = torch.isfinite(row)
        if not bool(finite.all()):
            if self.on_nan == "skip":
                self.skipped += 1
                return
            index = int((~finite).nonzero()[0])
            name, series = next(each for each in self._series.items() if index < each[1].columns.stop)
            where = f" at {index - series.columns.start}" if series.shape else ""
            raise ValueError(f"{name}: expected finite numbers, got {float(row[index])}{where} in step {at:g}")
        self._record(at, row)

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

    def _record(self, at: float, row: Tensor) -> None:
        self._fitted = None
        if not self.samples:
            self._allocate(len(row))
            self._origin.copy_(row)
            self._first = at
        elif not self._length:
            self._length = at - self._first
        while at - self._first > self._length > 0:
            self._double()
        place = (at - self._first) / self._length * self._cells if self._length else 0.0
        cell = min(int(place), self._cells - 1)
        weights = _uniform_basis(place - cell)
        for first in range(4):
            for second in range(first, 4):
                self._products[cell + first, second - first] += weights[first] * weights[second]
        moved = row - self._origin
        self._sums[cell : cell + 4].addr_(torch.tensor(weights, dtype=torch.float64).to(self.device), moved)
        self._squares.addcmul_(moved, moved)
        self._latest.copy_(row)
        self._last = at
        self.samples += 1

    def _double(self) -> None:
        """Goes on to the sums of the space whose cells are twice as long."""
        self._length *= 2
        rows = len(self._products)
        # N'[I, J] = Σ w_k·w_m·N[2I + k − 3, 2J + m − 3], where N is zero beyond the third diagonal.
        coarse = torch.zeros_like(self._products)
        for diagonal in range(4):
            for k, left in enumerate(_TWO_SCALE):
                for m, right in enumerate(_TWO_SCALE):
                    apart = 2 * diagonal + m - k
                    if abs(apart) <= 3:
                        # The lower index of the pair is 2I + shift, the upper one `apart` on.
                        shift = k - 3 + min(apart, 0)
                        first, last = max((1 - shift) // 2, 0), (rows - 1 - abs(apart) - shift) // 2
                        fine = self._products[2 * first + shift : 2 * last + shift + 1 : 2, abs(apart)]
                        coarse[first : last + 1, diagonal] += left * right * fine
        self._products = coarse
        # In place, since the sums are what takes memory: row I needs rows 2I − 3 to 2I + 1, of which only some of the
        # first three have been written before.
        head = self._sums[:3].clone()
        for row in range(rows):
            total = torch.zeros_like(self._squares)
            for k, weight in enumerate(_TWO_SCALE):
                below = 2 * row + k - 3
                if 0 <= below < rows:
                    total.add_(head[below] if below < 3 else self._sums[below], alpha=weight)
            self._sums[row] = total

    @property
    def nbytes(self) -> int:
        """What is kept: it does not depend on how many samples there were. A fit that was asked for, n + 1 numbers of
        float64 for each that is watched, stays until the next sample besides.
        """
        kept = (self._products, self._sums, self._squares, self._origin, self._latest)
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    # What comes out.

    def trajectories(self) -> dict[str, Trajectory]:
        """Every series as a spline: the least-squares fit to all samples so far.

        Raises ValueError for fewer samples than control points, and where they do not determine each of these to eight
        digits: for steps that are too uneven, and for 50 control points or more of hardly more samples.
        """
        knots, control, residual = self._fit()
        count = self.samples
        # Of z = y − y₀: the functions sum up to one.
        total = self._sums.sum(0)
        deviation = (self._squares - total.square() / count).clamp(min=0)
        size = (self._squares + 2 * self._origin * total + count * self._origin.square()).clamp(min=0)
        floor = 16 * torch.finfo(torch.float64).eps * size.sqrt()
        parts = [(part / count).sqrt() for part in (residual, deviation, size, floor.square())]
        result = {}
        for name, series in self._series.items():
            columns, shape = series.columns, series.shape
            spline = BSpline(control[columns].reshape(*shape, self.n), knots)
            error = FitError(*(part[columns].reshape(shape) for part in parts))
            result[name] = Trajectory(name, spline, error, count, series.itemsize, series.unit, series.signal)
        return result

    def _fit(self) -> tuple[Tensor, Tensor, Tensor]:
        """Knots, control points (columns, n), and the columns' sums of squared residuals."""
        if self._fitted is not None:
            return self._fitted
        if self.samples < self.n:
            raise ValueError(f"samples: expected {self.n} or more for {self.n} control points, got {self.samples}")
        cell, end = self._length / self._cells, self._last - self._first
        even = torch.linspace(0, end, self.n - 2, dtype=torch.float64)[1:-1]
        knots = clamped_knots(self.n, 0.0, end, (even / cell).round() * cell)
        basis = _on_grid(knots, cell, len(self._products))
        gram = basis.T @ _banded_product(self._products, basis)
        moments = basis.T.to(self.device) @ self._sums
        factor, failed = torch.linalg.cholesky_ex(gram)
        pivots = factor.diagonal().square() / gram.diagonal()
        if int(failed) or not bool((pivots > _SINGULAR).all()):
            index = int(failed) - 1 if int(failed) else int(pivots.argmin())
            where = self._first + float(BSpline(torch.zeros(self.n), knots).abscissae[index])
            raise ValueError(
                f"steps: expected samples that determine every control point, got too few near step {where:g}"
            )
        control = torch.cholesky_solve(moments, factor.to(self.device))
        # Σ (z − ẑ)²; its error is of second order in the control points'.
        explained = (control * (2 * moments - gram.to(self.device) @ control)).sum(0)
        residual = (self._squares - explained).clamp(min=0)
        self._fitted = knots + self._first, control.T + self._origin[:, None], residual
        return self._fitted

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
            distance = (self._last - self._first) / max(self.samples - 1, 1)
            ahead = torch.arange(1, steps + 1, dtype=torch.float64) * distance
        else:
            ahead = steps.detach().to("cpu", torch.float64) - self._last
            if ahead.dim() != 1 or not bool((ahead >= 0).all()):
                raise ValueError(f"steps: expected one dimension of steps from {self._last} on, got {steps}")
        ahead = ahead.to(self.device)
        if method == "hold":
            values = self._latest[:, None].expand(-1, len(ahead))
        else:
            knots, control, _ = self._fit()
            spline = BSpline(control, knots)
            end = spline.domain[1]
            slope = spline(end, 1) if method == "linear" else torch.zeros_like(control[:, 0])
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
        lines = [
            f"{'series':<32} {'numbers':>9} {'err/dev':>9} {'err/size':>9} {'ratio':>7} {'activity':>10} "
            f"{'last quarter':>12} {'stability':>9}"
        ]
        for each in self.trajectories().values():
            total = each.error.total()
            first, last = each.spline.domain
            overall, late = (a.square().mean().sqrt() for a in (each.activity(), each.activity((last - first) / 4)))
            lines.append(
                f"{each.name:<32} {each.shape.numel():>9,} {float(total.to_deviation):>9.2%} "
                f"{float(total.to_size):>9.2%} {each.compression_ratio:>7.1f} {float(overall):>10.3g} "
                f"{float(late):>12.3g} {float(each.stability().mean()):>9.2f}"
            )
        return "\n".join(lines)

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
            "samples": self.samples,
            "skipped": self.skipped,
            "first": self._first,
            "last": self._last,
            "length": self._length,
            "series": series,
        }
        save_state(path, _KIND, _VERSION, {name: getattr(self, f"_{name}") for name in _TENSORS}, metadata)

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> TrajectoryRecorder:
        """The recorder of a file of `save`. To go on recording, `add` each series again under its name.

        Raises CorruptWeightError for a damaged file, and ValueError for another version and for another kind of file.
        """
        tensors, metadata = load_state(path, _KIND, _VERSION)
        with reading_metadata(path):
            n, resolution = int(metadata["n"]), int(metadata["resolution"])
            # Before anything of this size is made.
            products = take(tensors, "products", torch.float64, (_cells(n, resolution) + 3, 4), path)
            recorder = cls(n, resolution=resolution, on_nan=metadata["on_nan"], device=device)
            recorder.samples, recorder.skipped = int(metadata["samples"]), int(metadata["skipped"])
            recorder._first, recorder._last = float(metadata["first"]), float(metadata["last"])
            recorder._length = float(metadata["length"])
            recorder._check_steps()
            end = 0
            for each in metadata["series"]:
                series = _Series(None, each["unit"], each["signal"], tuple(each["shape"]), each["itemsize"])
                series.check(each["name"])
                start, end = end, end + (math.prod(series.shape) if recorder.samples else 0)
                series.columns = slice(start, end)
                recorder._series[each["name"]] = series
        rows = len(products)
        shapes = {"sums": (rows, end), "squares": (end,), "origin": (end,), "latest": (end,)}
        recorder._products = products
        for name, shape in shapes.items():
            setattr(recorder, f"_{name}", take(tensors, name, torch.float64, shape, path).to(recorder.device))
        return recorder

    def _check_steps(self) -> None:
        """Raises ValueError for steps and a length that no recording leads to."""
        reach = self._last - self._first
        started = self.samples > 0 or self._first == self._last == 0
        covered = (
            self._length / 2 < reach <= self._length < math.inf if self.samples > 1 else reach == self._length == 0
        )
        if min(self.samples, self.skipped) < 0 or not (started and covered):
            got = f"{self.samples} from {self._first} to {self._last} on a length of {self._length}"
            raise ValueError(f"samples: expected steps on a length, got {got}")

    # Plots.

    def plot(self, path: str | Path, *, names: Sequence[str] | None = None, elements: int = 4) -> None:
        """Draws series as a PNG (or what ``path`` ends in): splines with their control points, and their activity.

        Samples are not kept, so there are none in the picture. names: which series; None is the first six. elements:
        how many of each, evenly spaced. Raises ImportError without matplotlib, ValueError for an unknown name.
        """
        from infold.spectral.plot import figure

        every = self.trajectories()
        names = list(every)[:6] if names is None else list(names)
        unknown = [name for name in names if name not in every]
        if unknown or not names:
            raise ValueError(f"names: expected recorded series, got {unknown}")
        if elements < 1:
            raise ValueError(f"elements: expected one or more, got {elements}")
        drawing = figure(10, 2.2 * len(names))
        axes = drawing.subplots(len(names), 2, squeeze=False, sharex=True)
        for (left, right), name in zip(axes, names, strict=True):
            spline = every[name].spline
            flat = spline.control.reshape(-1, self.n).cpu()
            chosen = flat[_evenly(len(flat), elements)]
            t = torch.linspace(*spline.domain, 400, dtype=torch.float64)
            shown = BSpline(chosen, spline.knots)
            for line, control in zip(shown(t), chosen, strict=True):
                (drawn,) = left.plot(t, line, linewidth=1)
                left.plot(spline.abscissae, control, "o", markersize=3, color=drawn.get_color(), alpha=0.6)
            activity = BSpline(flat, spline.knots)(t, 1).square().mean(0).sqrt()
            right.plot(t, activity, color="black", linewidth=1)
            left.set_title(f"{name}: {len(chosen)} of {len(flat)}, control points", fontsize=8)
            right.set_title(f"{name}: activity, all", fontsize=8)
        for below in axes[-1]:
            below.set_xlabel("step")
        drawing.savefig(path, dpi=120)


#: What a file holds: attributes, with an underscore before.
_TENSORS = ("products", "sums", "squares", "origin", "latest")


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
        return value.flatten()[_evenly(value.numel(), elements).to(value.device)]

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


def _cells(n: int, resolution: int) -> int:
    return 1 << (resolution * n - 1).bit_length()


def _evenly(count: int, chosen: int) -> Tensor:
    """Indices of evenly spaced elements, at most so many."""
    chosen = min(count, chosen)
    return torch.arange(chosen) * count // chosen


def _uniform_basis(s: float) -> tuple[float, float, float, float]:
    """The four uniform cubic basis functions that are not zero at ``s`` of a cell, from 0 to 1."""
    return (
        (1 - s) ** 3 / 6,
        (3 * s**3 - 6 * s**2 + 4) / 6,
        (-3 * s**3 + 3 * s**2 + 3 * s + 1) / 6,
        s**3 / 6,
    )


def _on_grid(knots: Tensor, cell: float, rows: int) -> Tensor:
    """(rows, n) coefficients of a space's basis functions in the fine uniform space that holds it from 0 to its end.

    The coefficient for the fine function about x is f(x) − cell²·f″(x)/6 (de Boor and Fix 1973), f being twice
    continuously differentiable; at the ends the outermost polynomials go on. Functions beyond the end have no sums.
    """
    middles = torch.arange(-1, rows - 1, dtype=torch.float64) * cell
    values: Tensor = ops.bspline_basis(middles, knots, 0)
    bends: Tensor = ops.bspline_basis(middles, knots, 2)
    return values - cell**2 / 6 * bends


def _banded_product(band: Tensor, matrix: Tensor) -> Tensor:
    """A symmetric banded matrix, [i, d] being its [i, i + d], times a matrix."""
    result: Tensor = band[:, :1] * matrix
    for d in range(1, band.shape[1]):
        result[:-d] += band[:-d, d, None] * matrix[d:]
        result[d:] += band[:-d, d, None] * matrix[:-d]
    return result

"""Monotone splines: a map for each dimension that is smooth, ascends and has an exact inverse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Samples that quantiles are taken of: of more they hardly differ.
MAX_SAMPLES = 1 << 14
#: No slope is below this, so that neither direction loses digits.
MIN_SLOPE = 1e-3
#: Knots nearer than so many roundings of the largest one are not apart.
_APART = 16


class MonotoneSpline(nn.Module):
    """A monotone rational-quadratic spline for each dimension (Gregory and Delbourgo 1982; Durkan et al. 2019).

    Between knots it is a quotient of quadratics with an analytic inverse; beyond them it goes on in straight lines. It
    begins as the identity. It is made of PyTorch's operators: it runs on any device, compiles, and has gradients of any
    order in its input and, where they are set to require them, in its knots.

    x_knots, y_knots: (dimensions, knots), ascending; slopes: (dimensions, knots), positive. At least two knots. They
    keep their dtype when a module is cast (``.bfloat16()``): in fewer digits neighbours may coincide.

    Raises ValueError for knots that do not ascend and slopes below `MIN_SLOPE`, also when such are loaded.
    """

    x_knots: Tensor
    y_knots: Tensor
    slopes: Tensor

    def __init__(self, x_knots: Tensor, y_knots: Tensor, slopes: Tensor) -> None:
        super().__init__()
        shape = x_knots.shape
        if len(shape) != 2 or shape[1] < 2 or y_knots.shape != shape or slopes.shape != shape:
            got = ", ".join(str(list(t.shape)) for t in (x_knots, y_knots, slopes))
            raise ValueError(
                f"knots, slopes: expected three of shape [dimensions, knots], two knots or more, got {got}"
            )
        _check(x_knots, y_knots, slopes)
        self.register_buffer("x_knots", x_knots)
        self.register_buffer("y_knots", y_knots)
        self.register_buffer("slopes", slopes)
        self.register_load_state_dict_post_hook(_check_loaded)  # type: ignore[no-untyped-call]

    @classmethod
    def identity(cls, dimensions: int, knots: int = 8, dtype: torch.dtype = torch.float32) -> MonotoneSpline:
        """The map that changes nothing, with knots from −1 to 1."""
        places = torch.linspace(-1, 1, knots, dtype=dtype).expand(dimensions, -1)
        return cls(places.clone(), places.clone(), torch.ones_like(places))

    @classmethod
    def fit(cls, x: Tensor, knots: int = 8, strength: float = 1.0) -> MonotoneSpline:
        """A map towards a normal distribution of x's own mean and deviation, in every dimension.

        x: (samples, dimensions); of more than 16,384 samples, as many evenly spaced ones. Knots lie on quantiles where
        these are distinct, else evenly between the extremes, and each goes to the normal quantile of its place among
        the numbers, ties halved. Dimensions in which neither ascends, such as a constant one or one whose spread is
        a few roundings of its mean, stay as they are. Knots are in x's dtype, in float32 at least. strength: 0 is the
        identity, 1 goes all the way.

        Raises ValueError for other shapes, numbers that are not finite, and a strength outside 0 to 1.
        """
        return cls.fit_all(x, knots, (strength,))[0]

    @classmethod
    def fit_all(cls, x: Tensor, knots: int, strengths: Sequence[float]) -> list[MonotoneSpline]:
        """What `fit` gives for each of several strengths; sorts once."""
        if x.dim() != 2 or not len(x):
            raise ValueError(f"x: expected shape [samples, dimensions], got {list(x.shape)}")
        for strength in strengths:
            if not 0 <= strength <= 1:
                raise ValueError(f"strength: expected from 0 to 1, got {strength}")
        if knots < 2:
            raise ValueError(f"knots: expected two or more, got {knots}")
        if not bool(x.isfinite().all()):
            raise ValueError("x: expected finite numbers")
        values = x[:: -(-len(x) // MAX_SAMPLES)].double()
        mean, deviation = values.mean(0)[:, None], values.std(0, correction=0)[:, None]
        # Each dimension's numbers side by side.
        order = values.T.contiguous().sort(1).values
        share = (torch.arange(knots, dtype=torch.float64, device=x.device) + 0.5) / knots
        quantiles = order[:, (share * len(values)).long()]
        even = order[:, :1].lerp(order[:, -1:], torch.linspace(0, 1, knots, dtype=torch.float64, device=x.device))

        def normal(places: Tensor) -> Tensor:
            below, up_to = (torch.searchsorted(order, places.contiguous(), right=right) for right in (False, True))
            # A normal distribution has no quantiles of 0 and 1.
            middle = ((below + up_to) / (2 * len(values))).clamp(0.5 / len(values), 1 - 0.5 / len(values))
            goal: Tensor = mean + deviation * torch.special.ndtri(middle)
            return goal

        spread = torch.maximum(deviation, 1e-3 * (1 + mean.abs()))
        unbent = mean + spread * torch.special.ndtri(share)
        maps = [(places, normal(places)) for places in (even, quantiles)]
        dtype = torch.promote_types(x.dtype, torch.float32)
        # Nearer ones are hardly apart in float32, or in the dtype that they will have.
        least = torch.maximum(1e-4 * deviation, _APART * torch.finfo(dtype).eps * order.abs().amax(1, keepdim=True))

        def spline(strength: float) -> MonotoneSpline:
            # As they are, where nothing else ascends.
            x_knots = y_knots = unbent
            slopes = torch.ones_like(x_knots)
            for places, goal in maps:
                target = places.lerp(goal, strength)
                apart = (places.diff(dim=-1) > least) & (target.diff(dim=-1) > least)
                ascends = apart.all(-1, keepdim=True) & (deviation > 0)
                bend = _slopes(places, target).clamp(MIN_SLOPE, 1 / MIN_SLOPE)
                x_knots, y_knots, slopes = (
                    torch.where(ascends, new, old)
                    for new, old in ((places, x_knots), (target, y_knots), (bend, slopes))
                )
            return cls(x_knots.to(dtype), y_knots.to(dtype), slopes.to(dtype))

        return list(map(spline, strengths))

    @property
    def bent(self) -> Tensor:
        """(dimensions), whether each is changed at all."""
        return ((self.x_knots != self.y_knots) | (self.slopes != 1)).any(-1)

    @property
    def dimensions(self) -> int:
        return self.x_knots.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """(..., dimensions) to the same shape, in x's dtype, or the knots' for integers; computed in the wider."""
        result, x = x.dtype if x.is_floating_point() else self.x_knots.dtype, self._wide(x)
        left, width, height, low, slope, before, after = self._bins(x, self.x_knots)
        t = ((x - left) / width).clamp(0, 1)
        rest = t * (1 - t)
        inner = low + height * (slope * t * t + before * rest) / (slope + (before + after - 2 * slope) * rest)
        return self._with_tails(x, inner, self.x_knots, self.slopes).to(result)

    def inverse(self, y: Tensor) -> Tensor:
        """What `forward` makes y of."""
        result, y = y.dtype if y.is_floating_point() else self.x_knots.dtype, self._wide(y)
        left, width, height, low, slope, before, after = self._bins(y, self.y_knots)
        u = ((y - low) / height).clamp(0, 1)
        bend = before + after - 2 * slope
        a = (slope - before) + u * bend
        b = before - u * bend
        c = -slope * u
        # The root that does not cancel; b and the root are not negative.
        root = (b * b - 4 * a * c).clamp(min=0).sqrt()
        inner = left + width * (2 * c / (-b - root).clamp(max=-torch.finfo(y.dtype).tiny)).clamp(0, 1)
        return self._with_tails(y, inner, self.y_knots, 1 / self.slopes).to(result)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]

    def _wide(self, x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, self.x_knots.dtype))

    def _bins(self, x: Tensor, knots: Tensor) -> tuple[Tensor, ...]:
        """Of each number's interval of ``knots``: x's left end and width, y's height and low end, its slope, and those
        at its ends.
        """
        if x.dim() < 1 or x.shape[-1] != self.dimensions:
            raise ValueError(f"x: expected a last dimension of {self.dimensions}, got shape {list(x.shape)}")
        columns = x.detach().reshape(-1, self.dimensions).T.contiguous()
        inner = knots[:, 1:-1].contiguous().to(x.dtype)
        index = torch.searchsorted(inner, columns, right=True).T.reshape(x.shape)
        width, height = self.x_knots.diff(dim=-1), self.y_knots.diff(dim=-1)
        parts = (self.x_knots[:, :-1], width, height, self.y_knots[:, :-1], height / width,
                 self.slopes[:, :-1], self.slopes[:, 1:])  # fmt: skip
        rows = torch.arange(self.dimensions, device=x.device)
        return tuple(part.to(x.dtype)[rows, index] for part in parts)

    @staticmethod
    def _with_tails(x: Tensor, inner: Tensor, knots: Tensor, slopes: Tensor) -> Tensor:
        first, last = knots[:, 0].to(x.dtype), knots[:, -1].to(x.dtype)
        below = F.relu(first - x) * slopes[:, 0].to(x.dtype)
        above = F.relu(x - last) * slopes[:, -1].to(x.dtype)
        # Outside, the inner part is clamped to an end.
        return inner - below + above


def _check(x_knots: Tensor, y_knots: Tensor, slopes: Tensor) -> None:
    for name, knots in (("x_knots", x_knots), ("y_knots", y_knots)):
        # Of NaN no comparison holds.
        if not bool((knots.diff(dim=-1) > 0).all()) or not bool(knots.isfinite().all()):
            raise ValueError(f"{name}: expected finite knots that ascend in every dimension")
    if not bool((slopes >= 0.999 * MIN_SLOPE).all()) or not bool(slopes.isfinite().all()):
        raise ValueError(f"slopes: expected finite slopes of {MIN_SLOPE} or more, got {float(slopes.min())}")


def _check_loaded(spline: MonotoneSpline, _: object) -> None:
    if not spline.x_knots.is_meta:
        _check(spline.x_knots, spline.y_knots, spline.slopes)


def _slopes(x: Tensor, y: Tensor) -> Tensor:
    """Slopes at the knots: the harmonic mean of the neighbours', weighted by widths (Fritsch and Butland 1984), and at
    the ends the neighbour's own.
    """
    width = x.diff(dim=-1)
    slope = y.diff(dim=-1) / width
    if slope.shape[-1] == 1:
        return slope.expand(-1, 2).clone()
    one, two = width[:, 1:] + 2 * width[:, :-1], 2 * width[:, 1:] + width[:, :-1]
    inner = (one + two) / (two / slope[:, :-1] + one / slope[:, 1:])
    return torch.cat([slope[:, :1], inner, slope[:, -1:]], -1)

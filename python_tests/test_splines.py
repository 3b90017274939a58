"""Cubic B-splines against SciPy's and finite differences."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.interpolate
import torch
from infold.tokenizers import BSpline, clamped_knots, fit_bspline
from torch import Tensor


def knots_of(n: int, seed: int = 0) -> Tensor:
    """Clamped and uneven, from −1 to 3."""
    generator = torch.Generator().manual_seed(seed)
    interior = torch.rand(n - 4, generator=generator, dtype=torch.float64).sort().values * 4 - 1
    return clamped_knots(n, -1.0, 3.0, interior)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def scipys(spline: BSpline) -> scipy.interpolate.BSpline:
    control = spline.control.double().movedim(-1, 0)
    return scipy.interpolate.BSpline(spline.knots.numpy(), control.numpy(), 3)


@pytest.mark.parametrize("n", [4, 5, 9])
@pytest.mark.parametrize("derivative", [0, 1, 2, 3])
def test_values_and_derivatives_are_scipys(n: int, derivative: int) -> None:
    spline = BSpline(random(2, 3, n), knots_of(n))
    # Not on knots, where the third derivative jumps.
    t = torch.linspace(-1, 3, 57, dtype=torch.float64).reshape(3, 19)
    expected = torch.from_numpy(scipys(spline)(t.numpy(), derivative)).movedim((0, 1), (2, 3))
    assert spline(t, derivative).shape == (2, 3, 3, 19)
    torch.testing.assert_close(spline(t, derivative), expected, rtol=1e-11, atol=1e-11)
    if derivative:
        assert torch.equal(spline.derivative(derivative)(t), spline(t, derivative))
    assert spline(0.5, derivative).shape == (2, 3)
    assert not spline(t, 4).any()


def test_beyond_its_ends_a_spline_must_be_asked_for() -> None:
    spline = BSpline(random(2, 7), knots_of(7))
    assert spline.domain == (-1.0, 3.0)
    with pytest.raises(ValueError, match=r"points: expected numbers from -1.0 to 3.0, got 3.5 at 2"):
        spline(torch.tensor([-1.0, 3.0, 3.5]))
    for far in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="points"):
            spline(far)
        with pytest.raises(ValueError, match="points"):
            spline(far, extrapolate=True)
    t = torch.tensor([-2.0, 4.0], dtype=torch.float64)
    expected = torch.from_numpy(scipys(spline)(t.numpy(), extrapolate=True)).T
    torch.testing.assert_close(spline(t, extrapolate=True), expected, rtol=1e-10, atol=1e-10)


def test_abscissae_reproduce_the_line() -> None:
    """A line's control points lie on it, at the Greville abscissae."""
    knots = knots_of(9)
    bare = BSpline(torch.zeros(9), knots)
    t = torch.linspace(-1, 3, 33, dtype=torch.float64)
    torch.testing.assert_close(BSpline(2 - 3 * bare.abscissae, knots)(t), 2 - 3 * t)


def test_differentiable_in_the_control_points() -> None:
    control = random(2, 6).requires_grad_()
    t = torch.linspace(-1, 3, 7, dtype=torch.float64)
    for derivative in range(3):
        assert torch.autograd.gradcheck(lambda c, d=derivative: BSpline(c, knots_of(6))(t, d), control)
    assert torch.autograd.gradcheck(lambda c: BSpline(c, knots_of(6)).variance(), control)
    assert torch.autograd.gradcheck(lambda c: BSpline(c, knots_of(6)).rms(1, 0.0, 2.0), control)
    values = random(2, 12).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: fit_bspline(v, 6).control, values)


@pytest.mark.parametrize("derivative", [0, 1, 2])
@pytest.mark.parametrize("span", [(None, None), (0.25, 1.75), (1.0, None)])
def test_means_are_integrals(derivative: int, span: tuple[float | None, float | None]) -> None:
    spline = BSpline(random(3, 8), knots_of(8))
    start, end = (-1.0 if span[0] is None else span[0]), (3.0 if span[1] is None else span[1])
    # SciPy's piecewise polynomials, squared by interpolation of degree 6 on each piece and integrated in closed form.
    for index in range(3):
        one = scipy.interpolate.BSpline(spline.knots.numpy(), spline.control[index].numpy(), 3)
        breaks = np.unique(np.concatenate([[start, end], spline.knots[(spline.knots > start) & (spline.knots < end)]]))
        total = 0.0
        for a, b in itertools.pairwise(breaks):
            x = (a + b) / 2 + (b - a) / 2 * np.cos(np.pi * (np.arange(7) + 0.5) / 7)
            square = np.polynomial.Polynomial.fit(x, one(x, derivative) ** 2, 6).integ()
            total += square(b) - square(a)
        found = float(spline.rms(derivative, *span)[index])
        assert found == pytest.approx(np.sqrt(total / (end - start)), rel=1e-9)


def test_variance_is_that_of_many_points() -> None:
    spline = BSpline(random(3, 8) + 100, knots_of(8))
    fine = spline(torch.linspace(-1, 3, 400_001, dtype=torch.float64))
    torch.testing.assert_close(spline.variance(), fine.var(-1, correction=0), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="start, end"):
        spline.rms(0, 2.0, 2.0)


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize(("n", "count"), [(4, 4), (4, 50), (8, 8), (8, 9), (8, 1000), (31, 100), (64, 64)])
def test_fits_are_scipys(n: int, count: int, uneven: bool) -> None:
    values = random(2, 3, count).cumsum(-1)
    points = random(count, seed=1).abs().cumsum(0) if uneven and count > n else None
    spline = fit_bspline(values, n, points)
    t = np.arange(count, dtype=float) if points is None else points.numpy()
    knots = np.concatenate([[t[0]] * 3, np.linspace(t[0], t[-1], n - 2), [t[-1]] * 3])
    np.testing.assert_allclose(spline.knots.numpy(), knots, rtol=1e-14)
    expected = scipy.interpolate.make_lsq_spline(t, values.movedim(-1, 0).numpy(), knots, 3)
    scale = np.abs(expected.c).max()
    np.testing.assert_allclose(spline.control.movedim(-1, 0).numpy(), expected.c, rtol=0, atol=1e-8 * scale)
    residual = values.numpy() - np.moveaxis(expected(t), 0, -1)
    rms = np.sqrt((residual**2).mean(-1))
    error = spline.error(values, points)
    np.testing.assert_allclose(error.rms.numpy(), rms, atol=1e-10 * scale)
    if count > n + 1:
        np.testing.assert_allclose(error.to_deviation.numpy(), rms / values.numpy().std(-1), rtol=1e-8)
        np.testing.assert_allclose(error.to_size.numpy(), rms / np.sqrt((values.numpy() ** 2).mean(-1)), rtol=1e-8)
        assert float(error.total().rms) == pytest.approx(float(np.sqrt((residual**2).mean())))


def test_given_knots_and_dtypes() -> None:
    values, knots = random(5, 200), knots_of(7)
    points = torch.linspace(-1, 3, 200, dtype=torch.float64)
    expected = scipy.interpolate.make_lsq_spline(points.numpy(), values.T.numpy(), knots.numpy(), 3).c.T
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        spline = fit_bspline(values.to(dtype), 7, points, knots)
        assert spline.control.dtype == dtype
        assert torch.equal(spline.knots, knots)
        torch.testing.assert_close(spline.control.double(), torch.from_numpy(expected), rtol=0, atol=tolerance)
    assert fit_bspline(torch.zeros(0, 3, 20), 7).control.shape == (0, 3, 7)
    # Any strides, and knots wider than the points.
    wide = clamped_knots(6, -2.0, 5.0)
    spread = fit_bspline(values.T.contiguous().T, 6, points, wide)
    torch.testing.assert_close(spread.control, fit_bspline(values, 6, points, wide).control)


def test_a_cubic_comes_back() -> None:
    t = torch.linspace(0, 1, 40, dtype=torch.float64)
    values = 1e6 + 2 * t - 5 * t**2 + t**3
    error = fit_bspline(values, 5).error(values)
    # What rounding leaves over is reported as what it is.
    assert float(error.to_size) < 1e-14
    assert float(error.rms) < 1e-8
    assert float(error.to_deviation) == float(error.rms) / values.numpy().std()


@pytest.mark.parametrize("value", [0.0, 0.1, -3e7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [50, 20_000])
def test_constants_have_no_error(value: float, dtype: torch.dtype, count: int) -> None:
    if dtype == torch.float16 and value < -1e4:
        value = -3e4
    values = torch.full((2, count), value, dtype=dtype)
    error = fit_bspline(values, 8).error(values)
    assert error.to_deviation.tolist() == error.to_size.tolist() == [0, 0]
    # Of another constant it is none.
    other = fit_bspline(values, 8).error(values.double() * 1.1 + 1)
    assert bool((other.to_size > 0.05).all())
    assert other.to_deviation.tolist() == [torch.inf, torch.inf]


@pytest.mark.parametrize(
    ("dtype", "offset", "swing"),
    [
        (torch.float32, 1e6, 1.0),
        (torch.float32, 1.0, 2e-7),
        (torch.bfloat16, 1.0, 0.1),
        (torch.bfloat16, 1.0, 0.01),
        (torch.float64, 1e15, 1.0),
    ],
)
def test_a_bad_fit_is_no_small_error(dtype: torch.dtype, offset: float, swing: float) -> None:
    """Also where all that moves is a few roundings of the values."""
    values = (offset + swing * torch.sin(400 * torch.linspace(0, 1, 200, dtype=torch.float64))).to(dtype)
    spline = fit_bspline(values, 8)
    raw = values.double().numpy()
    residual = raw - scipys(spline)(np.arange(200.0))
    expected = np.sqrt((residual**2).mean())
    error = spline.error(values)
    assert float(error.to_deviation) > 0.5
    assert float(error.to_deviation) == pytest.approx(expected / raw.std(), rel=0.2 if offset == 1e15 else 1e-6)
    assert float(error.to_size) == pytest.approx(
        expected / np.sqrt((raw**2).mean()), rel=0.2 if offset == 1e15 else 1e-6
    )


@pytest.mark.parametrize("index", [0, 37, 99])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_named(index: int, bad: float) -> None:
    values = random(4, 100)
    values[2, index] = bad
    with pytest.raises(ValueError, match=rf"values: expected finite numbers, got {bad} at \(2, {index}\)"):
        fit_bspline(values, 8)


def test_wrong_arguments_are_named() -> None:
    values = random(3, 20)
    points = torch.arange(20, dtype=torch.float64)
    swapped, outside, missing = points.clone(), points.clone(), points.clone()
    swapped[[4, 5]] = swapped[[5, 4]]
    outside[-1] = 30
    missing[7] = float("nan")
    near = torch.cat([torch.tensor([0.0, 1e-20]), torch.linspace(0.5, 19, 18)]).double()
    bunched = torch.cat([torch.linspace(0, 1, 19, dtype=torch.float64), torch.tensor([19.0], dtype=torch.float64)])
    cases = [
        (r"points: expected 21 or more for 21 control points, got 20", {"n": 21}),
        (r"n: expected 4 or more", {"n": 3}),
        (r"points: .*at 5", {"n": 8, "points": swapped}),
        (r"points: .*30 at 19", {"n": 8, "points": outside, "knots": clamped_knots(8, 0, 19)}),
        (r"points: .*NaN at 7", {"n": 8, "points": missing}),
        (r"points: .*none for control point", {"n": 8, "points": bunched}),
        (r"points: .*too few near", {"n": 20, "points": near}),
        (r"points: expected 20, one for each value", {"n": 8, "points": points[1:]}),
        (r"knots: expected 12 numbers", {"n": 8, "knots": clamped_knots(9, 0, 19)}),
        (r"knots: .*ascending", {"n": 8, "knots": clamped_knots(8, 0, 19).flip(0)}),
    ]
    for message, arguments in cases:
        with pytest.raises(ValueError, match=message):
            fit_bspline(values, **arguments)
    with pytest.raises(ValueError, match="values: expected floats"):
        fit_bspline(values.long(), 8)
    with pytest.raises(ValueError, match="control: expected floats, 4 or more"):
        BSpline(torch.zeros(2, 3), torch.zeros(7))
    with pytest.raises(ValueError, match="knots: expected 12 numbers"):
        BSpline(torch.zeros(2, 8), torch.zeros(11))
    with pytest.raises(ValueError, match="knots"):
        BSpline(torch.zeros(2, 8), torch.zeros(12))
    with pytest.raises(ValueError, match="interior: expected 4 knots"):
        clamped_knots(8, interior=torch.zeros(3))
    with pytest.raises(ValueError, match="values: expected shape"):
        fit_bspline(values, 8).error(values[:2])

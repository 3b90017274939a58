"""Tokenizers, monotone splines and their operators against dense float64, finite differences, SciPy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from infold import CorruptWeightError
from infold._library import ops
from infold.tokenizers import PCA, MonotoneSpline, PCATokenizer, SplinePCATokenizer
from infold.tokenizers._files import load_state, save_state
from scipy.interpolate import make_lsq_spline
from torch import Tensor, nn


def skewed(rows: int = 2000, features: int = 24, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(rows, 6, generator=generator) @ torch.randn(6, features, generator=generator)
    return (0.4 * factors + 0.1 * torch.randn(rows, features, generator=generator)).exp()


def pictures(count: int = 300, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, 3, 8, 12, generator=generator) * 255).to(torch.uint8)


def operands(k: int = 5, features: int = 9, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 3, features), (2, 3, k), (k, features), (features,), (k,))
    return tuple(torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes)


# The operators.


@pytest.mark.parametrize("with_mean", [False, True])
@pytest.mark.parametrize("with_scale", [False, True])
def test_projection_and_its_adjoint(with_mean: bool, with_scale: bool) -> None:
    x, z, components, mean, scale = operands()
    m, s = mean if with_mean else None, scale if with_scale else None
    expected = (x - mean if with_mean else x) @ components.T * (scale if with_scale else 1)
    torch.testing.assert_close(ops.pca_project(x, components, m, s), expected)
    back = (z * scale if with_scale else z) @ components + (mean if with_mean else 0)
    torch.testing.assert_close(ops.pca_reconstruct(z, components, m, s), back)
    for op, argument in ((ops.pca_project, x), (ops.pca_reconstruct, z)):
        arguments = (argument, components, m, s)
        assert torch.autograd.gradcheck(op, arguments)
        assert torch.autograd.gradgradcheck(op, arguments)
        results = torch.library.opcheck(op.default, arguments)
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("of", [torch.float32, torch.float64, torch.bfloat16])
def test_results_have_the_components_dtype(dtype: torch.dtype, of: torch.dtype) -> None:
    _, _, components, mean, scale = (t.detach() for t in operands(dtype=of))
    x = (torch.rand(7, 9) * 200).to(dtype)
    y = ops.pca_project(x, components, mean, scale)
    assert y.dtype == of
    expected = (x.double() - mean.double()) @ components.double().T * scale.double()
    size = (x.double() - mean.double()).abs() @ components.double().abs().T * scale.double().abs()
    limit = 32 * torch.finfo(of).eps * size
    assert bool(((y.double() - expected).abs() <= limit).all())


@pytest.mark.parametrize("op", [ops.pca_project, ops.pca_reconstruct])
def test_gradients_keep_each_operand_s_dtype(op: Callable[..., Tensor]) -> None:
    # Those of PyTorch, of the same numbers in float64.
    x, z, components, mean, scale = operands(dtype=torch.float64)
    first = x if op is ops.pca_project else z
    mixed = [t.detach().to(dtype).requires_grad_() for t, dtype in (
        (first, torch.float64), (components, torch.float32), (mean, torch.float64), (scale, torch.float64)
    )]  # fmt: skip
    wide = [t.detach().double().requires_grad_() for t in mixed]
    x, v, m, s = wide
    (op(*mixed) ** 2).sum().backward()
    ((((x - m) @ v.T * s) if op is ops.pca_project else (x * s) @ v + m) ** 2).sum().backward()
    for found, expected in zip(mixed, wide, strict=True):
        assert found.grad is not None
        assert found.grad.dtype == found.dtype
        torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1e-4, atol=1e-4)


def test_rows_are_worked_on_in_parts() -> None:
    x = (torch.rand(3000, 700) * 255).to(torch.uint8)
    components, mean = torch.randn(11, 700), torch.rand(700) * 200
    expected = (x.double() - mean.double()) @ components.double().T
    torch.testing.assert_close(ops.pca_project(x, components, mean).double(), expected, rtol=1e-4, atol=0.05)
    z = torch.randn(3000, 11)
    back = z.double() @ components.double() + mean.double()
    torch.testing.assert_close(ops.pca_reconstruct(z, components, mean).double(), back, rtol=1e-4, atol=1e-3)
    strided = x.t().contiguous().t()
    torch.testing.assert_close(ops.pca_project(strided, components, mean).double(), expected, rtol=1e-4, atol=0.05)
    assert ops.pca_project(x[:0], components, mean).shape == (0, 11)


def test_the_operators_refuse_by_name() -> None:
    x, z, components, mean, scale = operands()
    for call, message in (
        (lambda: ops.pca_project(x[..., 1:], components), "x: expected a last dimension of 9"),
        (lambda: ops.pca_reconstruct(x, components), "z: expected a last dimension of 5"),
        (lambda: ops.pca_project(x, components[0]), r"components: expected shape \[components, features\]"),
        (lambda: ops.pca_project(x, components, scale), r"mean: expected shape \[9\]"),
        (lambda: ops.pca_reconstruct(z, components, mean, mean), r"scale: expected shape \[5\]"),
        (lambda: ops.pca_project(x, components.long()), "components: expected a float32"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("count", [4, 5, 12])
def test_splines_are_scipys(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    points = torch.rand(200, generator=generator, dtype=torch.float64).sort().values
    points[0], points[-1] = 0, 1
    inner = torch.linspace(0, 1, count - 2, dtype=torch.float64)
    knots = torch.cat([torch.zeros(3), inner, torch.ones(3)])
    values = torch.randn(2, 3, 200, generator=generator, dtype=torch.float64, requires_grad=True)
    control = ops.bspline_fit(values, knots, points)
    peer = make_lsq_spline(points.numpy(), values.detach().numpy().reshape(6, 200).T, knots.numpy(), 3)
    np.testing.assert_allclose(control.detach().reshape(6, count).T, peer.c, rtol=1e-8, atol=1e-8)
    places = torch.linspace(-0.2, 1.2, 57, dtype=torch.float64)
    for order in range(5):
        found = ops.bspline_eval(control, knots, places, order).detach().reshape(6, -1).T
        expected = peer.derivative(order)(places.numpy()) if order < 4 else np.zeros((57, 6))
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-6 * max(1, np.abs(expected).max()))
    small = values[..., :60].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: ops.bspline_fit(v, knots, points[::4][:60]), small[..., :50])
    for op, arguments in (
        (ops.bspline_basis, (points, knots, 1)),
        (ops.bspline_fit_matrix, (points, knots)),
        (ops.bspline_control, (values, ops.bspline_fit_matrix(points, knots))),
        (ops.pca_scatter, (values[0].detach(), values[0, 0].detach())),
        (ops.bspline_fit, (values, knots, points)),
        (ops.bspline_eval, (control.detach().requires_grad_(), knots, places, 2)),
    ):
        assert set(torch.library.opcheck(op.default, arguments).values()) == {"SUCCESS"}


def test_splines_refuse_by_name() -> None:
    knots = torch.tensor([0.0] * 4 + [1.0] * 4)
    points, values = torch.linspace(0, 1, 9), torch.randn(9)
    for call, message in (
        (lambda: ops.bspline_basis(points, knots[1:]), "knots: expected at least 8"),
        (lambda: ops.bspline_basis(points, knots.flip(0)), "knots: expected finite numbers in ascending order"),
        (lambda: ops.bspline_basis(points, torch.zeros(8)), "knots: expected ends that are apart"),
        (lambda: ops.bspline_basis(points * torch.nan, knots), "points: expected finite numbers, got NaN at 0"),
        (lambda: ops.bspline_fit(values, knots, points.flip(0)), "points: expected ascending numbers from 0 to 1"),
        (lambda: ops.bspline_fit(values, knots, points + 1), "points: expected ascending numbers from 0 to 1"),
        (lambda: ops.bspline_fit(values[:3], knots, points[:3]), "got none for control point 3"),
        (lambda: ops.bspline_fit(values[1:], knots, points), "values: expected a last dimension of 9"),
        (lambda: ops.bspline_eval(values, knots, points), "control: expected a last dimension of 4"),
        (lambda: ops.bspline_control(values, points), r"matrix: expected shape \[control points, points\]"),
        (lambda: ops.bspline_control(values.long(), points[None]), "values: expected a float32"),
        (lambda: ops.pca_scatter(values, values), r"x: expected shape \[samples, features\]"),
        (lambda: ops.pca_scatter(values[None], points[1:]), r"shift: expected shape \[9\]"),
        (lambda: ops.pca_scatter(values[None].int(), points), "x: expected a float32"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# Monotone splines.


def test_a_spline_begins_as_the_identity() -> None:
    x = torch.linspace(-3, 3, 101, dtype=torch.float64)[:, None].expand(-1, 2)
    spline = MonotoneSpline.identity(2, dtype=torch.float64)
    torch.testing.assert_close(spline(x), x)
    torch.testing.assert_close(spline.inverse(x), x)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), knots=st.integers(2, 12), double=st.booleans())
def test_there_and_back(seed: int, knots: int, double: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    steps = torch.rand(2, 3, knots, generator=generator, dtype=dtype) + 0.05
    x_knots, y_knots = (steps.cumsum(-1) - knots / 4).unbind(0)
    slopes = torch.rand(3, knots, generator=generator, dtype=dtype) * 3 + 0.05
    spline = MonotoneSpline(x_knots, y_knots, slopes)
    x = (torch.rand(400, 3, generator=generator, dtype=dtype) - 0.5) * 2 * knots
    # Places of knots among them.
    x[:knots] = x_knots.T
    x = x.sort(0).values
    y = spline(x)
    assert bool((y.diff(dim=0) >= 0).all())
    torch.testing.assert_close(spline(x_knots.T), y_knots.T)
    limit = 1e-11 if double else 1e-5
    size = float(x.abs().max())
    assert float((spline.inverse(y) - x).abs().max()) <= limit * size * 2
    assert float((spline(spline.inverse(x)) - x).abs().max()) <= limit * size * 2


def test_gradients_of_splines() -> None:
    generator = torch.Generator().manual_seed(0)
    spline = MonotoneSpline.fit(skewed(300, 3).double(), 6)
    # Off the knots, at which second derivatives jump.
    x = (torch.rand(20, 3, generator=generator, dtype=torch.float64) * 4 - 1).requires_grad_()
    assert torch.autograd.gradcheck(spline, x)
    assert torch.autograd.gradcheck(spline.inverse, x)
    assert torch.autograd.gradgradcheck(spline, x)
    knots = [spline.x_knots, spline.y_knots, spline.slopes]
    parts = [part.clone().requires_grad_() for part in knots]

    def of_knots(*parts: Tensor) -> Tensor:
        spline.x_knots, spline.y_knots, spline.slopes = parts
        y: Tensor = spline(x.detach())
        return y

    assert torch.autograd.gradcheck(of_knots, parts)


def test_a_fit_makes_dimensions_normal() -> None:
    x = skewed(5000, 4)
    spline = MonotoneSpline.fit(x, 16)
    y = spline(x)

    def skewness(v: Tensor) -> Tensor:
        return ((v - v.mean(0)) / v.std(0)).pow(3).mean(0)

    assert bool((skewness(y).abs() < 0.2 * skewness(x).abs()).all())
    torch.testing.assert_close(MonotoneSpline.fit(x, 16, 0.0)(x), x, rtol=1e-5, atol=1e-5)


def test_several_strengths_are_as_each_alone_and_sort_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.cat([skewed(500), pictures(500).flatten(1)[:, :8].float(), torch.ones(500, 1)], 1)
    strengths = (0.0, 0.25, 0.5, 1.0)
    alone = [MonotoneSpline.fit(x, 8, strength) for strength in strengths]
    sorts: list[torch.Size] = []
    sort = Tensor.sort
    monkeypatch.setattr(Tensor, "sort", lambda self, dim: sorts.append(self.shape) or sort(self, dim))
    together = MonotoneSpline.fit_all(x, 8, strengths)
    assert sorts == [(33, 500)]
    for one, other in zip(together, alone, strict=True):
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
    assert SplinePCATokenizer.fit(x, 3, strengths=strengths).validation.keys() == set(strengths)
    assert len(sorts) == 2


def test_dimensions_of_few_values_stay_as_they_are() -> None:
    x = skewed(500, 3)
    x[:, 1] = 5
    x[:, 2] = (x[:, 2] > x[:, 2].median()).float()
    y = MonotoneSpline.fit(x)(x)
    torch.testing.assert_close(y[:, 1:], x[:, 1:], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(y[:, 0], x[:, 0], atol=1e-2)


def collapsing() -> Tensor:
    """Numbers whose spread is a rounding of their mean, in bfloat16 or in float32."""
    x = torch.randn(3000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.stack([1000 + 3 * x[:, 0].exp(), 1e7 + x[:, 1], x[:, 2].exp()], 1)


def test_a_spread_of_few_roundings_stays_as_it_is() -> None:
    spline = MonotoneSpline.fit(collapsing().float())
    assert spline.bent.tolist() == [True, False, True]
    # In float64 it is none.
    assert MonotoneSpline.fit(collapsing()).bent.tolist() == [True, True, True]
    assert MonotoneSpline.fit(collapsing().bfloat16()).x_knots.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_knots_are_not_cast(dtype: torch.dtype) -> None:
    x = collapsing()[:, ::2]
    spline = MonotoneSpline.fit(x)
    expected = spline(x.to(dtype).double())
    module = nn.Sequential(spline).to(dtype)
    found = module(x.to(dtype))
    assert found.dtype == dtype
    assert spline.x_knots.dtype == torch.float64
    assert torch.equal(found, expected.to(dtype))
    assert torch.equal(spline.inverse(found), spline.inverse(found.double()).to(dtype))
    assert module.to("meta")[0].x_knots.is_meta


def test_integers_are_mapped_as_floats() -> None:
    spline = MonotoneSpline.fit(skewed(500, 3))
    x = torch.arange(0, 256, dtype=torch.uint8)[:, None].expand(-1, 3)
    assert torch.equal(spline(x), spline(x.float()))
    assert torch.equal(spline.inverse(x), spline.inverse(x.float()))


def test_knots_that_coincide_are_not_loaded() -> None:
    spline = MonotoneSpline.identity(3)
    with pytest.raises(ValueError, match="x_knots: expected finite knots that ascend"):
        spline.load_state_dict(MonotoneSpline.fit(collapsing()).state_dict())


def test_splines_of_wrong_numbers_are_refused() -> None:
    up, ones = torch.linspace(0, 1, 4)[None], torch.ones(1, 4)
    for arguments, message in (
        ((up.flip(1), up, ones), "x_knots: expected finite knots that ascend"),
        ((up, torch.zeros(1, 4), ones), "y_knots: expected finite knots that ascend"),
        ((up, up * torch.nan, ones), "y_knots: expected finite"),
        ((up, up, -ones), "slopes: expected finite slopes of 0.001 or more"),
        ((up, up, ones[:, 1:]), "knots, slopes: expected three of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            MonotoneSpline(*arguments)
    for call, message in (
        (lambda: MonotoneSpline.fit(torch.full((5, 2), torch.nan)), "x: expected finite"),
        (lambda: MonotoneSpline.fit(torch.zeros(5)), "x: expected shape"),
        (lambda: MonotoneSpline.fit(up, strength=2.0), "strength: expected from 0 to 1"),
        (lambda: MonotoneSpline.identity(3)(torch.zeros(2, 4)), "x: expected a last dimension of 3"),
    ):
        with pytest.raises(ValueError, match=message):
            call()  # type: ignore[no-untyped-call]


# Tokenizers.


def make(kind: str, **options: Any) -> tuple[PCATokenizer, Tensor]:
    """A fitted tokenizer, and data for it."""
    if kind == "spline":
        x = skewed().reshape(-1, 4, 6)
        return SplinePCATokenizer.fit(x, 6, **options), x
    x = pictures()
    if kind == "patches":
        return PCATokenizer.fit(x, 6, patch_size=4, **options), x
    return PCATokenizer.fit(x, 6, **options), x


KINDS = ("image", "patches", "spline")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whiten", [False, True])
def test_tokens_and_back(kind: str, whiten: bool) -> None:
    tokenizer, x = make(kind, whiten=whiten)
    tokens = tokenizer(x)
    assert tokens.shape == ((len(x), 6, 6) if kind == "patches" else (len(x), 6))
    assert tokenizer.inverse(tokens).shape == x.shape
    again = tokenizer(tokenizer.inverse(tokens))
    torch.testing.assert_close(again, tokens, rtol=1e-3, atol=1e-2 * float(tokens.abs().max()))
    if whiten and kind == "image":
        torch.testing.assert_close(tokens.std(0), torch.ones(6), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_all_components_lose_nothing(kind: str) -> None:
    x = skewed()[:, :8].reshape(-1, 2, 2, 2)
    fit = SplinePCATokenizer.fit if kind == "spline" else PCATokenizer.fit
    options: dict[str, Any] = {"patch_size": 1} if kind == "patches" else {}
    tokenizer = fit(x, 2 if kind == "patches" else 8, **options)
    torch.testing.assert_close(tokenizer.inverse(tokenizer(x)), x, rtol=1e-4, atol=1e-4)


def test_bands_are_the_fewest_that_hold_their_share() -> None:
    tokenizer, x = make("image", bands=(0.5, 0.3))
    ratio = tokenizer.explained_variance_ratio.double()
    ratio = ratio / ratio.sum()
    hot, warm, cold = (tokenizer.bands[name] for name in ("hot", "warm", "cold"))
    assert (hot.start, hot.stop, warm.stop, cold.stop) == (0, warm.start, cold.start, 6)
    assert float(ratio[hot].sum()) >= 0.5 > float(ratio[: hot.stop - 1].sum())
    assert float(ratio[: warm.stop].sum()) >= 0.8 > float(ratio[: warm.stop - 1].sum())
    tokens = tokenizer(x)
    assert torch.equal(torch.cat([tokenizer.band(tokens, name) for name in tokenizer.bands], -1), tokens)
    for bands, sizes in (((0.0, 0.0), [0, 0, 6]), ((1.0, 0.0), [6, 0, 0]), ((0.0, 1.0), [0, 6, 0])):
        found = PCATokenizer.fit(x, 6, bands=bands).bands.values()
        assert [band.stop - band.start for band in found] == sizes


def test_the_spline_is_kept_where_it_helps_and_only_there() -> None:
    data, x = skewed(6000).split(3000)
    helped, plain = SplinePCATokenizer.fit(data, 6), PCATokenizer.fit(data, 6)
    assert helped.strength
    error = float((helped.inverse(helped(x)) - x).square().mean())
    assert error < float((plain.inverse(plain(x)) - x).square().mean())
    # Of a subspace any bend is a loss.
    flat = torch.randn(2000, 3) @ torch.randn(3, 10)
    assert SplinePCATokenizer.fit(flat, 3).strength == 0


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_through(kind: str) -> None:
    tokenizer, x = make(kind)
    x = x[:5].double().requires_grad_()
    tokenizer = tokenizer.double()
    assert torch.autograd.gradcheck(lambda x: tokenizer(x).sum(-1), x[:2, ..., :].detach().requires_grad_())
    head = nn.Linear(6, 3).double()
    loss = head(tokenizer(x)).square().mean()
    loss.backward()
    assert x.grad is not None
    assert float(x.grad.abs().max()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_in_one_graph(kind: str) -> None:
    tokenizer, x = make(kind)
    x = x[:7].float()
    compiled = torch.compile(lambda x: tokenizer.inverse(tokenizer(x)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), tokenizer.inverse(tokenizer(x)))
    torch.testing.assert_close(compiled(x[:3]), tokenizer.inverse(tokenizer(x[:3])))


def test_a_loaded_state_is_all_of_it() -> None:
    """Also what follows from tensors: the bands, and whether the spline bends."""
    bent, x = make("spline")
    straight = SplinePCATokenizer(PCA(6).fit(torch.randn(99, 24)), MonotoneSpline.identity(24), input_shape=(4, 6))
    assert straight.bands != bent.bands
    nn.Sequential(straight).load_state_dict(nn.Sequential(bent).state_dict())
    assert straight.bands == bent.bands
    assert torch.equal(straight(x), bent(x))
    assert torch.equal(straight.inverse(bent(x)), bent.inverse(bent(x)))


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_a_straight_spline_can_be_bent(direction: str) -> None:
    x = torch.rand(50, 3, dtype=torch.float64)
    pca, straight = PCA(3).fit(x), MonotoneSpline.identity(3, dtype=torch.float64)
    tokenizer = SplinePCATokenizer(pca, straight)
    run = tokenizer if direction == "forward" else tokenizer.inverse
    compiled = torch.compile(lambda x: run(x), fullgraph=True, backend="aot_eager")
    assert torch.equal(run(x), getattr(PCATokenizer(pca), direction)(x))
    torch.testing.assert_close(compiled(x), run(x))
    straight.slopes.requires_grad_()
    run(x).square().sum().backward()
    assert straight.slopes.grad is not None
    assert bool(straight.slopes.grad.any())
    with torch.no_grad():
        straight.slopes += straight.slopes.grad.abs().clamp(max=1)
    straight.slopes.requires_grad_(False)
    expected = SplinePCATokenizer(pca, MonotoneSpline(straight.x_knots, straight.y_knots, straight.slopes))
    assert torch.equal(run(x), getattr(expected, direction)(x))
    torch.testing.assert_close(compiled(x), run(x))
    assert not torch.allclose(run(x), getattr(PCATokenizer(pca), direction)(x), atol=1e-3)


@pytest.mark.parametrize("method", ["exact", "randomized", "moments", "blocks"])
def test_a_spline_before_every_method(method: Any) -> None:
    x = skewed(400)
    tokenizer = SplinePCATokenizer.fit(x, 6, method=method)
    assert tokenizer.strength
    moved = tokenizer.spline(x).double().numpy()
    values = np.linalg.svd(moved - moved.mean(0), compute_uv=False) ** 2
    expected = values[:6] / values.sum()
    np.testing.assert_allclose(tokenizer.explained_variance_ratio.double().numpy(), expected, rtol=1e-2)
    assert SplinePCATokenizer.fit(x, 6, method=method, strengths=()).strength == 0


def test_a_tokenizer_in_half_precision_is_saved(tmp_path: Path) -> None:
    x = collapsing().repeat(1, 2)
    tokenizer = SplinePCATokenizer(PCA(2).fit(MonotoneSpline.fit(x)(x)), MonotoneSpline.fit(x)).bfloat16()
    tokenizer.save(tmp_path / "tokenizer")
    found = SplinePCATokenizer.load(tmp_path / "tokenizer")(x.bfloat16())
    assert torch.equal(found, tokenizer(x.bfloat16()))
    assert bool(found.isfinite().all())


def test_batches_fit_as_one() -> None:
    x = pictures()
    one, many = PCATokenizer.fit(x, 6, patch_size=4), PCATokenizer.fit(iter(torch.split(x, 32)), 6, patch_size=4)
    torch.testing.assert_close(one.components, many.components, rtol=1e-4, atol=1e-5)
    assert many.input_shape == (3, 8, 12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_holds_all_of_it(kind: str, tmp_path: Path) -> None:
    tokenizer, x = make(kind, whiten=True, bands=(0.5, 0.3))
    path = tmp_path / "tokenizer.safetensors"
    tokenizer.save(path)
    loaded = type(tokenizer).load(path)
    assert torch.equal(loaded(x), tokenizer(x))
    assert torch.equal(loaded.inverse(loaded(x)), tokenizer.inverse(tokenizer(x)))
    assert (loaded.bands, repr(loaded)) == (tokenizer.bands, repr(tokenizer))
    other = PCATokenizer if kind == "spline" else SplinePCATokenizer
    with pytest.raises(ValueError, match="expected a file of kind"):
        other.load(path)
    clone = type(tokenizer).load(path)
    clone.load_state_dict(tokenizer.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_and_lying_files(kind: str, tmp_path: Path) -> None:
    tokenizer, _ = make(kind)
    path = tmp_path / "tokenizer.safetensors"
    tokenizer.save(path)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for length in generator.choice(len(whole), 40, replace=False):
        path.write_bytes(whole[:length])
        with pytest.raises((CorruptWeightError, ValueError)):
            type(tokenizer).load(path)
    for place in generator.choice(len(whole), 80, replace=False):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(bytes(damaged))
        with pytest.raises((CorruptWeightError, ValueError)):
            type(tokenizer).load(path)
    path.write_bytes(whole)
    tensors, metadata = load_state(path, tokenizer._kind, 1)
    for changed, said in (
        ({"mean": tensors["mean"][1:]}, {}),
        ({"mean": tensors["mean"] * torch.nan}, {}),
        ({"components": tensors["components"][0]}, {}),
        ({}, {"input_shape": [3]}),
        ({}, {"input_shape": "all"}),
        ({}, {"patch_size": 5}),
        ({}, {"bands": [2, 3]}),
    ):
        save_state(path, tokenizer._kind, 1, {**tensors, **changed}, {**metadata, **said})
        with pytest.raises(CorruptWeightError):
            type(tokenizer).load(path)
    save_state(path, tokenizer._kind, 1, {k: v for k, v in tensors.items() if k != "mean"}, metadata)
    with pytest.raises(CorruptWeightError):
        type(tokenizer).load(path)
    save_state(path, tokenizer._kind, 9, tensors, metadata)
    with pytest.raises(ValueError, match="expected version 1"):
        type(tokenizer).load(path)


def test_tokenizers_refuse_by_name() -> None:
    x = pictures()
    tokenizer = PCATokenizer.fit(x, 6)
    pca = PCA(6).fit(x.flatten(1))
    for call, message in (
        (lambda: tokenizer(x[:, :2]), r"x: expected shape \[batch, 3, 8, 12\], got \[300, 2, 8, 12\]"),
        (lambda: tokenizer.inverse(torch.zeros(2, 5)), r"tokens: expected shape \[batch, 6\]"),
        (lambda: tokenizer.band(torch.zeros(2, 6), "tepid"), "name: expected one of hot, warm, cold"),
        (lambda: PCATokenizer(pca, input_shape=(3, 8, 11)), "input_shape: expected 288 numbers"),
        (
            lambda: PCATokenizer(pca, input_shape=(3, 8, 12), patch_size=4),
            "expected 288 numbers, as in the PCA, got 48",
        ),
        (lambda: PCATokenizer(pca, bands=(0.9, 0.2)), "bands: expected two shares"),
        (lambda: PCATokenizer.fit(x, 6, patch_size=5), "size: expected 2 sizes that divide"),
        (lambda: PCATokenizer.fit(iter([]), 6), r"data: expected \(samples, \*shape\), got no batch"),
        (lambda: PCATokenizer.fit(iter([x, x[:, :1]]), 6), "data: expected samples of shape"),
        (lambda: PCATokenizer.fit(x.numpy(), 6), "data: expected a tensor, or an iterable of tensors, got ndarray"),
        (lambda: PCATokenizer.fit(3, 6), "data: expected a tensor, or an iterable of tensors, got int"),
        (lambda: PCATokenizer.fit([(x, x)], 6), "data: expected batches that are tensors, got tuple; of pairs"),
        (lambda: PCATokenizer.fit([x, x.numpy()], 6), "data: expected batches that are tensors, got ndarray"),
        (lambda: SplinePCATokenizer.fit([x], 6), r"data: expected one tensor \(samples, \*shape\), got list"),
        (
            lambda: SplinePCATokenizer.fit(iter([x]), 6),
            r"data: expected one tensor \(samples, \*shape\), got list_iter",
        ),
        (lambda: SplinePCATokenizer.fit(x[:, 0, 0, 0], 6), r"data: expected one tensor .* got shape \[300\]"),
        (lambda: SplinePCATokenizer.fit(skewed(2), 1), "data: expected three samples or more"),
        (lambda: SplinePCATokenizer.fit(skewed(), 2, validation=1.0), "validation: expected a share"),
        (lambda: SplinePCATokenizer(pca, MonotoneSpline.identity(3)), "spline: expected 288 dimensions, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            call()  # type: ignore[no-untyped-call]


def test_a_tokenizer_shares_no_memory_with_its_pca() -> None:
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.randn(60, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    pca = PCA(3).fit(first)
    tokenizer, components, mean = PCATokenizer(pca), pca.components_.clone(), pca.mean_.clone()
    tokenizer.load_state_dict(PCATokenizer(PCA(3).fit(second)).state_dict())
    assert torch.equal(pca.components_, components)
    assert torch.equal(pca.mean_, mean)
    before = tokenizer(first)
    pca.partial_fit(second + 10)
    assert torch.equal(tokenizer(first), before)

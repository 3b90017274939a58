"""Convolutions by spectra against PyTorch's in float64, and their gradients of first and second order."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from infold._library import ops
from infold.nn import FrequencyConv1d, FrequencyConv2d, FrequencyConv3d
from torch import Tensor, nn

CLASSES: list[tuple[type[Any], type[Any]]] = [
    (FrequencyConv1d, nn.Conv1d),
    (FrequencyConv2d, nn.Conv2d),
    (FrequencyConv3d, nn.Conv3d),
]
CONVOLUTIONS = [F.conv1d, F.conv2d, F.conv3d]


def error(got: Tensor, expected: Tensor, *factors: Tensor) -> float:
    """By the norm of what is expected. With factors, whose products it sums: at least by a hundredth of theirs, for
    sums that cancel, or of nothing, round by these.
    """
    got, expected = got.detach().double(), expected.detach().double()
    least = 0.01 * math.prod(float(factor.detach().double().norm()) for factor in factors) if factors else 0.0
    return float((got - expected).norm()) / max(float(expected.norm()), least, 1e-30)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    circular: bool,
) -> Tensor:
    """PyTorch's, with all padding put there before."""
    dimensions = weight.dim() - 2
    both = list(zip(padding[:dimensions], padding[-dimensions:], strict=True))
    sides = [side for pair in reversed(both) for side in pair]
    x = F.pad(x, sides, "circular" if circular else "constant") if any(sides) else x
    return CONVOLUTIONS[dimensions - 1](x, weight, bias, stride, 0, dilation, groups)


@st.composite
def cases(draw: st.DrawFn, dimensions: int, largest: int) -> tuple[Any, ...]:
    def integers(least: int, most: int) -> int:
        return draw(st.integers(least, most))

    batch, ins, outs, groups = integers(1, 3), integers(1, 4), integers(1, 4), integers(1, 3)
    size = [integers(1, largest) for _ in range(dimensions)]
    padding = [integers(0, min(5, length)) for _ in range(2) for length in size]
    padded = [n + padding[i] + padding[i + dimensions] for i, n in enumerate(size)]
    kernel = [integers(1, length) for length in padded]
    dilation = [integers(1, min(4, (n - 1) // (k - 1)) if k > 1 else 3) for n, k in zip(padded, kernel, strict=True)]
    stride = [integers(1, 4) for _ in size]
    generator = torch.Generator().manual_seed(integers(0, 1 << 20))
    x = torch.randn(batch, groups * ins, *size, generator=generator, dtype=torch.float64)
    weight = torch.randn(groups * outs, ins, *kernel, generator=generator, dtype=torch.float64)
    bias = torch.randn(groups * outs, generator=generator, dtype=torch.float64) if draw(st.booleans()) else None
    return x, weight, bias, stride, padding, dilation, groups, draw(st.booleans())


def check(case: tuple[Any, ...]) -> None:
    x, weight, bias, *where = case
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias) if tensor is not None]
    y, expected = ops.frequency_conv(x, weight, bias, *where), reference(x, weight, bias, *where)
    assert y.shape == expected.shape
    assert error(y, expected, x, weight) < 1e-10
    g = torch.randn_like(expected)
    factors = [(g, weight), (g, x), ()]
    gradients = zip(torch.autograd.grad(y, leaves, g), torch.autograd.grad(expected, leaves, g), factors, strict=False)
    for got, gradient, both in gradients:
        assert error(got, gradient, *both) < 1e-10
    single = [None if tensor is None else tensor.detach().float() for tensor in (x, weight, bias)]
    exact = [None if tensor is None else tensor.double() for tensor in single]
    got, expected = ops.frequency_conv(*single, *where), reference(*exact, *where)
    assert error(got, expected, x, weight) < 1e-5


# --- values -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(cases(1, 40))
def test_one_dimension(case: tuple[Any, ...]) -> None:
    check(case)


@settings(deadline=None, max_examples=60)
@given(cases(2, 9))
def test_two_dimensions(case: tuple[Any, ...]) -> None:
    check(case)


@settings(deadline=None, max_examples=40)
@given(cases(3, 5))
def test_three_dimensions(case: tuple[Any, ...]) -> None:
    check(case)


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize(
    ("length", "kernel", "channels", "groups"), [(8192, 1024, 1, 1), (5000, 63, 6, 3), (700, 7, 9, 9)]
)
def test_long_inputs(length: int, kernel: int, channels: int, groups: int, circular: bool) -> None:
    x = torch.randn(3, channels, length, dtype=torch.float64)
    weight = torch.randn(channels, channels // groups, kernel, dtype=torch.float64)
    check((x, weight, torch.randn(channels, dtype=torch.float64), [1], [kernel // 2] * 2, [1], groups, circular))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(2, 4, 60), torch.randn(6, 4, 9), torch.randn(6)
    x, weight, bias = (tensor.to(dtype) for tensor in (x, weight, bias))
    where = ([2], [3], [1], 1, False)
    y = ops.frequency_conv(x, weight, bias, *where)
    expected = reference(x.double(), weight.double(), bias.double(), *where)
    limit = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert y.dtype == dtype
    assert error(y, expected) < limit
    g = torch.randn_like(y)
    dx = ops.frequency_conv_dx(g, weight, [60], *where)
    dw = ops.frequency_conv_dw(g, x, [9], *where)
    assert (dx.dtype, dw.dtype) == (dtype, torch.float32)
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    gradients = torch.autograd.grad(reference(x, weight, None, *where), (x, weight), g.double())
    assert error(dx, gradients[0]) < limit
    assert error(dw, gradients[1]) < 1e-6
    # Parameters in another dtype get gradients in theirs.
    mixed = nn.Parameter(weight.detach().float())
    ops.frequency_conv(x.detach().to(dtype), mixed, None, *where).float().sum().backward()
    assert mixed.grad is not None
    assert mixed.grad.dtype == torch.float32


def test_strided_offset_and_empty_inputs() -> None:
    x = torch.randn(9, 2, 30, 4, dtype=torch.float64)[1:, :, ::2].permute(3, 1, 0, 2)
    weight = torch.randn(3, 2, 5, 3, dtype=torch.float64).transpose(2, 3)
    where = ([1, 1], [1, 1], [1, 1], 1, False)
    torch.testing.assert_close(ops.frequency_conv(x, weight, None, *where), reference(x, weight, None, *where))
    empty = torch.zeros(0, 2, 8, 15, dtype=torch.float64, requires_grad=True)
    y = ops.frequency_conv(empty, weight, None, *where)
    assert y.shape == (0, 3, 8, 13)
    y.sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == empty.shape
    bias = torch.randn(3)
    y = ops.frequency_conv(torch.zeros(2, 0, 5), torch.zeros(3, 0, 2), bias, [1], [0], [1], 1, False)
    assert torch.equal(y, bias[None, :, None].expand(2, 3, 4))


# --- gradients --------------------------------------------------------------------------------------------------------

#: size, kernel, stride, padding, dilation, circular
SMALL = [
    ((7,), (3,), [1], [1], [1], False),
    ((7,), (3,), [2], [2, 1], [2], True),
    ((4, 5), (2, 3), [2, 1], [1, 2], [1, 1], False),
    ((4, 5), (3, 2), [1, 2], [1, 2], [1, 2], True),
    ((3, 2, 4), (2, 1, 3), [1, 1, 2], [0, 1, 1], [1, 1, 1], False),
]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("case", SMALL)
def test_gradients_of_first_and_second_order(case: tuple[Any, ...], groups: int) -> None:
    size, kernel, *place, circular = case
    where = (*place, groups, circular)
    x = torch.randn(2, 2, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 2 // groups, *kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    g = torch.randn_like(ops.frequency_conv(x, weight, bias, *where)).requires_grad_()
    for checked in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert checked(lambda x, w, b: ops.frequency_conv(x, w, b, *where), (x, weight, bias))
        assert checked(lambda g, w: ops.frequency_conv_dx(g, w, list(size), *where), (g, weight))
        assert checked(lambda g, x: ops.frequency_conv_dw(g, x, list(kernel), *where), (g, x))


def test_only_what_is_needed_is_kept_and_computed() -> None:
    x = torch.randn(2, 3, 20, dtype=torch.float64)
    weight, bias = torch.randn(4, 3, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    where = ([1], [0], [1], 1, False)
    for needed in ((x,), (weight,), (bias,), (x, bias)):
        for tensor in (x, weight, bias):
            tensor.requires_grad_(any(tensor is other for other in needed))
        got = torch.autograd.grad(ops.frequency_conv(x, weight, bias, *where).sum(), needed)
        torch.testing.assert_close(got, torch.autograd.grad(reference(x, weight, bias, *where).sum(), needed))


# --- contracts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("case", SMALL)
def test_opcheck(case: tuple[Any, ...], requires_grad: bool) -> None:
    size, kernel, *place, circular = case
    where = (*place, 2, circular)
    x, weight, bias = torch.randn(2, 4, *size), torch.randn(6, 2, *kernel), torch.randn(6)
    g = torch.randn_like(ops.frequency_conv(x, weight, bias, *where))
    x, weight, bias, g = (tensor.requires_grad_(requires_grad) for tensor in (x, weight, bias, g))
    for name, sample in {
        "frequency_conv": (x, weight, bias, *where),
        "frequency_conv_dx": (g, weight, list(size), *where),
        "frequency_conv_dw": (g, x, list(kernel), *where),
    }.items():
        results = torch.library.opcheck(getattr(ops, name).default, sample)
        assert set(results.values()) == {"SUCCESS"}, (name, results)


def test_compile_and_export() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        FrequencyConv2d(3, 8, 5, padding="same", padding_mode="circular"),
        nn.ReLU(),
        FrequencyConv2d(8, 4, 3, stride=2, padding=1, groups=2),
    )
    x = torch.randn(5, 3, 12, 16)
    expected = net(x)
    gradients = torch.autograd.grad(expected.square().sum(), list(net.parameters()))
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    got = compiled(x)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), list(net.parameters())), gradients)
    sizes = {0: torch.export.Dim("batch", min=2), 2: torch.export.Dim("height", min=8, max=400)}
    exported = torch.export.export(net, (x,), dynamic_shapes=(sizes,)).module()
    torch.testing.assert_close(exported(x), expected)
    other = torch.randn(9, 3, 20, 16)
    torch.testing.assert_close(exported(other), net(other))


def test_autocast_casts_everything() -> None:
    layer = FrequencyConv1d(3, 4, 9)
    x = torch.randn(2, 3, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer.bfloat16()(x.bfloat16()))


@pytest.mark.parametrize("groups", [1, 16])
def test_bits_do_not_depend_on_threads_or_on_the_batch(groups: int) -> None:
    layer = FrequencyConv1d(16, 16, 100, padding=50, groups=groups)
    x = torch.randn(9, 16, 3000, requires_grad=True)
    leaves = [x, *layer.parameters()]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        y = layer(x)
        g = torch.randn_like(y)
        gradients = torch.autograd.grad(y, leaves, g)
        torch.set_num_threads(3)
        again = layer(x)
        assert torch.equal(again, y)
        for first, second in zip(torch.autograd.grad(again, leaves[:2], g), gradients, strict=False):
            assert torch.equal(first, second)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(layer(x[5]), y[5])
    assert torch.equal(layer(x[2:4]), y[2:4])


X, W = torch.zeros(2, 4, 10), torch.zeros(6, 2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.frequency_conv(X, W, None, [1], [0], [1], 1, False), "x: expected 2 channels"),
        (lambda: ops.frequency_conv(X[0], W, None, [1], [0], [1], 2, False), "x: expected 3 dimensions"),
        (lambda: ops.frequency_conv(X, W[0], None, [1], [0], [1], 2, False), "weight: expected 3 to 5 dimensions"),
        (lambda: ops.frequency_conv(X, W[:5], None, [1], [0], [1], 2, False), "groups: expected a divisor of out"),
        (lambda: ops.frequency_conv(X, W, None, [1], [0], [1], 0, False), "x: expected 0 channels"),
        (lambda: ops.frequency_conv(X, W, torch.zeros(5), [1], [0], [1], 2, False), r"bias: expected shape \[6\]"),
        (lambda: ops.frequency_conv(X, W, None, [0], [0], [1], 2, False), "stride: expected 1 integers from 1"),
        (lambda: ops.frequency_conv(X, W, None, [1], [-1], [1], 2, False), "padding: expected 1 integers from 0"),
        (lambda: ops.frequency_conv(X, W, None, [1], [1] * 3, [1], 2, False), "padding: expected 1 or 2"),
        (lambda: ops.frequency_conv(X, W, None, [1], [11], [1], 2, True), "padding: expected at most the input's 10"),
        (lambda: ops.frequency_conv(X, W, None, [1], [0], [1, 1], 2, False), "dilation: expected 1 integers"),
        (lambda: ops.frequency_conv(X, W, None, [1], [0], [5], 2, False), "kernel_size: expected at most the padded"),
        (lambda: ops.frequency_conv(X.int(), W, None, [1], [0], [1], 2, False), "x: expected a float32"),
        (lambda: ops.frequency_conv(X, W.int(), None, [1], [0], [1], 2, False), "weight: expected a float32"),
        (lambda: ops.frequency_conv_dx(X, W, [12], [1], [0], [1], 2, False), r"gradient: expected shape \[2, 6, 10\]"),
        (lambda: ops.frequency_conv_dw(X, X, [3], [1], [0], [1], 2, False), r"gradient: expected shape \[2, 4, 8\]"),
        (lambda: FrequencyConv1d(4, 6, 3, padding_mode="reflect"), "padding_mode: expected 'zeros' or 'circular'"),
        (lambda: FrequencyConv1d(4, 6, 3, groups=3), "in_channels must be divisible by groups"),
        (lambda: FrequencyConv1d.from_conv(nn.Conv2d(1, 1, 1)), "conv: expected a Conv1d, got Conv2d"),
    ],
)
def test_wrong_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# --- the layers -------------------------------------------------------------------------------------------------------

ARGUMENTS: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": 4, "padding": "same", "padding_mode": "circular", "bias": False},
    {"kernel_size": 3, "padding": "valid", "stride": 2},
    {"kernel_size": 3, "padding": 2, "dilation": 2, "stride": 3, "groups": 2, "padding_mode": "circular"},
    {"kernel_size": 1, "padding": 1, "groups": 4},
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_layers_are_pytorchs(dimensions: int, arguments: dict[str, Any]) -> None:
    ours, dense = CLASSES[dimensions - 1]
    torch.manual_seed(1)
    layer = ours(4, 8, **arguments, dtype=torch.float64)
    torch.manual_seed(1)
    conv = dense(4, 8, **arguments, dtype=torch.float64).eval()
    assert [(k, v.shape) for k, v in layer.state_dict().items()] == [(k, v.shape) for k, v in conv.state_dict().items()]
    for parameter, other in zip(layer.parameters(), conv.parameters(), strict=True):
        assert torch.equal(parameter, other)
    x = torch.randn(2, 4, *(7, 6, 5)[:dimensions], dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer(x[0]), conv(x[0]), rtol=1e-10, atol=1e-10)
    made, back = ours.from_conv(conv), layer.to_conv()
    assert (type(made), type(back), made.training, back.training) == (ours, dense, False, True)
    assert torch.equal(made(x), layer(x))
    assert torch.equal(back(x), conv(x))
    assert made.weight is not conv.weight
    conv.load_state_dict(layer.state_dict())
    layer.load_state_dict(conv.state_dict())


def test_it_learns_what_a_dense_one_computes() -> None:
    torch.manual_seed(0)
    teacher, student = nn.Conv1d(1, 1, 33, padding=16), FrequencyConv1d(1, 1, 33, padding=16)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    for _ in range(200):
        x = torch.randn(8, 1, 128)
        loss = F.mse_loss(student(x), teacher(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert error(student.weight, teacher.weight) < 0.01

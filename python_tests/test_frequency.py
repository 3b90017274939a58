"""Block-circulant layers against the dense operator built explicitly, and PyTorch's own derivatives."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from infold import spectral
from infold._library import ops
from infold.nn import FrequencyLinear
from torch import Tensor

#: (out_features, in_features, block): odd, even, prime, one, larger than the features, cut short on either side.
SHAPES = [
    (12, 8, 4),
    (15, 10, 5),
    (7, 7, 1),
    (14, 21, 7),
    (10, 13, 6),
    (3, 5, 8),
    (64, 96, 32),
    (130, 190, 65),
    (300, 270, 150),
]


def blocks_of(shape: tuple[int, int, int], dtype: torch.dtype = torch.float64) -> Tensor:
    out, inputs, block = shape
    generator = torch.Generator().manual_seed(out * inputs + block)
    return torch.randn(-(-out // block), -(-inputs // block), block, generator=generator, dtype=torch.float64).to(dtype)


def dense_of(blocks: Tensor, out: int, inputs: int) -> Tensor:
    """SciPy's circulant matrices, side by side."""
    rows = [np.hstack([scipy.linalg.circulant(block) for block in row]) for row in blocks.numpy()]
    return torch.from_numpy(np.vstack(rows)[:out, :inputs].copy())


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 64, 65, 256])
def test_packed_spectra_are_an_orthonormal_transform(n: int) -> None:
    basis = spectral.pack_spectrum(torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(basis @ basis.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-13)
    blocks = torch.randn(3, 2, n, dtype=torch.float64)
    torch.testing.assert_close(spectral.unpack_spectrum(spectral.pack_spectrum(blocks)), blocks)
    full = torch.fft.fft(blocks, norm="ortho")
    packed = spectral.pack_spectrum(blocks)
    torch.testing.assert_close(packed[..., 0], full.real[..., 0])
    for k in range(1, (n + 1) // 2):
        torch.testing.assert_close(packed[..., k], full.real[..., k] * math.sqrt(2))
        torch.testing.assert_close(packed[..., n // 2 + k], full.imag[..., k] * math.sqrt(2))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,), (101,)])
def test_equals_the_dense_operator(shape: tuple[int, int, int], dtype: torch.dtype, batch: tuple[int, ...]) -> None:
    out, inputs, block = shape
    blocks = blocks_of(shape)
    weight = dense_of(blocks, out, inputs)
    x = torch.randn(*batch, inputs).to(dtype)
    g = torch.randn(*batch, out).to(dtype)
    bias = torch.randn(out, dtype=torch.float64)
    spectrum = spectral.pack_spectrum(blocks).to(torch.float64 if dtype == torch.float64 else torch.float32)
    y = ops.frequency_linear(x, spectrum, bias.to(dtype), out)
    dx = ops.frequency_linear_dx(g, spectrum, inputs)
    dw = ops.frequency_linear_dw(g, x, block)
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, spectrum.dtype)
    assert (y.shape, dx.shape, dw.shape) == ((*batch, out), (*batch, inputs), blocks.shape)
    limit = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    if 0 not in batch:
        assert error(y, F.linear(x.double(), weight, bias.to(dtype).double())) < limit
        assert error(dx, g.double() @ weight) < limit
    variable = blocks.clone().requires_grad_()
    form = (F.linear(x.double(), spectral.dense(variable, out, inputs)) * g.double()).sum()
    (expected,) = torch.autograd.grad(form, variable)
    # g and x are what they are: only sums are rounded.
    assert error(dw, spectral.pack_spectrum(expected)) < (1e-11 if dtype == torch.float64 else 1e-5) or 0 in batch
    if 0 in batch:
        assert not dw.any()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.integers(1, 5))
def test_any_shape(out: int, inputs: int, block: int, rows: int) -> None:
    blocks = blocks_of((out, inputs, block))
    x = torch.randn(rows, inputs, dtype=torch.float64)
    y = ops.frequency_linear(x, spectral.pack_spectrum(blocks), None, out)
    torch.testing.assert_close(y, x @ dense_of(blocks, out, inputs).T, rtol=1e-11, atol=1e-11)


def test_strided_and_offset_inputs() -> None:
    blocks = blocks_of((12, 8, 4))
    spectrum = spectral.pack_spectrum(blocks)
    x = torch.randn(8, 2, 5, dtype=torch.float64)[:, 1:, ::2].permute(1, 2, 0)
    strided = torch.stack([spectrum, spectrum], -1)[..., 1]
    y = ops.frequency_linear(x, strided, None, 12)
    torch.testing.assert_close(y, x @ dense_of(blocks, 12, 8).T, rtol=1e-11, atol=1e-11)


# --- gradients --------------------------------------------------------------------------------------------------------


def leaves(shape: tuple[int, int, int], rows: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, inputs, _ = shape
    x, g = torch.randn(rows, inputs, dtype=torch.float64), torch.randn(rows, out, dtype=torch.float64)
    tensors = (x, g, spectral.pack_spectrum(blocks_of(shape)), torch.randn(out, dtype=torch.float64))
    return tuple(tensor.requires_grad_() for tensor in tensors)  # type: ignore[return-value]


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] * s[1] < 300])
def test_gradients_of_first_and_second_order(shape: tuple[int, int, int]) -> None:
    out, inputs, block = shape
    x, g, spectrum, bias = leaves(shape)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x, w, b: ops.frequency_linear(x, w, b, out), (x, spectrum, bias))
        assert check(lambda g, w: ops.frequency_linear_dx(g, w, inputs), (g, spectrum))
        assert check(lambda g, x: ops.frequency_linear_dw(g, x, block), (g, x))


@pytest.mark.parametrize("block", [1, 2, 5, 6])
def test_complex_spectra_have_pytorchs_gradients(block: int) -> None:
    out, inputs = 2 * block, 3 * block - block // 2
    x = torch.randn(4, inputs, dtype=torch.float64, requires_grad=True)
    half = torch.fft.rfft(blocks_of((out, inputs, block))).requires_grad_()

    def composed(x: Tensor, spectrum: Tensor) -> Tensor:
        x = F.pad(x, (0, 3 * block - inputs)).view(-1, 3, block)
        product = torch.einsum("pqk,bqk->bpk", spectrum, torch.fft.rfft(x))
        return torch.fft.irfft(product, block).reshape(-1, out)

    def ours(x: Tensor, spectrum: Tensor) -> Tensor:
        return ops.frequency_linear_complex(x, spectrum, None, block, out)

    torch.testing.assert_close(ours(x, half), composed(x, half), rtol=1e-11, atol=1e-11)
    g = torch.randn(4, out, dtype=torch.float64)
    got = torch.autograd.grad(ours(x, half), (x, half), g)
    torch.testing.assert_close(got, torch.autograd.grad(composed(x, half), (x, half), g), rtol=1e-11, atol=1e-11)
    alone = [0] if block % 2 else [0, block // 2]
    assert not got[1].imag[..., alone].any()
    assert torch.autograd.gradcheck(ours, (x, half))
    assert torch.autograd.gradgradcheck(ours, (x, half))


def test_third_order() -> None:
    shape = (10, 13, 6)
    x, _, spectrum, _ = leaves(shape)

    def third(product: object) -> tuple[Tensor, ...]:
        y = product(x, spectrum)  # type: ignore[operator]
        first = torch.autograd.grad((y**4).sum(), (x, spectrum), create_graph=True)
        second = torch.autograd.grad(sum((t**2).sum() for t in first), (x, spectrum), create_graph=True)
        return torch.autograd.grad(sum((t**2).sum() for t in second), (x, spectrum))

    got = third(lambda x, w: ops.frequency_linear(x, w, None, 10))
    expected = third(lambda x, w: x @ spectral.dense(spectral.unpack_spectrum(w), 10, 13).T)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_only_what_is_needed_is_kept_and_computed() -> None:
    x, _, spectrum, bias = leaves((12, 8, 4))
    for needed in ((x,), (spectrum,), (bias,), (x, bias)):
        for tensor in (x, spectrum, bias):
            tensor.requires_grad_(any(tensor is other for other in needed))
        y = ops.frequency_linear(x, spectrum, bias, 12)
        got = torch.autograd.grad(y.sum(), needed)
        weight = spectral.dense(spectral.unpack_spectrum(spectrum), 12, 8)
        torch.testing.assert_close(got, torch.autograd.grad(F.linear(x, weight, bias).sum(), needed))


# --- contracts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool) -> None:
    x, g, spectrum, bias = (tensor.detach().requires_grad_(requires_grad) for tensor in leaves((10, 13, 6)))
    half = torch.fft.rfft(blocks_of((10, 13, 6))).requires_grad_(requires_grad)
    for name, sample in {
        "frequency_linear": (x, spectrum, bias, 10),
        "frequency_linear_dx": (g, spectrum, 13),
        "frequency_linear_dw": (g, x, 6),
        "frequency_linear_complex": (x, half, bias, 6, 10),
    }.items():
        results = torch.library.opcheck(getattr(ops, name).default, sample)
        assert set(results.values()) == {"SUCCESS"}, (name, results)


def test_compile_and_export() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(FrequencyLinear(96, 64, 32), torch.nn.ReLU(), FrequencyLinear(64, 10, 16))
    x = torch.randn(5, 96)
    expected = net(x)
    gradients = torch.autograd.grad(expected.square().sum(), list(net.parameters()))
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    got = compiled(x)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), list(net.parameters())), gradients)
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(net, (x,), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(torch.randn(9, 96)).shape, torch.Size([9, 10]))
    torch.testing.assert_close(exported(x), expected)


def test_autocast_casts_activations_and_not_the_spectrum() -> None:
    layer = FrequencyLinear(96, 64, 32)
    x = torch.randn(5, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, ops.frequency_linear(x.bfloat16(), layer.spectrum, layer.bias.bfloat16(), 64))


def test_bits_do_not_depend_on_threads_or_on_the_batch() -> None:
    layer = FrequencyLinear(500, 300, 32)
    x = torch.randn(70, 500)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        y = layer(x)
        torch.set_num_threads(3)
        assert torch.equal(layer(x), y)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(layer(x[17]), y[17])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: ops.frequency_linear(x, w[0], None, 12), "spectrum: expected shape"),
        (lambda x, w: ops.frequency_linear(x, w, None, 13), "out_features: expected 9 to 12"),
        (lambda x, w: ops.frequency_linear(x, w, None, -1), "out_features: expected"),
        (lambda x, w: ops.frequency_linear(x[:, :4], w, None, 12), "x's last dimension: expected 5 to 8"),
        (lambda x, w: ops.frequency_linear(x[0, 0], w, None, 12), "x: expected at least one dimension"),
        (lambda x, w: ops.frequency_linear(x.int(), w, None, 12), "x: expected a float32"),
        (lambda x, w: ops.frequency_linear(x, w, torch.zeros(11), 12), r"bias: expected shape \[12\]"),
        (lambda x, w: ops.frequency_linear(x, w.new_empty(3, 2, 0), None, 12), "spectrum: expected shape"),
        (lambda x, w: ops.frequency_linear_dx(x, w, 8), "gradient's last dimension: expected 9 to 12"),
        (lambda x, w: ops.frequency_linear_dw(x, x[:1], 4), "gradient: expected the leading dimensions"),
        (lambda x, w: ops.frequency_linear_dw(x, x, 0), "block: expected a positive size"),
        (lambda x, w: ops.frequency_linear_complex(x, w, None, 4, 12), "spectrum: expected a complex tensor"),
        (lambda x, w: FrequencyLinear(0, 3), "in_features: expected a positive integer"),
    ],
)
def test_wrong_arguments_are_named(call: object, message: str) -> None:
    x, spectrum = torch.randn(3, 8), torch.randn(3, 2, 4)
    with pytest.raises(ValueError, match=message):
        call(x, spectrum)  # type: ignore[operator]


# --- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_projection_is_the_nearest_block_circulant_matrix(shape: tuple[int, int, int]) -> None:
    out, inputs, block = shape
    linear = torch.nn.Linear(inputs, out, dtype=torch.float64)
    layer = FrequencyLinear.from_linear(linear.float(), block).double()
    weight = linear.weight.detach().double()
    # Least squares over the blocks, whose every element is a column of the design.
    count = layer.spectrum.numel()
    basis = [
        spectral.dense(unit.view(layer.spectrum.shape), out, inputs).flatten() for unit in torch.eye(count).double()
    ]
    design = torch.stack(basis, 1)
    best = torch.linalg.lstsq(design, weight.flatten(), driver="gelsd").solution
    expected = (design @ best).view(out, inputs)
    torch.testing.assert_close(layer.dense_weight().detach(), expected, rtol=1e-5, atol=1e-6)
    x = torch.randn(4, inputs, dtype=torch.float64)
    torch.testing.assert_close(layer.to_linear()(x), layer(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.bias, linear.bias.double())


def test_initial_weights_are_those_of_a_dense_layer() -> None:
    torch.manual_seed(0)
    weight = FrequencyLinear(512, 512, 8).dense_weight().detach()
    bound = 1 / math.sqrt(512)
    assert weight.abs().max() <= bound * (1 + 1e-5)
    assert abs(float(weight.std()) / (bound / math.sqrt(3)) - 1) < 0.02


def test_state_dicts_and_dtypes() -> None:
    layer = FrequencyLinear(40, 24, 16)
    other = FrequencyLinear(40, 24, 16)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 40)
    assert torch.equal(other(x), layer(x))
    half = other.bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert error(half(x.bfloat16()), layer(x)) < 0.02
    assert "block=16" in repr(layer)


def test_it_learns_a_circular_convolution() -> None:
    torch.manual_seed(0)
    teacher = FrequencyLinear(64, 32, 16)
    student = FrequencyLinear(64, 32, 16)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    for _ in range(300):
        x = torch.randn(32, 64)
        loss = F.mse_loss(student(x), teacher(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert error(student.dense_weight(), teacher.dense_weight()) < 0.01


@pytest.mark.parametrize("storage", ["float", "log8"])
def test_another_number_of_features_is_refused(storage: Literal["float", "log8"]) -> None:
    # The operator itself takes whatever the blocks cover.
    layer = FrequencyLinear(100, 70, 16, storage=storage)
    for x in (torch.randn(3, 101), torch.randn(3, 99), torch.randn(())):
        with pytest.raises(ValueError, match="x: expected a last dimension of 100"):
            layer(x)
    with pytest.raises(ValueError, match=r"block: expected a positive integer, got 4\.5"):
        FrequencyLinear(100, 70, 4.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="spectrum: expected"):
        ops.frequency_linear(torch.randn(3, 100), torch.ones(5, 7, 16, dtype=torch.int64), None, 70)

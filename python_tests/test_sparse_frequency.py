"""Sparse two-dimensional spectra against the dense operator built explicitly, and PyTorch's own derivatives."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from infold import spectral
from infold._library import ops
from infold.nn import SparseFrequencyLinear
from safetensors.torch import load_file, save_file
from torch import Tensor

#: (out_features, in_features): odd, even, prime, one, two, transforms by matrices and fast ones.
SHAPES = [(12, 8), (15, 10), (7, 11), (1, 9), (9, 1), (1, 1), (2, 2), (64, 96), (130, 257)]
SCALE = 0.3


def half_plane(out: int, inputs: int) -> list[tuple[int, int]]:
    """The half-plane as its definition has it."""
    edge = {0, inputs // 2} if inputs % 2 == 0 else {0}
    return [(u, v) for v in range(inputs // 2 + 1) for u in range(out // 2 + 1 if v in edge else out)]


def sparse(
    shape: tuple[int, int], count: int = 40, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Coefficients and indices without an order, all of them different."""
    generator = torch.Generator().manual_seed(shape[0] * shape[1] + seed)
    all_indices = torch.tensor(half_plane(*shape))
    indices = all_indices[torch.randperm(len(all_indices), generator=generator)[:count]].T.contiguous()
    coefficients = torch.randn(indices.shape[1], 2, generator=generator, dtype=torch.float64).to(dtype)
    return coefficients, indices


def dense_of(coefficients: Tensor, indices: Tensor, shape: tuple[int, int], scale: float = SCALE) -> Tensor:
    """The definition, wave by wave. Differentiable."""
    out, inputs = shape
    i, j = np.arange(out)[:, None], np.arange(inputs)
    turns = [2 * np.pi * (u * i / out - v * j / inputs) for u, v in indices.T.tolist()]
    waves = np.array([[np.cos(turn), -np.sin(turn)] for turn in turns]).reshape(-1, 2, out, inputs)
    return scale * torch.einsum("kp,kpij->ij", coefficients.double(), torch.from_numpy(waves))


def error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm().clamp(min=1e-30))


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,), (35,)])
def test_equals_the_dense_operator(shape: tuple[int, int], dtype: torch.dtype, batch: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    out, inputs = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    coefficients, indices = sparse(shape, dtype=wide)
    weight = dense_of(coefficients, indices, shape)
    x, g, bias = torch.randn(*batch, inputs).to(dtype), torch.randn(*batch, out).to(dtype), torch.randn(out).to(dtype)
    y = ops.sparse_frequency_linear(x, coefficients, indices, bias, out, SCALE)
    dx = ops.sparse_frequency_linear_dx(g, coefficients, indices, inputs, SCALE)
    dc = ops.sparse_frequency_linear_dc(g, x, indices, SCALE)
    assert (y.dtype, dx.dtype, dc.dtype) == (dtype, dtype, wide)
    assert (y.shape, dx.shape, dc.shape) == ((*batch, out), (*batch, inputs), coefficients.shape)
    if 0 in batch:
        assert not dc.any()
        return
    limit = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    assert error(y, F.linear(x.double(), weight, bias.double())) < limit
    assert error(dx, g.double() @ weight) < limit
    variable = coefficients.double().requires_grad_()
    form = (F.linear(x.double(), dense_of(variable, indices, shape)) * g.double()).sum()
    (expected,) = torch.autograd.grad(form, variable)
    # g and x are what they are: only sums are rounded.
    assert error(dc, expected) < (1e-11 if dtype == torch.float64 else 1e-5)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 60), st.integers(1, 20))
def test_any_shape(out: int, inputs: int, count: int, rows: int) -> None:
    coefficients, indices = sparse((out, inputs), count)
    x = torch.randn(rows, inputs, dtype=torch.float64)
    y = ops.sparse_frequency_linear(x, coefficients, indices, None, out, SCALE)
    torch.testing.assert_close(y, x @ dense_of(coefficients, indices, (out, inputs)).T, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_strided_inputs_and_indices_that_come_twice(dtype: torch.dtype) -> None:
    coefficients, indices = sparse((12, 8), 20)
    coefficients, indices = torch.cat([coefficients, coefficients.flip(1)]), torch.cat([indices, indices], 1).to(dtype)
    x = torch.randn(8, 2, 5, dtype=torch.float64)[:, 1:, ::2].permute(1, 2, 0)
    strided = torch.stack([coefficients, coefficients], -1)[..., 1]
    y = ops.sparse_frequency_linear(x, strided, torch.stack([indices, indices], -1)[..., 1], None, 12, SCALE)
    torch.testing.assert_close(y, x @ dense_of(coefficients, indices, (12, 8)).T, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_cuda_composition_on_cpu_tensors(shape: tuple[int, int]) -> None:
    """The kernels registered for CUDA are made of PyTorch's operators, which run anywhere."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    out, inputs = shape
    coefficients, indices = sparse(shape)
    indices = torch.cat([indices, indices[:, :3]], 1)
    coefficients = torch.cat([coefficients, coefficients[:3]])
    for batch in [(3, 5), (1,), (0,)]:
        x, g = torch.randn(*batch, inputs).double(), torch.randn(*batch, out).double()
        bias = torch.randn(out).double()
        for name, arguments in {
            "sparse_frequency_linear": (x, coefficients, indices, bias, out, SCALE),
            "sparse_frequency_linear_dx": (g, coefficients, indices, inputs, SCALE),
            "sparse_frequency_linear_dc": (g, x, indices, SCALE),
        }.items():
            operator = getattr(ops, name).default
            got, expected = operator.redispatch(cuda, *arguments), operator(*arguments)
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
            narrow = [a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
            assert operator.redispatch(cuda, *narrow).dtype == torch.float32
    # It cannot refuse indices; it may not follow them either.
    x = torch.randn(2, inputs).double()
    for hostile in (1 << 62, -(1 << 63), -1):
        places = torch.full_like(indices, hostile)
        y = ops.sparse_frequency_linear.default.redispatch(cuda, x, coefficients, places, None, out, SCALE)
        assert y.shape == (2, out)
    with pytest.raises(ValueError, match="coefficients: expected shape"):
        ops.sparse_frequency_linear.default.redispatch(cuda, x, coefficients[:1, :1], indices, None, out, SCALE)
    with pytest.raises(ValueError, match="gradient: expected leading dimensions"):
        ops.sparse_frequency_linear_dc.default.redispatch(cuda, x[:1], x, indices, SCALE)


# --- gradients --------------------------------------------------------------------------------------------------------


def leaves(shape: tuple[int, int], rows: tuple[int, ...] = (2,)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, inputs = shape
    x, g = torch.randn(*rows, inputs, dtype=torch.float64), torch.randn(*rows, out, dtype=torch.float64)
    tensors = (x, g, sparse(shape, 12)[0], torch.randn(out, dtype=torch.float64))
    return tuple(tensor.requires_grad_() for tensor in tensors)  # type: ignore[return-value]


@pytest.mark.parametrize("rows", [(2,), (0,)])
@pytest.mark.parametrize("shape", [(12, 8), (15, 10), (7, 11), (1, 9), (9, 1), (1, 1), (2, 2)])
def test_gradients_of_first_and_second_order(shape: tuple[int, int], rows: tuple[int, ...]) -> None:
    out, inputs = shape
    x, g, coefficients, bias = leaves(shape, rows)
    indices = sparse(shape, 12)[1]
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x, c, b: ops.sparse_frequency_linear(x, c, indices, b, out, SCALE), (x, coefficients, bias))
        assert check(lambda g, c: ops.sparse_frequency_linear_dx(g, c, indices, inputs, SCALE), (g, coefficients))
        assert check(lambda g, x: ops.sparse_frequency_linear_dc(g, x, indices, SCALE), (g, x))


def test_gradients_of_strided_inputs() -> None:
    x = torch.randn(11, 3, dtype=torch.float64).T.requires_grad_()
    coefficients, indices = sparse((7, 11), 12)
    strided = torch.stack([coefficients, coefficients], -1)[..., 0].requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda x, c: ops.sparse_frequency_linear(x, c, indices, None, 7, SCALE), (x, strided)
    )


def test_third_order() -> None:
    shape = (10, 13)
    x, _, coefficients, _ = leaves(shape)
    indices = sparse(shape, 12)[1]

    def third(product: object) -> tuple[Tensor, ...]:
        y = product(x, coefficients)  # type: ignore[operator]
        first = torch.autograd.grad((y**4).sum(), (x, coefficients), create_graph=True)
        second = torch.autograd.grad(sum((t**2).sum() for t in first), (x, coefficients), create_graph=True)
        return torch.autograd.grad(sum((t**2).sum() for t in second), (x, coefficients))

    got = third(lambda x, c: ops.sparse_frequency_linear(x, c, indices, None, 10, SCALE))
    expected = third(lambda x, c: x @ dense_of(c, indices, shape).T)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_only_what_is_needed_is_kept_and_computed() -> None:
    x, _, coefficients, bias = leaves((12, 8))
    indices = sparse((12, 8), 12)[1]
    for needed in ((x,), (coefficients,), (bias,), (x, bias)):
        for tensor in (x, coefficients, bias):
            tensor.requires_grad_(any(tensor is other for other in needed))
        y = ops.sparse_frequency_linear(x, coefficients, indices, bias, 12, SCALE)
        got = torch.autograd.grad(y.sum(), needed)
        weight = dense_of(coefficients, indices, (12, 8))
        torch.testing.assert_close(got, torch.autograd.grad(F.linear(x, weight, bias).sum(), needed))


def test_the_imaginary_part_of_what_is_its_own_conjugate_has_no_effect() -> None:
    indices = torch.tensor([[0, 6, 0, 6], [0, 0, 4, 4]])
    x = torch.randn(5, 8)
    coefficients = torch.randn(4, 2).requires_grad_()
    y = ops.sparse_frequency_linear(x, coefficients, indices, None, 12, SCALE)
    without = coefficients.detach() * torch.tensor([1.0, 0.0])
    assert torch.equal(y, ops.sparse_frequency_linear(x, without, indices, None, 12, SCALE))
    (gradient,) = torch.autograd.grad((y * torch.randn_like(y)).sum(), coefficients)
    assert gradient[:, 0].all()
    assert not gradient[:, 1].any()


# --- contracts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool) -> None:
    x, g, coefficients, bias = (tensor.detach().requires_grad_(requires_grad) for tensor in leaves((10, 13)))
    indices = sparse((10, 13), 12)[1].int()
    for name, sample in {
        "sparse_frequency_linear": (x, coefficients, indices, bias, 10, SCALE),
        "sparse_frequency_linear_dx": (g, coefficients, indices, 13, SCALE),
        "sparse_frequency_linear_dc": (g, x, indices, SCALE),
    }.items():
        results = torch.library.opcheck(getattr(ops, name).default, sample)
        assert set(results.values()) == {"SUCCESS"}, (name, results)


@pytest.mark.parametrize("real", [False, True])
def test_compile_and_export(real: bool) -> None:
    # What other tests compiled of the same layer counts towards a limit.
    torch.compiler.reset()
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        SparseFrequencyLinear(96, 64, 0.1, real=real), torch.nn.ReLU(), SparseFrequencyLinear(64, 10, 0.5, real=real)
    )
    x = torch.randn(5, 96)
    expected = net(x)
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    assert len(trained) == 4
    gradients = torch.autograd.grad(expected.square().sum(), trained)
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    got = compiled(x)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), trained), gradients)
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(net, (x,), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(torch.randn(9, 96)).shape, torch.Size([9, 10]))
    torch.testing.assert_close(exported(x), expected)


def test_autocast_casts_activations_and_not_the_coefficients() -> None:
    layer = SparseFrequencyLinear(96, 64, 0.1)
    x = torch.randn(5, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    expected = ops.sparse_frequency_linear(
        x.bfloat16(), layer.coefficients, layer.indices, layer.bias.bfloat16(), 64, layer.scale
    )
    torch.testing.assert_close(y, expected)


def test_bits_do_not_depend_on_threads_or_on_the_batch() -> None:
    torch.manual_seed(0)
    layer = SparseFrequencyLinear(500, 300, 0.05)
    x, g = torch.randn(170, 500), torch.randn(170, 300)
    operands = layer.coefficients.detach(), layer.indices

    def run() -> list[Tensor]:
        dx = ops.sparse_frequency_linear_dx(g, *operands, 500, layer.scale)
        return [
            layer(x),
            layer(x[:20]),
            layer(x[3]),
            dx,
            ops.sparse_frequency_linear_dc(g, x, operands[1], layer.scale),
        ]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run()
        torch.set_num_threads(3)
        for got, expected in zip(run(), alone, strict=True):
            assert torch.equal(got, expected)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone[1], alone[0][:20])
    assert torch.equal(alone[2], alone[0][3])
    assert torch.equal(ops.sparse_frequency_linear_dx(g[7], *operands, 500, layer.scale), alone[3][7])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x, c, i: ops.sparse_frequency_linear(x, c[0], i, None, 12, 1.0),
            r"coefficients: expected shape \[3, 2\]",
        ),
        (lambda x, c, i: ops.sparse_frequency_linear(x, c[:2], i, None, 12, 1.0), "coefficients: expected shape"),
        (lambda x, c, i: ops.sparse_frequency_linear(x, c.int(), i, None, 12, 1.0), "coefficients: expected a float32"),
        (lambda x, c, i: ops.sparse_frequency_linear(x, c, i.T, None, 12, 1.0), r"indices: expected shape \[2, "),
        (lambda x, c, i: ops.sparse_frequency_linear(x, c, i.float(), None, 12, 1.0), "indices: expected an int32 or"),
        (lambda x, c, i: ops.sparse_frequency_linear(x, c, i, None, -1, 1.0), "out_features: expected"),
        (lambda x, c, i: ops.sparse_frequency_linear(x[0, 0], c, i, None, 12, 1.0), "x: expected at least one"),
        (lambda x, c, i: ops.sparse_frequency_linear(x.int(), c, i, None, 12, 1.0), "x: expected a float32"),
        (
            lambda x, c, i: ops.sparse_frequency_linear(x, c, i, torch.zeros(11), 12, 1.0),
            r"bias: expected shape \[12\]",
        ),
        (lambda x, c, i: ops.sparse_frequency_linear(x, c, i, None, 12, math.inf), "scale: expected a finite number"),
        (lambda x, c, i: ops.sparse_frequency_linear(x, c, i, None, 6, 1.0), r"\(u, v\) = \(7, 1\) at position 2"),
        (lambda x, c, i: ops.sparse_frequency_linear(x, c, -i, None, 12, 1.0), r"\(u, v\) = \(-1, 0\) at position 0"),
        (lambda x, c, i: ops.sparse_frequency_linear_dx(x, c, i, 3, 1.0), r"at position 1"),
        (lambda x, c, i: ops.sparse_frequency_linear_dx(x, c, i, -8, 1.0), "in_features: expected"),
        (lambda x, c, i: ops.sparse_frequency_linear_dc(x, x[:1], i, 1.0), "gradient: expected the leading dimensions"),
        (lambda x, c, i: ops.sparse_frequency_linear_dc(x, x, i << 40, 1.0), "indices: expected 0 <= v <= 4"),
        (lambda x, c, i: SparseFrequencyLinear(0, 3, 0.5), "in_features: expected a positive integer"),
        (lambda x, c, i: SparseFrequencyLinear(3, 3, 0.0), "density: expected a number above 0, up to 1, got 0.0"),
        (lambda x, c, i: SparseFrequencyLinear(3, 3), "density, indices: expected one of them, got neither"),
        (lambda x, c, i: SparseFrequencyLinear(3, 3, 0.5, i), "density, indices: expected one of them, got both"),
        (lambda x, c, i: SparseFrequencyLinear(8, 6, indices=i), r"indices\[:, 2\]: expected .*\(u, v\) = \(7, 1\)"),
        (lambda x, c, i: SparseFrequencyLinear(8, 12, indices=i.T), "indices: expected an int32 or int64 tensor"),
        (lambda x, c, i: SparseFrequencyLinear(3, 3, 0.5, scale=0), "scale: expected a finite number"),
        (lambda x, c, i: SparseFrequencyLinear.from_linear(torch.nn.Linear(3, 3), 1.5), "density: expected"),
    ],
)
def test_wrong_arguments_are_named(call: object, message: str) -> None:
    x, coefficients, indices = torch.randn(3, 8), torch.randn(3, 2), torch.tensor([[1, 2, 7], [0, 3, 1]])
    with pytest.raises(ValueError, match=message):
        call(x, coefficients, indices)  # type: ignore[operator]


# --- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 2), (3, 2), (5, 7), (6, 4), (7, 6), (12, 9), (10, 10)])
def test_the_half_plane_has_one_of_two_conjugates(shape: tuple[int, int]) -> None:
    indices = spectral.half_plane(*shape)
    assert [tuple(pair) for pair in indices.T.tolist()] == half_plane(*shape)
    assert indices.shape[1] == spectral.half_plane_size(*shape)
    out, inputs = shape
    both = [{(u, v), (-u % out, -v % inputs)} for u, v in half_plane(*shape)]
    assert set.union(*both) == {(u, v) for u in range(out) for v in range(inputs)}
    assert sum(len(pair) for pair in both) == out * inputs


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (5, 7), (6, 4), (7, 6), (12, 9), (16, 24)])
@pytest.mark.parametrize("density", [0.05, 0.31, 0.5, 1])
def test_projection_is_the_best_for_its_degrees(shape: tuple[int, int], density: float) -> None:
    out, inputs = shape
    linear = torch.nn.Linear(inputs, out, dtype=torch.float64)
    layer = SparseFrequencyLinear.from_linear(linear, density)
    weight, got = linear.weight.detach(), layer.dense_weight().detach()
    expected = dense_of(layer.coefficients.detach(), layer.indices, shape, layer.scale)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    # Parseval: what is left is the energy of what was not taken; try every share of single degrees and pairs.
    energy = np.abs(np.fft.fft2(weight.numpy())) ** 2 / (out * inputs)
    conjugates = [((u, -v % inputs), (-u % out, v % inputs)) for u, v in half_plane(out, inputs)]
    alone = sorted((energy[a] for a, b in conjugates if a == b), reverse=True)
    pairs = sorted((energy[a] + energy[b] for a, b in conjugates if a != b), reverse=True)
    degrees = max(1, round(density * out * inputs))
    counts = range(min(len(alone), degrees) + 1)
    best = max(sum(alone[:count]) + sum(pairs[: (degrees - count) // 2]) for count in counts)
    assert float((weight - got).square().sum()) == pytest.approx(energy.sum() - best, rel=1e-9, abs=1e-12)
    own = sum((-u % out, -v % inputs) == (u, v) for u, v in layer.indices.T.tolist())
    assert 2 * layer.indices.shape[1] - own <= degrees
    if density == 1:
        torch.testing.assert_close(got, weight, rtol=1e-12, atol=1e-12)
    x = torch.randn(4, inputs, dtype=torch.float64)
    torch.testing.assert_close(layer.to_linear()(x), layer(x), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(layer.bias, linear.bias)


@pytest.mark.parametrize("real", [False, True])
def test_initial_weights_have_the_variance_of_a_dense_layer(real: bool) -> None:
    torch.manual_seed(0)
    layer = SparseFrequencyLinear(512, 256, 0.2, real=real)
    weight = layer.dense_weight().detach()
    assert abs(float(weight.std()) * math.sqrt(3 * 512) - 1) < 0.02
    # The default scale: an orthonormal basis.
    assert abs(float(layer.coefficients.detach().norm() / weight.norm()) - 1) < 0.02
    assert layer.indices.shape[1] == round(0.2 * spectral.half_plane_size(256, 512))
    assert torch.unique(layer.indices, dim=1).shape == layer.indices.shape


def test_indices_are_those_of_the_generator() -> None:
    def draw(seed: int) -> Tensor:
        return SparseFrequencyLinear(40, 24, 0.1, generator=torch.Generator().manual_seed(seed)).indices

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


def test_state_dicts_copies_and_dtypes(tmp_path: Path) -> None:
    layer = SparseFrequencyLinear.from_linear(torch.nn.Linear(40, 24), 0.11)
    other = SparseFrequencyLinear(40, 24, 0.5)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    x = torch.randn(3, 40)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert not list(layer.buffers())
    half = other.bfloat16()
    assert half.indices.dtype == torch.int32
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert error(half(x.bfloat16()), layer(x)) < 0.02
    assert "coefficients=" in repr(layer)
    with pytest.raises(RuntimeError, match="size mismatch"):
        SparseFrequencyLinear(41, 25, 0.5).load_state_dict(layer.state_dict())


def test_freezing_leaves_the_indices_alone() -> None:
    layer = SparseFrequencyLinear(8, 8, 0.5)
    assert not any(parameter.requires_grad for parameter in layer.requires_grad_(False).parameters())
    trained = {name for name, parameter in layer.requires_grad_().named_parameters() if parameter.requires_grad}
    assert trained == {"coefficients", "bias"}


@pytest.mark.parametrize("real", [False, True])
def test_it_learns_the_coefficients(real: bool) -> None:
    torch.manual_seed(0)
    teacher = SparseFrequencyLinear(64, 32, 0.1, real=real)
    student = SparseFrequencyLinear(64, 32, indices=teacher.indices, real=real)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.1)
    for _ in range(300):
        x = torch.randn(32, 64)
        loss = F.mse_loss(student(x), teacher(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert error(student.dense_weight(), teacher.dense_weight()) < 0.01


def test_another_number_of_features_is_refused() -> None:
    layer = SparseFrequencyLinear(100, 70, 0.1)
    for features in (99, 101, 200):
        with pytest.raises(ValueError, match="x: expected a last dimension of 100"):
            layer(torch.randn(3, features))

"""The operators' contracts: values, gradients, dtypes, layouts, compilers, threads, errors."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIGS, Case, make_case, random_weight
from infold import FusedConfig, build_info
from infold._library import ops
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (97, 131), (64, 64), (130, 1100)])
@pytest.mark.parametrize("batch", [(), (1,), (0,), (7,), (2, 3, 5), (130,)])
def test_linear_equals_the_dense_product(config: FusedConfig, shape: tuple[int, int], batch: tuple[int, ...]) -> None:
    case = make_case(random_weight(*shape), config)
    x, bias = torch.randn(*batch, shape[1]), torch.randn(shape[0])
    y = case.linear(x, bias)
    expected = F.linear(x.double(), case.dense(), bias.double())
    assert y.shape == expected.shape
    assert y.dtype == x.dtype
    if y.numel():
        assert relative_error(y, expected) < 1e-5


@pytest.mark.parametrize("dtype", FLOATS)
def test_half_precision_is_no_worse_than_the_dense_layer(config: FusedConfig, dtype: torch.dtype) -> None:
    case = make_case(random_weight(256, 512), config)
    x = torch.randn(33, 512).to(dtype)
    weight = case.dense(dtype)
    exact = F.linear(x.double(), case.dense())
    # AMX takes ECSQ's reconstruction points rounded, as the dense layer has them; else they are not.
    rounds = config.format == "ecsq" and dtype == torch.bfloat16 and build_info()["cpu"] == "amx"
    ours = relative_error(case.linear(x), exact)
    theirs = relative_error(F.linear(x, weight), exact if rounds else F.linear(x.double(), weight.double()))
    assert case.linear(x).dtype == dtype
    assert ours <= 1.02 * theirs + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lossless_weights_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    weight = random_weight(100, 333, dtype)
    weight[3, 4], weight[5, 6], weight[7, 8], weight[0, 0] = float("nan"), float("inf"), -0.0, 6e4
    case = make_case(weight, FusedConfig())
    assert torch.equal(case.dense(dtype).view(torch.uint8), weight.view(torch.uint8))
    looked_up = ops.fused_embedding(torch.tensor([0, 7, 3]), *case.tensors, None, *case.layout, dtype)
    assert torch.equal(looked_up.view(torch.uint8), weight[[0, 7, 3]].view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_16_bit_patterns(dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(256, 256).view(dtype)
    case = make_case(patterns, FusedConfig())
    assert torch.equal(case.dense(dtype).view(torch.int16), patterns.view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 5, 64])
def test_exact_mode_has_the_bits_of_the_dense_layer(dtype: torch.dtype, batch: int) -> None:
    weight, bias = random_weight(300, 200, dtype), torch.randn(300).to(dtype)
    case = make_case(weight, FusedConfig())
    x = torch.randn(batch, 200).to(dtype)
    assert torch.equal(case.linear(x, bias, exact=True), F.linear(x, weight, bias))


def test_exact_mode_shares_its_scratch_between_shapes_and_dtypes() -> None:
    for rows, cols, dtype in [
        (64, 32, torch.float32),
        (8, 8, torch.float32),
        (90, 90, torch.bfloat16),
        (4, 4, torch.float32),
    ]:
        weight = random_weight(rows, cols, dtype)
        x = torch.randn(3, cols).to(dtype)
        assert torch.equal(make_case(weight, FusedConfig()).linear(x, exact=True), F.linear(x, weight))


def test_inputs_may_be_strided_or_offset(case: Case) -> None:
    base = torch.randn(161, 12)
    strided = base[1:].T
    offset = torch.randn(1 + 3 * 160)[1:].view(3, 160)
    expanded = torch.randn(160).expand(4, 160)
    for x in (strided, offset, expanded):
        assert torch.equal(case.linear(x), case.linear(x.contiguous()))
    payload = torch.cat([torch.zeros(3, dtype=torch.uint8), case.packed.payload])[3:]
    unaligned = torch.frombuffer(b"x" + bytes(case.packed.directory.numpy().data), dtype=torch.int32, offset=1)
    moved = case._replace(packed=case.packed._replace(payload=payload, directory=unaligned))
    assert torch.equal(moved.linear(strided), case.linear(strided))


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_embedding_equals_the_dense_lookup(case: Case, index_dtype: torch.dtype) -> None:
    for indices in (torch.tensor(5), torch.tensor([], dtype=torch.int64), torch.randint(0, 96, (4, 7))):
        indices = indices.to(index_dtype)
        rows = ops.fused_embedding(indices, *case.tensors, case.scales, *case.layout, torch.float32)
        assert torch.equal(rows, F.embedding(indices, case.dense(torch.float32)))


# --- gradients --------------------------------------------------------------------------------------------------------


def test_gradients_of_the_linear(config: FusedConfig) -> None:
    case = make_case(random_weight(37, 70), config)
    x = torch.randn(2, 3, 70, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(37, dtype=torch.float64, requires_grad=True)
    scales = None if case.scales is None else case.scales.double().requires_grad_()
    inputs = (x, bias) if scales is None else (x, bias, scales)
    assert torch.autograd.gradcheck(case.linear, inputs)
    assert torch.autograd.gradgradcheck(case.linear, inputs)


def test_gradients_of_the_embedding_and_of_unpack(quantized: list[Case]) -> None:
    indices = torch.tensor([[3, 3, 39], [0, 32, 7]])
    for case in quantized:
        scales = case.packed.scales.double().requires_grad_()

        def embed(s: Tensor, case: Case = case) -> Tensor:
            return ops.fused_embedding(indices, *case.tensors, s, *case.layout, torch.float64)

        def unpack(s: Tensor, case: Case = case) -> Tensor:
            return ops.unpack(*case.tensors, s, *case.layout, torch.float64)

        for function in (embed, unpack):
            assert torch.autograd.gradcheck(function, (scales,))
            assert torch.autograd.gradgradcheck(function, (scales,))


def test_gradients_equal_the_dense_layer(case: Case) -> None:
    x, y_grad = torch.randn(50, 160, requires_grad=True), torch.randn(50, 96)
    bias = torch.randn(96, requires_grad=True)
    case.linear(x, bias).backward(y_grad)
    assert x.grad is not None
    assert bias.grad is not None
    assert relative_error(x.grad, y_grad.double() @ case.dense()) < 1e-5
    assert relative_error(bias.grad, y_grad.double().sum(0)) < 1e-5


def test_exact_mode_has_the_gradient_bits_of_the_dense_layer() -> None:
    weight = random_weight(64, 48)
    case = make_case(weight, FusedConfig())
    x = torch.randn(10, 48)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    case.linear(ours, exact=True).sum().backward()
    F.linear(theirs, weight).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)


def test_a_frozen_weight_keeps_no_activation() -> None:
    case = make_case(random_weight(64, 64), CONFIGS["int8"])
    saved: list[Tensor] = []

    def remember(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(8, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        case.linear(x)
    assert saved
    assert all(tensor.data_ptr() != x.data_ptr() for tensor in saved)


# --- compilers --------------------------------------------------------------------------------------------------------


def arguments(case: Case, requires_grad: bool) -> dict[str, tuple[object, ...]]:
    scales = None if case.scales is None else case.scales.float().requires_grad_(requires_grad)
    x = torch.randn(3, 160, requires_grad=requires_grad)
    g = torch.randn(3, 96, requires_grad=requires_grad)
    bias = torch.randn(96, requires_grad=requires_grad)
    indices = torch.tensor([[1, 5], [95, 0]])
    rows = torch.randn(2, 2, 160, requires_grad=requires_grad)
    shape = [] if case.scales is None else list(case.scales.shape)
    common = (*case.layout, torch.float32)
    samples: dict[str, tuple[object, ...]] = {
        "fused_linear": (x, *case.tensors, scales, bias, *common),
        "fused_linear_dx": (g, *case.tensors, scales, *common),
        "fused_embedding": (indices, *case.tensors, scales, *common),
        "unpack": (*case.tensors, scales, *common),
    }
    if shape:
        samples["fused_linear_ds"] = (g, x, *case.tensors, shape, *common)
        samples["fused_embedding_ds"] = (rows, indices, *case.tensors, shape, *common)
    return samples


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(case: Case, requires_grad: bool) -> None:
    for name, sample in arguments(case, requires_grad).items():
        results = torch.library.opcheck(getattr(ops, name).default, sample)
        assert set(results.values()) == {"SUCCESS"}, (name, results)


class Net(torch.nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.case.linear(torch.sin(x))).sum(-1)


def test_compile_and_export(case: Case) -> None:
    net = Net(case)
    x = torch.randn(5, 160, requires_grad=True)
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    expected = net(x)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    got = compiled(x)
    (compiled_gradient,) = torch.autograd.grad(got.sum(), x)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(compiled_gradient, gradient)
    torch.testing.assert_close(compiled(x[:2]), expected[:2])

    exported = torch.export.export(net, (x.detach(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(exported.module()(x[:3].detach()), expected[:3])


def test_autocast_casts_activations_and_nothing_else(case: Case) -> None:
    x, bias = torch.randn(4, 160), torch.randn(96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = case.linear(x, bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, case.linear(x.bfloat16(), bias.bfloat16()))


def test_exact_mode_ignores_autocast_in_the_backward() -> None:
    case = make_case(random_weight(64, 48), FusedConfig())
    gradient = torch.randn(3, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dx = ops.fused_linear_dx(gradient, *case.tensors, None, *case.layout, torch.float32, True)
    assert dx.dtype == torch.float32
    assert torch.equal(dx, gradient @ case.dense(torch.float32))


# --- threads and processes --------------------------------------------------------------------------------------------


def test_bits_do_not_depend_on_threads_or_batch_position(case: Case) -> None:
    x = torch.randn(70, 160)
    torch.set_num_threads(1)
    expected = case.linear(x)
    gradient = ops.fused_linear_dx(expected, *case.tensors, case.scales, *case.layout, torch.float32)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(case.linear(x), expected)
        again = ops.fused_linear_dx(expected, *case.tensors, case.scales, *case.layout, torch.float32)
        assert torch.equal(again, gradient)
    for row in (0, 1, 47, 48, 69):
        assert torch.equal(case.linear(x[row]), expected[row])


def test_set_num_threads_governs() -> None:
    """Counts the threads that the process has: a serial `at::parallel_for` would start none."""
    code = (
        "import os, torch, infold\n"
        "from infold._library import ops\n"
        "torch.set_num_threads(3)\n"
        "w = torch.randn(512, 64)\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "ops.pack_lossless(w)\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) == 2


def test_eight_threads_at_once(case: Case) -> None:
    inputs = [torch.randn(9, 160) for _ in range(8)]
    expected = [case.linear(x) for x in inputs]
    barrier = threading.Barrier(8)

    def work(index: int) -> bool:
        barrier.wait()
        exact = case.linear(inputs[index], exact=True)
        return all(torch.equal(case.linear(inputs[index]), expected[index]) for _ in range(20)) and torch.equal(
            case.linear(inputs[index], exact=True), exact
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_fork_before_first_use() -> None:
    """As in a DataLoader's workers: a fresh process that has loaded the library forks, and the children compute."""
    code = (
        "import os, torch, infold\n"
        "from conftest import make_case, random_weight, CONFIGS\n"
        "torch.set_num_threads(1)\n"
        "case = make_case(random_weight(64, 64), CONFIGS['ecsq'])\n"
        "x = torch.ones(2, 64)\n"
        "pid = os.fork()\n"
        "y = case.linear(x)\n"
        "ok = torch.allclose(y.double(), x.double() @ case.dense().T)\n"
        "if pid == 0: os._exit(0 if ok else 1)\n"
        "assert ok and os.waitpid(pid, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=Path(__file__).parent)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_twelve_hundred_passes_leak_nothing(case: Case) -> None:
    x = torch.randn(16, 160, requires_grad=True)

    def passes(count: int) -> None:
        for _ in range(count):
            case.linear(x).sum().backward()
            case.linear(x, exact=True)
            ops.fused_embedding(torch.tensor([1, 2]), *case.tensors, case.scales, *case.layout, torch.float32)
            x.grad = None

    # A leak grows in every round; whatever else the process does, in some.
    passes(200)
    grown = []
    for _ in range(3):
        before = resident_bytes()
        passes(400)
        grown.append(resident_bytes() - before)
    assert min(grown) < 200_000, f"{grown} bytes more in three rounds of 400 passes"


def test_a_forward_allocates_its_output_and_a_converted_input(config: FusedConfig) -> None:
    """Tensors that the operator makes, from PyTorch's own memory events; `rust_tests/memory.rs` counts the rest."""
    case = make_case(random_weight(2048, 512, torch.bfloat16), config)
    for dtype, converted in ((torch.float32, 0), (torch.bfloat16, 4)):
        x = torch.randn(8, 512).to(dtype)
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            y = case.linear(x)
        events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
        allocated = sum(max(event.nbytes(), 0) for event in events)
        assert y.nbytes <= allocated <= y.nbytes + converted * x.numel() + 1024


# --- errors -----------------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_value_errors(case: Case) -> None:
    codec, layout, rows, cols = case.layout
    x = torch.randn(2, 160)
    tail = (codec, layout, rows, cols, torch.float32)
    with pytest.raises(ValueError, match=r"x: expected a last dimension of 160, got shape \[2, 159\]"):
        case.linear(x[:, 1:])
    with pytest.raises(ValueError, match="x: expected a float32, float64, float16 or bfloat16 tensor, got Int64"):
        case.linear(x.long())
    with pytest.raises(ValueError, match=r"bias: expected shape \[96\], got \[95\]"):
        case.linear(x, torch.randn(95))
    with pytest.raises(ValueError, match="out_features: expected 96, as in the weight's header, got 97"):
        ops.fused_linear(x, *case.tensors, case.scales, None, codec, layout, 97, cols, torch.float32)
    with pytest.raises(ValueError, match="codec: expected"):
        ops.fused_linear(x, *case.tensors, case.scales, None, 1 - codec, *tail[1:])
    with pytest.raises(ValueError, match="payload: expected dtype Uint8"):
        ops.fused_linear(x, case.packed.payload.int(), *case.tensors[1:], case.scales, None, *tail)
    with pytest.raises(ValueError, match="out_features: expected 0 to 67108863, got -1"):
        ops.fused_linear(x, *case.tensors, case.scales, None, codec, layout, -1, cols, torch.float32)
    with pytest.raises(ValueError, match="scale_shape: expected"):
        ops.fused_linear_ds(torch.randn(2, 96), x, *case.tensors, [7, 7], *tail)
    with pytest.raises(RuntimeError, match="unknown kind"):
        case.linear(torch.zeros(2, 160, dtype=torch.uint16))
    with pytest.raises(ValueError, match="embedding index: expected 0 to 95, got 96"):
        ops.fused_embedding(torch.tensor([3, 96]), *case.tensors, case.scales, *tail)
    if case.scales is not None:
        with pytest.raises(ValueError, match="scales: expected"):
            ops.fused_linear(x, *case.tensors, case.scales.flatten()[1:], None, *tail)


def test_packing_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ValueError, match="weight: expected two dimensions"):
        ops.pack_int8(torch.randn(3))
    with pytest.raises(ValueError, match="weight: expected a float32, float16 or bfloat16 tensor, got Double"):
        ops.pack_lossless(torch.randn(3, 3).double())
    weight = torch.randn(3, 4)
    weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"weight\[1, 2\] is NaN"):
        ops.pack_int8(weight)
    with pytest.raises(ValueError, match="exactly one of the two"):
        ops.pack_ecsq(torch.randn(3, 4))


def test_hostile_tensors_are_errors_or_wrong_numbers() -> None:
    generator = torch.Generator().manual_seed(0)

    def noise(size: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).to(dtype)

    case = make_case(random_weight(64, 64), CONFIGS["ecsq"])
    x = torch.randn(2, 64)
    messages = set()
    for round_ in range(200):
        payload = noise(case.packed.payload.numel() - round_ * 5, torch.uint8)
        directory = noise(case.packed.directory.numel(), torch.int32)
        for tensors in (
            (payload, *case.tensors[1:]),
            (case.packed.payload, directory, case.packed.tables),
            (payload, directory, noise(case.packed.tables.numel(), torch.uint8)),
        ):
            try:
                y = ops.fused_linear(x, *tensors, case.scales, None, *case.layout, torch.float32)
                assert y.shape == (2, 64)
            except (RuntimeError, ValueError) as error:
                messages.add(str(error))
    assert messages
    assert not any("internal error" in message for message in messages)

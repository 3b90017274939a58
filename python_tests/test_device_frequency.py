"""The block-circulant operators on a GPU, against those of the CPU in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from infold import log8_decode, log8_encode
from infold._library import ops
from infold.nn import FrequencyLinear, SparseFrequencyLinear
from torch import Tensor

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
#: By the kernels that compute them: for few rows, for many of bfloat16, and PyTorch's transforms.
BLOCKS = [16, 32, 64, 128, 256, 1, 3, 48]
SHAPES = [(300, 270), (640, 1024), (4096, 4096)]


def relative(actual: Tensor, expected: Tensor) -> float:
    expected = expected.detach()
    size = expected.norm().item()
    return (actual.detach().double().cpu() - expected).norm().item() / size if size else 0.0


@cuda
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_products_and_gradients_on_cuda(block: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    if block < 16 and outputs > 1000:
        pytest.skip("large for so small blocks")
    # Of bfloat16 many rows: two transforms, two spectra, the weights and the result are rounded.
    limit = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    generator = torch.Generator().manual_seed(block)
    layer = FrequencyLinear(inputs, outputs, block, dtype=torch.float64)
    for batch in (0, 1, 17, 300) if outputs > 1000 else (0, 1, 5, 16, 17, 64, 300):
        x = torch.randn(batch, inputs, generator=generator, dtype=torch.float64).to(dtype)
        g = torch.randn(batch, outputs, generator=generator, dtype=torch.float64).to(dtype)
        results = []
        for device in ("cpu", "cuda"):
            own = torch.float64 if device == "cpu" else dtype
            spectrum = layer.spectrum.detach().to(dtype).to(device, own).clone().requires_grad_()  # type: ignore[union-attr]
            bias = layer.bias.detach().to(dtype).to(device, own).clone().requires_grad_()  # type: ignore[union-attr]
            here = x.to(device, own).clone().requires_grad_()
            y = ops.frequency_linear(here, spectrum, bias, outputs)
            y.backward(g.to(device, own))
            results.append((y, here.grad, spectrum.grad, bias.grad))
        for actual, expected in zip(results[1], results[0], strict=True):
            assert (actual.shape, actual.device.type) == (expected.shape, "cuda")
            assert relative(actual, expected) <= limit


@cuda
@pytest.mark.parametrize("block", [16, 64, 5])
def test_blocks_cut_short_on_cuda(block: int) -> None:
    for outputs, inputs in ((1, 1), (33, 7), (70, 1)):
        layer = FrequencyLinear(inputs, outputs, block)
        x = torch.randn(3, inputs)
        expected = x.double() @ layer.dense_weight().detach().double().T + layer.bias.detach().double()  # type: ignore[union-attr]
        actual = layer.cuda()(x.cuda())
        assert (actual.cpu() - expected).abs().max() <= 1e-5


@cuda
@pytest.mark.parametrize("block", [16, 64, 5])
def test_strided_float32_spectra_and_repeats_on_cuda(block: int) -> None:
    layer = FrequencyLinear(256, 320, block).cuda()
    for batch in (3, 40):
        x = torch.randn(2, 512, batch, dtype=torch.bfloat16, device="cuda").transpose(1, 2)[..., ::2]
        y = layer(x)
        assert (y.shape, y.dtype) == ((2, batch, 320), torch.bfloat16)
        exact = x.double() @ layer.dense_weight().double().T + layer.bias.double()  # type: ignore[union-attr]
        assert relative(y, exact.cpu()) <= 8e-3
        assert torch.equal(layer(x), y)
        with torch.autocast("cuda", torch.bfloat16):
            assert torch.equal(layer(x.float()), y)


@cuda
def test_graphs_and_compile_on_cuda() -> None:
    layer = FrequencyLinear(512, 512, 64).cuda()
    compiled = torch.compile(layer, fullgraph=True)
    for batch in (2, 100):
        x = torch.randn(batch, 512, dtype=torch.bfloat16, device="cuda")
        with torch.no_grad():
            layer(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = layer(x)
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(y, layer(x))
            assert torch.equal(compiled(x), y)


@cuda
@pytest.mark.parametrize("block", [16, 64, 12])
def test_log8_on_cuda(block: int) -> None:
    layer = FrequencyLinear(500, 600, block, storage="log8")
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        expected = log8_decode(layer._encoded(), dtype)
        there = log8_decode(layer._encoded()._replace(codes=layer.codes.cuda(), words=layer.words.cuda()), dtype)  # type: ignore[union-attr]
        assert torch.equal(there.cpu(), expected)
    # Of its own, bias included, which layers made of one another share.
    exact = copy.deepcopy(layer).to_float(torch.float64)
    encoded = log8_encode(exact.spectrum.float().cuda())  # type: ignore[union-attr]
    assert all(part.is_cuda for part in encoded)
    layer.cuda()
    for batch in (1, 40):
        x = torch.randn(batch, 500)
        g = torch.randn(batch, 600)
        for dtype, limit in ((torch.float32, 2e-6), (torch.bfloat16, 8e-3)):
            here, far = (x.to(dtype).double().requires_grad_(), x.to("cuda", dtype).requires_grad_())
            exact(here).backward(g.to(dtype).double())
            y = layer(far)
            y.backward(g.to("cuda", dtype))
            assert relative(y, exact(here)) <= limit
            assert relative(far.grad, here.grad) <= limit  # type: ignore[arg-type]


@cuda
@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("sizes", [(500, 600), (257, 130), (7, 1)])
def test_sparse_spectra_on_cuda(sizes: tuple[int, int], real: bool) -> None:
    layer = SparseFrequencyLinear(
        *sizes, 0.1, real=real, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    there = copy.deepcopy(layer).cuda()
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 5e-6), (torch.bfloat16, 1e-2)):
        for batch in (0, 1, 40):
            # Copies, for on the CPU they would be one tensor.
            x, g = torch.randn(batch, sizes[0]).to(dtype), torch.randn(batch, sizes[1]).to(dtype)
            here, far = (
                x.to(device, own, copy=True).requires_grad_()
                for device, own in (("cpu", torch.float64), ("cuda", dtype))
            )
            layer.zero_grad()
            there.zero_grad()
            y = there(far)
            y.backward(g.cuda())
            expected = layer(here)
            expected.backward(g.double())
            assert (y.dtype, y.is_cuda) == (dtype, True)
            assert relative(y, expected) <= limit
            assert relative(far.grad, here.grad) <= limit  # type: ignore[arg-type]
            assert relative(there.coefficients.grad, layer.coefficients.grad) <= limit  # type: ignore[arg-type]
            assert torch.equal(there(far), y)


@cuda
def test_sparse_gradients_of_any_order_on_cuda() -> None:
    layer = SparseFrequencyLinear(9, 12, 0.3, dtype=torch.float64).cuda()
    x = torch.randn(2, 9, dtype=torch.float64, device="cuda", requires_grad=True)
    coefficients = layer.coefficients.detach().requires_grad_()

    def product(x: Tensor, coefficients: Tensor) -> Tensor:
        return ops.sparse_frequency_linear(x, coefficients, layer.indices, None, 12, 0.5)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(product, (x, coefficients))
    assert torch.autograd.gradgradcheck(product, (x, coefficients))


@cuda
@pytest.mark.parametrize("block", [4, 16, 7])
def test_gradients_of_any_order_on_cuda(block: int) -> None:
    options = {"dtype": torch.float64, "device": "cuda", "requires_grad": True}
    x = torch.randn(2, 20, **options)  # type: ignore[call-overload]
    spectrum = torch.randn(-(-30 // block), -(-20 // block), block, **options)  # type: ignore[call-overload]

    def layer(x: Tensor, spectrum: Tensor) -> Tensor:
        return ops.frequency_linear(x, spectrum, None, 30)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(layer, (x, spectrum))
    assert torch.autograd.gradgradcheck(layer, (x, spectrum))


@cuda
def test_opcheck_on_cuda() -> None:
    layer = FrequencyLinear(64, 128, 16).cuda()
    x = torch.randn(3, 64, device="cuda", requires_grad=True)
    torch.library.opcheck(ops.frequency_linear.default, (x, layer.spectrum, layer.bias, 128))


@cuda
def test_inputs_elsewhere_are_refused_on_cuda() -> None:
    layer = FrequencyLinear(64, 128, 16)
    with pytest.raises(ValueError, match="spectrum: expected a tensor on Cuda"):
        ops.frequency_linear(torch.randn(3, 64, device="cuda"), layer.spectrum, None, 128)

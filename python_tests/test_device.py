"""Weights laid out for CUDA; and where there is a GPU, every operator there against float64."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import infold
import pytest
import torch
import torch.nn.functional as F
from infold import FusedConfig
from infold._library import ops
from infold.nn import FusedDecompressConv, FusedDecompressEmbedding, FusedDecompressLinear
from infold.packed import Packed, lay_out, pack
from torch import nn

LOSSLESS = FusedConfig("lossless")
#: By the layout that they get.
QUANTISED = {
    "codes4": FusedConfig("ecsq", bits=3),
    "codes5": FusedConfig("ecsq", bits=4),
    "codes8 of ecsq": FusedConfig("ecsq", bits=6),
    "codes8": FusedConfig("int8"),
    "codes4 in groups": FusedConfig("int4", group_size=64),
}
#: Formats whose weights are coded in pairs too.
IN_PAIRS = {"lossless": LOSSLESS, **{name: QUANTISED[name] for name in ("codes4", "codes5", "codes4 in groups")}}
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def sums_in_float32() -> Iterator[None]:
    """The library's own products shall not add halves of a sum in half precision."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_bf16_reduced_precision_reduction, settings.allow_fp16_reduced_precision_reduction
    settings.allow_bf16_reduced_precision_reduction = settings.allow_fp16_reduced_precision_reduction = False
    yield
    settings.allow_bf16_reduced_precision_reduction, settings.allow_fp16_reduced_precision_reduction = before


def weight_of(rows: int, cols: int) -> torch.Tensor:
    """Trained weights look like this; some zeros and outliers are outside the window."""
    weight = torch.randn(rows, cols).mul(0.05)
    weight.view(-1)[:: max(rows * cols // 7, 1)] = 0
    weight.view(-1)[-1] = 1.5
    return weight.bfloat16()


def linear_of(rows: int, cols: int) -> nn.Linear:
    linear = nn.Linear(cols, rows, dtype=torch.bfloat16)
    linear.weight.data = weight_of(rows, cols)
    return linear


@pytest.mark.parametrize("layout", ["compact", "fast"])
def test_a_module_goes_to_the_devices_layout_and_back(layout: str) -> None:
    linear = linear_of(70, 200)
    packed = FusedDecompressLinear.from_linear(linear, LOSSLESS)
    canonical = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    infold.prepare(nn.Sequential(packed), layout)  # type: ignore[arg-type]

    packed.lay_out("device")
    assert packed.layout == "window"
    assert 8 * packed.packed.nbytes / linear.weight.numel() < 18  # ragged edges; 12.2 of a large weight
    for name, tensor in packed.state_dict().items():
        assert torch.equal(tensor, canonical[name]), name
    other = copy.deepcopy(packed)
    other.load_state_dict(FusedDecompressLinear.from_linear(linear_of(70, 200), LOSSLESS).state_dict())
    other.load_state_dict(canonical)
    assert other.layout == "window"

    # The CPU has no use for it: the next forward lays it out anew.
    x = torch.randn(3, 200, dtype=torch.bfloat16)
    assert torch.equal(other(x), FusedDecompressLinear.from_linear(linear, LOSSLESS)(x))
    assert other.layout == "fast"
    assert torch.equal(packed.weight, linear.weight)


def test_the_size_of_a_large_weight() -> None:
    packed = lay_out(pack(torch.randn(1024, 1024).bfloat16(), LOSSLESS), "device")
    assert 12 < 8 * packed.nbytes / 1024**2 < 12.2


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_weights_go_there_and_back(name: str) -> None:
    linear = linear_of(130, 320).float()
    packed = FusedDecompressLinear.from_linear(linear, QUANTISED[name])
    canonical = {field: tensor.clone() for field, tensor in packed.state_dict().items()}
    packed.lay_out("device")
    assert packed.layout == name.split()[0]
    for field, tensor in packed.state_dict().items():
        assert torch.equal(tensor, canonical[field]), field


@pytest.mark.parametrize("name", IN_PAIRS)
def test_pairs_there_and_back_and_from_the_other_layouts(name: str) -> None:
    linear = linear_of(130, 320)
    packed = FusedDecompressLinear.from_linear(linear if name == "lossless" else linear.float(), IN_PAIRS[name])
    canonical = {field: tensor.clone() for field, tensor in packed.state_dict().items()}
    fixed = "window" if name == "lossless" else "codes"
    for form in ("pairs", fixed, "pairs", "device", fixed, "compact", "pairs", "fast"):
        packed.lay_out(form)
        expected = {"pairs": ("pairs", "pairs_of_levels"), "compact": ("compact",), "fast": ("fast",)}
        assert form == "device" or packed.layout in expected.get(form, ("window", "codes4", "codes5"))
        for field, tensor in packed.state_dict().items():
            assert torch.equal(tensor, canonical[field]), (form, field)


def test_a_module_takes_a_weight_that_has_no_pairs() -> None:
    linear = linear_of(64, 256).float()
    packed = FusedDecompressLinear.from_linear(linear, QUANTISED["codes4"])
    other = FusedDecompressLinear.from_linear(linear, QUANTISED["codes8"])
    packed.lay_out("pairs")
    assert packed.layout == "pairs_of_levels"
    packed.load_state_dict(FusedDecompressLinear.from_linear(linear, QUANTISED["codes5"]).state_dict())
    assert packed.layout == "pairs_of_levels"
    packed.load_state_dict(other.state_dict())
    assert packed.layout == "codes8"
    assert torch.equal(packed.weight, other.weight)


def test_pairs_take_fewer_bits() -> None:
    weight = torch.randn(1024, 1024) * 0.02
    for name, most in (("lossless", 10.9), ("codes4", 3.5), ("codes5", 4.5)):
        packed = lay_out(pack(weight.bfloat16() if name == "lossless" else weight, IN_PAIRS[name]), "pairs")
        assert 8 * packed.nbytes / weight.numel() < most, name


def test_equal_times_keep_the_fixed_width(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = FusedDecompressLinear.from_linear(linear_of(64, 256), LOSSLESS)
    for fixed, pairs, expected in ((1.0, 1.0, "window"), (1.01, 1.0, "window"), (1.1, 1.0, "pairs"), (1, 2, "window")):
        calls = []

        def measure(
            _: object, forms: object, fixed: float = fixed, pairs: float = pairs, calls: list[object] = calls
        ) -> dict[str, float]:
            calls.append(forms)
            return {"window": fixed, "pairs": pairs}

        monkeypatch.setattr(infold.layout, "_measure_on_device", measure)
        infold.layout.lay_out_for_device([[packed], [copy.deepcopy(packed)]], "auto")
        assert packed.layout == expected
        assert len(calls) == 1  # weights of one size are measured once
    bytes_ = FusedDecompressLinear.from_linear(linear_of(64, 256).float(), QUANTISED["codes8"])
    infold.layout.lay_out_for_device([[bytes_]], "auto")
    assert bytes_.layout == "codes8"  # and what has one layout not at all
    with pytest.raises(ValueError, match="layout: expected window or pairs or raw for a weight of format lossless"):
        infold.layout.lay_out_for_device([[packed]], "codes")
    with pytest.raises(ValueError, match="layout: expected auto, window, codes, pairs or raw on CUDA"):
        infold.layout.lay_out_for_device([[packed]], "fast")


def test_other_weights_are_refused_and_stay() -> None:
    packed = FusedDecompressLinear.from_linear(linear_of(64, 128).half(), LOSSLESS)
    before = packed.weight
    with pytest.raises(ValueError, match="layout for CUDA: expected lossless bfloat16, ecsq, int8 or int4"):
        packed.lay_out("window")
    assert packed.layout == "compact"
    assert torch.equal(packed.weight, before)
    bytes_ = FusedDecompressLinear.from_linear(linear_of(64, 128).float(), QUANTISED["codes8"])
    for form, expected in (("pairs", "at most one weight in 64"), ("raw", "expected a lossless weight, got Int8")):
        with pytest.raises(ValueError, match=expected):
            bytes_.lay_out(form)
    assert bytes_.layout == "compact"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_that_lie_as_they_are(dtype: torch.dtype) -> None:
    linear = linear_of(70, 100).to(dtype)
    packed = FusedDecompressLinear.from_linear(linear, LOSSLESS)
    canonical = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    packed.lay_out("raw" if dtype == torch.bfloat16 else "device")
    assert packed.layout == {torch.bfloat16: "raw_bf16", torch.float16: "raw_f16", torch.float32: "raw_f32"}[dtype]
    assert torch.equal(packed.payload.view(dtype).view(70, 100), linear.weight)
    assert all(torch.equal(tensor, canonical[name]) for name, tensor in packed.state_dict().items())
    assert torch.equal(packed.weight, linear.weight)


@cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_that_lie_as_they_are_on_cuda(dtype: torch.dtype) -> None:
    linear = linear_of(70, 100).to(dtype)
    packed = FusedDecompressLinear.from_linear(linear, LOSSLESS).cuda()
    packed.lay_out("raw")
    embedding = FusedDecompressEmbedding(packed.packed)
    conv = nn.Conv2d(4, 8, 3, dtype=dtype)
    packed_conv = FusedDecompressConv.from_conv(conv, LOSSLESS).cuda()
    linear.cuda(), conv.cuda()
    for own in (dtype, torch.float32):
        x = torch.randn(5, 100, device="cuda", dtype=own, requires_grad=True)
        expected = F.linear(x, linear.weight.to(own), linear.bias.to(own))
        assert torch.equal(packed(x), expected)
        gradient = torch.randn_like(expected)
        dx, *_ = torch.autograd.grad(packed(x), x, gradient)
        assert torch.equal(dx, gradient @ linear.weight.to(own))
    indices = torch.randint(70, (3, 4), device="cuda")
    assert torch.equal(embedding(indices), linear.weight[indices])
    image = torch.randn(2, 4, 9, 9, device="cuda", dtype=dtype)
    assert torch.equal(packed_conv(image), conv(image))


def test_pruned_weights_have_pairs() -> None:
    linear = linear_of(64, 64)
    linear.weight.data[::2] = 0
    packed = FusedDecompressLinear.from_linear(linear, LOSSLESS)
    with pytest.raises(ValueError, match="at most one weight in 64"):
        packed.lay_out("window")
    packed.lay_out("device")
    assert packed.layout == "pairs"
    packed.lay_out("compact")
    assert torch.equal(packed.weight, linear.weight)


def test_the_cpus_operators_refuse_it() -> None:
    packed = lay_out(pack(weight_of(64, 64), LOSSLESS), "device")
    arguments = (*packed[:3], None, None, 0, 2, 64, 64, torch.bfloat16)
    with pytest.raises(ValueError, match=r"layout: expected 0 \(compact\) or 1 \(fast\) on the CPU"):
        ops.fused_linear(torch.randn(1, 64), *arguments)


def test_damage_is_named() -> None:
    packed = lay_out(pack(weight_of(64, 64), LOSSLESS), "device")
    with pytest.raises((RuntimeError, ValueError), match="device payload"):
        lay_out(packed._replace(payload=packed.payload[:-1]), "compact")


def is_close(actual: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor) -> bool:
    """Sums in float32, rounded once to the result's dtype; `scale` is the sum of the terms' magnitudes."""
    limit = scale * 1e-5 + expected.abs() * {torch.bfloat16: 1 / 256, torch.float16: 1 / 2048}.get(actual.dtype, 0)
    return bool(((actual.double().cpu() - expected).abs() <= limit + 1e-30).all())


def dense(x: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    """The dense layer's product in x's dtype, on its device."""
    assert linear.bias is not None
    return F.linear(x, *(parameter.detach().to(x) for parameter in (linear.weight, linear.bias)))


SHAPES = [(16, 64), (1, 1), (70, 200), (4096, 1000), (33, 4097), (6144, 4096)]


@cuda
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("batch", [0, 1, 2, 5, 8, 9, 16, 17, 64, 100, 256, 300])
def test_linear_on_cuda(rows: int, cols: int, batch: int) -> None:
    linear = linear_of(rows, cols)
    packed = FusedDecompressLinear.from_linear(linear, LOSSLESS).cuda()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.randn(batch, cols).to(dtype).cuda().requires_grad_()
        y = packed(x)
        assert (y.dtype, y.shape, packed.layout) == (dtype, (batch, rows), "window")
        weight, exact = linear.weight.detach().double(), x.detach().double().cpu()
        assert linear.bias is not None
        bias = linear.bias.detach().cpu().double()
        expected, scale = F.linear(exact, weight, bias), F.linear(exact.abs(), weight.abs(), bias.abs())
        # Many rows are the library's own product, whose sums of an odd number of columns are coarser.
        assert is_close(y, expected, scale) or torch.equal(y, dense(x.detach(), linear))
        if batch and dtype == torch.bfloat16:
            gradient = torch.randn_like(y)
            y.backward(gradient)
            assert x.grad is not None
            g = gradient.double().cpu()
            assert is_close(x.grad, g @ weight, g.abs() @ weight.abs())


@cuda
@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize(("rows", "cols"), [(70, 200), (1024, 4096)])
def test_quantised_linear_on_cuda(name: str, rows: int, cols: int) -> None:
    packed = FusedDecompressLinear.from_linear(linear_of(rows, cols), QUANTISED[name])
    weight = packed.unpack(torch.float32).double()
    assert packed.bias is not None
    bias = packed.bias.detach().double()
    packed.cuda()
    for batch in (1, 8, 9, 16, 17, 65, 200):
        x = torch.randn(batch, cols).bfloat16()
        y = packed(x.cuda()).cpu()
        assert packed.layout == name.split()[0]
        # Values are rounded to bfloat16 before their scales, each by 2^-9 at most.
        exact = F.linear(x.double(), weight, bias)
        limit = (x.double().square() @ weight.T.square()).sqrt() / 64 + exact.abs() / 128
        assert ((y.double() - exact).abs() <= limit).all()
    assert torch.equal(packed.unpack(torch.float32).cpu().double(), weight)
    assert torch.equal(packed.unpack(torch.bfloat16).cpu(), packed.cpu().unpack(torch.bfloat16))


@cuda
@pytest.mark.parametrize("name", QUANTISED)
def test_scales_train_on_cuda(name: str) -> None:
    config = dataclasses.replace(QUANTISED[name], trainable_scales=True)
    linear = FusedDecompressLinear.from_linear(linear_of(130, 328).float(), config)
    embedding = FusedDecompressEmbedding.from_embedding(nn.Embedding(130, 328), config)
    indices = torch.randint(130, (50,))
    x, gradient = torch.randn(20, 328), torch.randn(20, 130)
    gradients = {}
    for device in ("cpu", "cuda"):
        for module in (linear.to(device), embedding.to(device)):
            assert module.scales is not None
            module.scales.grad = None
        linear(x.to(device)).backward(gradient.to(device))
        embedding(indices.to(device)).square().sum().backward()
        gradients[device] = [module.scales.grad.cpu().clone() for module in (linear, embedding)]  # type: ignore[union-attr]
    for actual, expected in zip(gradients["cuda"], gradients["cpu"], strict=True):
        assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@cuda
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_unpack_and_embedding_on_cuda(rows: int, cols: int) -> None:
    dense = nn.Embedding(rows, cols, dtype=torch.bfloat16)
    dense.weight.data = weight_of(rows, cols)
    packed = FusedDecompressEmbedding.from_embedding(dense, LOSSLESS).cuda()
    indices = torch.randint(rows, (3, 5))
    for kind in (torch.int64, torch.int32):
        assert torch.equal(packed(indices.to(kind).cuda()).cpu(), dense(indices))
    assert torch.equal(packed.weight.cpu(), dense.weight)
    assert torch.equal(packed.unpack(torch.float32).cpu(), dense.weight.float())
    state = packed.state_dict()
    again = FusedDecompressEmbedding.from_embedding(dense, LOSSLESS).state_dict()
    assert all(torch.equal(state[name].cpu(), again[name]) for name in again)
    assert torch.equal(packed.cpu()(indices), dense(indices))


@cuda
@pytest.mark.parametrize("name", ["lossless", *QUANTISED])
@pytest.mark.parametrize(("rows", "cols"), [(70, 200), (33, 4097), (1100, 600), (1024, 4096)])
def test_laying_out_on_cuda_gives_the_hosts_bytes(name: str, rows: int, cols: int) -> None:
    packed = pack(weight_of(rows, cols), QUANTISED.get(name, LOSSLESS))
    expected = lay_out(packed, "device")
    moved = Packed(*(tensor.cuda() for tensor in packed))
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            there = lay_out(moved, "device")
            assert all(tensor.is_cuda for tensor in there)
            for own, other in zip(expected[:3], there[:3], strict=True):
                assert torch.equal(own, other.cpu())


@cuda
@pytest.mark.parametrize("layout", ["compact", "fast"])
def test_what_the_host_lays_out_for_cuda(layout: str) -> None:
    packed = pack(weight_of(70, 200), LOSSLESS)
    moved = Packed(*(tensor.cuda() for tensor in lay_out(packed, layout)))
    assert torch.equal(lay_out(moved, "device").payload.cpu(), lay_out(packed, "device").payload)
    cut = moved._replace(payload=moved.payload[:-1500])
    with pytest.raises((RuntimeError, ValueError), match=r"infold/corrupt: field `(payload|directory)`"):
        lay_out(cut, "device")


@cuda
@pytest.mark.parametrize("name", IN_PAIRS)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_pairs_on_cuda(name: str, rows: int, cols: int) -> None:
    linear = linear_of(rows, cols)
    packed = FusedDecompressLinear.from_linear(linear if name == "lossless" else linear.float(), IN_PAIRS[name])
    if packed.header.quantizer == "lossless" and packed.header.dtype != torch.bfloat16:
        pytest.skip("too small to be quantised")
    weight = packed.unpack(torch.float32)
    packed.cuda().lay_out("pairs")
    assert torch.equal(packed.unpack(torch.float32).cpu(), weight)
    assert packed.bias is not None
    bias = packed.bias.detach().cpu().double()
    for batch in (1, 8, 9, 16, 17):
        x = torch.randn(batch, cols).bfloat16()
        y = packed(x.cuda()).cpu()
        assert packed.layout in ("pairs", "pairs_of_levels")
        exact = F.linear(x.double(), weight.double(), bias)
        if name == "lossless":
            scale = F.linear(x.double().abs(), weight.double().abs(), bias.abs())
            assert is_close(y, exact, scale) or torch.equal(y, dense(x.cuda(), linear).cpu())
        else:
            limit = (x.double().square() @ weight.double().T.square()).sqrt() / 64 + exact.abs() / 128
            assert ((y.double() - exact).abs() <= limit).all()
    indices = torch.randint(rows, (7,))
    embedding = FusedDecompressEmbedding(packed.packed)
    assert torch.equal(embedding(indices.cuda()).cpu(), weight[indices].to(embedding.dtype))


@cuda
def test_prepare_measures_and_obeys_on_cuda() -> None:
    model = nn.Sequential(*(FusedDecompressLinear.from_linear(linear_of(512, 1024), LOSSLESS) for _ in range(3))).cuda()
    x = torch.randn(4, 1024, dtype=torch.bfloat16).cuda()
    expected = model[0](x).float()
    for layout in ("window", "pairs", "auto", "window", "auto"):
        found = set(infold.prepare(model, layout).values())  # type: ignore[arg-type]
        assert found <= ({"window", "pairs"} if layout == "auto" else {layout})
        assert torch.allclose(model[0](x).float(), expected, rtol=1 / 64, atol=1e-3)
    with pytest.raises(ValueError, match="layout: expected window or pairs or raw for a weight of format lossless"):
        infold.prepare(model, "codes")
    with pytest.raises(ValueError, match="layout: expected auto, window, codes, pairs or raw on CUDA"):
        infold.prepare(model, "fast")


@cuda
@pytest.mark.parametrize("name", ["lossless", *QUANTISED])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "cols"), [(70, 200), (33, 4097), (1024, 4096)])
def test_packing_on_cuda_gives_the_cpus_bits(name: str, dtype: torch.dtype, rows: int, cols: int) -> None:
    config = QUANTISED.get(name, LOSSLESS)
    weight = weight_of(rows, cols).to(dtype)
    expected = pack(weight, config)
    packed = pack(weight.cuda(), config)
    assert all(tensor.is_cuda for tensor in packed)
    on_device = dtype == torch.bfloat16 or config is not LOSSLESS
    assert (ops.inspect_packed(*(tensor.cpu() for tensor in packed[:3]))[2] >= 2) == on_device
    for own, other in zip(expected, lay_out(packed, "compact"), strict=True):
        assert torch.equal(own, other.cpu())


@cuda
def test_what_the_host_packs_for_cuda() -> None:
    pruned = torch.randn(64, 64).bfloat16()
    pruned[::2] = 0
    infinite = torch.randn(64, 64).bfloat16()
    infinite[3, 5] = torch.inf
    for weight, config in ((pruned, LOSSLESS), (infinite, LOSSLESS), (torch.zeros(64, 64), QUANTISED["codes8"])):
        for own, other in zip(pack(weight, config), lay_out(pack(weight.cuda(), config), "compact"), strict=True):
            assert torch.equal(own, other.cpu())
    with pytest.raises(ValueError, match=r"weight\[3, 5\] is inf"):
        pack(infinite.cuda(), QUANTISED["codes8"])


@cuda
@pytest.mark.parametrize("name", ["lossless", *QUANTISED])
def test_a_model_is_converted_on_cuda(name: str) -> None:
    config = QUANTISED.get(name, LOSSLESS)
    model = nn.Sequential(linear_of(256, 512), nn.ReLU(), linear_of(70, 256))
    there = copy.deepcopy(model).cuda()
    infold.convert(model, config, progress=False)
    report = infold.convert(there, config, progress=False)
    # What is measured to be faster.
    fixed, pairs = ("window", "pairs") if name == "lossless" else (name.split()[0], "pairs_of_levels")
    assert {layer.layout for layer in report.layers} <= {fixed, pairs}
    own, other = model.state_dict(), there.state_dict()
    assert all(torch.equal(own[field], other[field].cpu()) for field in own)
    floats = infold.convert(nn.Sequential(nn.Linear(64, 64)).cuda(), LOSSLESS, progress=False)
    assert [layer.layout for layer in floats.layers] == ["raw_f32"]
    with pytest.warns(UserWarning, match="layout 'fast' is one of the CPU's"):
        infold.convert(nn.Sequential(linear_of(64, 64)).cuda(), FusedConfig("lossless", layout="fast"), progress=False)


@cuda
def test_conv_on_cuda() -> None:
    conv = nn.Conv2d(32, 48, 3, padding=1, dtype=torch.bfloat16)
    packed = FusedDecompressConv.from_conv(conv, LOSSLESS).cuda()
    x = torch.randn(2, 32, 9, 9, dtype=torch.bfloat16).cuda()
    assert torch.equal(packed(x), conv.cuda()(x))


@cuda
def test_graphs_streams_and_repeats_on_cuda() -> None:
    linear = linear_of(4096, 4096)
    packed = FusedDecompressLinear.from_linear(linear, LOSSLESS).cuda()
    x = torch.randn(4, 4096, dtype=torch.bfloat16).cuda()
    with torch.inference_mode():
        expected = packed(x)
        assert all(torch.equal(packed(x), expected) for _ in range(20))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            assert torch.equal(packed(x), expected)
        torch.cuda.current_stream().wait_stream(side)
        for batch in (4, 100):
            x = torch.randn(batch, 4096, dtype=torch.bfloat16).cuda()
            packed(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = packed(x)
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(y, packed(x))


@cuda
def test_reduce_overhead_on_cuda() -> None:
    """torch.compile with CUDA graphs."""
    packed = FusedDecompressLinear.from_linear(linear_of(512, 512), LOSSLESS).cuda()
    infold.prepare(nn.Sequential(packed))
    compiled = torch.compile(packed, mode="reduce-overhead", fullgraph=True)
    with torch.inference_mode():
        for _ in range(4):
            x = torch.randn(4, 512, dtype=torch.bfloat16).cuda()
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.equal(compiled(x).clone(), packed(x))


@cuda
def test_a_graph_right_after_prepare() -> None:
    """No kernel has run before the graph is recorded."""
    packed = FusedDecompressLinear.from_linear(linear_of(512, 512), QUANTISED["codes5"]).cuda()
    infold.prepare(nn.Sequential(packed))
    for batch in (4, 16):
        x = torch.randn(batch, 512, dtype=torch.bfloat16).cuda()
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph):
            y = packed(x)
        graph.replay()
        assert torch.equal(y, packed(x))


@cuda
def test_tied_weights_are_laid_out_once() -> None:
    first = FusedDecompressLinear.from_linear(linear_of(64, 64), LOSSLESS)
    second = FusedDecompressLinear(first.packed._replace(payload=first.payload, tables=first.tables))
    assert second.payload is first.payload
    nn.ModuleList([first, second]).cuda()
    x = torch.randn(2, 64, dtype=torch.bfloat16).cuda()
    first(x)
    address = first.payload.data_ptr()
    second(x)
    assert second.payload.data_ptr() == address


@cuda
def test_inputs_elsewhere_are_refused_on_cuda() -> None:
    packed = FusedDecompressLinear.from_linear(linear_of(64, 128), LOSSLESS).cuda()
    packed(torch.randn(1, 128, dtype=torch.bfloat16, device="cuda"))
    for batch in (1, 20):
        with pytest.raises(ValueError, match="x: expected a contiguous BFloat16 on Cuda"):
            ops.fused_linear(
                torch.randn(batch, 128).bfloat16(), *packed._tensors(), None, *packed._layout(), torch.bfloat16, False
            )


@cuda
@pytest.mark.parametrize("name", ["lossless", "codes8"])
def test_gradients_of_any_order_on_cuda(name: str) -> None:
    packed = FusedDecompressLinear.from_linear(linear_of(6, 64), QUANTISED.get(name, LOSSLESS)).cuda().double()
    x = torch.randn(2, 64, dtype=torch.float64, device="cuda", requires_grad=True)
    assert torch.autograd.gradcheck(packed, (x,))
    assert torch.autograd.gradgradcheck(packed, (x,))


@cuda
def test_opcheck_on_cuda() -> None:
    packed = FusedDecompressLinear.from_linear(linear_of(64, 128), LOSSLESS).cuda()
    x = torch.randn(3, 128, dtype=torch.bfloat16, device="cuda")
    packed(x)
    arguments = (x, *packed._tensors(), packed.bias, *packed._layout(), torch.bfloat16)
    torch.library.opcheck(ops.fused_linear.default, arguments)

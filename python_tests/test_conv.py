"""Packed convolutions against PyTorch's own, in float64 and to the bit."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import infold
import pytest
import torch
from infold import FusedConfig
from infold._library import ops
from infold.nn import FusedDecompressConv
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

CONVS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "1d, same": (lambda: nn.Conv1d(6, 9, 4, padding="same", dilation=3, groups=3), (2, 6, 40)),
    "2d": (lambda: nn.Conv2d(16, 24, 3, padding=1), (2, 16, 9, 7)),
    "2d, strided": (lambda: nn.Conv2d(16, 24, (3, 5), stride=(2, 1), padding=(0, 2), bias=False), (3, 16, 9, 8)),
    "2d, depthwise": (lambda: nn.Conv2d(16, 32, 3, padding="valid", groups=16), (2, 16, 6, 6)),
    "2d, reflect": (lambda: nn.Conv2d(8, 4, 3, padding="same", padding_mode="reflect"), (1, 8, 5, 6)),
    "3d, circular": (
        lambda: nn.Conv3d(4, 8, (3, 2, 1), stride=2, padding=(1, 0, 2), padding_mode="circular"),
        (1, 4, 9, 8, 7),
    ),
    "pointwise": (lambda: nn.Conv2d(32, 48, 1), (2, 32, 5, 7)),
    "pointwise, strided": (lambda: nn.Conv2d(32, 48, 1, stride=(2, 3), bias=False), (2, 32, 9, 7)),
    "pointwise, many pixels": (lambda: nn.Conv2d(8, 12, 1, stride=2), (2, 8, 33, 33)),
    "pointwise 1d": (lambda: nn.Conv1d(32, 48, 1), (3, 32, 11)),
    "pointwise, padded": (lambda: nn.Conv2d(8, 12, 1, padding=1), (1, 8, 3, 3)),
}


@pytest.fixture(params=CONVS)
def conv_and_input(request: pytest.FixtureRequest) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    build, shape = CONVS[request.param]
    return build(), torch.randn(shape)


def dense_twin(packed: FusedDecompressConv, conv: Any) -> Any:
    """The dense convolution in float64 with the weight that is packed."""
    twin = copy.deepcopy(conv).double()
    twin.weight.data = packed.unpack(torch.float64).view(conv.weight.shape)
    return twin


def test_equals_the_dense_convolution(conv_and_input: tuple[Any, Tensor], config: FusedConfig) -> None:
    conv, x = conv_and_input
    packed = FusedDecompressConv.from_conv(conv, config)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # PyTorch's, on odd "same" padding
        twin = dense_twin(packed, conv)
        expected, unbatched = twin(x.double()), twin(x[0].double())
    torch.testing.assert_close(packed(x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed(x.double()), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(packed(x[0].double()), unbatched, rtol=1e-12, atol=1e-12)


def test_exact_mode_has_the_bits_of_the_dense_layer(conv_and_input: tuple[Any, Tensor]) -> None:
    conv, x = conv_and_input
    for dtype in (torch.float32, torch.bfloat16):
        dense, values = copy.deepcopy(conv).to(dtype), x.to(dtype)
        packed = FusedDecompressConv.from_conv(dense, FusedConfig(mode="exact"))
        y = packed(values)
        assert torch.equal(y, dense(values))
        assert y.stride() == dense(values).stride()


def test_the_dense_layer_comes_back(conv_and_input: tuple[Any, Tensor]) -> None:
    conv, _ = conv_and_input
    packed = FusedDecompressConv.from_conv(conv, FusedConfig())
    back = packed.to_conv()
    assert repr(back) == repr(conv)
    assert torch.equal(back.weight, conv.weight)
    assert torch.equal(packed.weight, conv.weight)
    for attribute in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(packed, attribute) == getattr(conv, attribute)


@pytest.mark.parametrize("name", ["2d", "pointwise"])
def test_channels_last_stays(name: str) -> None:
    build, shape = CONVS[name]
    conv, x = build(), torch.randn(shape).to(memory_format=torch.channels_last)
    for mode in ("fused", "exact"):
        y = FusedDecompressConv.from_conv(conv, FusedConfig(mode=mode))(x)
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_gradients_equal_the_dense_layer(conv_and_input: tuple[Any, Tensor], config: FusedConfig) -> None:
    conv, x = conv_and_input
    packed = FusedDecompressConv.from_conv(conv, config)
    twin, x = dense_twin(packed, conv), x.double().requires_grad_()
    y = packed(x)
    cotangent = torch.randn_like(y)
    parameters = [] if conv.bias is None else [packed.bias]
    got = torch.autograd.grad(y, [x, *parameters], cotangent)
    expected = torch.autograd.grad(twin(x), [x, *([] if conv.bias is None else [twin.bias])], cotangent)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["ecsq", "int8", "int4"])
@pytest.mark.parametrize("kernel", [1, 2])
def test_gradients_of_any_order(name: str, kernel: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(64 // kernel**2, 3, kernel, padding=kernel - 1)
    group = {"group_size": 64} if name == "int4" else {}
    config = FusedConfig(name, bits=4 if name == "ecsq" else None, **group, trainable_scales=True)
    packed = FusedDecompressConv.from_conv(conv, config)
    assert packed.scales is not None, "the weight pays for quantising"
    x = torch.randn(1, conv.in_channels, 2, 3, dtype=torch.float64, requires_grad=True)
    scales = packed.scales.detach().double().requires_grad_()
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def forward(x: Tensor, scales: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(packed, {"scales": scales, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(forward, (x, scales, bias))
    assert torch.autograd.gradgradcheck(forward, (x, scales, bias))


def test_nothing_dense_waits_for_the_backward() -> None:
    packed = FusedDecompressConv.from_conv(nn.Conv2d(16, 16, 3), FusedConfig())
    kept: list[int] = []

    def remember(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    x = torch.randn(4, 16, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        packed(x)
    assert sum(kept) <= packed.packed.nbytes + 64


def test_opcheck(config: FusedConfig) -> None:
    packed = FusedDecompressConv.from_conv(nn.Conv2d(8, 12, 3), config)
    trains = packed.scales is not None
    scales = packed.float_scales().float().requires_grad_() if trains else None  # type: ignore[union-attr]
    x, bias = torch.randn(2, 8, 7, 6, requires_grad=True), torch.randn(12, requires_grad=True)
    sample = (x, *packed.packed[:3], scales, bias, [3, 3], [2, 1], [1, 0], [1, 2], 1, *packed._layout(), torch.float32)
    results = torch.library.opcheck(ops.fused_conv.default, sample)
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("name", ["2d", "pointwise"])
def test_compile_and_export(name: str) -> None:
    build, shape = CONVS[name]
    packed = FusedDecompressConv.from_conv(build(), FusedConfig())
    x = torch.randn(3, *shape[1:])
    compiled = torch.compile(packed, fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x), packed(x))
    exported = torch.export.export(packed, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(exported.module()(x[:2]), packed(x[:2]))


def test_autocast_casts_activations() -> None:
    conv = nn.Conv2d(8, 8, 3)
    packed = FusedDecompressConv.from_conv(conv, FusedConfig())
    x = torch.randn(2, 8, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = packed(x)
        assert torch.equal(y, conv(x))
    assert y.dtype == torch.bfloat16


def test_wrong_arguments_are_value_errors() -> None:
    packed = FusedDecompressConv.from_conv(nn.Conv2d(8, 12, 3), FusedConfig())

    def call(
        x: Tensor, kernel: Any = (3, 3), stride: Any = (1, 1), padding: Any = (0, 0), groups: int = 1, **rest: Any
    ) -> Tensor:
        bias = rest.get("bias")
        where = (kernel, stride, padding, (1, 1), groups)
        return ops.fused_conv(x, *packed.packed[:3], None, bias, *where, *packed._layout(), torch.float32)

    x = torch.randn(1, 8, 6, 6)
    assert call(x).shape == (1, 12, 4, 4)
    for arguments, message in (
        ({"x": torch.randn(1, 9, 6, 6)}, "channels"),
        ({"x": torch.randn(8, 6, 6)}, "4 dimensions"),
        ({"x": x.long()}, "x"),
        ({"x": x, "kernel": (3, 4)}, "channels"),
        ({"x": x, "kernel": (3,)}, "stride"),
        ({"x": x, "kernel": ()}, "kernel_size"),
        ({"x": x, "kernel": (2**62, 4)}, "channels"),
        ({"x": x, "stride": (0, 1)}, "stride"),
        ({"x": x, "padding": (-1, 0)}, "padding"),
        ({"x": x, "groups": 0}, "groups"),
        ({"x": x, "groups": 5}, "groups"),
        ({"x": x, "bias": torch.randn(11)}, "bias"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**arguments)  # type: ignore[arg-type]
    # Tensors without data are checked alike.
    weight = [tensor.to("meta") for tensor in packed.packed[:3]]
    for where in (
        [(3, 3), (1, 1), (), (1, 1), 1],
        [(3, 3), (0, 0), (0, 0), (1, 1), 1],
        [(3, 3), (1,), (0, 0), (1, 1), 1],
        [(7, 7), (1, 1), (0, 0), (1, 1), 1],
        [(), (), (), (), 1],
        [(3, 3), (1, 1), (0, 0), (1, 1), 0],
    ):
        with pytest.raises(ValueError, match="expected"):
            ops.fused_conv(x.to("meta"), *weight, None, None, *where, *packed._layout(), torch.float32)
    with pytest.raises(RuntimeError):
        call(torch.randn(1, 8, 2, 2))  # smaller than the kernel: the library's own error


def test_another_kernel_is_refused_and_hooks_fire_once(tmp_path: Path) -> None:
    tall, wide = (nn.Sequential(nn.Conv2d(64, 64, size)) for size in ((3, 1), (1, 3)))
    infold.convert(tall, FusedConfig(), progress=False)
    infold.save(tall, tmp_path / "tall.safetensors")
    with pytest.raises(ValueError, match=r"kernel size \[1, 3\], got \[3, 1\]"):
        infold.load_into(wide, tmp_path / "tall.safetensors")
    calls: list[object] = []
    tall[0].register_forward_hook(lambda *_: calls.append(None))
    tall(torch.randn(64, 5, 5))
    assert len(calls) == 1


def test_a_residual_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 2], layer_type="bottleneck")
    model = ResNetModel(config).eval()
    dense = copy.deepcopy(model)
    report = infold.convert(model, FusedConfig(layout="fast"), progress=False)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in dense.modules())
    assert [layer.kind for layer in report.layers] == ["conv"] * convolutions
    assert not report.refused
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = dense(images).last_hidden_state
        torch.testing.assert_close(model(images).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
        infold.save(model, tmp_path / "resnet.safetensors")
        fresh = ResNetModel(config).eval()
        infold.load_into(fresh, tmp_path / "resnet.safetensors")
        assert torch.equal(fresh(images).last_hidden_state, model(images).last_hidden_state)
    again = copy.deepcopy(fresh)
    again.load_state_dict(model.state_dict())
    for name, module in again.named_modules():
        if isinstance(module, FusedDecompressConv):
            assert torch.equal(module.weight, dense.get_submodule(name).weight)

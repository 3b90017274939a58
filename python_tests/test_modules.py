"""The modules as a user's training and serving code treats them."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from conftest import CONFIGS, random_weight
import infold
from infold import CorruptWeightError, FusedConfig
from infold.nn import FusedDecompressEmbedding, FusedDecompressLinear, PackedModule
from torch import nn


def linear(
    config: FusedConfig, rows: int = 96, cols: int = 160, bias: bool = True
) -> tuple[nn.Linear, FusedDecompressLinear]:
    torch.manual_seed(0)
    dense = nn.Linear(cols, rows, bias)
    return dense, FusedDecompressLinear.from_linear(dense, config)


def bits(module: PackedModule) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in module.packed]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_round_trip_to_dense(config: FusedConfig) -> None:
    dense, fused = linear(config)
    back = fused.to_linear()
    x = torch.randn(4, 160)
    torch.testing.assert_close(fused(x), back(x))
    if config.format == "lossless":
        assert torch.equal(back.weight, dense.weight)
        assert torch.equal(fused.weight, dense.weight)
    assert back.bias is not None
    assert torch.equal(back.bias, dense.bias)
    assert "96" in repr(fused)
    assert config.format in repr(fused)


def test_only_bias_and_asked_for_scales_train() -> None:
    for config in CONFIGS.values():
        _, fused = linear(config)
        assert [name for name, p in fused.named_parameters() if p.requires_grad] == ["bias"]
    _, fused = linear(FusedConfig("int8", trainable_scales=True))
    assert [name for name, p in fused.named_parameters() if p.requires_grad] == ["scales", "bias"]
    optimizer = torch.optim.Adam(fused.parameters(), lr=1e-3)
    x, target = torch.randn(64, 160), torch.randn(64, 96)
    losses = []
    for _ in range(30):
        loss = (fused(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_casting_the_module_leaves_the_weight_alone(config: FusedConfig) -> None:
    _, fused = linear(config)
    expected, weight = bits(fused), fused.weight
    fused.bfloat16()
    assert same(bits(fused), expected)
    assert fused.bias is not None
    assert fused.bias.dtype == fused.weight.dtype == torch.bfloat16
    assert fused(torch.randn(2, 160).bfloat16()).dtype == torch.bfloat16
    fused.float()
    assert torch.equal(fused.weight, weight)

    embedding = FusedDecompressEmbedding.from_embedding(nn.Embedding(50, 64), config)
    assert embedding(torch.tensor([1])).dtype == torch.float32
    assert embedding.half()(torch.tensor([1])).dtype == torch.float16


def test_copies(config: FusedConfig) -> None:
    _, fused = linear(config)
    x = torch.randn(3, 160)
    buffer = io.BytesIO()
    torch.save(fused.state_dict(), buffer)
    buffer.seek(0)
    loaded = linear(config)[1]
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), loaded):
        assert torch.equal(other(x), fused(x))
        assert other.payload.data_ptr() != fused.payload.data_ptr()


def test_loading_accepts_a_payload_of_another_size() -> None:
    _, compact = linear(FusedConfig("ecsq", bits=3))
    _, target = linear(FusedConfig("ecsq", bits=6))
    assert target.payload.shape != compact.payload.shape
    target.load_state_dict(compact.state_dict())
    assert torch.equal(target.weight, compact.weight)
    _, other_shape = linear(FusedConfig("ecsq", bits=3), cols=161)
    with pytest.raises(RuntimeError, match="size mismatch for payload"):
        target.load_state_dict(other_shape.state_dict())


def test_loading_verifies_every_bit() -> None:
    for field in ("payload", "directory", "tables", "scales"):
        _, fused = linear(CONFIGS["ecsq"])
        state = {name: tensor.clone() for name, tensor in fused.state_dict().items()}
        state[field].view(torch.uint8).flatten()[3] ^= 1
        with pytest.raises(CorruptWeightError) as raised:
            nn.Sequential(fused).load_state_dict({f"0.{name}": tensor for name, tensor in state.items()})
        assert raised.value.tensor == "0"
        assert raised.value.field in (f"{field}_checksum", "version", "magic"), raised.value


def test_config_is_checked() -> None:
    for wrong, message in [
        ({"format": "int3"}, "format: expected one of lossless"),
        ({"format": "ecsq"}, "exactly one of bits and max_error"),
        ({"format": "ecsq", "bits": 9}, "bits: expected 2 to 8"),
        ({"format": "ecsq", "max_error": 0}, "max_error: expected between 0 and 1"),
        ({"bits": 4}, "only with format 'ecsq'"),
        ({"format": "int4", "group_size": 100}, "group_size: expected a positive multiple of 64"),
        ({"format": "int8", "round_to": torch.bfloat16}, "round_to: expected"),
        ({"trainable_scales": True}, "trainable_scales: expected a quantised format"),
        ({"layout": "small"}, "layout: expected"),
        ({"mode": "quick"}, "mode: expected"),
    ]:
        with pytest.raises(ValueError, match=message):
            FusedConfig(**wrong)  # type: ignore[arg-type]


def test_rounding_first_has_to_be_asked_for() -> None:
    dense, exact = linear(FusedConfig())
    _, rounded = linear(FusedConfig(round_to=torch.bfloat16))
    assert torch.equal(exact.weight, dense.weight)
    assert torch.equal(rounded.weight, dense.weight.bfloat16().float())
    assert rounded.packed.nbytes < 0.5 * exact.packed.nbytes


def test_ddp_wraps_it(tmp_path: object) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        _, fused = linear(CONFIGS["ecsq"])
        expected = bits(fused)
        wrapped = nn.parallel.DistributedDataParallel(nn.Sequential(fused, nn.Linear(96, 4)))
        wrapped(torch.randn(2, 160)).sum().backward()
        assert fused.bias is not None
        assert fused.bias.grad is not None
        assert same(bits(fused), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_a_small_embedding_and_linear_of_one_row() -> None:
    weight = random_weight(1, 7)
    dense = nn.Linear(7, 1, bias=False)
    dense.weight = nn.Parameter(weight)
    fused = FusedDecompressLinear.from_linear(dense, CONFIGS["int8"])
    # Seven weights do not pay for a header: stored as they are.
    assert fused.header.quantizer == "lossless"
    assert torch.equal(fused.weight, weight)


def test_modules_compile_and_export(config: FusedConfig) -> None:
    net = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
    infold.convert(net, config, progress=False)
    indices = torch.randint(0, 50, (4, 7))
    expected = net(indices)
    torch.testing.assert_close(torch.compile(net, fullgraph=True)(indices), expected)
    torch.testing.assert_close(torch.export.export(net, (indices,)).module()(indices), expected)

"""The modules as a user's training and serving code treats them."""

from __future__ import annotations

import copy
import io
import multiprocessing
import os
import pickle
from pathlib import Path

import infold
import pytest
import torch
from conftest import CONFIGS, random_weight
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


def test_a_padding_row_trains_nothing() -> None:
    embedding = nn.Embedding(50, 64, padding_idx=3)
    fused = FusedDecompressEmbedding.from_embedding(embedding, FusedConfig("int8", trainable_scales=True))
    fused(torch.tensor([3, 4, 3])).sum().backward()
    assert fused.scales is not None
    assert fused.scales.grad is not None
    assert fused.scales.grad.nonzero()[:, 0].tolist() == [4]


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


LOADABLE = {
    **CONFIGS,
    "ecsq 3 bits": FusedConfig("ecsq", bits=3),
    "trained int8": FusedConfig("int8", trainable_scales=True),
    "trained ecsq": FusedConfig("ecsq", bits=5, trainable_scales=True),
}


@pytest.mark.parametrize("target_config", LOADABLE.values(), ids=LOADABLE)
@pytest.mark.parametrize("source_config", LOADABLE.values(), ids=LOADABLE)
def test_loading_accepts_any_format(source_config: FusedConfig, target_config: FusedConfig) -> None:
    _, source = linear(source_config)
    if source_config.trainable_scales and source.scales is not None:
        source.scales.data *= 1.01
    _, target = linear(target_config)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.weight, source.weight)
    assert target.header == source.header
    again = linear(target_config)[1]
    again.load_state_dict(target.state_dict(), assign=True)
    assert torch.equal(again.weight, source.weight)


def test_loading_a_row_grid_into_a_tensor_grid() -> None:
    torch.manual_seed(0)
    rows = nn.Linear(128, 64, bias=False)
    rows.weight = nn.Parameter(torch.randn(64, 128).sign() * (3 * torch.randn(64, 1)).exp())
    source = FusedDecompressLinear.from_linear(rows, FusedConfig("ecsq", bits=2))
    target = linear(FusedConfig("ecsq", bits=4), 64, 128, bias=False)[1]
    assert source.header.scale_shape == (64, 1)
    assert target.header.scale_shape == (1, 1)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.weight, source.weight)


def test_a_failed_load_changes_nothing() -> None:
    _, source = linear(FusedConfig("ecsq", bits=3))
    _, other_shape = linear(FusedConfig("ecsq", bits=3), cols=161)
    _, target = linear(FusedConfig("ecsq", bits=6))
    expected = bits(target)
    with pytest.raises(RuntimeError, match="size mismatch for payload"):
        target.load_state_dict(other_shape.state_dict())
    partial = source.state_dict()
    del partial["tables"]
    with pytest.raises(RuntimeError, match=r"Missing key.*tables"):
        target.load_state_dict(partial)
    wrong = {**source.state_dict(), "payload": source.payload.int()}
    with pytest.raises(CorruptWeightError, match="weight: field `payload`: expected dtype Uint8"):
        target.load_state_dict(wrong)
    assert same(bits(target), expected)
    assert torch.isfinite(target(torch.randn(2, 160))).all()


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
        ({"format": "lossless", "group_size": 64}, "group_size: expected only with format 'int4'"),
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


def _ddp_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    dense, fused = linear(CONFIGS["ecsq"])
    if rank == 1:
        # DDP must bring rank 0's bits.
        with torch.no_grad():
            fused.payload.zero_()
            fused.bias.zero_()  # type: ignore[union-attr]
    expected = bits(linear(CONFIGS["ecsq"])[1])
    wrapped = nn.parallel.DistributedDataParallel(nn.Sequential(fused, nn.Linear(96, 4)))
    for _ in range(2):
        wrapped(torch.randn(2, 160)).sum().backward()
    assert same(bits(fused), expected)
    assert fused.bias is not None
    assert torch.equal(fused.bias, dense.bias)
    gradients = [torch.zeros_like(fused.bias) for _ in range(2)]
    assert fused.bias.grad is not None
    torch.distributed.all_gather(gradients, fused.bias.grad)
    assert torch.equal(*gradients)
    (Path(folder) / f"rank {rank} is well").touch()
    torch.distributed.barrier()
    # Gloo's threads may abort a process that tears the group down while the other does; nothing is tested there.
    os._exit(0)


def test_ddp_keeps_two_ranks_equal(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_ddp_rank, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
        process.kill()
    assert sorted(path.name for path in tmp_path.glob("rank*")) == ["rank 0 is well", "rank 1 is well"]


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

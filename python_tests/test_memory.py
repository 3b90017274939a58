"""Where a forward pass's memory goes, against sizes that follow from shapes."""

from __future__ import annotations

import json
from pathlib import Path

import infold
import pytest
import torch
from infold import FusedConfig
from torch import Tensor, nn

BATCH, WIDTH, HIDDEN = 50, 128, 512


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.act = nn.ReLU()
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x))) * self.gain  # type: ignore[no-any-return]


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    net = Net()
    infold.convert(net, FusedConfig("int8", layout="compact"), progress=False)
    return net


def profile(net: nn.Module) -> infold.MemoryReport:
    return infold.profile_memory(net, torch.randn(BATCH, WIDTH))


def test_sizes_follow_from_shapes(net: Net) -> None:
    torch.set_num_threads(2)
    with torch.no_grad():
        report = profile(net)
    up, act, down, other = report.modules
    hidden, out = 4 * BATCH * HIDDEN, 4 * BATCH * WIDTH
    assert [module.name for module in report.modules] == ["up", "act", "down", "(other)"]
    assert (up.output_bytes, act.output_bytes, down.output_bytes) == (hidden, hidden, out)
    assert (up.calls, act.calls, other.calls) == (1, 1, 0)
    assert report.activation_bytes == 2 * hidden  # at the activation: its argument and its result
    assert act.peak_bytes == 2 * hidden
    assert up.weight_bytes == net.up.packed.nbytes + 4 * HIDDEN  # type: ignore[union-attr,operator]
    assert up.dense_bytes == 4 * (WIDTH + 1) * HIDDEN
    assert other.weight_bytes == 4 * WIDTH
    assert report.weight_bytes == sum(tensor.nbytes for tensor in net.parameters())
    assert report.dense_weight_bytes == sum(tensor.nbytes for tensor in Net().parameters())
    # x in chunks of columns, and at most 64 KB a thread.
    for module, columns in ((up, WIDTH), (down, HIDDEN)):
        assert 4 * BATCH * columns <= module.scratch_bytes <= 4 * BATCH * columns + 2 * (64 << 10)
    assert act.scratch_bytes == 0
    assert report.peak_bytes == report.weight_bytes + max(module.peak_bytes for module in report.modules)


def test_gradients_keep_activations(net: Net) -> None:
    result, hidden = 4 * BATCH * WIDTH, 4 * BATCH * HIDDEN
    with torch.no_grad():
        assert profile(net).timeline[-1][1] == result
    # The activation's result for its own backward, the product's for the gain's.
    assert profile(net).timeline[-1][1] == hidden + 2 * result


def test_shared_weights_and_modules_called_twice() -> None:
    first, second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    second.weight = first.weight
    net = nn.Sequential(first, second, first)
    infold.convert(net, FusedConfig("int8"), progress=False)
    report = profile(net)
    a, b, _other = report.modules
    assert (a.calls, b.calls) == (2, 1)
    assert b.weight_bytes == 4 * WIDTH
    assert report.dense_weight_bytes == 4 * WIDTH * (WIDTH + 2)


def test_hooks_are_gone_afterwards_also_where_the_model_fails(net: Net) -> None:
    with pytest.raises(ValueError, match="last dimension"):
        infold.profile_memory(net, torch.randn(3, WIDTH + 1))
    for module in net.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    profile(net)


def test_table_json_and_timeline(net: Net, tmp_path: Path) -> None:
    report = profile(net)
    table = str(report)
    assert "FusedDecompressLinear" in table
    assert "peak:" in table
    report.plot(tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    data = json.loads(report.to_json(tmp_path / "memory.json"))
    assert json.loads((tmp_path / "memory.json").read_text()) == data
    assert data["total"]["peak_bytes"] == report.peak_bytes
    assert [time for time, _ in data["timeline"]] == sorted(time for time, _ in data["timeline"])


def test_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match="meta"):
        infold.profile_memory(nn.Linear(2, 2, device="meta"), torch.randn(1, 2))

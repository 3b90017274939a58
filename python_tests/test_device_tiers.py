"""Tiers below a GPU. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from infold.tiers import Placement, Plan, TierSpec, attach, fingerprint, offload_activations, units
from torch import Tensor, nn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

FAST = TierSpec("HBM", 0, 1000, resident=True)
RAM = TierSpec("RAM", 5, 25)
DISK = TierSpec("DISK", 100, 1, on_disk=True)
WIDTH = 512


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(64, WIDTH), *(Block() for _ in range(6)), nn.Linear(WIDTH, 64)).cuda()


def spread(model: nn.Module, tiers: list[TierSpec], buffers: int = 3) -> Plan:
    found = units(model)
    placements = {unit.name: Placement(tiers[i % len(tiers)].name, unit.nbytes) for i, unit in enumerate(found)}
    ring = buffers * max(unit.room for unit in found)
    return Plan((FAST, RAM, DISK), placements, ring, fingerprint(model), "by turns")


TIERS = {"ram": [RAM], "disk": [DISK], "all": [FAST, RAM, DISK]}


def train(model: nn.Module, step: object, optimizer: torch.optim.Optimizer, steps: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(64, (4, 16), generator=generator).cuda()
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        step()  # type: ignore[operator]
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


@pytest.mark.parametrize("tiers", TIERS.values(), ids=TIERS)
def test_outputs_gradients_and_training_have_the_same_bits(tiers: list[TierSpec], tmp_path: Path) -> None:
    model, reference = make(), make()
    optimizer, other = (torch.optim.AdamW(m.parameters(), 1e-3) for m in (model, reference))
    with attach(model, spread(model, tiers), folder=tmp_path) as handle:
        losses = train(model, lambda: handle.step(optimizer), optimizer, 10)
    assert torch.equal(losses, train(reference, other.step, other, 10))
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert p.is_cuda
        assert torch.equal(p, q)


def test_memory_leaves_the_device_and_comes_back(tmp_path: Path) -> None:
    model = make()
    tokens = torch.zeros(1, 4, dtype=torch.long, device="cuda")
    with torch.no_grad():
        model(tokens)  # cuBLAS takes its workspace, 32 MB on Hopper, of the same memory
    nbytes = sum(p.nbytes for p in model.parameters())
    before = torch.cuda.memory_allocated()
    with attach(model, spread(model, [RAM, DISK], 2), folder=tmp_path), torch.no_grad():
        torch.cuda.synchronize()
        assert before - torch.cuda.memory_allocated() > 0.95 * nbytes
        model(tokens)
        assert before - torch.cuda.memory_allocated() > 0.5 * nbytes
        # Outside its module a parameter is a copy, on the device.
        for found, expected in zip(model.parameters(), make().parameters(), strict=True):
            assert torch.equal(found + 0, expected)
        del found, expected
    assert abs(torch.cuda.memory_allocated() - before) < 1 << 20


def test_emulated_tiers_delay_the_stream() -> None:
    model = make()
    slow = TierSpec("RAM", 5, 0.1)
    plan = Plan(
        (FAST, slow), {u.name: Placement("RAM", u.nbytes) for u in units(model)}, 1 << 24, fingerprint(model), ""
    )
    tokens = torch.zeros(1, 4, dtype=torch.long, device="cuda")
    with torch.no_grad():
        expected = model(tokens)
    with attach(model, plan, mode="emulated"), torch.no_grad():
        model(tokens)
        torch.cuda.synchronize()
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        assert torch.equal(model(tokens), expected)
        ended.record()
        torch.cuda.synchronize()
    fetched = sum(unit.nbytes for unit in units(model)) - plan.buffer_bytes  # what the ring held need not come again
    milliseconds = fetched / 0.1e9 * 1e3
    assert 0.9 * milliseconds < begun.elapsed_time(ended) < 20 * milliseconds


def test_offloaded_activations_give_the_same_gradients() -> None:
    model, reference = make(), make()
    tokens = torch.randint(64, (8, 128), device="cuda")
    with offload_activations(model, min_bytes=1 << 16):
        loss = model(tokens).square().mean()
    loss.backward()
    reference(tokens).square().mean().backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)

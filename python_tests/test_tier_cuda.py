"""A GPU's pieces and stash on the CPU: streams, events and pinned memory are stand-ins, which check their order.

`test_device_tiers.py` runs them on a GPU.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from infold.tiers import Placement, Plan, TierSpec, attach, fingerprint, offload_activations, units
from infold.tiers import activations as its_activations
from infold.tiers import cuda as its_cuda
from infold.tiers import pinned as its_pinned
from infold.tiers.away import AwayTensor
from infold.tiers.ring import host_memory
from torch import Tensor, nn

FAST = TierSpec("HBM", 0, 1000, resident=True)
RAM = TierSpec("RAM", 5, 25)
DISK = TierSpec("DISK", 100, 1, on_disk=True)
CPU = torch.device("cpu")


class Event:
    def __init__(self) -> None:
        self.waited = False

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.waited = True


class Stream:
    """Notes what it has to wait for, and refuses copies before it waited for the stream that computes."""

    def __init__(self, device: Any = None) -> None:
        self.waits: list[object] = []

    def wait_stream(self, stream: Stream) -> None:
        self.waits.append(stream)

    def wait_event(self, event: Event) -> None:
        self.waits.append(event)

    def record_event(self) -> Event:
        assert self.waits, "a copy that overtakes what uses its memory"
        return Event()

    def synchronize(self) -> None:
        pass


@pytest.fixture(autouse=True)
def computing(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """The current stream."""
    current = Stream()

    @contextlib.contextmanager
    def stream(wanted: Stream) -> Iterator[None]:
        yield

    class Torch:
        cuda = SimpleNamespace(Stream=Stream, stream=stream, current_stream=lambda device: current)

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        def empty(self, *sizes: int, pin_memory: bool = False, **options: Any) -> Tensor:
            return torch.empty(*sizes, **options)

    for module in (its_cuda, its_pinned):
        monkeypatch.setattr(module, "torch", Torch())
    monkeypatch.setattr(its_cuda, "pinned", host_memory)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    its_attach = import_module("infold.tiers.attach")  # the package's `attach` is the function
    monkeypatch.setattr(its_attach, "_device", lambda model: SimpleNamespace(type="cuda"))
    monkeypatch.setattr(its_attach, "device_memory", lambda device: host_memory)
    monkeypatch.setattr(its_attach, "link_for", lambda spec, device: None)
    monkeypatch.setattr(its_attach, "Lane", lambda device, executor: its_cuda.Lane(CPU, executor))
    return current


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(16, 64), *(Block() for _ in range(3)), nn.Linear(64, 16))


def spread(model: nn.Module, tiers: list[TierSpec], buffers: int = 3) -> Plan:
    found = units(model)
    placements = {unit.name: Placement(tiers[i % len(tiers)].name, unit.nbytes) for i, unit in enumerate(found)}
    ring = buffers * max(unit.room for unit in found)
    return Plan((FAST, RAM, DISK), placements, ring, fingerprint(model), "by turns")


def train(model: nn.Module, step: Any, optimizer: torch.optim.Optimizer) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(4):
        tokens = torch.randint(16, (4, 8), generator=generator)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("tiers", [[RAM], [DISK], [FAST, RAM, DISK]], ids=["ram", "disk", "all"])
def test_training_has_the_same_bits(tiers: list[TierSpec], tmp_path: Path, computing: Stream) -> None:
    model, reference = make(), make()
    optimizer, other = (torch.optim.AdamW(m.parameters(), 1e-3) for m in (model, reference))
    with attach(model, spread(model, tiers), folder=tmp_path) as handle:
        losses = train(model, lambda: handle.step(optimizer), optimizer)
        assert any(isinstance(wait, Event) for wait in computing.waits)
    assert torch.equal(losses, train(reference, other.step, other))
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert type(p) is nn.Parameter
        assert torch.equal(p, q)
        for name, value in optimizer.state[p].items():
            assert type(value) is Tensor
            assert torch.equal(value, other.state[q][name])


def test_a_parameter_outside_its_module_is_a_copy(tmp_path: Path) -> None:
    model, reference = make(), make()
    with attach(model, spread(model, [RAM, DISK]), folder=tmp_path):
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            assert isinstance(p, AwayTensor)
            assert torch.equal(p + 0, q)
            with pytest.raises(RuntimeError, match="is away"):
                p.zero_()


def test_layers_are_not_decoded_for_a_gpu() -> None:
    model = make()
    with pytest.raises(ValueError, match="materialize: expected a model on the CPU, got one on cuda"):
        attach(model, spread(model, [RAM]), materialize=True)


def test_what_cannot_be_read_is_not_a_number(tmp_path: Path) -> None:
    model, reference = make(), make()
    handle = attach(model, spread(model, [DISK]), folder=tmp_path)
    assert handle._store is not None
    os.ftruncate(handle._store._handle, 4096 * 5)  # the first unit, and a page of the next
    with pytest.raises(RuntimeError, match=rf"{tmp_path}.*\.tier"):
        handle.remove()
    parameters = list(model.parameters())
    assert all(type(parameter) is nn.Parameter for parameter in parameters)
    assert torch.equal(parameters[0], next(reference.parameters()))
    assert parameters[-1].isnan().all()


def test_offloaded_activations_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch, computing: Stream) -> None:
    def stash(owner: Any, device: torch.device) -> Any:
        made = its_pinned.PinnedStash(device, owner.counters, owner._limit, owner._buffer_bytes)
        return owner._stashes.setdefault(device, made)

    monkeypatch.setattr(its_activations.ActivationOffload, "_stash", stash)
    model, reference = make(), make()
    tokens = torch.randint(16, (8, 32))
    with offload_activations(model, min_bytes=1 << 12, buffer_bytes=1 << 18) as offload:
        loss = model(tokens).square().mean()
    loss.backward()
    assert offload.counters.fetches == offload.counters.offloaded > 5
    assert offload.counters.demanded < offload.counters.fetches
    reference(tokens).square().mean().backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)

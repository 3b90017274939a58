"""Activations that wait on disk give the gradients that they give in memory."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from infold.tiers import Placement, Plan, TierSpec, attach, fingerprint, offload_activations, units
from infold.tiers.ring import host_memory
from infold.tiers.store import Store
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

WIDTH = 48
#: Bytes of one activation of the model below.
ACTIVATION = 4 * 5 * 16 * WIDTH


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + F.softmax(q @ k.transpose(1, 2), -1) @ v
        return x + self.down(torch.relu_(self.up(x)))


class Model(nn.Module):
    def __init__(self, blocks: int = 3, how: str = "") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.how == "reentrant") if self.how else block(x)
        return x


def make(**options: Any) -> Model:
    torch.manual_seed(0)
    return Model(**options)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 16, WIDTH, generator=torch.Generator().manual_seed(1), requires_grad=True)


def gradients(model: nn.Module, y: Tensor, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y.square().mean(), [x, *model.parameters()]))


def assert_same(ours: list[Tensor], expected: list[Tensor]) -> None:
    for index, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert torch.equal(a, b), index


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("pack", [None, "lossless"])
@pytest.mark.parametrize("buffer_bytes", [0, 3 * ACTIVATION, 1 << 30])
@pytest.mark.parametrize("how", ["", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_have_the_same_bits(
    pack: Any, buffer_bytes: int, how: str, autocast: bool, x: Tensor, tmp_path: Path
) -> None:
    model = make(how=how)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        # In the reentrant kind of checkpoint, only .backward() has a gradient.
        y = model(x)
    y.float().square().mean().backward()
    expected = [x.grad.clone(), *(p.grad.clone() for p in model.parameters())]
    for _ in range(2):
        x.grad = None
        model.zero_grad()
        offload = offload_activations(model, folder=tmp_path, min_bytes=1, buffer_bytes=buffer_bytes, pack=pack)
        with offload:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = model(x)
            assert offload.counters.offloaded > 0
            assert offload.stashed_bytes > 0
            y.float().square().mean().backward()
        assert_same([x.grad, *(p.grad for p in model.parameters())], expected)
        del y
        assert offload.stashed_bytes == 0
        if buffer_bytes < ACTIVATION:
            assert offload.counters.fetches > 0


def test_the_backward_may_come_after_and_save_on_cpu_agrees(x: Tensor) -> None:
    model = make()
    with save_on_cpu():
        y = model(x)
    expected = gradients(model, y, x)
    with offload_activations(model, min_bytes=1, buffer_bytes=0):
        y = model(x)
    assert_same(gradients(model, y, x), expected)


def test_weights_stay_and_each_storage_goes_once(x: Tensor) -> None:
    model = make(blocks=1)
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    alive: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(x).sum()
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    expected = [size for key, size in sizes.items() if key not in weights]
    assert len(expected) < len(sizes) < len(alive)
    offload = offload_activations(model, min_bytes=1)
    with offload:
        loss = model(x).sum()
        assert offload.counters.offloaded == len(expected)
        assert offload.counters.bytes_offloaded == sum(expected)
        assert offload.counters.shared + len(expected) == sum(t.untyped_storage()._cdata not in weights for t in alive)
        loss.backward()
        # A tensor of the caller's, twice, and a weight's view and its transpose.
        before = offload.counters.offloaded
        y = (x * x).sum() + (x.transpose(1, 2) * 2).square().sum() + (model.blocks[0].up.weight.t()[1:] ** 2).sum()
        assert offload.counters.offloaded == before + 2
        y.backward()
    quiet = offload_activations(list(model.parameters()), min_bytes=4 * ACTIVATION + 1)
    with quiet:
        model(x).sum().backward()
    assert quiet.counters.offloaded == 0


def test_the_limit_is_hard(x: Tensor) -> None:
    model = make()
    expected = gradients(model, model(x), x)
    with offload_activations(model, min_bytes=1) as offload:
        y = model(x)
        whole = offload.stashed_bytes
        assert_same(gradients(model, y, x), expected)
    limit = whole // 3 + 1000
    with offload_activations(model, min_bytes=1, limit_bytes=limit) as offload:
        for batch in (5, 4, 3, 5):  # other sizes, so that ranges have to be cut and joined
            y = model(x[:batch])
            stash = next(iter(offload._stashes.values()))
            assert whole // 4 * batch // 5 < offload.stashed_bytes <= limit
            assert os.fstat(stash._store._handle).st_size <= limit + 4096
            assert offload.counters.kept > 0
            ours = gradients(model, y, x)
        assert_same(ours, expected)
        assert offload.stashed_bytes == 0


def test_retained_graphs_several_graphs_and_higher_derivatives(x: Tensor) -> None:
    model = make()

    def run(loss_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        parameters = list(model.parameters())
        first, second = loss_of(model(x)), loss_of(model(2 * x))
        results = list(torch.autograd.grad(first, parameters, retain_graph=True))
        results += torch.autograd.grad(second, parameters)
        results += torch.autograd.grad(first, parameters, retain_graph=True)
        (slope,) = torch.autograd.grad(first, x, create_graph=True)
        results += torch.autograd.grad(slope.square().sum(), parameters)
        return results

    expected = run(lambda y: y.pow(3).sum())
    for buffer_bytes in (0, 6 * ACTIVATION, 1 << 30):
        with offload_activations(model, min_bytes=1, buffer_bytes=buffer_bytes) as offload:
            assert_same(run(lambda y: y.pow(3).sum()), expected)
        assert offload.stashed_bytes == 0
    assert offload.counters.shared > 0


def test_gradcheck() -> None:
    weight = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    with offload_activations([weight], min_bytes=1, buffer_bytes=0):
        assert torch.autograd.gradcheck(lambda x: torch.tanh(x @ weight).exp(), x)
        assert torch.autograd.gradgradcheck(lambda x: torch.tanh(x @ weight).exp(), x)


def test_writes_in_place_change_nothing_that_was_saved() -> None:
    a = torch.randn(64, 64, requires_grad=True)
    expected = a.detach().exp() * 2 * a.detach().exp()
    with offload_activations([], min_bytes=1):
        b = a.exp()
        c = (b * b).sum()
        with torch.no_grad():
            b.zero_()
        # PyTorch refuses this one; here what was saved is elsewhere, but what stays is watched as PyTorch does.
        (gradient,) = torch.autograd.grad(c, b, retain_graph=True)
        assert torch.equal(gradient, 2 * a.detach().exp())
        c.backward()
    assert torch.equal(a.grad, expected)
    with offload_activations([], min_bytes=1 << 30):
        c = (b := a * 1).exp().mul_(2).sum() + (b * b).sum()
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*version 1; expected version 0"):
            c.backward()
    weight = torch.randn(64, 64, requires_grad=True)
    with offload_activations([weight], min_bytes=1):
        c = (a @ weight).sum()
        with torch.no_grad():
            weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            c.backward()


def test_a_version_that_was_written_is_another_tensor() -> None:
    """What was saved before and after a write are two entries."""
    a = torch.randn(32, 32)
    w = torch.ones(32, 32, requires_grad=True)
    before = a.clone()
    with offload_activations([w], min_bytes=1) as offload:
        first = (w * a).sum()
        a.mul_(3)
        second = (w * a).sum()
        assert offload.counters.offloaded == 2
        assert torch.equal(torch.autograd.grad(first, w)[0], before)
        assert torch.equal(torch.autograd.grad(second, w)[0], 3 * before)


def test_addresses_that_come_again_are_told_apart() -> None:
    w = torch.ones(100_000, requires_grad=True)
    losses, values = [], []
    with offload_activations([w], min_bytes=1, buffer_bytes=0) as offload:
        for seed in range(8):
            value = torch.full((100_000,), float(seed))
            values.append(float(seed))
            losses.append((w * value).sum())
            del value
        assert offload.counters.offloaded == 8
        for loss, value in zip(losses, values, strict=True):
            assert torch.autograd.grad(loss, w)[0].unique().tolist() == [value]


def test_int8_changes_gradients_within_its_step() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 256)
    w = torch.randn(64, 256, requires_grad=True)
    odd = torch.randn(8, 512)
    odd[3, 5] = torch.inf
    with offload_activations([w], min_bytes=1, buffer_bytes=0, pack="int8") as offload:
        y = (w * x).sum()
        # The gradient is what was saved. A level is the row's largest / 127, and its scale a bfloat16 of 8 bits.
        (gradient,) = torch.autograd.grad(y, w)
        level = x.abs().amax(1, keepdim=True) / 127
        error = (gradient - x).abs()
        assert (error <= level * (0.5 + 127 * 2**-8)).all()
        assert 0.1 < (error / level).mean() < 0.5
        # Read from the disk, it is the same.
        again, other = (w * x).sum(), w.exp().sum()
        assert torch.equal(torch.autograd.grad(again, w)[0], gradient)
        assert offload.counters.fetches > 0
        del other
        assert offload.counters.bytes_stored < 0.4 * offload.counters.bytes_offloaded
        # What has no levels keeps its bits: indices, infinities, and views that are a part of their storage.
        for value in (odd, x[:, ::2], x.double()):
            v = torch.ones_like(value, requires_grad=True)
            assert torch.equal(torch.autograd.grad((v * value).sum(), v)[0], value)
    model = make()
    x = torch.randn(5, 16, WIDTH, requires_grad=True)
    expected = gradients(model, model(x), x)
    with offload_activations(model, min_bytes=1, buffer_bytes=0, pack="int8"):
        ours = gradients(model, model(x), x)
    # What ReLU saved also tells which of its outputs were zero, and small ones are rounded to that.
    for a, b in zip(ours, expected, strict=True):
        assert 0 < (a - b).norm() <= 0.15 * b.norm()


def test_packing_saves_bytes_of_bfloat16() -> None:
    w = torch.ones(256, 1024, dtype=torch.bfloat16, requires_grad=True)
    value = torch.randn(256, 1024).bfloat16()
    with offload_activations([w], min_bytes=1, buffer_bytes=0, pack="lossless") as offload:
        loss = (w * value).sum()
        assert torch.equal(torch.autograd.grad(loss, w)[0], value)
        assert offload.counters.bytes_stored < 0.75 * offload.counters.bytes_offloaded


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exceptions_leak_nothing(error: type[BaseException], x: Tensor) -> None:
    model = make()

    def fail(*_: object) -> None:
        raise error("stop")

    begun = descriptors()
    for _ in range(3):
        offload = offload_activations(model, min_bytes=1, buffer_bytes=2 * ACTIVATION)
        hook = model.blocks[2].up.register_forward_hook(fail)
        with pytest.raises(error), offload:
            model(x)
        hook.remove()
        gc.collect()
        assert offload.stashed_bytes == 0
        with offload:
            hidden = model.blocks[0](x)
            hidden.register_hook(fail)
            y = model.blocks[1](hidden)
            with pytest.raises(error):
                y.sum().backward()
            del hidden, y
        gc.collect()
        assert offload.stashed_bytes == 0
        # It is usable still.
        with offload:
            ours = gradients(model, model(x), x)
        assert_same(ours, gradients(model, model(x), x))
        assert offload.stashed_bytes == 0
    assert descriptors() == begun


def test_a_graph_that_outlives_the_context_closes_the_file_when_it_goes(x: Tensor) -> None:
    model = make()
    begun = descriptors()
    with offload_activations(model, min_bytes=1) as offload:
        y = model(x)
    assert descriptors() > begun
    del y
    assert offload.stashed_bytes == 0
    end = time.monotonic() + 30
    while descriptors() > begun and time.monotonic() < end:
        time.sleep(0.01)
    assert descriptors() == begun


def a_thousand_steps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    data = torch.randn(32, 64)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    with offload_activations(model, min_bytes=1, buffer_bytes=8192) as offload:
        for step in range(1000):
            if step == 100:
                begun = resident(), descriptors(), threading.active_count()
            model(data).sum().backward()
        assert offload.stashed_bytes == 0
        assert (descriptors(), threading.active_count()) == begun[1:]
        assert resident() - begun[0] < 8 << 20
        assert os.fstat(offload._stashes[torch.device("cpu")]._store._handle).st_size < 1 << 20
        assert len(offload._known) == len(offload._given) == 0


@pytest.mark.parametrize("pack", [None, "lossless"])
def test_storages_of_more_than_a_huge_page(pack: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.Tanh()) for _ in range(3)))
    x = torch.randn(3 << 10, 256)
    wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    with offload_activations(model, folder=tmp_path, buffer_bytes=4 << 20, pack=pack) as offload:
        found = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    assert offload.counters.fetches > 0
    assert all(map(torch.equal, found, wanted))


def test_a_thousand_steps_leak_nothing() -> None:
    # In a process whose memory nothing else has grown.
    process = multiprocessing.get_context("spawn").Process(target=a_thousand_steps)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_no_grad_and_strange_tensors_stay() -> None:
    with offload_activations([], min_bytes=1) as offload, torch.no_grad():
        torch.randn(64, 64).exp()
    assert offload.counters.offloaded == 0
    i = torch.randn(32, 32, dtype=torch.complex64, requires_grad=True)
    s = torch.eye(32).to_sparse()
    d = torch.randn(32, 32, requires_grad=True)

    def run() -> list[Tensor]:
        return list(torch.autograd.grad((i.conj() * i).abs().sum() + torch.sparse.mm(s, d * d).sum(), [i, d]))

    expected = run()
    with offload_activations([], min_bytes=1):
        assert_same(run(), expected)


def test_a_failing_disk_is_an_error_that_names_it(x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    with (
        pytest.raises(RuntimeError, match=r"nowhere.*No such file"),
        offload_activations(model, min_bytes=1, folder=tmp_path / "nowhere"),
    ):
        model(x)
    write = Store.write

    def broken(self: Store, offset: int, data: Tensor) -> int:
        raise RuntimeError("scratch: cannot write")

    begun = descriptors()
    monkeypatch.setattr(Store, "write", broken)
    with (
        pytest.raises(RuntimeError, match="scratch: cannot write"),
        offload_activations(model, min_bytes=1, buffer_bytes=0),
    ):
        model(x)
    monkeypatch.setattr(Store, "write", write)
    read = Store.read

    def short(self: Store, offset: int, out: Tensor) -> int:
        raise RuntimeError("scratch: cannot read")

    with offload_activations(model, min_bytes=1, buffer_bytes=0) as offload:
        y = model(x)
        monkeypatch.setattr(Store, "read", short)
        with pytest.raises(RuntimeError, match="scratch: cannot read"):
            gradients(model, y, x)
        monkeypatch.setattr(Store, "read", read)
        del y
        assert_same(gradients(model, model(x), x), gradients(model, model(x), x))
    gc.collect()
    assert offload.stashed_bytes == 0
    assert descriptors() == begun


def test_with_a_model_whose_weights_are_away_as_well() -> None:
    fast = TierSpec("FAST", 0, 1000, resident=True)
    disk = TierSpec("DISK", 50, 1, on_disk=True)
    model, reference = make(), make()
    optimizer, other = (torch.optim.SGD(m.parameters(), 1e-2, momentum=0.9) for m in (model, reference))
    found = units(model)
    plan = Plan(
        (fast, disk),
        {unit.name: Placement("DISK", unit.nbytes) for unit in found},
        2 * max(unit.room for unit in found),
        fingerprint(model),
        "disk",
    )
    generator = torch.Generator().manual_seed(3)
    with attach(model, plan) as handle, offload_activations(model, min_bytes=1, buffer_bytes=2 * ACTIVATION) as offload:
        for _ in range(5):
            x = torch.randn(5, 16, WIDTH, generator=generator)
            for m in (model, reference):
                m.zero_grad()
                with offload_activations(reference, min_bytes=1 << 30):
                    pass
                m(x).square().mean().backward()
            handle.step(optimizer)
            other.step()
        assert offload.counters.offloaded > 0
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q)


def test_backward_in_other_threads(x: Tensor) -> None:
    model = make()
    expected = gradients(model, model(x), x)
    results: dict[int, list[Tensor]] = {}

    def run(index: int) -> None:
        with offload:
            results[index] = gradients(model, model(x), x)

    offload = offload_activations(model, min_bytes=1, buffer_bytes=2 * ACTIVATION)
    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(3):
        assert_same(results[index], expected)
    assert offload.stashed_bytes == 0


def test_compiled(x: Tensor) -> None:
    model = make(blocks=1)
    expected = gradients(model, model(x), x)
    compiled = torch.compile(model, backend="aot_eager")
    with offload_activations(model, min_bytes=1, buffer_bytes=0):
        for ours, reference in zip(gradients(model, compiled(x), x), expected, strict=True):
            torch.testing.assert_close(ours, reference)
    torch.compiler.reset()


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="min_bytes: expected zero or more bytes, got -1"):
        offload_activations([], min_bytes=-1)
    with pytest.raises(ValueError, match="limit_bytes: expected zero or more bytes, got -5"):
        offload_activations([], limit_bytes=-5)
    with pytest.raises(ValueError, match="pack: expected one of lossless, int8 or None, got 'int3'"):
        offload_activations([], pack="int3")  # type: ignore[arg-type]


def test_ranges_of_a_file_never_overlap_and_join_again(tmp_path: Path) -> None:
    store = Store(tmp_path, growth=0)
    limit = 64 * 4096
    generator = torch.Generator().manual_seed(0)
    held: dict[int, int] = {}
    refused = 0
    for _ in range(2000):
        if held and torch.rand((), generator=generator) < 0.5:
            offset = list(held)[int(torch.randint(len(held), (), generator=generator))]
            store.free(offset, held.pop(offset))
        else:
            size = int(torch.randint(1, 12 * 4096, (), generator=generator))
            if not store.has_room(size, limit):
                refused += 1
                continue
            held[store.reserve(size)] = -(-size // 4096) * 4096
        assert store.taken == sum(held.values())
        ranges = sorted((start, start + size) for start, size in held.items())
        assert all(a[1] <= b[0] for a, b in pairwise(ranges))
        assert not ranges or ranges[-1][1] <= limit
    assert refused > 0
    for offset, size in held.items():
        store.free(offset, size)
    assert store.reserve(store._end) == 0
    assert os.fstat(store._handle).st_size <= limit
    store.close()


def test_ranges_are_mapped_where_the_file_has_grown(tmp_path: Path) -> None:
    store = Store(tmp_path, 3 * 4096, growth=2 * 4096)
    first, second = store.reserve(4096), store.reserve(4096)
    before = store.map(second, 4096)
    # Begins in what was there, and ends in what is new.
    grown = store.reserve(3 * 4096)
    after = store.map(grown, 3 * 4096)
    for value, (offset, memory) in enumerate(((second, before), (grown, after), (first, store.map(first, 4096))), 1):
        data = host_memory(memory.nbytes)
        store.wait(store.write(offset, data.fill_(value)))
        assert memory.unique().tolist() == [value]
    assert grown == 2 * 4096
    assert before.unique().tolist() == [1]
    store.close()

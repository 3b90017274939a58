"""Tiers when things go wrong: full and failing disks, a process that is killed, several threads at a time."""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import infold
import pytest
import torch
from infold.tiers import Handle, Placement, Plan, TierSpec, attach, fingerprint, units
from infold.tiers.engine import Engine
from infold.tiers.training import _tensors
from torch import Tensor, nn

DISK = TierSpec("DISK", 50, 1, on_disk=True)
FAST = TierSpec("FAST", 0, 1000, resident=True)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(128, 128) for _ in range(6)))


def on_disk(model: nn.Module, buffers: int = 2) -> Plan:
    found = units(model)
    placements = {unit.name: Placement("DISK", unit.nbytes) for unit in found}
    return Plan((FAST, DISK), placements, buffers * found[0].room, fingerprint(model), "all on disk")


def truncate(handle: Handle, nbytes: int) -> None:
    assert handle._store is not None
    os.ftruncate(handle._store._handle, nbytes)


def test_a_short_read_names_the_file_and_the_rest_works(tmp_path: Path) -> None:
    model, reference, x = make(), make(), torch.randn(3, 128)
    handle = attach(model, on_disk(model), folder=tmp_path)
    room = units(model)[0].room
    truncate(handle, 5 * room + 4096)  # all but a page of the last layer's is lost
    with torch.no_grad():
        for _ in range(2):
            with pytest.raises(RuntimeError, match=rf"{tmp_path}.*\.tier"):
                model(x)
        assert torch.equal(model[:5](x), reference[:5](x))
    with pytest.raises(RuntimeError, match=rf"{tmp_path}.*\.tier"):
        handle.remove()
    for layer, expected in zip(model[:5], reference[:5], strict=True):
        assert torch.equal(layer.weight, expected.weight)
    assert model[5].weight.isnan().all()
    model.load_state_dict(reference.state_dict())
    assert torch.equal(model(x), reference(x))


def test_a_write_that_fails_keeps_what_was_written_until_it_succeeds(tmp_path: Path) -> None:
    model, reference, x = make(), make(), torch.randn(3, 128)
    optimizer, other = (torch.optim.SGD(m.parameters(), 0.1) for m in (model, reference))
    handle = attach(model, on_disk(model, 8), folder=tmp_path)
    for m in (model, reference):
        m(x).sum().backward()
    other.step()
    failing = [True]
    assert handle._store is not None
    wait = handle._store.wait

    def wait_or_fail(ticket: int) -> None:
        wait(ticket)
        if failing[0]:
            raise RuntimeError("no space on device")

    handle._store.wait = wait_or_fail  # type: ignore[method-assign]
    handle.step(optimizer)
    with pytest.raises(RuntimeError, match="no space"):
        handle.refresh()
    failing[0] = False
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q)
    handle.remove()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_full_disk_is_an_error_before_anything_moves(tmp_path: Path) -> None:
    # A limit on the size of files stands for the disk's end: both fail where the file is set aside.
    code = f"""
import resource, signal, sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_tier_faults import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
model, reference = make(), make()
try:
    attach(model, on_disk(model), folder={str(tmp_path)!r})
except RuntimeError as error:
    print(error)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), reference.parameters()))
    assert not model._forward_pre_hooks and not model[0]._forward_pre_hooks
    assert torch.equal(model(torch.ones(128)), reference(torch.ones(128)))
    print("unharmed")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert str(tmp_path) in run.stdout
    assert ".tier" in run.stdout
    assert run.stdout.endswith("unharmed\n")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    model = make()
    with pytest.raises(RuntimeError, match=f"{tmp_path}/nowhere"):
        attach(model, on_disk(model), folder=tmp_path / "nowhere")
    assert torch.equal(model[0].weight, make()[0].weight)


@pytest.mark.parametrize("moment", ["attaching", "stepping"])
def test_a_process_that_is_killed_leaves_nothing_and_loses_nothing(moment: str, tmp_path: Path) -> None:
    folder = tmp_path / "tiers"
    folder.mkdir()
    checkpoint = tmp_path / "model.pt"
    torch.save(make().state_dict(), checkpoint)
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    code = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_tier_faults import *
model = make()
model.load_state_dict(torch.load({str(checkpoint)!r}))
optimizer = torch.optim.AdamW(model.parameters())
print("begun", flush=True)
while True:
    with attach(model, on_disk(model), folder={str(folder)!r}) as handle:
        while {moment == "stepping"}:
            model(torch.randn(3, 128)).sum().backward()
            handle.step(optimizer)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert list(folder.iterdir()) == []
    assert hashlib.sha256(checkpoint.read_bytes()).hexdigest() == digest


def test_an_interrupt_while_attaching_restores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = make(), make()
    place, count = Handle._place, [0]

    def interrupted(self: Handle, unit: object, spec: object) -> None:
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        place(self, unit, spec)  # type: ignore[arg-type]

    monkeypatch.setattr(Handle, "_place", interrupted)
    with pytest.raises(KeyboardInterrupt):
        attach(model, on_disk(model), folder=tmp_path)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q)
    assert not model[0]._forward_pre_hooks


@pytest.mark.parametrize("place", ["_prefetch", "_await", "_let_go"])
def test_an_interrupt_of_the_engine_leaves_nothing_in_use(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, reference, x = make(), make(), torch.randn(3, 128)
    original, count = getattr(Engine, place), [0]

    def interrupted(self: Engine, *args: object, **options: object) -> None:
        count[0] += 1
        if count[0] % 7 == 3:
            raise KeyboardInterrupt
        original(self, *args, **options)

    with attach(model, on_disk(model), folder=tmp_path) as handle, torch.no_grad():
        monkeypatch.setattr(Engine, place, interrupted)
        for _ in range(40):
            with contextlib.suppress(KeyboardInterrupt):
                assert torch.equal(model(x), reference(x))
        assert count[0] > 40
        monkeypatch.setattr(Engine, place, original)
        assert torch.equal(model(x), reference(x))
        assert not any(state.pins for state in handle._engine._states.values())
        assert handle.counters.elsewhere == 0


def test_several_threads_share_an_attached_model(tmp_path: Path) -> None:
    model, reference = make(), make()
    xs = [torch.randn(3, 128, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    results: dict[int, list[Tensor]] = {i: [] for i in range(4)}
    errors: list[BaseException] = []

    def work(index: int) -> None:
        torch.set_num_threads(1)
        try:
            for _ in range(20):
                x = xs[index].clone().requires_grad_()
                model(x).square().sum().backward()
                assert x.grad is not None
                results[index].append(x.grad)
        except BaseException as error:
            errors.append(error)

    model.requires_grad_(False)
    with attach(model, on_disk(model, 3), folder=tmp_path) as handle:
        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert handle._ring.taken <= handle._ring.capacity
    assert not errors
    for index, x in enumerate(xs):
        y = x.clone().requires_grad_()
        reference(y).square().sum().backward()
        assert y.grad is not None
        for result in results[index]:
            assert torch.equal(result, y.grad)


def test_a_handle_that_was_removed_touches_nothing(tmp_path: Path) -> None:
    first, second, reference = make(), make(), make()
    old = attach(first, on_disk(first), folder=tmp_path)
    store = old._store
    old.remove()
    with attach(second, on_disk(second), folder=tmp_path) as handle:
        for call in (lambda: old.move("0", "FAST"), old.refresh, lambda: old.step(torch.optim.SGD(first.parameters()))):
            with pytest.raises(RuntimeError, match="brought it back"):
                call()
        assert store is not None
        with pytest.raises(RuntimeError, match="closed"):
            store.reserve(4096)
        handle.refresh()
    for p, q in zip(second.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_model_is_attached_once(tmp_path: Path) -> None:
    model = make()
    with (
        attach(model, on_disk(model), folder=tmp_path),
        pytest.raises(ValueError, match=r"'0\.weight' of an attached one; call remove\(\)"),
    ):
        attach(model, on_disk(model), folder=tmp_path)
    attach(model, on_disk(model), folder=tmp_path).remove()


@pytest.mark.parametrize("tier", ["DISK", "FAST"])
def test_the_layers_of_an_attached_model_are_not_replaced(tier: str, tmp_path: Path) -> None:
    model, lazy = make().requires_grad_(False), nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    packed, file = copy.deepcopy(model), tmp_path / "packed.safetensors"
    infold.convert(packed, infold.FusedConfig("lossless"), progress=False)
    infold.save(packed, file)
    with attach(model, on_disk(model), folder=tmp_path) as handle:
        handle.move("1", tier)
        for replace, advice in (
            (lambda m: infold.convert(m, infold.FusedConfig("lossless"), progress=False), "convert before"),
            (infold.prepare, "lay out before"),
            (lambda m: infold.load_into(m, file), "load before"),
        ):
            # A part of it that is in the fastest tier is the handle's as well.
            for part in (model, nn.Sequential(model[1])):
                with pytest.raises(ValueError, match=rf"of an attached one; {advice} infold\.tiers\.attach"):
                    replace(part)
        assert all(type(module) is nn.Linear for module in model[:2])
        # Other models are converted as ever.
        with pytest.warns(UserWarning, match="left dense: 0: LazyLinear"):
            infold.convert(lazy, infold.FusedConfig("lossless"), progress=False)
    assert len(infold.convert(model, infold.FusedConfig("lossless"), progress=False).layers) > 1


@pytest.mark.parametrize("inside", [False, True])
def test_writes_by_data_are_seen_after_refresh(inside: bool, tmp_path: Path) -> None:
    model, reference, x = make(), make(), torch.randn(3, 128)
    optimizer, other = (torch.optim.SGD(m.parameters(), 0.1) for m in (model, reference))
    with attach(model, on_disk(model, 3), folder=tmp_path) as handle:

        def clamp(module: nn.Module, args: object) -> None:
            module.weight.data.clamp_(-0.05, 0.05)  # type: ignore[union-attr, operator]
            if module is model[2]:
                handle.refresh()

        if inside:
            for m in (model, reference):
                m[2].register_forward_pre_hook(clamp)
        for _ in range(3):
            for m, step in ((model, lambda: handle.step(optimizer)), (reference, other.step)):
                m.zero_grad()
                m(x).square().sum().backward()
                step()
                if not inside:
                    for p in m.parameters():
                        p.data.clamp_(-0.05, 0.05)
            if not inside:
                handle.refresh()
            assert torch.equal(model(x), reference(x))
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_use_at_home_is_not_moved_under_another_thread(tmp_path: Path) -> None:
    model = make()
    with attach(model, on_disk(model, 1), folder=tmp_path) as handle:
        engine = handle._engine
        with engine.use("0"):
            at_home = engine.acquire("1")  # the ring holds one
        address = model[1].weight.data_ptr()
        with engine.use("1"):  # another thread's, now that there is room
            assert model[1].weight.data_ptr() == address
        engine.release("1", at_home)
        with engine.use("1"):
            assert model[1].weight.data_ptr() != address
        assert handle.counters.elsewhere == 2


def test_descriptors_do_not_grow_with_units(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(300)))
    optimizer = torch.optim.AdamW(model.parameters())
    before = len(os.listdir("/proc/self/fd"))
    with attach(model, on_disk(model, 2), folder=tmp_path) as handle:
        model(torch.randn(2, 4)).sum().backward()
        handle.step(optimizer)
        assert len(os.listdir("/proc/self/fd")) - before < 12


def test_a_copy_of_an_attached_model_is_plain(tmp_path: Path) -> None:
    model, x = make(), torch.randn(3, 128)
    for materialize in (False, True):
        model.requires_grad_(not materialize)
        with attach(model, on_disk(model, 4), folder=tmp_path, materialize=materialize):
            copied = copy.deepcopy(model)
            average = torch.optim.swa_utils.AveragedModel(model)
            average.update_parameters(model)
            loaded = pickle.loads(pickle.dumps(model.state_dict()))
        for other in (copied, average):
            assert torch.equal(other(x), model(x))
        assert all(type(parameter) is nn.Parameter for parameter in copied.parameters())
        assert torch.equal(loaded["3.weight"], model[3].weight)


def test_a_handle_is_not_copied_and_outlives_who_tries(tmp_path: Path) -> None:
    model, x = make(), torch.randn(3, 128)
    expected = model(x)
    handle = attach(model, on_disk(model, 2), folder=tmp_path)
    model.handle = handle
    for copier in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="handle: expected not to be copied or saved"):
            copier(model)
    with pytest.raises(TypeError, match="store: expected not to be copied"):
        copy.copy(handle._store)
    assert torch.equal(model(x), expected)
    handle.remove()
    assert torch.equal(model(x), expected)


def test_models_that_are_dropped_while_attached_leave_nothing(tmp_path: Path) -> None:
    def drop() -> None:
        model = make()
        attach(model, on_disk(model), folder=tmp_path)
        model(torch.randn(2, 128))

    drop()
    gc.collect()
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(30):
        drop()  # which would be refused, were an address of one before still noted
        gc.collect()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_an_optimizer_of_another_model_is_refused(tmp_path: Path) -> None:
    model, other = make(), make()
    with (
        attach(model, on_disk(model), folder=tmp_path) as handle,
        pytest.raises(ValueError, match="optimizer: expected one of the attached model's parameters"),
    ):
        handle.step(torch.optim.SGD(other.parameters()))


def test_packed_weights_refuse_every_write_and_answer_every_read(tmp_path: Path) -> None:
    model, reference = make().requires_grad_(False), make().requires_grad_(False)
    with attach(model, on_disk(model, 4), folder=tmp_path, materialize=True):
        weight, expected = model[1].weight, reference[1].weight

        def item() -> None:
            weight[0] = 0

        for write in (
            lambda: weight.mul_(0),
            item,
            lambda: torch._foreach_mul_([weight], 0.0),
            lambda: torch.mul(expected, 2, out=weight),
        ):
            with pytest.raises(RuntimeError, match="is away"):
                write()
        buffer = torch.zeros(128, 128)
        assert torch.equal(buffer.copy_(weight), expected)
        assert torch.equal(torch.mul(weight, 2, out=buffer), expected * 2)
        assert torch.equal(weight.detach(), expected)
    assert torch.equal(model[1].weight, expected)


def test_a_packed_weight_that_a_module_returns_is_kept(tmp_path: Path) -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(64, 128), requires_grad=False)

        def forward(self, n: int) -> Tensor:
            return self.table[:n]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.layer = Positions(), nn.Linear(128, 128).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            p = self.positions(len(x))
            return self.layer(x) + p

    model, x = Model(), torch.randn(3, 128)
    expected = model(x)
    found = units(model)
    placements = {unit.name: Placement("DISK", unit.nbytes) for unit in found}
    made = Plan((FAST, DISK), placements, 4 * max(u.room for u in found), fingerprint(model), "all on disk")
    with attach(model, made, folder=tmp_path, materialize=True):
        assert torch.equal(model(x), expected)


def test_the_models_own_parameters_come_to_the_ring_too(tmp_path: Path) -> None:
    model, x = nn.Linear(128, 128), torch.randn(3, 128)
    expected = model(x)
    inside: list[int] = []
    with attach(model, on_disk(model), folder=tmp_path) as handle:
        home = model.weight.data_ptr()
        model.register_forward_pre_hook(lambda module, args: inside.append(module.weight.data_ptr()))
        assert torch.equal(model(x), expected)
        assert inside != [home]
        assert handle._ring.taken


def test_optimizer_state_that_is_loaded_later_moves_too(tmp_path: Path) -> None:
    model, reference, x = make(), make(), torch.randn(3, 128)
    optimizer, other = (torch.optim.AdamW(m.parameters(), 1e-2) for m in (model, reference))
    with attach(model, on_disk(model, 3), folder=tmp_path) as handle:
        for turn in range(4):
            for m, o, step in ((model, optimizer, lambda: handle.step(optimizer)), (reference, other, other.step)):
                o.zero_grad()
                m(x).square().sum().backward()
                if turn == 0:
                    m[0].bias.grad = None  # has a state only from the second step on
                step()
                if turn == 1:
                    o.load_state_dict(copy.deepcopy(o.state_dict()))
        state = optimizer.state[model[0].bias]["exp_avg"]
        assert handle._engine.holds("0 (optimizer)", [*_tensors(optimizer, model[0].parameters())])
        assert torch.equal(state, other.state[reference[0].bias]["exp_avg"])
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q)

"""Tiers when things go wrong: full and failing disks, a process that is killed, several threads at a time."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from infold.tiers import Handle, Placement, Plan, TierSpec, attach, fingerprint, units
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

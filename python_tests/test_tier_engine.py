"""The disk engine's operators, and storages that are pointed elsewhere."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from infold._library import library_path, ops
from torch import Tensor
from torch.nn import functional as F

PAGE = 4096


def pages(nbytes: int) -> Tensor:
    """Zeros at the start of a page."""
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)


def noise(nbytes: int, seed: int) -> Tensor:
    out = pages(nbytes)
    out.copy_(torch.randint(256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)))
    return out


@pytest.fixture(params=["auto", "threads"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    store = ops.tier_open(str(tmp_path), 64 * PAGE, 4, request.param)
    yield store
    ops.tier_close(store)


def test_what_is_written_is_read(store: int) -> None:
    data, back = noise(64 * PAGE, 0), pages(64 * PAGE)
    tickets = [ops.tier_write(store, 0, data), ops.tier_read(store, 0, back)]
    for ticket in tickets:
        ops.tier_wait(store, ticket)
    assert torch.equal(back, data)
    # The store's number is the file's descriptor.
    with mmap.mmap(store, 64 * PAGE, access=mmap.ACCESS_READ) as mapped:
        assert mapped[:] == bytes(data.numpy())
    read, written, requests, unfinished, uring, direct = ops.tier_stats(store)
    assert (read, written, requests, unfinished) == (64 * PAGE, 64 * PAGE, 2, 0)
    assert {uring, direct} <= {0, 1}


def test_a_store_grows(store: int) -> None:
    assert ops.tier_reserve(store, 5000) == 64 * PAGE
    assert ops.tier_reserve(store, PAGE) == 66 * PAGE
    data, back = noise(3 * PAGE, 1), pages(3 * PAGE)
    ops.tier_wait(store, ops.tier_write(store, 64 * PAGE, data))
    ops.tier_wait(store, ops.tier_read(store, 64 * PAGE, back))
    assert torch.equal(back, data)


def test_threads_are_named_as_such(tmp_path: Path) -> None:
    store = ops.tier_open(str(tmp_path), 0, backend="threads")
    assert ops.tier_stats(store)[4] == 0
    ops.tier_close(store)


def test_wrong_arguments(store: int, tmp_path: Path) -> None:
    good = pages(2 * PAGE)
    for wrong, what in [
        (torch.zeros(PAGE, dtype=torch.int8), "expected a contiguous uint8 tensor on the CPU, got Int8"),
        (good[::2], "expected a contiguous uint8 tensor"),
        (good[64 : 64 + PAGE], "memory's address: expected a multiple of 4096"),
        (good[:100], "memory's bytes: expected a multiple of 4096, got 100"),
        (torch.zeros(PAGE, dtype=torch.uint8, device="meta"), "expected a contiguous uint8 tensor on the CPU"),
    ]:
        with pytest.raises(ValueError, match=what):
            ops.tier_read(store, 0, wrong)
        with pytest.raises(ValueError, match=what):
            ops.tier_write(store, 0, wrong)
    for offset, what in [(-PAGE, "offset: expected at least 0"), (1, "offset: "), (63 * PAGE, "range: expected one")]:
        with pytest.raises(ValueError, match=what):
            ops.tier_read(store, offset, good)
    ticket = ops.tier_read(store, 0, good)
    ops.tier_wait(store, ticket)
    for call in (ops.tier_wait, ops.tier_done):
        with pytest.raises(ValueError, match="ticket: expected one that was handed out"):
            call(store, ticket)
    for arguments, what in [((0, 0), "depth"), ((-1,), "nbytes"), ((0, 4, "disk"), "backend: expected auto, uring")]:
        with pytest.raises(ValueError, match=what):
            ops.tier_open(str(tmp_path), *arguments)
    with pytest.raises(ValueError, match="store: expected one that tier_open returned"):
        ops.tier_reserve(-3, 0)


def test_a_closed_store_is_unknown(tmp_path: Path) -> None:
    store = ops.tier_open(str(tmp_path), PAGE)
    ops.tier_close(store)
    with pytest.raises(ValueError, match="store"):
        ops.tier_stats(store)
    with pytest.raises(ValueError, match="store"):
        ops.tier_close(store)


def test_the_disk_s_errors_name_the_file(store: int, tmp_path: Path) -> None:
    os.ftruncate(store, PAGE)
    out = pages(2 * PAGE)
    ticket = ops.tier_read(store, 0, out)
    name = rf"{tmp_path}/infold-{os.getpid()}-\w+\.tier: "
    with pytest.raises(RuntimeError, match=name + "cannot read 8192 bytes at offset 0: short read"):
        ops.tier_wait(store, ticket)
    with pytest.raises(RuntimeError, match=name + f"cannot set aside {1 << 55} bytes"):
        ops.tier_reserve(store, 1 << 55)
    with pytest.raises(RuntimeError, match=r"/nowhere/infold-.*No such file"):
        ops.tier_open("/nowhere", 0)
    ops.tier_wait(store, ops.tier_read(store, 0, out[:PAGE]))


def test_tensors_live_until_they_are_read(store: int) -> None:
    memory = mmap.mmap(-1, 64 * PAGE)
    gone = weakref.ref(memory)
    # Behind others, so that it is not done at once.
    others = pages(64 * PAGE)
    tickets = [ops.tier_read(store, 0, others) for _ in range(200)]
    tickets.append(ops.tier_read(store, 0, torch.frombuffer(memory, dtype=torch.uint8)))
    del memory
    assert ops.tier_done(store, tickets[-1]) or gone() is not None
    for ticket in tickets:
        ops.tier_wait(store, ticket)
    assert gone() is None


def test_a_wait_lets_other_threads_run(tmp_path: Path) -> None:
    """The read that is waited for is behind many, so that the wait takes a while; another thread counts meanwhile."""
    store = ops.tier_open(str(tmp_path), 16 << 20)
    out = pages(16 << 20)
    counted, end = [0], threading.Event()

    def count() -> None:
        while not end.is_set():
            counted[0] += 1
            time.sleep(0)  # gives the lock away

    thread = threading.Thread(target=count)
    tickets = [ops.tier_read(store, 0, out) for _ in range(60)]
    # This thread keeps Python's lock unless it gives it away.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        thread.start()
        before = counted[0]
        ops.tier_wait(store, tickets[-1])
        during = counted[0] - before
    finally:
        end.set()
        sys.setswitchinterval(interval)
        thread.join()
        ops.tier_close(store)
    assert during > 0


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("backend", ["auto", "threads"])
def test_descriptors_do_not_leak(tmp_path: Path, backend: str) -> None:
    def use() -> None:
        store = ops.tier_open(str(tmp_path), PAGE, 4, backend)
        ops.tier_wait(store, ops.tier_read(store, 0, out))
        ops.tier_close(store)

    out = pages(PAGE)
    use()
    before, threads = descriptors(), len(os.listdir("/proc/self/task"))
    for _ in range(200):
        use()
    assert descriptors() == before
    assert len(os.listdir("/proc/self/task")) == threads
    assert not any(tmp_path.iterdir())


def test_nothing_is_left_of_a_killed_process(tmp_path: Path) -> None:
    """Killed with writes in flight."""
    program = f"""
import mmap, os, signal, torch
torch.ops.load_library({library_path()!r})
store = torch.ops.infold.tier_open({str(tmp_path)!r}, 64 << 20)
data = torch.frombuffer(mmap.mmap(-1, 64 << 20), dtype=torch.uint8)
for _ in range(8):
    torch.ops.infold.tier_write(store, 0, data)
assert torch.ops.infold.tier_stats(store)[3] > 0
os.kill(os.getpid(), signal.SIGKILL)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert not any(tmp_path.iterdir())


def test_bind_points_every_view_to_the_memory() -> None:
    tensor = torch.arange(12.0).view(3, 4)
    view, version = tensor[1], tensor._version
    memory = noise(PAGE, 2)
    values = memory[:48].view(torch.float32).view(3, 4)
    values.copy_(torch.arange(12.0).view(3, 4) * 2)
    ops.tier_bind(tensor, memory)
    assert tensor.data_ptr() == memory.data_ptr()
    assert tensor.untyped_storage().nbytes() == PAGE
    assert torch.equal(tensor, values)
    assert torch.equal(view, values[1])
    assert tensor.shape == (3, 4)
    assert tensor.stride() == (4, 1)
    assert tensor._version == version
    values[1, 0] = -1
    assert view[0] == -1


def test_bind_to_nothing_frees() -> None:
    tensor = torch.ones(1000)
    ops.tier_bind(tensor, None)
    assert tensor.untyped_storage().nbytes() == 0
    assert tensor.shape == (1000,)
    assert tensor.data_ptr() == 0


def test_bound_memory_is_held() -> None:
    memory, tensor = mmap.mmap(-1, PAGE), torch.empty(100)
    gone = weakref.ref(memory)
    ops.tier_bind(tensor, torch.frombuffer(memory, dtype=torch.uint8))
    del memory
    assert gone() is not None
    assert tensor.sum() == 0
    ops.tier_bind(tensor, None)
    assert gone() is None


def test_autograd_sees_what_is_bound_before_the_backward() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 64, generator=generator, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(32, 64, generator=generator))
    expected = torch.autograd.grad(F.linear(x, weight).square().sum(), (x, weight))
    kept = weight.detach().clone()

    ops.tier_bind(weight, None)
    for _ in range(2):
        memory = pages(32 * 64 * 4)
        memory.view(torch.float32).view(32, 64).copy_(kept)
        ops.tier_bind(weight, memory)
        loss = F.linear(x, weight).square().sum()
        ops.tier_bind(weight, None)
        memory.zero_()
        again = pages(32 * 64 * 4)
        again.view(torch.float32).view(32, 64).copy_(kept)
        ops.tier_bind(weight, again)
        for got, want in zip(torch.autograd.grad(loss, (x, weight)), expected, strict=True):
            assert torch.equal(got, want)
        ops.tier_bind(weight, None)


def test_bind_refuses_what_cannot_be_a_storage() -> None:
    tensor = torch.zeros(100)
    good = pages(PAGE)
    for wrong, what in [
        (torch.zeros(PAGE, dtype=torch.int8), "memory: expected a contiguous uint8 tensor, got Char"),
        (good[::2], "memory: expected a contiguous uint8 tensor"),
        (good[32:], "memory: expected an address that is a multiple of 64"),
        (good[:384], "memory: expected at least 400 bytes, got 384"),
        (torch.zeros(PAGE, dtype=torch.uint8, device="meta"), "memory: expected device cpu, got meta"),
    ]:
        with pytest.raises(ValueError, match=what):
            ops.tier_bind(tensor, wrong)
    with pytest.raises(ValueError, match="memory: expected a storage of its own"):
        ops.tier_bind(good, good)
    assert torch.equal(tensor, torch.zeros(100))
    # From an offset on: the storage has to reach as far.
    with pytest.raises(ValueError, match="memory: expected at least 400 bytes"):
        ops.tier_bind(tensor[90:], good[:64])

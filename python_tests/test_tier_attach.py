"""A model whose weights lie in tiers computes what it computes without, bit for bit."""

from __future__ import annotations

import copy
import dataclasses
import os
import threading
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Literal

import infold
import pytest
import torch
import torch.nn.functional as F
from infold.tiers import Handle, Placement, Plan, TierSpec, attach, fingerprint, units
from infold.tiers.store import Store
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

FAST = TierSpec("FAST", 0, 1000, resident=True)
RAM = TierSpec("RAM", 1, 20)
DISK = TierSpec("DISK", 50, 1, on_disk=True)


class Block(nn.Module):
    """Branches, a module that is called twice, a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.left = nn.Linear(width, 3 * width)
        self.right = nn.Linear(width, 3 * width, bias=False)
        self.down = nn.Linear(3 * width, width)
        self.twice = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        h = self.down(F.silu(self.left(h)) * self.right(h))
        return x + self.twice(torch.tanh(self.twice(h)))


class Model(nn.Module):
    """A small language model: a tied embedding, a parameter of its own, attention, batch norm, an early exit."""

    def __init__(self, width: int = 32, blocks: int = 4, checkpointed: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.scale = nn.Parameter(torch.ones(width))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.bn = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.checkpointed = checkpointed

    def forward(self, tokens: Tensor, exit_after: int = 99) -> Tensor:
        x = self.embedding(tokens) * self.scale
        x = x + self.attention(x, x, x, need_weights=False)[0]
        for index, block in enumerate(self.blocks):
            if index == exit_after:
                break
            x = checkpoint(block, x, use_reentrant=self.reentrant) if self.checkpointed else block(x)
        return self.head(self.bn(x.transpose(1, 2)).transpose(1, 2))

    reentrant = False


def make(seed: int = 0, **options: int) -> Model:
    torch.manual_seed(seed)
    return Model(**options)


def spread(model: nn.Module, tiers: list[TierSpec], buffers: int = 2) -> Plan:
    """Every unit into the next tier, by turns."""
    found = units(model)
    placements = {unit.name: Placement(tiers[i % len(tiers)].name, unit.nbytes) for i, unit in enumerate(found)}
    largest = sorted(unit.room for unit in found)[-buffers:]
    return Plan((FAST, RAM, DISK), placements, sum(largest), fingerprint(model), "by turns")


TIERS: dict[str, list[TierSpec]] = {
    "disk": [DISK],
    "ram": [RAM],
    "fast": [FAST],
    "fast and disk": [FAST, DISK],
    "ram and disk": [RAM, DISK],
    "all": [FAST, RAM, DISK],
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """The models are so small that threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(1))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], None], steps: int, autocast: bool = False
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(50, (3, 7), generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        step()
        losses.append(loss.detach())
    return losses


def assert_same_state(model: nn.Module, reference: nn.Module) -> None:
    expected = reference.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("tiers", TIERS.values(), ids=TIERS)
@pytest.mark.parametrize("buffers", [1, 3])
def test_outputs_and_gradients_have_the_same_bits(tiers: list[TierSpec], buffers: int, tokens: Tensor) -> None:
    model, reference = make(), make()
    with attach(model, spread(model, tiers, buffers)):
        for _ in range(3):
            y, expected = model(tokens), reference(tokens)
            assert torch.equal(y, expected)
            y.square().sum().backward()
            expected.square().sum().backward()
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert p.grad is not None, name
            assert torch.equal(p.grad, q.grad), name
        assert_same_state(model, reference)
    assert_same_state(model, reference)
    assert torch.equal(model(tokens), reference(tokens))


@pytest.mark.parametrize("tiers", TIERS.values(), ids=TIERS)
def test_200_steps_of_training_have_the_same_bits(tiers: list[TierSpec]) -> None:
    model, reference = make(blocks=1), make(blocks=1)
    optimizer, other = (torch.optim.AdamW(m.parameters(), 1e-2) for m in (model, reference))
    with attach(model, spread(model, tiers)) as handle:
        losses = train(model, optimizer, lambda: handle.step(optimizer), 200)
        assert torch.stack(losses).equal(torch.stack(train(reference, other, other.step, 200)))
        assert_same_state(model, reference)
    assert_same_state(model, reference)
    # What the optimizer keeps is back as well.
    assert torch.stack(train(model, optimizer, optimizer.step, 3)).equal(
        torch.stack(train(reference, other, other.step, 3))
    )


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_training_with_checkpointing_and_autocast(reentrant: bool, autocast: bool) -> None:
    model, reference = make(checkpointed=True), make(checkpointed=True)
    model.reentrant = reference.reentrant = reentrant
    optimizer, other = (torch.optim.SGD(m.parameters(), 1e-2, momentum=0.9) for m in (model, reference))
    with attach(model, spread(model, [DISK], buffers=2)) as handle:
        losses = train(model, optimizer, lambda: handle.step(optimizer), 5, autocast)
    assert torch.stack(losses).equal(torch.stack(train(reference, other, other.step, 5, autocast)))
    assert_same_state(model, reference)


class ByData(torch.optim.Optimizer):
    """Writes as some optimizers do: to what PyTorch does not see written."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                    mean.data.lerp_(parameter.grad, 0.1)
                    parameter.data.sub_(group["lr"] * mean)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "fused AdamW": partial(torch.optim.AdamW, fused=True),
    "fused SGD": partial(torch.optim.SGD, momentum=0.9, fused=True),
    "by data": ByData,
}


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("by_units", [False, True])
def test_optimizers_of_any_kind_write_where_the_weights_live(
    make_optimizer: Callable[..., torch.optim.Optimizer], by_units: bool
) -> None:
    model, reference = make(), make()
    optimizer, other = (make_optimizer(m.parameters(), lr=1e-2) for m in (model, reference))
    with attach(model, spread(model, [DISK, RAM], buffers=3)) as handle:
        losses = train(model, optimizer, partial(handle.step, optimizer) if by_units else optimizer.step, 20)
    assert torch.stack(losses).equal(torch.stack(train(reference, other, other.step, 20)))
    assert_same_state(model, reference)


def test_evaluation_between_training_steps_and_early_exits(tokens: Tensor) -> None:
    model, reference = make(), make()
    with attach(model, spread(model, [DISK], buffers=4)):
        for exit_after in (99, 2, 0, 99, 3, 1):
            for m in (model, reference):
                m(tokens, exit_after).sum().backward()
            with torch.no_grad():
                assert torch.equal(model.eval()(tokens, exit_after), reference.eval()(tokens, exit_after))
            model.train()
            reference.train()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad) if q.grad is not None else p.grad is None


def test_prefetching_learns_the_order(tokens: Tensor) -> None:
    model = make()
    with attach(model, spread(model, [DISK], buffers=6)) as handle, torch.no_grad():
        for _ in range(3):
            model(tokens)
        before = dataclasses.replace(handle.counters)
        model(tokens)
        # Nothing has to be asked for any more, and what is fetched is used.
        assert handle.counters.demanded == before.demanded
        assert handle.counters.fetches - before.fetches <= handle.counters.uses - before.uses + 2


def test_outside_access_sees_and_changes_the_weights(tokens: Tensor) -> None:
    model, reference = make(), make()
    with attach(model, spread(model, [DISK, RAM])), torch.no_grad():
        model(tokens)
        reference(tokens)
        for m in (model, reference):
            m.blocks[1].left.weight.mul_(2)
            m.blocks[2].down.weight[3].zero_()
            m.load_state_dict({**m.state_dict(), "scale": torch.full((32,), 0.5)})
        assert torch.equal(model(tokens), reference(tokens))
        copied = copy.deepcopy(model.state_dict())
    for name, tensor in reference.state_dict().items():
        assert torch.equal(copied[name], tensor)


@pytest.mark.parametrize("tiers", [[DISK], [FAST], [FAST, RAM, DISK]], ids=["disk", "fast", "all"])
def test_a_state_dict_is_copied_and_not_assigned(tiers: list[TierSpec], tokens: Tensor) -> None:
    model, reference, other = make().eval(), make().eval(), make(1).eval()
    with attach(model, spread(model, tiers)) as handle:
        parts = [model, nn.Sequential(model)]
        if tiers == [DISK]:
            parts.append(model.get_submodule("blocks.1.left"))
        for part in parts:
            state = {name: torch.zeros_like(tensor) for name, tensor in part.state_dict().items()}
            with pytest.raises(ValueError, match=r"load_state_dict: expected assign=False .* call remove\(\)"):
                part.load_state_dict(state, assign=True)
        assert_same_state(model, reference)
        assert torch.equal(model(tokens), reference(tokens))
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(tokens), other(tokens))
        copied = copy.deepcopy(model)
        copied.load_state_dict(reference.state_dict(), assign=True)
        assert torch.equal(copied(tokens), reference(tokens))
        handle.remove()
        model.load_state_dict(reference.state_dict(), assign=True)
        assert torch.equal(model(tokens), reference(tokens))


def test_a_parameter_that_is_replaced_is_computed_with(tokens: Tensor, tmp_path: Path) -> None:
    model, reference, other = make().eval(), make().eval(), make(1).eval()
    with attach(model, spread(model, [DISK, RAM]), folder=tmp_path) as handle:
        model(tokens)
        # Each of them, so that no weight is left by which the model is known to be attached.
        for m in (model, reference):
            for name, module in m.named_modules():
                for local, parameter in other.get_submodule(name).named_parameters(recurse=False):
                    setattr(module, local, nn.Parameter(parameter.detach().clone()))
        for _ in range(2):
            assert torch.equal(model(tokens), reference(tokens))
        for part in (model, nn.Sequential(model), model.blocks[1]):
            with pytest.raises(ValueError, match=r"of an attached one; call remove\(\) of its handle first"):
                attach(part, spread(part, [RAM]), folder=tmp_path)
        assert_same_state(model, reference)
        handle.remove()
        assert torch.equal(model(tokens), reference(tokens))
    with attach(model, spread(model, [DISK, RAM]), folder=tmp_path):
        assert torch.equal(model(tokens), reference(tokens))
    assert_same_state(model, reference)


def test_writes_inside_a_forward_are_kept() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.count = nn.Parameter(torch.zeros(5000), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return x + self.count

    model = nn.Sequential(Counting(), nn.Linear(5000, 10), nn.Linear(10, 5000), Counting())
    with attach(model, spread(model, [DISK], buffers=1)):
        for _ in range(3):
            model(torch.zeros(5000))
        assert model[0].count.unique().tolist() == [3]
    assert model[3].count.unique().tolist() == [3]


def test_a_backward_after_remove_and_a_second_backward(tokens: Tensor) -> None:
    model, reference = make(), make()
    handle = attach(model, spread(model, [DISK]))
    y, expected = model(tokens).square().sum(), reference(tokens).square().sum()
    y.backward(retain_graph=True)
    expected.backward(retain_graph=True)
    handle.remove()
    handle.remove()
    y.backward()
    expected.backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_a_forward_or_a_backward_leaves_the_model_usable(
    error: type[BaseException], tokens: Tensor
) -> None:
    model, reference = make(), make()
    with attach(model, spread(model, [DISK], buffers=1)):

        def fail(*_: object) -> None:
            raise error("stop")

        hook = model.blocks[1].down.register_forward_hook(fail)
        with pytest.raises(error):
            model(tokens)
        hook.remove()
        y = model.eval()(tokens)
        assert torch.equal(y, reference.eval()(tokens))
        hidden = model.blocks[0](torch.randn(2, 5, 32))
        hidden.register_hook(fail)
        with pytest.raises(error):
            (model.blocks[1](hidden)).sum().backward()
        assert torch.equal(model(tokens), reference(tokens))
    assert_same_state(model, reference)


def test_compiled_and_eager_ask_the_engine_alike(tokens: Tensor) -> None:
    model, reference = make(), make()
    with attach(model, spread(model, [DISK])) as handle:
        model(tokens).sum().backward()
        eager = handle.counters.uses
        for p in model.parameters():
            p.grad = None
        compiled = torch.compile(model, backend="aot_eager")
        compiled(tokens).sum().backward()
        reference(tokens)
        reference.zero_grad()
        reference(tokens).sum().backward()
        forward_and_backward = handle.counters.uses - eager
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        assert forward_and_backward >= 2 * len(units(model)) - 2
        with torch.no_grad():
            before = handle.counters.uses
            model(tokens)
            eager = handle.counters.uses - before
            compiled(tokens)
            assert handle.counters.uses - before == 2 * eager
    torch.compiler.reset()


def test_many_layers_alike_are_compiled_once(tokens: Tensor) -> None:
    model = make(blocks=12).eval().requires_grad_(False)
    expected = model(tokens)
    once = torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
    with attach(model, spread(model, [RAM])), torch.no_grad(), once:
        torch.compiler.reset()
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens), expected)
        # A copy is not attached: nothing breaks its graph.
        copied = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(copied(tokens), expected)
    torch.compiler.reset()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_memory_leaves_at_attach() -> None:
    width, layers = 1024, 24
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    size = 4 * width * width
    before, files = resident(), descriptors()
    with attach(model, spread(model, [DISK], buffers=2)) as handle, torch.no_grad():
        for _ in range(3):
            model(torch.randn(1, width))
        assert handle._ring.taken <= 2 * size
        assert before - resident() > 0.85 * (layers - 2) * size
    assert descriptors() == files


@pytest.mark.parametrize("tier", [DISK, RAM], ids=["disk", "ram"])
def test_a_thousand_iterations_leak_nothing(tier: TierSpec) -> None:
    model = nn.Sequential(*(nn.Linear(128, 128) for _ in range(5)))
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(4, 128)

    def step() -> None:
        model(x).square().sum().backward()
        handle.step(optimizer)
        optimizer.zero_grad()

    with attach(model, spread(model, [tier], buffers=2)) as handle:
        for _ in range(100):
            step()
        memory, files, threads = resident(), descriptors(), threading.active_count()
        for _ in range(1000):
            step()
        # A leak of a buffer or a mapping at each would be 64 MB and more.
        assert resident() - memory < 4 << 20
        assert (descriptors(), threading.active_count()) == (files, threads)


def test_a_model_on_the_meta_device_is_filled_a_unit_at_a_time(tokens: Tensor) -> None:
    reference = make().eval()
    with torch.device("meta"):
        model = Model().eval()
    with attach(model, spread(model, [FAST, DISK, RAM]), weights=reference.state_dict()):
        assert torch.equal(model(tokens), reference(tokens))
    assert_same_state(model, reference)
    assert model.head.weight is model.embedding.weight
    with torch.device("meta"):
        model = Model()
    with pytest.raises(ValueError, match=r"attention\.in_proj_weight"):
        attach(
            model,
            spread(model, [DISK]),
            weights={k: v for k, v in reference.state_dict().items() if "in_proj_w" not in k},
        )


def test_units_move_between_tiers_while_attached(tokens: Tensor) -> None:
    model, reference = make(), make()
    optimizer, other = (torch.optim.AdamW(m.parameters(), 1e-2) for m in (model, reference))
    with attach(model, spread(model, [FAST, DISK])) as handle:
        for tier in ("RAM", "DISK", "FAST", "DISK"):
            train(model, optimizer, lambda: handle.step(optimizer), 2)
            train(reference, other, other.step, 2)
            assert handle.move("blocks.1.down", tier) > 0 or handle.tiers()["blocks.1.down"] == tier
            assert_same_state(model, reference)
        with pytest.raises(ValueError, match="expected one of FAST, RAM, DISK, got 'TAPE'"):
            handle.move("blocks.1.down", "TAPE")
        with pytest.raises(ValueError, match="expected a unit"):
            handle.move("blocks.9", "RAM")
    assert_same_state(model, reference)


@pytest.mark.parametrize("mode", ["real", "emulated"])
def test_a_handle_says_what_lies_where(mode: Literal["real", "emulated"], tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3)))
    with attach(model, spread(model, [FAST, RAM, DISK]), mode=mode, folder=tmp_path) as handle:
        file = f"; file in {tmp_path}" if mode == "real" else ""
        said = "ring of 32.77 KB; FAST: 1 units, 16.38 KB; RAM: 1 units, 16.38 KB; DISK: 1 units, 16.38 KB"
        assert repr(handle) == f"<Handle: {mode}; {said}{file}>"
        handle.move("1", "DISK")
        assert "RAM: 0 units, 0 B; DISK: 2 units, 32.77 KB" in str(handle)
    assert repr(handle) == "<Handle: removed>"


def test_a_move_that_fails_leaves_the_unit_in_the_first_tier(tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = make().eval(), make().eval()
    with attach(model, spread(model, [RAM, DISK])) as handle:
        name = next(name for name, tier in handle.tiers().items() if tier == "RAM")

        def fail(self: Store, offset: int, data: Tensor) -> int:
            raise RuntimeError("scratch: no space left")

        with monkeypatch.context() as patch:
            patch.setattr(Store, "write", fail)
            with pytest.raises(RuntimeError, match="no space left"):
                handle.move(name, "DISK")
        assert handle.tiers()[name] == "FAST"
        assert torch.equal(model(tokens), reference(tokens))
        assert handle.move(name, "RAM") > 0
        assert torch.equal(model(tokens), reference(tokens))
    assert_same_state(model, reference)


def test_wrong_plans_are_refused_by_name(tokens: Tensor) -> None:
    model = make()
    plan = spread(model, [DISK])
    other = dict(plan.placements)
    other.pop("blocks.1.left")
    with pytest.raises(ValueError, match=r"of another: the plan has no units 'blocks\.1\.left'"):
        attach(model, dataclasses.replace(plan, placements=other))
    with pytest.raises(ValueError, match="of another: the model has no units 'nothing'"):
        attach(model, dataclasses.replace(plan, placements={**plan.placements, "nothing": Placement("RAM", 1)}))
    small = {name: placement._replace(nbytes=1) for name, placement in plan.placements.items()}
    with pytest.raises(ValueError, match="buffer_bytes of at least"):
        attach(model, dataclasses.replace(plan, placements=small, buffer_bytes=4096))
    with pytest.raises(ValueError, match="of another: shapes or dtypes"):
        attach(make(width=64), dataclasses.replace(plan, buffer_bytes=1 << 20))
    with pytest.raises(ValueError, match="expected 'real' or 'emulated', got 'dreamt'"):
        attach(model, plan, mode="dreamt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="by itself, got LBFGS"), attach(model, plan) as handle:
        handle.step(torch.optim.LBFGS(model.parameters()))
    assert torch.equal(model.eval()(tokens), make().eval()(tokens))


def test_emulated_mode_changes_nothing_but_time(tokens: Tensor) -> None:
    model, reference = make(), make()
    pointers = [p.data_ptr() for p in model.parameters()]
    with attach(model, spread(model, [DISK, RAM]), mode="emulated") as handle:
        assert isinstance(handle, Handle)
        assert torch.equal(model(tokens), reference(tokens))
        assert [p.data_ptr() for p in model.parameters()] == pointers
        assert sum(handle.counters.waited.values()) > 0
    assert_same_state(model, reference)


@pytest.mark.parametrize("tiers", [[DISK], [RAM], [FAST, RAM, DISK]], ids=["disk", "ram", "all"])
def test_weights_that_are_stored_packed_and_decoded_before_they_are_used(tiers: list[TierSpec], tokens: Tensor) -> None:
    model, reference = make(width=96).requires_grad_(False), make(width=96).requires_grad_(False)
    for m in (model, reference):
        for name, p in m.named_parameters():
            p.requires_grad_(name.endswith("bias") or "norm" in name)
    optimizer, other = (torch.optim.AdamW(m.parameters(), 1e-2) for m in (model, reference))
    plan = spread(model, tiers, 5)
    with attach(model, plan, materialize=True) as handle:
        losses = train(model, optimizer, lambda: handle.step(optimizer), 3)
        assert torch.stack(losses).equal(torch.stack(train(reference, other, other.step, 3)))
        assert_same_state(model, reference)
        # A weight that is away still answers; it cannot be written to.
        unit = next(name for name, tier in handle.tiers().items() if tier != "FAST" and "left" in name)
        weight = model.get_submodule(unit).weight
        assert torch.equal(weight + 0, reference.get_submodule(unit).weight)
        assert weight.shape == (288, 96)
        assert isinstance(weight, nn.Parameter)
        with pytest.raises(RuntimeError, match="is away"), torch.no_grad():
            weight.mul_(2)
    assert type(weight) is nn.Parameter
    assert_same_state(model, reference)


def test_packing_takes_the_plans_codec(tokens: Tensor) -> None:
    model, reference = make(width=96).requires_grad_(False).eval(), make(width=96).requires_grad_(False).eval()
    placements = {
        name: placement._replace(codec="ecsq-6" if "left" in name else "raw")
        for name, placement in spread(model, [DISK]).placements.items()
    }
    plan = dataclasses.replace(spread(model, [DISK], 5), placements=placements)
    expected = reference(tokens)
    for block in reference.blocks:
        linear = block.left
        linear.weight.copy_(
            infold.nn.FusedDecompressLinear.from_linear(linear, infold.FusedConfig("ecsq", bits=6)).weight
        )
    with attach(model, plan, materialize=True):
        y = model(tokens)
    assert torch.equal(y, reference(tokens))
    assert not torch.equal(y, expected)


def test_inference_mode_at_any_time(tokens: Tensor) -> None:
    model, reference = make().eval(), make().eval()
    with torch.inference_mode():
        handle = attach(model, spread(model, [DISK, RAM]))
        assert torch.equal(model(tokens), reference(tokens))
    for _ in range(2):
        for m in (model, reference):
            m(tokens).sum().backward()
        with torch.inference_mode():
            assert torch.equal(model(tokens), reference(tokens))
            handle.refresh()
    with torch.inference_mode():
        handle.remove()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    with torch.no_grad():
        model.scale.add_(1)


@pytest.mark.parametrize("materialize", [False, True])
def test_a_model_that_was_made_in_inference_mode(materialize: bool, tokens: Tensor) -> None:
    with torch.inference_mode():
        model, reference = make(width=96).requires_grad_(False).eval(), make(width=96).eval()
        with attach(model, spread(model, [DISK, RAM], 5), materialize=materialize):
            assert torch.equal(model(tokens), reference(tokens))
        assert torch.equal(model(tokens), reference(tokens))


def test_only_what_trains_is_written_back() -> None:
    model, reference = make(width=96).requires_grad_(False), make(width=96).requires_grad_(False)
    for m in (model, reference):
        for name, p in m.named_parameters():
            p.requires_grad_(name.endswith("bias"))
    optimizer, other = (torch.optim.SGD(m.parameters(), 0.1) for m in (model, reference))
    with attach(model, spread(model, [DISK], 3)) as handle:
        begun = handle.store_stats()["bytes_written"]
        losses = train(model, optimizer, lambda: handle.step(optimizer), 2)
        written = handle.store_stats()["bytes_written"] - begun
        trained = [p for p in model.parameters() if p.requires_grad]
        # Each bias takes a page or two.
        assert 4096 * len(trained) <= written <= 2 * 2 * 4096 * len(trained)
    assert torch.stack(losses).equal(torch.stack(train(reference, other, other.step, 2)))
    assert_same_state(model, reference)

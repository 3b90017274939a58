"""Where a forward pass's memory goes: packed weights, activations, scratch."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from infold._library import ops
from infold.nn import PackedModule
from infold.report import format_bytes

_SPAN = "infold.profile_memory:"
#: The key of tensors of modules that have others inside: the name of no layer.
_OTHER = ""


@dataclass(frozen=True)
class ModuleMemory:
    """One layer, in bytes. Of several calls, the most."""

    name: str
    kind: str
    calls: int
    #: Its parameters and buffers as they lie in memory; shared ones are counted once, where they come first.
    weight_bytes: int
    #: What ``weight_bytes`` would be with dense weights.
    dense_bytes: int
    #: Tensors that are alive after the call and were not before: its result, and what the backward will need.
    output_bytes: int
    #: Tensors that lived during the call only.
    temporary_bytes: int
    #: What Infold took outside tensors: decoded blocks, sums, and the input in the order that the kernel reads.
    scratch_bytes: int
    #: All of the model's activations and scratch at the call's worst moment.
    peak_bytes: int


@dataclass(frozen=True)
class MemoryReport:
    """A forward pass's memory; prints as a table. What was alive before it, such as the inputs, is not counted."""

    modules: list[ModuleMemory]
    #: Bytes of all parameters and buffers, each once, and what they would be with dense weights.
    weight_bytes: int
    dense_weight_bytes: int
    #: (milliseconds, bytes of activations alive) at every allocation and release.
    timeline: list[tuple[float, int]]

    @property
    def activation_bytes(self) -> int:
        """The most bytes of tensors that were alive at a time."""
        return max((live for _, live in self.timeline), default=0)

    @property
    def scratch_bytes(self) -> int:
        """The most scratch of a call."""
        return max((module.scratch_bytes for module in self.modules), default=0)

    @property
    def peak_bytes(self) -> int:
        """Weights, and the most that activations and scratch took at a time."""
        return self.weight_bytes + max([self.activation_bytes, *(module.peak_bytes for module in self.modules)])

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON, also written to ``path`` if one is given."""
        total = {
            "weight_bytes": self.weight_bytes,
            "dense_weight_bytes": self.dense_weight_bytes,
            "activation_bytes": self.activation_bytes,
            "scratch_bytes": self.scratch_bytes,
            "peak_bytes": self.peak_bytes,
        }
        modules = [asdict(module) for module in self.modules]
        text = json.dumps({"total": total, "modules": modules, "timeline": self.timeline}, indent=2)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def plot(self, path: str | Path) -> None:
        """Writes a PNG: activations over time, on top of the weights. Needs matplotlib."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        times = [time for time, _ in self.timeline] or [0.0]
        weights = self.weight_bytes / 1e6
        live = [weights + bytes_ / 1e6 for _, bytes_ in self.timeline] or [weights]
        axes.fill_between(times, 0, weights, color="#3b6ea5", label=f"weights, {format_bytes(self.weight_bytes)}")
        label = f"activations, at most {format_bytes(self.activation_bytes)}"
        axes.fill_between(times, weights, live, step="post", color="#b5563c", label=label)
        dense = self.dense_weight_bytes
        axes.axhline(dense / 1e6, color="black", linestyle=":", label=f"dense weights, {format_bytes(dense)}")
        axes.set_xlabel("milliseconds")
        axes.set_ylabel("MB")
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside upper center", ncols=3)
        figure.savefig(path, dpi=120, format="png")

    def __str__(self) -> str:
        width = max([len(module.name) for module in self.modules] + [len("total")])
        heads = ("weights", "dense", "output", "temporary", "scratch", "peak")
        head = f"{'layer':<{width}}  {'kind':<24} {'calls':>5} " + " ".join(f"{title:>10}" for title in heads)
        rows = [
            (
                module.name,
                module.kind,
                str(module.calls),
                module.weight_bytes,
                module.dense_bytes,
                module.output_bytes,
                module.temporary_bytes,
                module.scratch_bytes,
                module.peak_bytes,
            )
            for module in self.modules
            if any((module.weight_bytes, module.output_bytes, module.temporary_bytes, module.scratch_bytes))
        ]
        peak = self.peak_bytes - self.weight_bytes
        total = ("total", "", "", self.weight_bytes, self.dense_weight_bytes, "", "", self.scratch_bytes, peak)

        def line(name: str, kind: str, calls: str, *sizes: int | str) -> str:
            shown = (size if isinstance(size, str) else format_bytes(size) for size in sizes)
            return f"{name:<{width}}  {kind:<24} {calls:>5} " + " ".join(f"{size:>10}" for size in shown)

        rule = "-" * len(head)
        peaks = (
            f"peak: {format_bytes(self.peak_bytes)} = weights {format_bytes(self.weight_bytes)} + {format_bytes(peak)}"
        )
        return "\n".join([head, rule, *(line(*row) for row in rows), rule, line(*total), peaks])


def profile_memory(model: nn.Module, *inputs: Any, **options: Any) -> MemoryReport:
    """Runs ``model(*inputs, **options)`` once and reports where its memory goes, layer by layer.

    The pass runs in the caller's grad mode: with gradients, what the backward keeps is in it. The first layer that
    unpacks (``mode="exact"``, most convolutions) leaves behind the dense scratch that all of them share. Raises
    ValueError for a model that is not on the CPU.
    """
    elsewhere = {
        str(tensor.device) for tensor in [*model.parameters(), *model.buffers()] if tensor.device.type != "cpu"
    }
    if elsewhere:
        raise ValueError(f"model: expected one on the CPU, got tensors on {', '.join(sorted(elsewhere))}")
    leaves = {name or "model": module for name, module in model.named_modules() if not any(module.children())}
    scratch: dict[str, int] = dict.fromkeys(leaves, 0)
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.filterwarnings("ignore", message=".*Profiler clears events")
        for name, module in leaves.items():
            stack.enter_context(_spans(name, module, scratch))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = model(*inputs, **options)
    del result
    timeline, spans = _read(profiler)
    weights, dense = _weights(model, leaves)
    modules = []
    for name, module in {**leaves, _OTHER: model}.items():
        calls = [_call(timeline, *span) for span in spans.get(name, [])]
        output, temporary, peak = (max(column) for column in zip(*calls, strict=True)) if calls else (0, 0, 0)
        modules.append(
            ModuleMemory(
                name=name or "(other)",
                kind=type(module).__name__,
                calls=len(calls),
                weight_bytes=weights[name],
                dense_bytes=dense[name],
                output_bytes=output,
                temporary_bytes=temporary,
                scratch_bytes=scratch.get(name, 0),
                peak_bytes=peak + scratch.get(name, 0),
            )
        )
    start = timeline[0][0] if timeline else 0
    return MemoryReport(
        modules=modules,
        weight_bytes=sum(weights.values()),
        dense_weight_bytes=sum(dense.values()),
        timeline=[((time - start) / 1e6, live) for time, live in timeline],
    )


@contextmanager
def _spans(name: str, module: nn.Module, scratch: dict[str, int]) -> Iterator[None]:
    """Marks the module's calls in the profile, and notes the most scratch of one."""
    entered: list[tuple[Any, int]] = []

    def enter(*_: object) -> None:
        span = record_function(_SPAN + name)
        live, _peak = ops.allocated_bytes(True)
        entered.append((span, live))
        span.__enter__()  # type: ignore[no-untyped-call]

    def leave(*_: object) -> None:
        span, before = entered.pop()
        span.__exit__(None, None, None)
        scratch[name] = max(scratch[name], ops.allocated_bytes()[1] - before)

    hooks = (module.register_forward_pre_hook(enter), module.register_forward_hook(leave))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _read(profiler: Any) -> tuple[list[tuple[int, int]], dict[str, list[tuple[int, int]]]]:
    """The bytes alive after each event as (nanoseconds, bytes), and each layer's calls as (start, end)."""
    changes: list[tuple[int, int]] = []
    spans: dict[str, list[tuple[int, int]]] = {}
    for event in profiler.profiler.kineto_results.events():
        name, start = event.name(), event.start_ns()
        if name == "[memory]":
            changes.append((start, event.nbytes()))
        elif name.startswith(_SPAN):
            spans.setdefault(name.removeprefix(_SPAN), []).append((start, start + event.duration_ns()))
    live, timeline = 0, []
    for time, change in sorted(changes, key=lambda item: item[0]):
        live += change
        timeline.append((time, live))
    return timeline, spans


def _call(timeline: list[tuple[int, int]], start: int, end: int) -> tuple[int, int, int]:
    """(left behind, temporary, most alive) of the time from ``start`` to ``end``."""
    before = next((live for time, live in reversed(timeline) if time < start), 0)
    during = [live for time, live in timeline if start <= time <= end]
    after, most = (during or [before])[-1], max([before, *during])
    return max(after - before, 0), most - max(before, after), most


def _weights(model: nn.Module, leaves: dict[str, nn.Module]) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of each layer's own tensors, and what they would be dense; the rest is ``_OTHER``'s."""
    seen: set[int] = set()
    sizes, dense = {}, {}
    for name, module in {**leaves, _OTHER: model}.items():
        own = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()] if id(tensor) not in seen}
        seen |= own.keys()
        sizes[name] = sum(tensor.nbytes for tensor in own.values())
        dense[name] = sizes[name]
        if isinstance(module, PackedModule) and id(module.payload) in own:
            header = module.header
            packed = sum(own[id(tensor)].nbytes for tensor in module.packed if id(tensor) in own)
            dense[name] += header.out_features * header.in_features * module.dtype.itemsize - packed
    return sizes, dense

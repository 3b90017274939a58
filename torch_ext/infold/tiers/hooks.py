"""Ties a model's modules and its backward graph to the engine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from infold.tiers.engine import Engine
from infold.tiers.units import Unit


class Hooks:
    """Has a unit's parameters here while a module of it runs, and while a node of its backward does.

    Compilers break the graph here (`torch.compiler.disable`): an operator without a result would be dropped.
    """

    def __init__(self, engine: Engine, model: nn.Module) -> None:
        self._engine = engine
        self._local = threading.local()
        self._handles: dict[str, list[RemovableHandle]] = {"": [self._watch(model)]}

    def _watch(self, model: nn.Module) -> RemovableHandle:
        return model.register_forward_pre_hook(self._begin, prepend=True)

    def add(self, unit: Unit) -> None:
        handles = self._handles.setdefault("unit " + unit.name, [])
        for module in unit.modules.values():
            handles.append(module.register_forward_pre_hook(_Before(self, unit.name), prepend=True))
            handles.append(module.register_forward_hook(_After(self, unit.name), always_call=True))

    def remove(self, unit: Unit) -> None:
        for handle in self._handles.pop("unit " + unit.name, ()):
            handle.remove()

    def clear(self) -> None:
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()
        self._handles.clear()

    @property
    def _running(self) -> list[_Use]:
        """The calling thread's uses that have not ended."""
        if not hasattr(self._local, "running"):
            self._local.running = []
        running: list[_Use] = self._local.running
        return running

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(self, module: nn.Module, args: Any) -> None:
        if torch._C._current_graph_task_id() == -1:
            # What an interrupt cut off has not ended by itself.
            while self._running:
                self._end(self._running.pop())

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def enter(self, name: str) -> None:
        self._hold(name, _next_node())

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def leave(self, name: str, output: Any) -> None:
        if not self._running or self._running[-1].name != name:
            return  # it was not entered: fetching it failed
        use = self._running.pop()
        if torch.is_grad_enabled():
            # The same two for all nodes: a large model has many.
            def hold(gradients: Any) -> None:
                self._hold(name, _BACKWARD)

            def let_go(*gradients: Any) -> None:
                self._let_go(name)

            for node in _nodes(output, use.first):
                node.register_prehook(hold)
                node.register_hook(let_go)
        self._end(use)

    def _hold(self, name: str, first: int) -> None:
        self._running.append(_Use(name, first, self._engine.acquire(name)))

    def _let_go(self, name: str) -> None:
        """Ends a backward node's use."""
        for index, use in reversed(list(enumerate(self._running))):
            if use.name == name and use.first == _BACKWARD:
                self._end(self._running.pop(index))
                return

    def _end(self, use: _Use) -> None:
        if use.pinned:
            self._engine.release(use.name)


#: The `first` of a use by a backward node.
_BACKWARD = -1


class _Use(NamedTuple):
    """A unit in use: the number that its first backward node would have, and whether the engine is to be told."""

    name: str
    first: int
    pinned: bool


def _next_node() -> int:
    """The number that the calling thread's next backward node will have."""
    return int(torch._C._autograd._get_sequence_nr())


class _Before:
    def __init__(self, hooks: Hooks, name: str) -> None:
        self._hooks, self._name = hooks, name

    def __call__(self, module: nn.Module, args: Any) -> None:
        self._hooks.enter(self._name)


class _After:
    def __init__(self, hooks: Hooks, name: str) -> None:
        self._hooks, self._name = hooks, name

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self._hooks.leave(self._name, output)


def _nodes(output: Any, first: int) -> Iterator[Any]:
    """The backward nodes that a module's forward made, but for those that are a unit's already.

    A thread numbers its nodes as it makes them, so that what came before the module is told by its number.
    """
    waiting = [leaf.grad_fn for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node in seen or hasattr(node, "variable") or node._sequence_nr() < first:
            continue
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions if following is not None)
        metadata: Any = node.metadata  # a property, whatever its annotation says
        if "infold.tiers" not in metadata:
            metadata["infold.tiers"] = True
            yield node

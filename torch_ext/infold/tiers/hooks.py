"""Ties a model's modules and its backward graph to the engine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from infold.storages import storage_key
from infold.tiers.engine import Engine, Use
from infold.tiers.units import Unit


class Hooks:
    """Has a unit's parameters here while a module of it runs, and while a node of its backward does."""

    def __init__(self, engine: Engine, model: nn.Module) -> None:
        self._engine = engine
        self._local = threading.local()
        self._model = model
        self._handles: dict[str, list[RemovableHandle]] = {}
        self._watch()

    def _watch(self) -> None:
        """Has `begin` run before all other hooks of the model, its own unit's among them."""
        for handle in self._handles.pop("model", ()):
            handle.remove()
        self._handles["model"] = [
            self._model.register_forward_pre_hook(_Begin(self), prepend=True),
            self._model.register_load_state_dict_pre_hook(_Loading(self)),  # type: ignore[no-untyped-call]
        ]

    def add(self, unit: Unit) -> None:
        handles = self._handles.setdefault("unit " + unit.name, [])
        for module in unit.modules.values():
            handles.append(module.register_forward_pre_hook(_Before(self, unit.name), prepend=True))
            handles.append(module.register_forward_hook(_After(self, unit.name), always_call=True))
            handles.append(module.register_load_state_dict_pre_hook(_Loading(self)))  # type: ignore[no-untyped-call]
        if self._model in unit.modules.values():
            self._watch()

    def remove(self, unit: Unit) -> None:
        for handle in self._handles.pop("unit " + unit.name, ()):
            handle.remove()

    def clear(self) -> None:
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()
        self._handles.clear()

    @property
    def _running(self) -> list[_Running]:
        """The calling thread's uses that have not ended."""
        if not hasattr(self._local, "running"):
            self._local.running = []
        running: list[_Running] = self._local.running
        return running

    def begin(self) -> None:
        if torch._C._current_graph_task_id() == -1:
            # What an interrupt cut off has not ended by itself.
            while self._running:
                self._end(self._running.pop())

    def enter(self, name: str) -> None:
        self._hold(name, _next_node())

    def leave(self, name: str, output: Any) -> Any:
        """The output, if it is to be another: a view of a weight that has no memory from now on is copied."""
        if not self._running or self._running[-1].name != name:
            return None  # it was not entered: fetching it failed
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
        fleeting = self._engine.fleeting(name)
        views = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and storage_key(leaf) in fleeting]
        kept = {id(view): view.clone() for view in views}
        self._end(use)
        return tree_map(lambda leaf: kept.get(id(leaf), leaf), output) if kept else None

    def _hold(self, name: str, first: int) -> None:
        self._running.append(_Running(name, first, self._engine.acquire(name)))

    def _let_go(self, name: str) -> None:
        """Ends a backward node's use."""
        for index, use in reversed(list(enumerate(self._running))):
            if use.name == name and use.first == _BACKWARD:
                self._end(self._running.pop(index))
                return

    def _end(self, use: _Running) -> None:
        self._engine.release(use.name, use.use)


def refuse_hooked(model: nn.Module, advice: str) -> None:
    """Raises ValueError, naming the first, where a module is an attached model's, whatever its parameters are now."""
    for name, module in model.named_modules():
        if any(isinstance(hook, _Hook) for hook in module._forward_pre_hooks.values()):
            raise ValueError(f"model: expected modules that are in no tiers, got {name!r} of an attached one; {advice}")


#: The `first` of a use by a backward node.
_BACKWARD = -1


class _Running(NamedTuple):
    """A unit in use: the number that its first backward node would have, and what the engine is to be told."""

    name: str
    first: int
    use: Use


def _next_node() -> int:
    """The number that the calling thread's next backward node will have."""
    return int(torch._C._autograd._get_sequence_nr())


class _Idle:
    """What is left of a hook in a copy of the module, which is not attached. Compilers see through it."""

    def __call__(self, *args: Any) -> None:
        pass


class _Hook:
    """What a module holds.

    Compilers break the graph at its call (`torch.compiler.disable`): an operator without a result would be dropped, and
    a call that they saw into would be compiled anew for each unit's name.
    """

    def __init__(self, hooks: Hooks, name: str = "") -> None:
        self._hooks, self._name = hooks, name

    def __reduce__(self) -> tuple[type[_Idle], tuple[()]]:
        return _Idle, ()


class _Begin(_Hook):
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: Any) -> None:
        self._hooks.begin()


class _Before(_Hook):
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: Any) -> None:
        self._hooks.enter(self._name)


class _After(_Hook):
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self._hooks.leave(self._name, output)


class _Loading(_Hook):
    def __call__(
        self, module: nn.Module, state: Any, prefix: str, local_metadata: dict[str, Any], *others: Any
    ) -> None:
        if local_metadata.get("assign_to_params_buffers"):
            raise ValueError(
                "load_state_dict: expected assign=False while weights are in tiers, got True, which would put others "
                "in their place, outside the tiers; call remove() of the handle first"
            )


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

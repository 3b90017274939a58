"""The diagonal of the Fisher information: squared gradients of single examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from infold.recover import evaluating
from infold.tiers.importance import by_unit

Method = Literal["auto", "vmap", "loop"]
#: ``loss_fn(model, batch)``: a scalar.
Loss = Callable[[nn.Module, Any], Tensor]


class FisherAnalyzer:
    """The mean over examples and elements of squared per-example gradients, by unit.

    loss_fn: ``loss_fn(model, batch)`` is a scalar; it is called with batches of *one* example. With the data's labels
        this is the empirical Fisher; with labels drawn from the model's own output, the true one.
    method: ``"vmap"`` takes the gradients of many examples at once (`torch.func`); ``"loop"`` one by one, which works
        for every model; ``"auto"`` is vmap, and loop for a model that vmap refuses (Infold's own layers, control flow
        that depends on data).
    chunk: examples that vmap takes at once. It holds a gradient of the whole model for each.

    The model is in eval mode meanwhile; afterwards modes and ``.grad`` are what they were. Raises ValueError for
    another method or chunk.
    """

    def __init__(self, loss_fn: Loss, *, method: Method = "auto", chunk: int = 16) -> None:
        if method not in get_args(Method):
            raise ValueError(f"method: expected one of {', '.join(get_args(Method))}, got {method!r}")
        if chunk < 1:
            raise ValueError(f"chunk: expected a positive number of examples, got {chunk}")
        self.loss_fn, self.method, self.chunk = loss_fn, method, chunk
        #: Units that the last call left out: those in which nothing trains.
        self.missing: tuple[str, ...] = ()

    def __call__(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        """Scores by unit name; see `diagonal`."""
        diagonal = self.diagonal(model, batches)
        totals = {parameter: (float(mean.sum()), mean.numel()) for parameter, mean in diagonal.items()}
        scores, self.missing = by_unit(model, totals)
        return scores

    def diagonal(self, model: nn.Module, batches: Iterable[Any]) -> dict[nn.Parameter, Tensor]:
        """The mean squared gradient of each element of each parameter that trains, in float64 (float32 on a device that
        has no float64).

        batches: tensors, or nested tuples, lists and dicts of them, all with examples along their first dimension.
        Raises ValueError for no batch, one without tensors or with different numbers of examples, a loss that is not a
        scalar, and a model in which nothing trains.
        """
        names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not names:
            raise ValueError("model: expected a parameter that trains, got none")
        sums = {name: torch.zeros_like(p, dtype=_wide(p)) for name, p in names.items()}
        method, seen = self.method, 0
        with evaluating(model), torch.enable_grad():
            for batch in batches:
                leaves, structure = tree_flatten(batch)
                count = _examples(leaves)
                seen += count
                for start in range(0, count, self.chunk):
                    part = [leaf[start : start + self.chunk] for leaf in leaves]
                    if method != "loop":
                        try:
                            squares = self._mapped(model, names, part, structure)
                        except (RuntimeError, ValueError):
                            if method == "vmap":
                                raise
                            method = "loop"
                    if method == "loop":
                        squares = self._looped(model, names, part, structure)
                    for name, square in squares.items():
                        sums[name] += square
        if not seen:
            raise ValueError("batches: expected one example at least, got none")
        return {names[name]: total / seen for name, total in sums.items()}

    def _mapped(
        self, model: nn.Module, names: dict[str, nn.Parameter], leaves: list[Tensor], structure: Any
    ) -> dict[str, Tensor]:
        """Squared gradients summed over the examples, all at once."""
        task = _Task(model, self.loss_fn)
        places = _places(task, names)

        def loss(parameters: dict[str, Tensor], *example: Tensor) -> Tensor:
            batch = tree_unflatten([leaf.unsqueeze(0) for leaf in example], structure)
            replaced = {place: parameters[name] for place, name in places.items()}
            # Ties are in `places`: where a module has two names, functional_call would not put its weights back.
            return _scalar(functional_call(task, replaced, (batch,), tie_weights=False))

        parameters = {name: parameter.detach() for name, parameter in names.items()}
        dims = (None, *(0 for _ in leaves))
        gradients = vmap(grad(loss), in_dims=dims)(parameters, *leaves)
        return {name: _squares(gradients[name]).sum(0, dtype=_wide(parameter)) for name, parameter in names.items()}

    def _looped(
        self, model: nn.Module, names: dict[str, nn.Parameter], leaves: list[Tensor], structure: Any
    ) -> dict[str, Tensor]:
        """As `_mapped`, one by one."""
        sums: dict[str, Tensor] = {}
        for index in range(len(leaves[0])):
            batch = tree_unflatten([leaf[index : index + 1] for leaf in leaves], structure)
            loss = _scalar(self.loss_fn(model, batch))
            gradients = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
            for (name, parameter), gradient in zip(names.items(), gradients, strict=True):
                if gradient is not None:
                    square = _squares(gradient).to(_wide(parameter))
                    sums[name] = square if name not in sums else sums[name] + square
        return sums


class _Task(nn.Module):
    """A model and its loss as one module, whose parameters `functional_call` can replace."""

    def __init__(self, model: nn.Module, loss_fn: Loss) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, batch: Any) -> Tensor:
        return self.loss_fn(self.model, batch)


def _places(task: nn.Module, names: dict[str, nn.Parameter]) -> dict[str, str]:
    """Every place of a parameter, each once, and the parameter's name."""
    name_of = {parameter: name for name, parameter in names.items()}
    return {
        f"{path}.{attribute}": name_of[parameter]
        for path, module in task.named_modules()
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if parameter in name_of
    }


def _examples(leaves: list[Any]) -> int:
    if not leaves or not all(isinstance(leaf, Tensor) and leaf.ndim for leaf in leaves):
        raise ValueError("batch: expected tensors with examples along their first dimension, got something else")
    counts = {len(leaf) for leaf in leaves}
    if len(counts) > 1:
        raise ValueError(f"batch: expected as many examples in every tensor, got {sorted(counts)}")
    return counts.pop()


def _scalar(loss: Tensor) -> Tensor:
    if loss.ndim:
        raise ValueError(f"loss_fn: expected a scalar, got shape {tuple(loss.shape)}")
    return loss


def _squares(gradient: Tensor) -> Tensor:
    return gradient.abs().square() if gradient.is_complex() else gradient.square()


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.float32 if parameter.device.type == "mps" else torch.float64

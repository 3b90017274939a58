"""What a model puts out for a batch, and what its layers see on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

#: What a model is called with: a mapping, a sequence or a tensor.
Batch = Any
Forward = Callable[[nn.Module, Batch], Tensor]


def call(model: nn.Module, batch: Batch) -> Tensor:
    """The main output of a model, as rows (..., features).

    batch: a mapping is passed as keywords, a tuple or list as positional arguments, a tensor as the only one. Of a
    mapping that comes back (as from transformers) ``logits``, ``last_hidden_state`` or the first tensor counts, of a
    tuple the first. Where the batch has an ``attention_mask`` for these rows, padding is left out: (rows, features).

    Raises ValueError for an output without a float tensor.
    """
    if isinstance(batch, Mapping):
        output = model(**batch)
    else:
        output = model(*batch) if isinstance(batch, tuple | list) else model(batch)
    if isinstance(output, Mapping):
        named = [output.get("logits"), output.get("last_hidden_state"), *output.values()]
        output = next((value for value in named if isinstance(value, Tensor)), None)
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise ValueError(f"model: expected a float tensor as output, got {type(output).__name__}; pass `forward`")
    return without_padding(output, batch)


class _CapturedError(Exception):
    """Ends a forward pass of which the rest is not needed."""


def capture(forward: Forward, model: nn.Module, name: str, batch: Batch) -> tuple[Tensor, Tensor]:
    """Input and output of a layer at its first call."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        seen.extend((arguments[0] if arguments else next(iter(keywords.values())), output))
        raise _CapturedError

    handle = model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    try:
        forward(model, batch)
    except _CapturedError:
        pass
    finally:
        handle.remove()
    if not seen:
        raise ValueError(f"{name}: expected the model to call it, it did not; leave it dense, or pass `forward`")
    return seen[0].detach(), seen[1].detach()


def without_padding(rows: Tensor, batch: Batch) -> Tensor:
    """The rows that an ``attention_mask`` of the batch keeps, if it has one for them; or all."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and rows.ndim == mask.ndim + 1 and rows.shape[:-1] == mask.shape:
        return rows[mask.bool()]
    return rows

"""Pruning by a weight's size and its second moment at once ("bitter7")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from infold.layers import dense_kind
from infold.tiers.importance import adam_state


def bitter7_scores(weight: Tensor, second_moment: Tensor, eps: float = 1e-12) -> Tensor:
    """|w|·(v + ε)^¼, elementwise, in float32 at least (math.md §7); the fourth root keeps extreme moments from ruling.

    second_moment: bias-corrected, so that weights that started late compare with others. Raises ValueError for another
    shape than the weight's and for an ε that is negative.
    """
    if weight.shape != second_moment.shape:
        raise ValueError(f"second_moment: expected shape {tuple(weight.shape)}, got {tuple(second_moment.shape)}")
    if not eps >= 0:
        raise ValueError(f"eps: expected zero or more, got {eps}")
    wide = torch.promote_types(weight.dtype, torch.float32)
    return weight.detach().to(wide).abs() * (second_moment.to(wide) + eps) ** 0.25


def prune_(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    amount: float | int,
    parameters: Sequence[tuple[nn.Module, str]] | None = None,
    *,
    eps: float = 1e-12,
) -> dict[str, float]:
    """Prunes the weights of the lowest `bitter7_scores` over all layers together, by `torch.nn.utils.prune`.

    amount: the share of weights to prune, or their number if it is an int; of those that are left, where some are
        pruned.
    parameters: (module, name of its parameter); None is every ``weight`` of linear and convolution layers that trains
        and is nobody else's.

    Masks are those of `torch.nn.utils.prune`: `prune.remove` makes them permanent; the optimizer goes on with the same
    parameters. Returns the share of zeros in each mask, by qualified name.

    Raises ValueError for an amount out of range, no parameter, a module of another model, a parameter without Adam
    state or tied to another layer, which would keep it dense; nothing is pruned then.
    """
    names = {module: name for name, module in model.named_modules()}
    owners: dict[int, int] = {}
    for module in model.modules():
        for _, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    chosen = parameters
    if chosen is None:
        layers = [module for module in names if dense_kind(module) in ("linear", "conv")]
        chosen = [
            (m, "weight") for m in layers if owners[id(_own(m, "weight"))] == 1 and _own(m, "weight").requires_grad
        ]
    if not chosen:
        raise ValueError("parameters: expected one to prune at least, got none")

    moments = adam_state(optimizer, "exp_avg_sq")
    scores: dict[tuple[nn.Module, str], Tensor] = {}
    for module, attribute in chosen:
        if module not in names:
            raise ValueError(f"parameters: expected modules of the model, got another {type(module).__name__}")
        path = ".".join(filter(None, (names[module], attribute)))
        parameter = _own(module, attribute)
        if owners[id(parameter)] > 1:
            raise ValueError(f"{path}: expected a parameter of one layer, got one that is tied")
        if parameter not in moments:
            raise ValueError(f"{path}: expected exp_avg_sq in the optimizer, got none; has it stepped?")
        scores[module, attribute] = bitter7_scores(parameter, moments[parameter], eps)
    left = sum(int(_mask(*place).sum()) for place in scores)
    share = isinstance(amount, float)
    if isinstance(amount, bool) or not 0 <= amount <= (1.0 if share else left):
        raise ValueError(f"amount: expected a share from 0 to 1 or a number up to {left}, got {amount!r}")
    prune.global_unstructured(list(scores), prune.L1Unstructured, importance_scores=scores, amount=amount)
    return {
        ".".join(filter(None, (names[module], attribute))): 1 - float(_mask(module, attribute).double().mean())
        for module, attribute in scores
    }


def _own(module: nn.Module, attribute: str) -> nn.Parameter:
    """The parameter, also where a mask hides it."""
    found = dict(module.named_parameters(recurse=False))
    for name in (attribute + "_orig", attribute):
        if name in found:
            return found[name]
    raise ValueError(f"parameters: expected a parameter {attribute!r} of {type(module).__name__}, got none")


def _mask(module: nn.Module, attribute: str) -> Tensor:
    mask = getattr(module, attribute + "_mask", None)
    return torch.ones_like(_own(module, attribute)) if mask is None else mask

"""What moves between tiers: the parameters of a module, as one piece."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import nn

from infold.storages import storage_key

#: Modules that use their children's weights without calling the children: they move with them.
ATOMIC: tuple[type[nn.Module], ...] = (nn.MultiheadAttention,)


@dataclass(frozen=True)
class Unit:
    """Parameters that are placed, fetched and released together.

    name: the qualified name of its first module (``""`` is the model itself).
    modules: each module that owns one of the parameters, by its first qualified name. More than one where weights are
        tied: the storages then belong to all.
    parameters: each distinct parameter once, by its first qualified name.
    nbytes: of their distinct storages.
    room: what they take in a buffer: each storage `aligned`, in all whole pages.
    """

    name: str
    modules: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]
    nbytes: int
    room: int


#: Where a storage begins in a buffer: cuBLAS chooses kernels, and so roundings, by alignments of up to as many bytes.
ALIGNMENT = 256
#: What direct reads and writes are multiples of.
PAGE = 4096


def pages(nbytes: int) -> int:
    """``nbytes`` rounded up to whole pages."""
    return -(-nbytes // PAGE) * PAGE


def aligned(nbytes: int) -> int:
    """``nbytes`` rounded up to where the next storage may begin."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def room(sizes: Iterable[int]) -> int:
    """What storages of such sizes take in a buffer, side by side."""
    return pages(sum(map(aligned, sizes)))


def units(model: nn.Module, atomic: Collection[type[nn.Module]] = ATOMIC) -> list[Unit]:
    """The units of a model in the order of its modules, empty parameters left out.

    A module's own parameters are one unit; modules that share a parameter's storage are one unit together. Buffers stay
    where they are: modules write to them.
    """
    owners: dict[int, int] = {}  # storage → index in groups
    groups: list[dict[str, nn.Module] | None] = []
    covered: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in covered:
            continue
        whole = isinstance(module, tuple(atomic))
        if whole:
            covered.update(module.modules())
        storages = {storage_key(p) for p in module.parameters(recurse=whole) if p.numel()}
        if not storages:
            continue
        joined = sorted({owners[key] for key in storages if key in owners})
        members: dict[str, nn.Module] = {}
        for index in joined:
            members.update(groups[index] or {})
            groups[index] = None
        members[name] = module
        index = joined[0] if joined else len(groups)
        if joined:
            groups[index] = members
        else:
            groups.append(members)
        owners.update({key: index for key, owner in owners.items() if owner in joined})
        owners.update(dict.fromkeys(storages, index))
    return [_unit(members, tuple(atomic)) for members in groups if members]


def _unit(members: dict[str, nn.Module], atomic: tuple[type[nn.Module], ...]) -> Unit:
    parameters: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, module in members.items():
        for local, parameter in module.named_parameters(recurse=isinstance(module, atomic)):
            if parameter.numel() and id(parameter) not in seen:
                seen.add(id(parameter))
                parameters[f"{name}.{local}" if name else local] = parameter
    storages = {storage_key(p): p.untyped_storage().nbytes() for p in parameters.values()}
    return Unit(next(iter(members)), members, parameters, sum(storages.values()), room(storages.values()))

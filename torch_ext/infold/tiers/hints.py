"""`tier_hints.json`: a plan in a file, and in the words of other tools."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from infold.checked_files import destination, replacing
from infold.tiers.gguf import gguf_name
from infold.tiers.plan import Placement, Plan, require_plan_of
from infold.tiers.problem import check_names
from infold.tiers.spec import TierSpec
from infold.tiers.units import units

FORMAT, VERSION = "infold-tiers", 1
#: No larger file is read: 100,000 units take a fifth of it.
MAX_BYTES = 64 * 2**20

_PLAN = {"format", "version", "objective", "fingerprint", "buffer_bytes", "tiers", "units"}
_SPEC = {field.name for field in fields(TierSpec)}
_DEFAULTS = {field.name: field.default for field in fields(TierSpec) if field.default is not MISSING}
_UNIT = {"tier", "nbytes", "codec", "score"}

Result = TypeVar("Result")


def save(plan: Plan, path: str | Path) -> None:
    """Writes a plan as JSON. The file appears complete or not at all: written beside ``path``, synced, renamed.

    Raises ValueError for a score that is not finite: JSON has none.
    """
    tiers = [{**asdict(tier), "budget_bytes": plan.budgets.get(tier.name)} for tier in plan.tiers]
    for name, placement in plan.placements.items():
        if placement.score is not None and not math.isfinite(placement.score):
            raise ValueError(f"{name}: score: expected a finite number, got {placement.score}")
    content = {
        "format": FORMAT,
        "version": VERSION,
        "objective": plan.objective,
        "fingerprint": plan.fingerprint,
        "buffer_bytes": plan.buffer_bytes,
        "tiers": tiers,
        "units": {name: placement._asdict() for name, placement in plan.placements.items()},
    }
    text = json.dumps(content, indent=1, allow_nan=False)
    with replacing(destination(path)) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def load(path: str | Path, model: nn.Module | None = None) -> Plan:
    """Reads a file of `save`, and checks it against a model if one is given.

    Raises ValueError, which names the file and the field or some units: for a file that is none of `save` or of a later
    version, for values of a wrong type or out of range, and for a plan of another model. OSError if the file cannot be
    read.
    """
    plan = read(path, parse)
    if model is not None:
        require_plan_of(str(path), plan, model, (unit.name for unit in units(model)))
    return plan


def read(path: str | Path, parse: Callable[[bytes], Result]) -> Result:
    """What ``parse`` makes of a file's bytes; ValueErrors, its own among them, name the file."""
    with open(path, "rb") as file:
        text = file.read(MAX_BYTES + 1)
    try:
        if len(text) > MAX_BYTES:
            raise ValueError(f"expected at most {MAX_BYTES} bytes, got more")
        return parse(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_object(text: bytes) -> dict[str, Any]:
    """The JSON object that a file holds; raises ValueError where it is none, or names something twice."""
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("expected JSON, got some that nests too deep") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"expected JSON, got {f'something else: {error}' if text.strip() else 'nothing'}") from None
    return _object(content, "JSON", None)


def parse_specs(text: bytes) -> dict[str, TierSpec]:
    """Tiers by name, of a file of ``infold tiers calibrate --out``: ``{"tiers": [{"name": ..., ...}, ...]}``.

    Raises ValueError, which names the field, for another file; what `TierSpec` has defaults for may be left out.
    """
    specs = {}
    for number, entry in enumerate(_tier_list(parse_object(text))):
        where = f"tiers[{number}]"
        spec = _spec({**_DEFAULTS, **_object(entry, where, None)}, where)
        if spec.name in specs:
            raise ValueError(f"{where}.name: expected tiers of different names, got {spec.name!r} twice")
        specs[spec.name] = spec
    return specs


def parse(text: bytes) -> Plan:
    """A plan from the bytes of a file; raises ValueError as `load` does."""
    content = parse_object(text)
    if "format" not in content:
        raise ValueError(f"format: expected {FORMAT!r}, got none: it is no file of infold.tiers.save")
    if content["format"] != FORMAT:
        raise ValueError(f"format: expected {FORMAT!r}, got {content['format']!r:.60}")
    if content.get("version") != VERSION or isinstance(content.get("version"), bool):
        raise ValueError(f"version: expected {VERSION}, got {content.get('version')!r:.60}")
    _object(content, "plan", _PLAN)
    tiers, budgets = [], {}
    for number, entry in enumerate(_tier_list(content)):
        where = f"tiers[{number}]"
        entry = dict(_object(entry, where, _SPEC | {"budget_bytes"}))
        budget = _optional_bytes(entry.pop("budget_bytes"), f"{where}.budget_bytes")
        tiers.append(_spec(entry, where))
        budgets[tiers[-1].name] = budget
    placements = {}
    for name, entry in _object(content["units"], "units", None).items():
        where = f"units.{name:.200}"
        entry = _object(entry, where, _UNIT)
        placements[name] = Placement(
            _string(entry["tier"], f"{where}.tier"),
            _bytes(entry["nbytes"], f"{where}.nbytes"),
            _string(entry["codec"], f"{where}.codec"),
            None if entry["score"] is None else _number(entry["score"], f"{where}.score"),
        )
    return Plan(
        tuple(tiers),
        placements,
        _bytes(content["buffer_bytes"], "buffer_bytes"),
        _string(content["fingerprint"], "fingerprint"),
        _string(content["objective"], "objective"),
        budgets,
    )


def to_device_map(plan: Plan, model: nn.Module, devices: Mapping[str, int | str] | None = None) -> dict[str, int | str]:
    """The plan as the ``device_map`` of accelerate and transformers: a device for each module.

    devices: of each tier by its name; without it, the first is device 0, a tier named as a torch device is that one,
        one that is ``on_disk`` is ``"disk"``, and others are ``"cpu"``.

    Raises ValueError for a tier without a device, and where a module's own parameters and those of a module inside it
    have different devices: accelerate moves a module as a whole. Give ``devices`` that are the same for their tiers, or
    run such a plan by `attach`.
    """
    found = units(model)
    check_names("units", plan.placements, (unit.name for unit in found), missing=True)
    if devices is None:
        devices = {tier.name: _device(tier, first=not index) for index, tier in enumerate(plan.tiers)}
    if absent := [tier.name for tier in plan.tiers if tier.name not in devices]:
        raise ValueError(f"devices: expected one for each tier, {', '.join(absent)} missing")
    device_map: dict[str, int | str] = {}
    for unit in found:
        for name in unit.modules:
            device_map[name] = devices[plan.placements[unit.name].tier]
    # Modules that own buffers alone compute with them on the first device.
    for name, module in model.named_modules():
        if name not in device_map and any(True for _ in module.buffers(recurse=False)):
            above = [outer for outer in device_map if _inside(name, outer)]
            device_map[name] = device_map[above[0]] if above else devices[plan.tiers[0].name]
    for inner in list(device_map):
        for outer in [outer for outer in device_map if _inside(inner, outer)]:
            if device_map[outer] != device_map[inner]:
                raise ValueError(
                    f"{outer or 'the model'}: expected one device for its own parameters and all inside, got "
                    f"{device_map[outer]!r} and, for {inner}, {device_map[inner]!r}: accelerate moves a module as a "
                    "whole; give their tiers the same of the devices, or run the plan by infold.tiers.attach"
                )
            del device_map[inner]
            break
    return device_map


def to_llama_cpp(plan: Plan, model: nn.Module, buffers: Mapping[str, str] | None = None) -> list[str]:
    """The plan as llama.cpp's ``-ot`` (``--override-tensor``) arguments, ``regex=buffer type``: one a kind of tensor.

    buffers: llama.cpp's buffer type for each tier by name; without it ``"CPU"`` for all but the first. A tier without
        one is left to ``-ngl``. There is none for a disk: "CPU" tensors are mapped from the file, and read when used.

    Raises ValueError for a parameter that GGUF has no name for.
    """
    found = units(model)
    check_names("units", plan.placements, (unit.name for unit in found), missing=True)
    if buffers is None:
        buffers = {tier.name: "CPU" for tier in plan.tiers[1:]}
    blocks: dict[tuple[str, str, str], list[int]] = {}
    for unit in found:
        buffer = buffers.get(plan.placements[unit.name].tier)
        for name in unit.parameters if buffer else ():
            tensor = gguf_name(name)
            block = re.fullmatch(r"blk\.(\d+)\.(.*)", tensor)
            key = (buffer or "", "blk" if block else "", block[2] if block else tensor)
            blocks.setdefault(key, []).append(int(block[1]) if block else -1)
    patterns = []
    for (buffer, prefix, rest), numbers in blocks.items():
        start = rf"blk\.({'|'.join(map(str, sorted(numbers)))})\." if prefix else ""
        patterns.append(f"^{start}{re.escape(rest)}$={buffer}")
    return patterns


def _device(tier: TierSpec, first: bool) -> int | str:
    if re.fullmatch(r"cpu|(cuda|xpu|mps)(:\d+)?", tier.name):
        return tier.name
    return 0 if first else "disk" if tier.on_disk else "cpu"


def _inside(inner: str, outer: str) -> bool:
    return inner != outer and (outer == "" or inner.startswith(f"{outer}."))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r:.200}: expected one entry, got several")
    return found


def _no_constant(constant: str) -> float:
    raise ValueError(f"expected numbers, got {constant}")


def _tier_list(content: Mapping[str, Any]) -> list[Any]:
    tiers = content.get("tiers")
    if not isinstance(tiers, list):
        raise ValueError(f"tiers: expected a list, got {'none' if tiers is None else type(tiers).__name__}")
    return tiers


def _spec(value: Any, where: str) -> TierSpec:
    entry = _object(value, where, _SPEC)
    return TierSpec(
        _string(entry["name"], f"{where}.name"),
        _number(entry["setup_us"], f"{where}.setup_us"),
        _number(entry["bandwidth_gb_s"], f"{where}.bandwidth_gb_s"),
        _optional_bytes(entry["capacity_bytes"], f"{where}.capacity_bytes"),
        _boolean(entry["resident"], f"{where}.resident"),
        _boolean(entry["on_disk"], f"{where}.on_disk"),
        _bytes(entry["depth"], f"{where}.depth"),
    )


def _object(value: Any, where: str, fields: set[str] | None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, got {type(value).__name__}")
    if fields is not None and value.keys() != fields:
        raise ValueError(
            f"{where}: expected the fields {', '.join(sorted(fields))}, got {', '.join(sorted(value))[:200] or 'none'}"
        )
    return value


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected a string, got {type(value).__name__}")
    return value


def _boolean(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{where}: expected true or false, got {type(value).__name__}")
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: expected a number, got {type(value).__name__}")
    # An int may be too large for a float, and a float literal infinite.
    if not abs(value) < 1e300:
        raise ValueError(f"{where}: expected a finite number, got one that is not")
    return float(value)


def _bytes(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{where}: expected a number of bytes, got {type(value).__name__}")
    if not 0 <= value < 2**63:
        raise ValueError(f"{where}: expected a number of bytes from 0 to 2^63 - 1, got one outside")
    return value


def _optional_bytes(value: Any, where: str) -> int | None:
    return None if value is None else _bytes(value, where)

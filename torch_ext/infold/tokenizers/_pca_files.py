"""Files of PCA: the options, the streaming state and the components."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infold._library import CorruptWeightError
from infold.tokenizers._files import load_state, save_state, take
from infold.tokenizers.blocks import Blocks, room_for
from infold.tokenizers.moments import Moments
from infold.tokenizers.spectrum import Spectrum

_KIND, _VERSION = "pca", 1
_OPTIONS = ("n_components", "method", "whiten", "seed")
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def save(
    path: str | Path, options: Mapping[str, Any], state: Moments | Blocks | None, spectrum: Spectrum | None
) -> None:
    """Writes what `load` reads."""
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {**options, "state": "none" if state is None else state.method}
    if isinstance(state, Moments):
        tensors = {"shift": state.shift, "sums": state.sums, "scatter": state.scatter}
        about["whole"] = state.whole
    elif isinstance(state, Blocks):
        tensors = {"center": state.mean, "values": state.values, "basis": state.basis, "squares": state.total}
    if state is not None:
        about.update(count=state.count, features=state.features, dtype=_name(state.dtype))
    # The components of blocks are rows of their basis.
    if spectrum is not None and not isinstance(state, Blocks):
        named = zip(("components", "mean", "variance", "total"), spectrum[:4], strict=True)
        tensors.update(named)
        about["spectrum"] = _name(spectrum.components.dtype)
        about.update(count=spectrum.samples, features=spectrum.components.shape[1])
    save_state(path, _KIND, _VERSION, tensors, about)


def load(path: str | Path) -> tuple[dict[str, Any], Moments | Blocks | None, Spectrum | None]:
    """The options, the state and the components of a file of `save`, on the CPU.

    Raises CorruptWeightError for tensors that no fit leaves, besides what `load_state` raises.
    """
    tensors, about = load_state(path, _KIND, _VERSION)
    missing = [name for name in (*_OPTIONS, "state", "count", "features") if name not in about]
    if missing:
        raise corrupt(path, "metadata", f"expected {', '.join(missing)}, got none")
    options = {name: about[name] for name in _OPTIONS}
    for name, least in (("n_components", 1), ("count", 1), ("features", about["n_components"])):
        if type(about[name]) is not int or type(least) is not int or about[name] < least:
            raise corrupt(path, name, f"expected an integer from {least}, got {about[name]!r}")
    features, components, count = about["features"], about["n_components"], about["count"]

    def get(name: str, dtype: torch.dtype, *shape: int | None) -> Tensor:
        tensor = take(tensors, name, dtype, shape, path)
        if not tensor.isfinite().all():
            raise corrupt(f"{path}: {name}", "tensor", "expected finite values")
        return tensor

    state: Moments | Blocks | None = None
    double = torch.float64
    if about["state"] == "moments":
        if not isinstance(about.get("whole"), bool):
            raise corrupt(path, "whole", f"expected a bool, got {about.get('whole')!r}")
        shift, sums = get("shift", double, features), get("sums", double, features)
        scatter = get("scatter", double, features, features)
        if not torch.equal(scatter, scatter.T) or bool((scatter.diagonal() < 0).any()):
            raise corrupt(f"{path}: scatter", "tensor", "expected sums of squares and products")
        state = Moments(count, shift, sums, scatter, about["whole"], _dtype(path, about, "dtype"))
    elif about["state"] == "blocks":
        dtype = _dtype(path, about, "dtype")
        values = get("values", double, None)
        rank = len(values)
        if rank > room_for(components, features):
            raise corrupt(f"{path}: values", "tensor", f"expected at most {room_for(components, features)}, got {rank}")
        if rank and (not bool((values > 0).all()) or bool((values.diff() > 1e-6 * values[0]).any())):
            raise corrupt(f"{path}: values", "tensor", "expected positive, falling values")
        basis = get("basis", dtype, rank, features)
        state = Blocks(components, features, torch.device("cpu"), dtype)
        total = get("squares", double)
        if total < 0:
            raise corrupt(f"{path}: squares", "tensor", f"expected a sum of squares, got {float(total)}")
        state.restore(count, total, get("center", double, features), values, basis)
    elif about["state"] != "none":
        raise corrupt(path, "state", f"expected none, moments or blocks, got {about['state']!r}")

    spectrum = None
    if "spectrum" in about:
        dtype = _dtype(path, about, "spectrum")
        rows = get("components", dtype, components, features)
        variance, total = get("variance", double, components), get("total", double)
        if bool((variance < 0).any()) or total < 0:
            raise corrupt(f"{path}: variance", "tensor", "expected variances, got negative ones")
        spectrum = Spectrum(rows, get("mean", dtype, features), variance, total, count)
    if state is None and spectrum is None:
        raise corrupt(path, "state", "expected a fit, got none")
    return options, state, spectrum


def corrupt(path: str | Path, field: str, detail: str) -> CorruptWeightError:
    """The error for a field of a file."""
    return CorruptWeightError(str(path), field, detail)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(path: str | Path, about: Mapping[str, Any], field: str) -> torch.dtype:
    name = about.get(field)
    if not isinstance(name, str) or name not in _DTYPES:
        raise corrupt(path, field, f"expected one of {', '.join(_DTYPES)}, got {name!r}")
    return _DTYPES[name]

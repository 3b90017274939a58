"""Adapters of Hugging Face PEFT that are spectra: FourierFT as `SparseFrequencyLinear`, C3A as `FrequencyLinear`.

PEFT builds FourierFT's dense matrix on every forward, and transforms C3A's kernels on every forward; these layers do
neither. They stand for the adapter's part alone, what is added to the base layer. PEFT itself is not needed.

    adapter = infold.peft.load_adapter("folder", model)
    infold.peft.attach(model, adapter)
    ...
    infold.peft.save_adapter("folder", adapter)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from infold import spectral
from infold.checked_files import replacing
from infold.layers import is_transposed_linear
from infold.nn import FrequencyLinear, SparseFrequencyLinear

#: A module's name and its adapter.
Adapter = dict[str, SparseFrequencyLinear] | dict[str, FrequencyLinear]

_PREFIX = "base_model.model."
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def fourierft_indices(in_features: int, out_features: int, n_frequency: int, seed: int = 777) -> Tensor:
    """The half-plane indices (2, n_frequency) of the frequencies that PEFT draws for a layer, in its order.

    PEFT draws from the whole plane: two conjugates may both be among them, and then have the same index here.
    """
    size = in_features * out_features
    if not 0 < n_frequency <= size:
        raise ValueError(f"n_frequency: expected 1 to {size}, got {n_frequency}")
    chosen = torch.randperm(size, generator=torch.Generator().manual_seed(seed), device="cpu")[:n_frequency]
    # `ifft2` has a positive exponent in both.
    u, v = chosen // in_features, -(chosen % in_features) % in_features
    edge = (v == 0) | (2 * v == in_features)
    conjugate = (2 * v > in_features) | (edge & (2 * u > out_features))
    return torch.stack([torch.where(conjugate, -u % out_features, u), torch.where(conjugate, -v % in_features, v)])


@torch.no_grad()
def from_fourierft(
    spectrum: Tensor, in_features: int, out_features: int, scaling: float = 150.0, seed: int = 777
) -> SparseFrequencyLinear:
    """The layer of a `fourierft_spectrum` (n_frequency,), with ``scaling`` and ``random_loc_seed`` of its config.

    The spectrum is the layer's parameter as it is: it trains as it does in PEFT, gradients included.
    """
    if spectrum.dim() != 1 or not spectrum.is_floating_point():
        raise ValueError(f"spectrum: expected (n_frequency,) floats, got {spectrum.dtype} {list(spectrum.shape)}")
    indices = fourierft_indices(in_features, out_features, len(spectrum), seed)
    scale = scaling / (in_features * out_features)
    options: Any = {"device": spectrum.device, "dtype": spectrum.dtype}
    layer = SparseFrequencyLinear(in_features, out_features, None, indices, False, scale, real=True, **options)
    layer.coefficients.copy_(spectrum)
    return layer


@torch.no_grad()
def to_fourierft(layer: SparseFrequencyLinear, scaling: float = 150.0, seed: int = 777) -> Tensor:
    """The `fourierft_spectrum` (n_frequency,) of a layer, to be used with ``scaling`` and ``random_loc_seed``.

    Raises ValueError for what FourierFT cannot hold: complex coefficients, frequencies that are not those of the seed,
    and a bias.
    """
    if not layer.real:
        raise ValueError("layer: expected real coefficients (`real=True`), got complex ones")
    _check_bias(layer)
    sizes = layer.in_features, layer.out_features
    if not torch.equal(layer.indices.long().cpu(), fourierft_indices(*sizes, layer.indices.shape[1], seed)):
        raise ValueError(f"indices: expected those of `fourierft_indices` for seed {seed}, got others")
    return layer.coefficients * (layer.scale * layer.in_features * layer.out_features / scaling)


@torch.no_grad()
def from_c3a(kernel: Tensor) -> FrequencyLinear:
    """The layer of a `c3a_kernel` (P, Q, block): PEFT's circular correlation over in_features = Q·block."""
    if kernel.dim() != 3 or not kernel.is_floating_point():
        got = f"{kernel.dtype} {list(kernel.shape)}"
        raise ValueError(f"kernel: expected (output blocks, input blocks, block) floats, got {got}")
    outputs, inputs, block = kernel.shape
    sizes = inputs * block, outputs * block, block
    layer = FrequencyLinear(*sizes, bias=False, device=kernel.device, dtype=kernel.dtype)
    assert layer.spectrum is not None
    layer.spectrum.copy_(spectral.pack_spectrum(_reversed(_wide(kernel)) / sizes[0]))
    return layer


@torch.no_grad()
def to_c3a(layer: FrequencyLinear) -> Tensor:
    """The `c3a_kernel` (P, Q, block) of a layer, float32 (float64 for float64).

    Raises ValueError for what C3A cannot hold: sizes that are not multiples of the block, and a bias.
    """
    _check_bias(layer)
    for name in ("in_features", "out_features"):
        if getattr(layer, name) % layer.block:
            raise ValueError(f"{name}: expected a multiple of the block, {layer.block}, got {getattr(layer, name)}")
    return _reversed(spectral.unpack_spectrum(_wide(layer.packed_spectrum()))) * layer.in_features


def _check_bias(layer: SparseFrequencyLinear | FrequencyLinear) -> None:
    if layer.bias is not None:
        raise ValueError("layer: expected none with a bias, which belongs to the base layer, got one")


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _reversed(blocks: Tensor) -> Tensor:
    """[0, n - 1, ..., 1] of the last dimension: convolution with it is correlation."""
    return blocks.flip(-1).roll(1, -1)


class Adapted(nn.Module):
    """A layer and an adapter beside it: base(x) + adapter(x). The base may be any module, packed ones included."""

    def __init__(self, base: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.base, self.adapter = base, adapter

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        added: Tensor = self.adapter(x)
        return y + added.to(y.dtype)


def attach(model: nn.Module, adapter: Mapping[str, nn.Module]) -> None:
    """Replaces each named module of ``model``, in place, by it and its adapter: see `Adapted`."""
    for name, layer in adapter.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Adapted(model.get_submodule(name), layer))


def load_adapter(folder: str | os.PathLike[str], model: nn.Module) -> Adapter:
    """Reads what PEFT's `save_pretrained` has written for a FourierFT or C3A adapter of ``model``, which says the
    layers' sizes and is not changed. Raises ValueError for an adapter of another type, for tensors of others, and for
    sizes that do not match; FileNotFoundError where there is no `adapter_model.safetensors`.
    """
    folder = Path(folder)
    config: dict[str, Any] = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    kind = config.get("peft_type")
    suffixes = {"FOURIERFT": ".fourierft_spectrum", "C3A": ".c3a_kernel"}
    if kind not in suffixes:
        raise ValueError(f"peft_type: expected one of {', '.join(suffixes)}, got {kind}")
    adapter: dict[str, Any] = {}
    for key, tensor in load_file(folder / _WEIGHTS).items():
        name = key.removeprefix(_PREFIX).removesuffix(suffixes[kind])
        if _PREFIX + name + suffixes[kind] != key:
            raise ValueError(f"{folder / _WEIGHTS}: expected tensors {_PREFIX}*{suffixes[kind]} alone, got {key}")
        sizes = _sizes(model.get_submodule(name))
        if kind == "FOURIERFT":
            adapter[name] = from_fourierft(
                tensor, *sizes, config.get("scaling", 150.0), config.get("random_loc_seed", 777)
            )
            continue
        adapter[name] = layer = from_c3a(tensor)
        if (layer.in_features, layer.out_features) != sizes:
            raise ValueError(f"{name}: expected a kernel for {sizes} features, got shape {list(tensor.shape)}")
    return adapter


def save_adapter(folder: str | os.PathLike[str], adapter: Mapping[str, nn.Module], seed: int = 777) -> None:
    """Writes an adapter, a layer for each module's name, as PEFT reads it: all `SparseFrequencyLinear`, with the
    frequencies of ``seed``, or all `FrequencyLinear`. Raises ValueError for others: see `to_fourierft` and `to_c3a`.
    """
    layers = list(adapter.values())
    config: dict[str, Any] = {"bias": "none", "target_modules": list(adapter), "inference_mode": True}
    if layers and all(isinstance(layer, SparseFrequencyLinear) for layer in layers):
        sparse = cast("Mapping[str, SparseFrequencyLinear]", adapter)
        # PEFT has one for all layers.
        first = next(iter(sparse.values()))
        scaling = first.scale * first.in_features * first.out_features
        tensors = {
            f"{_PREFIX}{name}.fourierft_spectrum": to_fourierft(layer, scaling, seed) for name, layer in sparse.items()
        }
        counts = {name: layer.indices.shape[1] for name, layer in sparse.items()}
        config |= {"peft_type": "FOURIERFT", "scaling": scaling, "random_loc_seed": seed}
        config |= {"n_frequency": first.indices.shape[1], "n_frequency_pattern": counts}
    elif layers and all(isinstance(layer, FrequencyLinear) for layer in layers):
        circulant = cast("Mapping[str, FrequencyLinear]", adapter)
        tensors = {f"{_PREFIX}{name}.c3a_kernel": to_c3a(layer) for name, layer in circulant.items()}
        blocks = {name: layer.block for name, layer in circulant.items()}
        config |= {"peft_type": "C3A", "block_size": next(iter(blocks.values())), "block_size_pattern": blocks}
    else:
        kinds = sorted({type(layer).__name__ for layer in layers})
        raise ValueError(f"adapter: expected SparseFrequencyLinear or FrequencyLinear layers of one kind, got {kinds}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / _WEIGHTS) as file:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    with replacing(folder / _CONFIG) as file:
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _sizes(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer."""
    if is_transposed_linear(module):
        rows, cols = cast(nn.Parameter, module.weight).shape
        return rows, cols
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not all(isinstance(size, int) for size in sizes):
        raise ValueError(f"model: expected a linear layer where the adapter is, got a {type(module).__name__}")
    return cast("tuple[int, int]", sizes)

"""Models that the command line knows by name, and checkpoints that are no pickles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from infold.activations import call
from infold.files import load_into


class Loaded(NamedTuple):
    """A model in evaluation mode, a batch for it, and how many tokens or samples that is."""

    model: nn.Module
    batch: Any
    items: int
    #: ``"tokens"`` or ``"samples"``.
    unit: str

    def forward(self) -> Tensor:
        return call(self.model, self.batch)


def lenet5() -> nn.Sequential:
    """LeNet-5 (LeCun et al. 1998) for 1 × 28 × 28 images: 10 logits."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10),
    )  # fmt: skip


def mlp() -> nn.Sequential:
    """Eight layers of 1024 × 1024, 33.6 MB in float32."""
    layers: list[nn.Module] = []
    for _ in range(8):
        layers += [nn.Linear(1024, 1024), nn.ReLU()]
    return nn.Sequential(*layers)


def load_model(
    name: str, checkpoint: str | Path | None = None, *, batch_size: int = 1, seq_length: int = 128, seed: int = 0
) -> Loaded:
    """A model by name, with random inputs.

    name: ``lenet5``, ``mlp``, or what transformers loads (it must be installed): a folder or hub name of safetensors,
        or a GGUF file. checkpoint: the weights, as `load_checkpoint` reads them.

    Raises ValueError for a name that is none of these, and for sizes below one.
    """
    if batch_size < 1 or seq_length < 1:
        raise ValueError(f"batch size, sequence length: expected one or more, got {batch_size} and {seq_length}")
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    if name == "lenet5":
        model: nn.Module = lenet5()
        loaded = Loaded(model, torch.randn(batch_size, 1, 28, 28, generator=generator), batch_size, "samples")
    elif name == "mlp":
        model = mlp()
        loaded = Loaded(model, torch.randn(batch_size, 1024, generator=generator), batch_size, "samples")
    else:
        model = _pretrained(name)
        words = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
        ids = torch.randint(words, (batch_size, seq_length), generator=generator)
        loaded = Loaded(model, {"input_ids": ids}, batch_size * seq_length, "tokens")
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    model.eval()
    return loaded


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Loads a safetensors file (of `infold.save` too) or a state dict of torch.save, which is read as data alone:
    nothing in it is run. A dict with the state under ``"model"``, ``"model_state_dict"`` or ``"state_dict"`` will do.

    Raises ValueError for a file that is neither, and for names or shapes that are not the model's.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
            if metadata.get("format", "").startswith("infold"):
                load_into(model, path)
                return
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError):
        raise
    # Broken files raise whatever their reader met.
    except Exception as error:
        raise ValueError(f"{path}: expected a safetensors file or a state dict of tensors alone: {error}") from error
    for key in ("model", "model_state_dict", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: expected a state dict of tensors, got {type(state).__name__}")
    try:
        model.load_state_dict(dict(state))
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from error


def _pretrained(name: str) -> nn.Module:
    try:
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    except ImportError:
        raise ValueError(
            f"model: expected lenet5 or mlp; {name!r} needs transformers, which is not installed"
        ) from None
    # Else transformers would look for it on a network.
    if (name.startswith(("/", ".")) or name.endswith(".gguf")) and not Path(name).exists():
        raise ValueError(f"model: expected lenet5, mlp, a name, or a folder or file that exists, got {name!r}")
    where, options = name, {}
    if name.endswith(".gguf"):
        where, options = str(Path(name).parent), {"gguf_file": Path(name).name}
    config = AutoConfig.from_pretrained(where, **options)
    words = any("LMHead" in each or "CausalLM" in each for each in config.architectures or ["CausalLM"])
    kind = AutoModelForCausalLM if words else AutoModel
    # Without this, a folder of pickles would be unpickled.
    safe = {} if options else {"use_safetensors": True}
    model: nn.Module = kind.from_pretrained(where, **options, **safe)
    return model

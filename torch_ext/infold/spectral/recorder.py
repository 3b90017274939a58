"""Records how the phases of a model's layers develop while it is trained."""

from __future__ import annotations

import csv
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from infold.spectral.phase import layer_frequencies, phase_histogram, resultant_length
from infold.spectral.plot import figure

#: The harmonics whose resultant lengths are recorded.
HARMONICS = (1, 2, 4)


class _Record(NamedTuple):
    step: int
    #: (layers, bins), (layers, harmonics), (layers,).
    histogram: np.ndarray[Any, np.dtype[np.float64]]
    resultant: np.ndarray[Any, np.dtype[np.float64]]
    amplitude: np.ndarray[Any, np.dtype[np.float64]]


class PhaseRecorder:
    """Records the phases of layers before training, after every ``every`` steps of an optimizer, and at the end.

        with infold.spectral.PhaseRecorder(model, optimizer, every=100) as recorder:
            train(model, optimizer)
        recorder.to_csv("phases.csv")

    A record holds, of each layer, the phase histogram (shares), the resultant lengths of harmonics 1, 2 and 4, and the
    root-mean-square amplitude; never spectra. When ``capacity`` records are held, every second one is dropped and
    ``every`` doubles, so that memory is bounded and the whole run stays covered. Nothing that is trained changes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        every: int = 100,
        layers: Collection[str] | None = None,
        bins: int = 36,
        block: int | None = None,
        capacity: int = 512,
    ) -> None:
        """layers: patterns (`fnmatch`) of the qualified names of layers that `layer_frequencies` takes; None takes all
            layers that hold a packed spectrum.
        block: for layers that hold a matrix, as in `layer_frequencies`.

        Raises ValueError for numbers that are not positive (a capacity below 2), and if a pattern, or None, finds no
        layer.
        """
        for name, value, least in (("every", every, 1), ("bins", bins, 1), ("capacity", capacity, 2)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        self._modules = _chosen(model, layers)
        self.layers = list(self._modules)
        self.every, self.bins, self.capacity = every, bins, capacity
        self._block = block
        self._step = 0
        self._records: list[_Record] = []
        self._hook: Any = None
        self._record()
        self._hook = optimizer.register_step_post_hook(self._after_step)

    @property
    def steps(self) -> list[int]:
        """The numbers of the steps that have been recorded."""
        return [record.step for record in self._records]

    def close(self) -> None:
        """Records the last step, takes the hook off the optimizer and lets the model go. The records stay."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            if self.steps[-1] != self._step:
                self._record()
            self._modules = {}

    def __enter__(self) -> PhaseRecorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._step += 1
        if self._step % self.every == 0:
            self._record()

    def _record(self) -> None:
        if len(self._records) == self.capacity:
            del self._records[1::2]
            self.every *= 2
            if self._hook is not None and self._step % self.every:
                return
        rows = []
        for module in self._modules.values():
            z = layer_frequencies(module, self._block)
            counts = phase_histogram(z, self.bins)[0].cpu()
            shares = counts / counts.sum().clamp(min=1)
            rms = float(z.abs().double().square().mean().sqrt())
            rows.append((shares.numpy(), [resultant_length(z, harmonic) for harmonic in HARMONICS], rms))
        columns = [np.array(column, dtype=np.float64) for column in zip(*rows, strict=True)]
        self._records.append(_Record(self._step, *columns))

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """All records: ``steps`` (S,), ``layers`` (L,) names, ``edges`` (bins + 1,) radians, ``histogram`` (S, L, bins)
        shares, ``harmonics`` (3,), ``resultant`` (S, L, 3), ``amplitude`` (S, L).
        """
        return {
            "steps": np.array(self.steps),
            "layers": np.array(self.layers),
            "edges": np.linspace(-np.pi, np.pi, self.bins + 1),
            "harmonics": np.array(HARMONICS),
            **{name: np.stack([getattr(record, name) for record in self._records]) for name in _Record._fields[1:]},
        }

    def to_npz(self, path: str | Path) -> None:
        """Writes `arrays`; `numpy.load` reads them without pickle."""
        with Path(path).open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **self.arrays())

    def to_csv(self, path: str | Path) -> None:
        """Writes a row for each step and layer: step, layer, amplitude, resultants, and the histogram's shares, named
        by the degrees where their bins begin.
        """
        degrees = [f"from_{-180 + 360 * index / self.bins:g}" for index in range(self.bins)]
        with Path(path).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "layer", "amplitude", *(f"resultant_{h}" for h in HARMONICS), *degrees])
            for record in self._records:
                for index, layer in enumerate(self.layers):
                    numbers = [record.amplitude[index], *record.resultant[index], *record.histogram[index]]
                    writer.writerow([record.step, layer, *map(float, numbers)])

    def plot(self, path: str | Path, layer: str | None = None) -> None:
        """Draws the phases of a layer (None: the first) against steps, as a PNG (or what ``path`` ends in): the
        histogram by brightness, and the resultant lengths.

        Raises ValueError for a layer that is not recorded, ImportError without matplotlib.
        """
        name = self.layers[0] if layer is None else layer
        if name not in self.layers:
            raise ValueError(f"layer: expected one of {', '.join(self.layers)}, got {name!r}")
        arrays, index = self.arrays(), self.layers.index(name)
        drawing = figure(7, 5)
        upper, lower = drawing.subplots(2, 1, sharex=True)
        # A column for each record, up to the next one; the last is as wide as the one before it.
        ends = np.append(self.steps, self.steps[-1] + max([1, *np.diff(self.steps)[-1:]]))
        mesh = upper.pcolormesh(ends, np.degrees(arrays["edges"]), arrays["histogram"][:, index].T)
        drawing.colorbar(mesh, ax=upper, label="share")
        upper.set(ylabel="phase, degrees", title=name or "the model itself")
        for position, harmonic in enumerate(HARMONICS):
            lower.plot(arrays["steps"], arrays["resultant"][:, index, position], label=f"harmonic {harmonic}")
        lower.set(xlabel="step", ylabel="resultant length", ylim=(0, 1))
        lower.legend()
        drawing.savefig(path, dpi=120)


def _chosen(model: nn.Module, patterns: Collection[str] | None) -> dict[str, nn.Module]:
    """The layers to record, by qualified name."""
    if isinstance(patterns, str):
        raise ValueError(f"layers: expected a collection of names, got a string (try [{patterns!r}])")
    modules = dict(model.named_modules())
    if patterns is None:
        chosen = {name: module for name, module in modules.items() if hasattr(module, "packed_spectrum")}
        if not chosen:
            raise ValueError("layers: expected a model with frequency layers, or names of other layers, got neither")
        return chosen
    chosen = {}
    for pattern in patterns:
        found = {name: module for name, module in modules.items() if fnmatchcase(name, pattern)}
        taken = {name: module for name, module in found.items() if _has_phases(module)}
        if not taken:
            raise ValueError(
                f"layers: expected {pattern!r} to match a layer with a spectrum or a matrix, it matches none"
            )
        chosen.update(taken)
    return chosen


def _has_phases(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return hasattr(module, "packed_spectrum") or (isinstance(weight, torch.Tensor) and weight.ndim == 2)

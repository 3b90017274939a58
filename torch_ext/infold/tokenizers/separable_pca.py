"""PCA of each mode of sequences and volumes (time × space, or three axes): small components where samples are few."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from infold.tokenizers._files import load_state, reading_metadata, require_finite, save_state, take
from infold.tokenizers.rows import check_dtype, combined, refuse_not_finite, with_signs

_KIND, _VERSION = "separable-pca", 1


class SeparablePCA:
    """The truncated higher-order SVD (De Lathauwer et al. 2000) of centred samples: x − mean → core of ranks r_1 … r_m.

    Each mode n has an orthonormal U_n (r_n, size_n), the leading eigenvectors of its covariance, summed over all other
    axes and samples; the code is (x − mean) ×_1 U_1 … ×_m U_m, what U_1 ⊗ … ⊗ U_m makes of the flattened sample. Of
    the data fitted, a share of the variance is lost that lies between the largest and the sum of
    `discarded_variance_ratio_`.

    ranks: components of each mode. modes: the axes of a sample in each mode; None: each axis one. For clips (frames,
    height, width), ``modes=((0,), (1, 2))`` is temporal × spatial. For 3-D patches of larger volumes, fit the blocks
    that `infold.tokenizers.to_patches` cuts.

    After `fit`, in the dtype of the data (float32 for bytes): components_, U_n by mode, largest entries positive; mean_
    (*shape); mode_variance_, all eigenvalues by mode, falling, each mode's summing to the total variance;
    discarded_variance_ratio_, by mode; n_samples_seen_.
    """

    components_: list[Tensor]
    mean_: Tensor
    mode_variance_: list[Tensor]
    discarded_variance_ratio_: tuple[float, ...]
    n_samples_seen_: int

    def __init__(self, ranks: Sequence[int], *, modes: Sequence[Sequence[int]] | None = None) -> None:
        """Raises ValueError for ranks below 1, and modes that do not have each axis once."""
        self.ranks = tuple(ranks)
        self.modes = tuple((n,) for n in range(len(self.ranks))) if modes is None else tuple(map(tuple, modes))
        if not self.ranks or any(rank < 1 for rank in self.ranks):
            raise ValueError(f"ranks: expected one of at least 1 for each mode, got {self.ranks}")
        self._axes = [axis for mode in self.modes for axis in mode]
        if len(self.modes) != len(self.ranks) or not all(self.modes) or sorted(self._axes) != [*range(len(self._axes))]:
            raise ValueError(f"modes: expected {len(self.ranks)} that have each axis once, got {self.modes}")
        self._reset()

    def fit(self, x: Tensor | Iterable[Tensor]) -> SeparablePCA:
        """x: samples (batch, *shape), floats or bytes, or batches of them. Sums are kept in float64.

        Raises ValueError for fewer than 2 samples, shapes that differ or do not fit the modes and ranks, and a number
        that is not finite (it says where).
        """
        self._reset()
        for batch in (x,) if isinstance(x, Tensor) else x:
            self._add(batch)
        self._solve()
        return self

    def partial_fit(self, x: Tensor) -> SeparablePCA:
        """As `fit`, keeping what was seen before; each call solves for the components anew, from 2 samples on."""
        self._add(x)
        if self.n_samples_seen_ >= 2:
            self._solve()
        return self

    def transform(self, x: Tensor) -> Tensor:
        """The code (batch, *ranks) of samples (batch, *shape); differentiable."""
        mean = self._fitted_mean()
        check_dtype(x)
        code = self._by_mode(x.to(mean.dtype), "x") - self._by_mode(mean[None], "mean")
        for component in self.components_:
            # The axis of the mode in front becomes the last; after all modes their order is that of before.
            code = torch.tensordot(code, component, dims=([1], [1]))
        return code

    def inverse_transform(self, z: Tensor) -> Tensor:
        """The samples (batch, *shape) of a code (batch, *ranks)."""
        mean = self._fitted_mean()
        if z.shape[1:] != self.ranks:
            raise ValueError(f"z: expected (batch, {', '.join(map(str, self.ranks))}), got {list(z.shape)}")
        for component in self.components_:
            z = torch.tensordot(z, component, dims=([1], [0]))
        z = z.reshape(len(z), *(mean.shape[axis] for axis in self._axes))
        return z.permute(0, *(1 + self._axes.index(axis) for axis in range(mean.ndim))) + mean

    @torch.no_grad()
    def explained_variance_ratio(self, x: Tensor) -> float:
        """1 − ‖x − inverse_transform(transform(x))‖² / ‖x − mean_‖² for samples (batch, *shape), seen or new."""
        code = self.transform(x)
        lost = (x.to(self.mean_.dtype) - self.inverse_transform(code)).double().square().sum()
        return 1 - float(lost / (x.to(self.mean_.dtype) - self.mean_).double().square().sum())

    def compression_ratio(self, samples: int | None = None) -> float:
        """Values of the data by values stored: of codes, or of so many codes, the mean and components."""
        size, code = self._fitted_mean().numel(), math.prod(self.ranks)
        if samples is None:
            return size / code
        return samples * size / (samples * code + size + sum(component.numel() for component in self.components_))

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, complete or not at all; `partial_fit` can go on from it.

        Raises ValueError before `fit`.
        """
        self._fitted_mean()
        assert self._mean is not None
        tensors = {"mean": self._mean, "discarded": torch.tensor(self.discarded_variance_ratio_, dtype=torch.float64)}
        for name, parts in (
            ("scatter", self._scatter), ("components", self.components_), ("variance", self.mode_variance_)
        ):  # fmt: skip
            tensors |= {f"{name}.{n}": part for n, part in enumerate(parts)}
        metadata = {"ranks": self.ranks, "modes": self.modes, "count": self.n_samples_seen_}
        save_state(path, _KIND, _VERSION, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> SeparablePCA:
        """Reads a file of `save`. Raises CorruptWeightError for a damaged one, ValueError for one of something else."""
        tensors, metadata = load_state(path, _KIND, _VERSION)
        require_finite(tensors, path)
        with reading_metadata(path):
            modes = [[int(axis) for axis in mode] for mode in metadata["modes"]]
            pca = cls([int(rank) for rank in metadata["ranks"]], modes=modes)
            pca.n_samples_seen_, pca._dtype = int(metadata["count"]), tensors["components.0"].dtype
            if pca.n_samples_seen_ < 2 or not pca._dtype.is_floating_point:
                raise ValueError(f"expected floats of 2 samples, got {pca._dtype} of {pca.n_samples_seen_}")
            pca._mean = take(tensors, "mean", torch.float64, [None] * len(pca._axes), path)
            sizes = pca._by_mode(pca._mean[None], "mean").shape[1:]
        components, variances = [], []
        for n, (rank, size) in enumerate(zip(pca.ranks, sizes, strict=True)):
            pca._scatter.append(take(tensors, f"scatter.{n}", torch.float64, (size, size), path))
            components.append(take(tensors, f"components.{n}", pca._dtype, (rank, size), path))
            variances.append(take(tensors, f"variance.{n}", pca._dtype, (size,), path))
        pca._set(components, variances, take(tensors, "discarded", torch.float64, (len(sizes),), path).tolist())
        return pca

    def _reset(self) -> None:
        self.n_samples_seen_ = 0
        self._mean: Tensor | None = None
        self._scatter: list[Tensor] = []
        if hasattr(self, "components_"):
            del self.components_

    @torch.no_grad()
    def _add(self, x: Tensor) -> None:
        check_dtype(x)
        data = self._by_mode(x, "x").double()
        if self._mean is not None and x.shape[1:] != self._mean.shape:
            raise ValueError(f"x: expected (batch, {', '.join(map(str, self._mean.shape))}), got {list(x.shape)}")
        refuse_not_finite(x)
        if not len(data):
            return
        if self._mean is None:
            self._mean = data.new_zeros(x.shape[1:])
            self._scatter = [data.new_zeros(size, size) for size in data.shape[1:]]
            self._dtype = x.dtype if x.is_floating_point() else torch.float32
        mean = x.mean(0, dtype=torch.float64)
        self.n_samples_seen_, self._mean, step = combined(self.n_samples_seen_, self._mean, len(data), mean)
        centred, step = data - self._by_mode(mean[None], "mean"), self._by_mode(step[None], "mean")
        for n, scatter in enumerate(self._scatter):
            scatter += _mode_scatter(centred, n) + _mode_scatter(step, n)

    def _solve(self) -> None:
        if self._mean is None or self.n_samples_seen_ < 2:
            raise ValueError(f"x: expected at least 2 samples, got {self.n_samples_seen_}")
        components, variances, discarded = [], [], list[float]()
        for scatter, rank in zip(self._scatter, self.ranks, strict=True):
            values, vectors = torch.linalg.eigh(scatter / (self.n_samples_seen_ - 1))
            values, component = values.flip(0).clamp_min(0), vectors.mT.flip(0)[:rank]
            components.append(with_signs(component).to(self._dtype).contiguous())
            variances.append(values.to(self._dtype))
            total = float(values.sum())
            discarded.append(float(values[rank:].sum()) / total if total else 0.0)
        self._set(components, variances, discarded)

    def _set(self, components: list[Tensor], variances: list[Tensor], discarded: Sequence[float]) -> None:
        assert self._mean is not None
        self.components_, self.mode_variance_, self.mean_ = components, variances, self._mean.to(self._dtype, copy=True)
        self.discarded_variance_ratio_ = tuple(discarded)

    def _by_mode(self, x: Tensor, name: str) -> Tensor:
        """Samples with one axis for each mode."""
        fitted = hasattr(self, "components_")
        if x.ndim != 1 + len(self._axes) or (fitted and x.shape[1:] != self.mean_.shape):
            wanted = ", ".join(map(str, self.mean_.shape)) if fitted else f"{len(self._axes)} axes"
            raise ValueError(f"{name}: expected (batch, {wanted}), got {list(x.shape)}")
        sizes = [math.prod(x.shape[1 + axis] for axis in mode) for mode in self.modes]
        if any(rank > size for rank, size in zip(self.ranks, sizes, strict=True)):
            raise ValueError(f"ranks: expected at most the sizes of modes, {sizes}, got {list(self.ranks)}")
        return x.permute(0, *(1 + axis for axis in self._axes)).reshape(len(x), *sizes)

    def _fitted_mean(self) -> Tensor:
        if not hasattr(self, "components_"):
            raise ValueError("SeparablePCA: expected a fitted one, got one without components: call fit first")
        return self.mean_


def _mode_scatter(data: Tensor, mode: int) -> Tensor:
    """Σ of unfoldings' products, unfold_n(x) unfold_n(x)ᵀ (size_n, size_n), over samples (batch, *sizes)."""
    unfolded = data.movedim(1 + mode, 0).flatten(1)
    return unfolded @ unfolded.mT

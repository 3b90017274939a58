"""Principal components with few features, or few groups of features: soft-thresholded power iterations, deflated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from infold.tokenizers._files import load_state, reading_metadata, require_finite, save_state, take
from infold.tokenizers.rows import check_dtype, refuse_not_finite, with_signs

_KIND, _VERSION = "sparse-pca", 1


class SparsePCA:
    """Sparse components of data, one after the other.

    With centred samples X, of which X_g are the n_g features of group g, a component maximises
    Σ_g max(‖X_gᵀz‖ − γ√n_g, 0)² over unit z, by power iterations ("Generalized power method for sparse PCA", Journée et
    al. 2010; its thresholding is that of Witten et al. 2009). The data are then deflated by the component's scores (the
    Schur complement of Mackey 2008), so that each component is chosen for the variance that it adds to those before.

    penalty: γ, from 0 (plain PCA) to below 1, as a share of the least one that leaves no feature.
    sparsity: instead, how many features (with groups: groups) each component has; γ then follows (Shen & Huang 2008).
    groups: a group index for each feature (a patch, a channel, a window): a group is used whole or not at all. None:
        each feature alone.
    refit: loadings are those of most variance on the features found (Journée et al.), not the shrunk ones.

    After `fit`, in the dtype of the data (float32 for bytes): components_ (k, d) of unit norm, largest entry positive,
    not orthogonal in general; mean_ (d); explained_variance_ (k), what each component's scores add to those before
    (Zou et al. 2006); explained_variance_ratio_ (k); n_iter_ (k ints).
    """

    components_: Tensor
    mean_: Tensor
    explained_variance_: Tensor
    explained_variance_ratio_: Tensor
    _projection: Tensor
    n_iter_: list[int]
    n_samples_seen_: int
    n_features_in_: int

    def __init__(
        self,
        n_components: int,
        *,
        penalty: float | None = None,
        sparsity: int | None = None,
        groups: Tensor | Sequence[int] | None = None,
        refit: bool = True,
        max_iter: int = 1000,
        tol: float = 1e-9,
    ) -> None:
        """tol: a component is found when an iteration moves its unit scores z by less. Raises ValueError."""
        if n_components < 1:
            raise ValueError(f"n_components: expected at least 1, got {n_components}")
        if (penalty is None) == (sparsity is None):
            raise ValueError(f"penalty, sparsity: expected one of them, got {penalty} and {sparsity}")
        if penalty is not None and not 0 <= penalty < 1:
            raise ValueError(f"penalty: expected 0 <= penalty < 1, got {penalty}")
        if sparsity is not None and sparsity < 1:
            raise ValueError(f"sparsity: expected at least 1, got {sparsity}")
        if max_iter < 1:
            raise ValueError(f"max_iter: expected at least 1, got {max_iter}")
        self.n_components_ = n_components
        self.penalty, self.sparsity, self.refit = penalty, sparsity, refit
        self.groups = None if groups is None else torch.as_tensor(groups)
        if self.groups is not None and (self.groups.ndim != 1 or self.groups.dtype.is_floating_point):
            raise ValueError(f"groups: expected integers (features), got {self.groups.dtype} {list(self.groups.shape)}")
        self.max_iter, self.tol = max_iter, tol

    @torch.no_grad()
    def fit(self, x: Tensor) -> SparsePCA:
        """x: (samples, features), floats or bytes, whole; computed in float64.

        Raises ValueError for a number that is not finite (it says where), groups of another length, and more
        components than the rank of the data.
        """
        check_dtype(x)
        if x.ndim != 2 or x.shape[0] < 2 or x.shape[1] < 1:
            raise ValueError(f"x: expected (samples, features) with at least 2 samples, got {list(x.shape)}")
        n, d = x.shape
        refuse_not_finite(x)
        groups = _Groups.of(self.groups, d, x.device)
        if self.sparsity is not None and self.sparsity > len(groups.sizes):
            what = "features" if self.groups is None else "groups"
            raise ValueError(f"sparsity: expected at most {len(groups.sizes)} {what}, got {self.sparsity}")
        data = x.double()
        mean = data.mean(0)
        data = data - mean
        # Inner products of features are all that counts, and R keeps them.
        data = torch.linalg.qr(data, mode="r").R if n > d else data
        total = float(data.square().sum())
        limit = total * max(n, d) * torch.finfo(torch.float64).eps
        rest, components, variances, self.n_iter_ = data, [], [], []
        for found in range(self.n_components_):
            if float(rest.square().sum()) <= limit:
                raise ValueError(
                    f"n_components: expected at most {found}, the rank of the data, got {self.n_components_}"
                )
            component, iterations = self._component(rest, groups)
            scores = rest @ component
            variances.append(float(scores.square().sum()) / (n - 1))
            unit = scores / scores.norm()
            rest = rest - torch.outer(unit, unit @ rest)
            components.append(component)
            self.n_iter_.append(iterations)
        dtype = x.dtype if x.is_floating_point() else torch.float32
        stacked = with_signs(torch.stack(components))
        self.components_ = stacked.to(dtype)
        self._projection = torch.linalg.pinv(stacked).to(dtype)
        self.mean_ = mean.to(dtype)
        self.explained_variance_ = torch.tensor(variances, dtype=dtype, device=x.device)
        self.explained_variance_ratio_ = self.explained_variance_ / (total / (n - 1))
        self.n_samples_seen_, self.n_features_in_ = n, d
        return self

    def transform(self, x: Tensor) -> Tensor:
        """The coordinates (samples, k) of the least-squares approximation of x (samples, features) by components."""
        self._require_fitted()
        check_dtype(x)
        if x.ndim != 2 or x.shape[1] != self.n_features_in_:
            raise ValueError(f"x: expected (samples, {self.n_features_in_}), got {list(x.shape)}")
        return (x.to(self.mean_.dtype) - self.mean_) @ self._projection

    def inverse_transform(self, z: Tensor) -> Tensor:
        """Coordinates (samples, k) → (samples, features)."""
        self._require_fitted()
        if z.ndim != 2 or z.shape[1] != self.n_components_:
            raise ValueError(f"z: expected (samples, {self.n_components_}), got {list(z.shape)}")
        return z @ self.components_ + self.mean_

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, complete or not at all. Raises ValueError before `fit`."""
        self._require_fitted()
        tensors = {name: getattr(self, attribute) for name, attribute in _TENSORS.items()}
        if self.groups is not None:
            tensors["groups"] = self.groups
        options = {"n_components": self.n_components_, "penalty": self.penalty, "sparsity": self.sparsity,
                   "refit": self.refit, "max_iter": self.max_iter, "tol": self.tol}  # fmt: skip
        save_state(path, _KIND, _VERSION, tensors, {**options, "n_iter": self.n_iter_, "count": self.n_samples_seen_})

    @classmethod
    def load(cls, path: str | Path) -> SparsePCA:
        """Reads a file of `save`. Raises CorruptWeightError for a damaged one, ValueError for one of something else."""
        tensors, metadata = load_state(path, _KIND, _VERSION)
        require_finite(tensors, path)
        with reading_metadata(path):
            penalty, sparsity = metadata["penalty"], metadata["sparsity"]
            pca = cls(
                int(metadata["n_components"]),
                penalty=None if penalty is None else float(penalty),
                sparsity=None if sparsity is None else int(sparsity),
                groups=tensors.get("groups"),
                refit=bool(metadata["refit"]),
                max_iter=int(metadata["max_iter"]),
                tol=float(metadata["tol"]),
            )
            pca.n_iter_, pca.n_samples_seen_ = list(map(int, metadata["n_iter"])), int(metadata["count"])
            if len(pca.n_iter_) != pca.n_components_:
                raise ValueError(f"n_iter: expected {pca.n_components_}, got {len(pca.n_iter_)}")
            dtype, k, d = tensors["mean"].dtype, pca.n_components_, tensors["mean"].numel()
            if not dtype.is_floating_point:
                raise ValueError(f"mean: expected floats, got {dtype}")
            pca.n_features_in_ = d
        shapes = {"components": (k, d), "projection": (d, k), "mean": (d,), "variance": (k,), "ratio": (k,)}
        for name, shape in shapes.items():
            setattr(pca, _TENSORS[name], take(tensors, name, dtype, shape, path))
        if pca.groups is not None:
            take(tensors, "groups", pca.groups.dtype, (d,), path)
        return pca

    def _require_fitted(self) -> None:
        if not hasattr(self, "components_"):
            raise ValueError("SparsePCA: expected a fitted one, got one without components: call fit first")

    def _component(self, data: Tensor, groups: _Groups) -> tuple[Tensor, int]:
        """The next component (d), of unit norm and any sign, and the iterations that it took."""
        gram = data @ data.mT
        peak, strongest = groups.strongest(data)
        threshold = None if self.penalty is None else self.penalty * peak
        # Power iterations end in the maximum they start nearest to; the second start can always be thresholded.
        runs = [self._iterate(data, groups, start, threshold) for start in (_leading(gram), strongest)]
        best = max(runs, key=lambda run: run.objective)
        if not self.refit:
            return best.component, best.iterations
        component = torch.zeros_like(best.component)
        block = data[:, best.support]
        if block.shape[1] <= block.shape[0]:
            component[best.support] = _leading(block.mT @ block)
        else:
            component[best.support] = block.mT @ _leading(block @ block.mT)
        unit: Tensor = component / component.norm()
        return unit, best.iterations

    def _iterate(self, data: Tensor, groups: _Groups, scores: Tensor, threshold: float | None) -> _Run:
        for iterations in range(1, self.max_iter + 1):
            loads = data.mT @ scores
            component, support = groups.shrink(loads, threshold, self.sparsity)
            norm = component.norm()
            if norm == 0:
                return _Run(component, support, -math.inf, iterations)
            component = component / norm
            variance = (data @ component).square().sum()
            moved = data @ component / variance.sqrt() if variance > 0 else scores
            step = float((moved - scores).norm())
            scores = moved
            if step <= self.tol:
                break
        return _Run(component, support, float(norm if threshold is not None else variance), iterations)


#: What a file holds, and the attributes that it is.
_TENSORS = {"components": "components_", "projection": "_projection", "mean": "mean_",
            "variance": "explained_variance_", "ratio": "explained_variance_ratio_"}  # fmt: skip


class _Run(NamedTuple):
    component: Tensor
    support: Tensor
    objective: float
    iterations: int


class _Groups(NamedTuple):
    """place: the group (0 to groups − 1) of each feature; sizes: features of each."""

    place: Tensor
    sizes: Tensor

    @staticmethod
    def of(groups: Tensor | None, features: int, device: torch.device) -> _Groups:
        if groups is None:
            return _Groups(torch.arange(features, device=device), torch.ones(features, device=device).double())
        if len(groups) != features:
            raise ValueError(f"groups: expected one for each of {features} features, got {len(groups)}")
        _, index, sizes = torch.unique(groups.to(device), return_inverse=True, return_counts=True)
        return _Groups(index, sizes.double())

    def strongest(self, data: Tensor) -> tuple[float, Tensor]:
        """The least γ that leaves nothing, max_g ‖X_g‖₂/√n_g, and the unit z at which that group passes any less."""
        if len(self.sizes) == len(self.place):
            norms = data.norm(dim=0)
            best = int(norms.argmax())
            return float(norms[best]), data[:, best] / norms[best]
        order = self.place.argsort(stable=True)
        blocks = torch.split(data[:, order], self.sizes.long().tolist(), dim=1)
        peaks = [float(torch.linalg.eigvalsh(_smaller_gram(block))[-1] / block.shape[1]) for block in blocks]
        best = max(range(len(peaks)), key=peaks.__getitem__)
        return math.sqrt(peaks[best]), torch.linalg.svd(blocks[best], full_matrices=False).U[:, 0]

    def shrink(self, loads: Tensor, threshold: float | None, sparsity: int | None) -> tuple[Tensor, Tensor]:
        """Loads (d), each group's norm less γ√n_g, and the features (bool, d) of the groups that are left.

        With a sparsity, γ is the largest that leaves so many groups.
        """
        squares = torch.zeros_like(self.sizes).index_add_(0, self.place, loads.square())
        strength = (squares / self.sizes).sqrt()
        if threshold is None:
            assert sparsity is not None
            highest = strength.topk(min(sparsity + 1, len(strength)))
            kept = torch.zeros_like(strength, dtype=torch.bool)
            kept[highest.indices[:sparsity]] = True
            threshold = float(highest.values[sparsity]) if sparsity < len(strength) else 0.0
            if threshold == float(highest.values[0]):
                threshold = 0.0  # all the same: nothing would be left
        else:
            kept = strength > threshold
        share = torch.where(kept, 1 - threshold / strength.clamp_min(torch.finfo(strength.dtype).tiny), 0.0)
        return loads * share[self.place], kept[self.place]


def _smaller_gram(block: Tensor) -> Tensor:
    return block.mT @ block if block.shape[1] <= block.shape[0] else block @ block.mT


def _leading(gram: Tensor) -> Tensor:
    """The leading eigenvector of a symmetric matrix."""
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors[:, -1]

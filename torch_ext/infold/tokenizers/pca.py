"""Principal components of any number of samples: exact, randomized, or from a stream."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from infold._library import CorruptWeightError, ops
from infold.tokenizers._files import load_state, reading_metadata, require_finite, save_state
from infold.tokenizers.blocks import Blocks
from infold.tokenizers.moments import Moments
from infold.tokenizers.rows import (
    check_rows,
    full_precision,
    refuse_large_squares,
    rounded,
    with_signs,
)

Method = Literal["auto", "moments", "blocks", "randomized", "exact"]
#: Features up to which a scatter matrix is cheap: 134 MB in float64, and seconds to decompose.
MAX_MOMENT_FEATURES = 4096
_KIND, _VERSION = "pca", 1
#: Directions beyond those asked for, of which the last are less right, and power iterations (Halko et al. 2011).
_OVERSAMPLED, _ITERATIONS = 10, 7


class PCA:
    """Principal component analysis, with scikit-learn's names.

    n_components: how many, k.
    method: ``"moments"``, exact from a stream by the d × d scatter matrix (an SVD while one batch of few samples is
        all); ``"blocks"``, from a stream in O(k·d) memory, close to exact; ``"auto"``, the first for up to 4,096
        features, else the second. Of all samples at once: ``"exact"``, an SVD in float64; ``"randomized"`` (Halko et
        al. 2011).
    whiten: `transform` divides by each component's standard deviation; components_ stay orthonormal.
    seed: of ``"randomized"``.

    Samples are uint8 (summed in integers by ``"moments"``: the quickest), float16, bfloat16, float32 or float64, on any
    device. Results are float32, for float64 samples float64, where the samples were. Signs are set so that each
    component's largest entry is positive.
    """

    def __init__(self, n_components: int, *, method: Method = "auto", whiten: bool = False, seed: int = 0) -> None:
        """Raises ValueError for less than one component and an unknown method."""
        if n_components < 1:
            raise ValueError(f"n_components: expected one or more, got {n_components}")
        if method not in get_args(Method):
            raise ValueError(f"method: expected one of {', '.join(get_args(Method))}, got {method!r}")
        self.n_components_, self.method, self.whiten, self.seed = n_components, method, whiten, seed
        self._reset()

    def _reset(self) -> None:
        self._stream: Moments | Blocks | None = None
        self._dtype = torch.float32
        self._count = 0
        #: Components, variances and mean; None when there are newer samples.
        self._result: tuple[Tensor, Tensor, Tensor] | None = None
        self._total = torch.zeros(())

    def fit(self, x: Tensor | Iterable[Tensor]) -> PCA:
        """Forgets all samples and takes x: (samples, features), or batches of that.

        Raises ValueError for samples that are not finite (it says where), of another shape or dtype, and for batches
        where the method needs all samples at once.
        """
        self._reset()
        if self.method in ("randomized", "exact"):
            if not isinstance(x, Tensor):
                raise ValueError(f"x: expected a tensor, since method {self.method!r} needs all samples at once")
            check_rows(x)
            with full_precision(x.device):
                self._fit_whole(x.detach())
            return self
        for batch in [x] if isinstance(x, Tensor) else x:
            self.partial_fit(batch)
        if self._stream is None:
            raise ValueError("x: expected a batch or more, got none")
        return self

    def partial_fit(self, x: Tensor) -> PCA:
        """Adds samples (samples, features). Components are computed when they are next asked for.

        Raises ValueError as `fit`, and for the methods that need all samples at once; a refused batch changes nothing.
        """
        if self.method in ("randomized", "exact"):
            raise ValueError(f"method: expected moments or blocks to take batches, got {self.method!r}")
        stream = self._stream
        check_rows(x, None if stream is None else len(stream.mean))
        if stream is None:
            if x.dtype == torch.float64:
                self._dtype = torch.float64
            stream = self._new_stream(x.shape[1], x.device)
        with full_precision(x.device):
            stream.update(x.detach())
        self._stream, self._count, self._result = stream, stream.count, None
        return self

    def _new_stream(self, features: int, device: torch.device) -> Moments | Blocks:
        """Raises ValueError for fewer features than components."""
        if self.n_components_ > features:
            raise ValueError(f"n_components: expected at most {features}, the features, got {self.n_components_}")
        if self.method == "moments" or (self.method == "auto" and features <= MAX_MOMENT_FEATURES):
            return Moments(features, self._dtype, device)
        # The last ones kept are the least right, so more are; fewer lost 0.2% of a thousand images' variance.
        kept = self.n_components_ + max(64, self.n_components_ // 8)
        return Blocks(features, kept, self._dtype, device)

    def merge(self, other: PCA) -> PCA:
        """Adds the samples that another PCA has seen. Of moments the result is that of one fit to all of them.

        Raises ValueError where the two differ in method or features, or blocks in components.
        """
        self._check_merge(other)
        mine, theirs = self._stream, copy.deepcopy(other._stream)
        if theirs is None:
            return self
        if mine is None:
            self._stream, self._count, self._dtype, self._result = theirs, theirs.count, other._dtype, None
            return self
        with full_precision(mine.mean.device):
            mine.merge(theirs)  # type: ignore[arg-type]
        self._count, self._result = mine.count, None
        return self

    def _check_merge(self, other: PCA) -> None:
        if {self.method, other.method} & {"randomized", "exact"}:
            raise ValueError(f"merge: expected moments or blocks, got {self.method!r} and {other.method!r}")
        theirs = other._stream
        if theirs is None:
            return
        mine = self._stream or self._new_stream(len(theirs.mean), torch.device("meta"))
        if _kind_of(mine) != _kind_of(theirs):
            got = f"{_kind_of(mine)} and {_kind_of(theirs)}"
            raise ValueError(f"merge: expected one method and as many features, got {got}")

    def all_merge(self, group: torch.distributed.ProcessGroup | None = None) -> PCA:
        """Merges the PCAs of all processes of a torch.distributed group; each then has the same one, to the bit.

        Processes without samples take part. Raises ValueError in all of them where none has any, or two do not `merge`.
        """
        dist = torch.distributed
        # Tensors on a GPU would come back there in every process: of another's number, if it has one.
        own = copy.copy(self)
        own._result, own._total = None, torch.zeros(())
        if self._stream is not None:
            own._stream = copy.copy(self._stream)
            own._stream.to(torch.device("cpu"))
        states = [own] * dist.get_world_size(group)
        dist.all_gather_object(states, own, group=group)
        seen = [state for state in states if state._stream is not None]
        if not seen:
            raise ValueError("all_merge: expected samples in one process or more, got none")
        # Every process makes every check, so that none goes on alone.
        for state in states:
            state._check_merge(seen[0])
        device = self._stream.mean.device if self._stream is not None else None
        merged = seen[0]
        for state in seen[1:]:
            merged.merge(state)
        self._stream, self._count, self._dtype, self._result = merged._stream, merged._count, merged._dtype, None
        if device is not None and self._stream is not None:
            self._stream.to(device)
        return self

    @property
    def n_samples_seen_(self) -> int:
        return self._count

    @property
    def n_features_in_(self) -> int:
        return len(self.mean_)

    @property
    def components_(self) -> Tensor:
        """(k, features), orthonormal rows by falling variance."""
        return self._fitted()[0]

    @property
    def explained_variance_(self) -> Tensor:
        """(k), sums of squares over samples − 1."""
        return self._fitted()[1]

    @property
    def mean_(self) -> Tensor:
        """(features)."""
        return self._fitted()[2]

    @property
    def explained_variance_ratio_(self) -> Tensor:
        """(k), shares of the variance of all features; zeros where there is no variance."""
        variance = self._fitted()[1]
        return variance / self._total.to(variance).clamp(min=torch.finfo(variance.dtype).tiny)

    @property
    def singular_values_(self) -> Tensor:
        """(k), of the centred samples."""
        return (self._fitted()[1] * (self._count - 1)).sqrt()

    @property
    def noise_variance_(self) -> float:
        """The mean variance of the directions left out (Tipping and Bishop 1999); 0 if there are none."""
        components, variance, _ = self._fitted()
        left = min(components.shape[1], self._count) - len(components)
        return max(0.0, float(self._total - variance.double().sum())) / left if left > 0 else 0.0

    def transform(self, x: Tensor) -> Tensor:
        """(..., features) → (..., k), with gradients. Raises ValueError for other features, and as `components_`."""
        tokens: Tensor = ops.pca_project(x, self.components_, self.mean_, self.scale())
        return tokens

    def inverse_transform(self, z: Tensor) -> Tensor:
        """(..., k) → (..., features), with gradients."""
        scale = self.scale()
        x: Tensor = ops.pca_reconstruct(z, self.components_, self.mean_, None if scale is None else 1 / scale)
        return x

    def scale(self) -> Tensor | None:
        """(k), what whitening multiplies tokens by, or None.

        Raises ValueError for a component of no more variance than rounding gives.
        """
        if not self.whiten:
            return None
        components, variance, mean = self._fitted()
        eps = torch.finfo(variance.dtype).eps
        # A scatter's rounding is a share of the largest variance; an SVD's, of the largest deviation.
        share = 8 * eps if isinstance(self._stream, Moments) else (8 * eps) ** 2
        # And samples are no nearer to their mean than their dtype can say.
        least = share * variance[0].double() + (components.double() * mean * eps).square().sum(1)
        none = (variance <= least).nonzero()
        if len(none):
            raise ValueError(f"whiten: expected components of some variance, got none in component {int(none[0])}")
        return variance.rsqrt()

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, complete or not at all; `partial_fit` and `merge` can go on from it.

        Samples may still be too few for components. Raises ValueError where there are none.
        """
        try:
            components, variance, mean = self._fitted()
        except ValueError:
            if self._stream is None:
                raise
            mean = self._stream.mean.to(self._dtype)
            components, variance = mean.new_empty(0, len(mean)), mean.new_empty(0)
        tensors = {"fitted.components": components, "fitted.variance": variance, "fitted.mean": mean,
                   "fitted.total": self._total.reshape(1)}  # fmt: skip
        stream = self._stream
        if stream is not None:
            tensors |= stream.tensors()
        options = {"n_components": self.n_components_, "method": self.method, "whiten": self.whiten, "seed": self.seed}
        state = {"stream": stream and stream.name, "kept": stream.kept if isinstance(stream, Blocks) else None}
        save_state(path, _KIND, _VERSION, tensors, {**options, **state, "count": self._count})

    @classmethod
    def load(cls, path: str | Path) -> PCA:
        """Reads a file of `save`. Raises CorruptWeightError for a damaged one, ValueError for one of something else."""
        tensors, metadata = load_state(path, _KIND, _VERSION)
        path = Path(path)
        require_finite(tensors, path)
        with reading_metadata(path):
            pca = cls(
                int(metadata["n_components"]),
                method=metadata["method"],
                whiten=bool(metadata["whiten"]),
                seed=int(metadata["seed"]),
            )
            pca._count = int(metadata["count"])
            components, variance, mean, total = (
                tensors[f"fitted.{name}"] for name in ("components", "variance", "mean", "total")
            )
            shapes = [list(t.shape) for t in (components, variance, mean, total)]
            k, features = pca.n_components_, shapes[2][0] if shapes[2] else 0
            # A stream that had too few samples has no components yet.
            k = 0 if metadata["stream"] and not len(components) else k
            if shapes != [[k, features], [k], [features], [1]]:
                raise ValueError(f"expected tensors of {k} components, got {json.dumps(shapes)}")
            pca._dtype, pca._total = components.dtype, total[0]
            pca._result = (components, variance, mean) if k else None
            if metadata["stream"] == Moments.name:
                pca._stream = Moments.of(pca._count, pca._dtype, tensors, path)
            elif metadata["stream"] == Blocks.name:
                pca._stream = Blocks.of(pca._count, int(metadata["kept"]), tensors, path)
        if pca._stream is not None and len(pca._stream.mean) != features:
            raise CorruptWeightError(str(path), "mean", f"expected {features} features, got {len(pca._stream.mean)}")
        return pca

    def _fitted(self) -> tuple[Tensor, Tensor, Tensor]:
        """Components, variances and mean of the samples so far."""
        if self._result is not None:
            return self._result
        if self._stream is None:
            raise ValueError("PCA: expected fit or partial_fit before, got no samples")
        self._check_count()
        with full_precision(self._stream.mean.device):
            components, squares, total = self._stream.spectrum(self.n_components_)
        return self._set(components, squares, self._stream.mean, total)

    def _check_count(self) -> None:
        if self._count < max(2, self.n_components_):
            expected = f"at least {max(2, self.n_components_)} samples for {self.n_components_} components"
            raise ValueError(f"x: expected {expected}, got {self._count}")

    def _set(self, components: Tensor, squares: Tensor, mean: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        variance = squares / (self._count - 1)
        self._total = total / (self._count - 1)
        self._result = (
            with_signs(components).to(self._dtype).contiguous(),
            variance.to(self._dtype),
            # A stream's own stays its own.
            mean.to(self._dtype, copy=True),
        )
        return self._result

    def _fit_whole(self, x: Tensor) -> None:
        self._count, self._dtype = len(x), torch.float64 if x.dtype == torch.float64 else torch.float32
        self._check_count()
        k = self.n_components_
        if k > x.shape[1]:
            raise ValueError(f"n_components: expected at most {x.shape[1]}, the features, got {k}")
        parts = torch.split(x, 4096)
        mean = torch.stack([part.sum(0, dtype=torch.float64) for part in parts]).sum(0) / len(x)
        total = torch.stack([(part.double() - mean).square().sum() for part in parts]).sum()
        refuse_large_squares(total, x, self._dtype)
        if self.method == "exact":
            centred = x.double() - mean
            _, values, components = torch.linalg.svd(centred, full_matrices=False)
        else:
            values, components = self._randomized(x, mean)
        self._set(components[:k], values[:k].double().square(), mean, total)

    def _randomized(self, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Singular values and right vectors of x − mean, by products with few columns."""
        features, dtype = x.shape[1], self._dtype
        size = min(self.n_components_ + _OVERSAMPLED, features, len(x))
        generator = torch.Generator().manual_seed(self.seed)
        basis = torch.randn(size, features, generator=generator, dtype=dtype).to(x.device)
        shift, rest = rounded(mean, dtype)

        def tall_of(basis: Tensor) -> Tensor:
            product: Tensor = ops.pca_project(x, basis, shift)
            tall: Tensor = torch.linalg.qr(product - basis @ rest)[0]
            return tall

        for _ in range(_ITERATIONS):
            basis = torch.linalg.qr(_transposed_product(tall_of(basis), x, shift, rest).T)[0].T
        _, values, components = torch.linalg.svd(
            _transposed_product(tall_of(basis), x, shift, rest), full_matrices=False
        )
        return values, components


def _transposed_product(tall: Tensor, x: Tensor, mean: Tensor, rest: Tensor) -> Tensor:
    """tallᵀ·(x − mean − rest), without a centred copy of x."""
    out = tall.new_zeros(tall.shape[1], x.shape[1])
    for rows, part in zip(torch.split(tall, 1024), torch.split(x, 1024), strict=True):
        out.addmm_(rows.T, part.to(tall.dtype) - mean - rest)
    return out


def _kind_of(stream: Moments | Blocks) -> str:
    kept = f", {stream.kept} directions kept" if isinstance(stream, Blocks) else ""
    return f"{stream.name} of {len(stream.mean)} features{kept}"

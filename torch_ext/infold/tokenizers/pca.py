"""Principal component analysis: exact while it streams, incremental in bounded memory, randomized, or exact at once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from infold._library import ops
from infold.tokenizers import _pca_files, factor
from infold.tokenizers.blocks import Blocks, new_blocks
from infold.tokenizers.gather import merge_ranks
from infold.tokenizers.moments import Moments
from infold.tokenizers.spectrum import Spectrum, check_batch, full_precision

if TYPE_CHECKING:
    from typing_extensions import Self

Method = Literal["auto", "moments", "blocks", "randomized", "exact"]

#: Features up to which "auto" keeps a scatter matrix: 134 MB of float64.
_MOMENTS_FEATURES = 4096


class PCA:
    """The directions of most variance, as `sklearn.decomposition.PCA` has them, on CPU and CUDA.

    n_components: k, at most the features and the samples.
    method: "moments": exact and streaming; a scatter matrix of features² float64. Of uint8 it is exact to the last bit,
        in any order and however sharded. Squaring halves the digits: components whose standard deviation is less than
        about 10⁻⁷ of the largest (3·10⁻⁴ in blocks of float32) are noise; "exact" still has them.
        "blocks": incremental (Ross et al., 2008); n_components·features and a batch, so for many features. Not exact:
        what falls below the components that it keeps, k + max(16, k/8), is lost.
        "randomized" (Halko et al., 2011) and "exact" (a singular value decomposition in float64) fit one tensor.
        "auto": moments up to 4,096 features, else blocks.
    whiten: whether `transform` gives each component a variance of one.
    seed: of the directions that "randomized" starts from.

    Batches are (samples, features) of uint8, float16, bfloat16, float32 or float64, and stay on their device; results
    are float32, or float64 where data was. Attributes are scikit-learn's. Raises ValueError for a wrong argument.
    """

    def __init__(self, n_components: int, *, method: Method = "auto", whiten: bool = False, seed: int = 0) -> None:
        if isinstance(n_components, bool) or not isinstance(n_components, int) or n_components < 1:
            raise ValueError(f"n_components: expected a positive integer, got {n_components!r}")
        if method not in get_args(Method):
            raise ValueError(f"method: expected one of {', '.join(get_args(Method))}, got {method!r}")
        if not isinstance(whiten, bool):
            raise ValueError(f"whiten: expected a bool, got {whiten!r}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed: expected an integer, got {seed!r}")
        self.n_components = n_components
        self.method: Method = method
        self.whiten = whiten
        self.seed = seed
        self._state: Moments | Blocks | None = None
        self._spectrum: Spectrum | None = None

    def fit(self, x: Tensor | Iterable[Tensor]) -> Self:
        """Fits a batch (samples, features), or all of an iterable of them, and forgets what was fitted before.

        An iterable is read once. Raises ValueError for a bad batch, and leaves the fit before it as it was.
        """
        if self.method in ("randomized", "exact"):
            self._spectrum = self._at_once(x)
            return self
        fresh = PCA(self.n_components, method=self.method)
        if isinstance(x, Tensor) or not isinstance(x, Iterable):
            fresh.partial_fit(x)
        else:
            for batch in x:
                fresh.partial_fit(batch)
        if fresh._state is None:
            raise ValueError("x: expected at least one batch, got none")
        self._state, self._spectrum = fresh._state, None
        return self

    def partial_fit(self, x: Tensor) -> Self:
        """Adds a batch (samples, features) to what was seen; components follow when they are next asked for.

        Raises ValueError for a bad batch, which leaves everything as it was.
        """
        if self.method in ("randomized", "exact"):
            raise ValueError(f"method: expected 'moments' or 'blocks' to add data, got {self.method!r}")
        if self._state is None:
            x = self._checked(x)
            with full_precision(x.device):
                state: Moments | Blocks
                if self._resolved(x.shape[1]) == "moments":
                    state = Moments.of(x)
                else:
                    state = new_blocks(self.n_components, x)
                    state.update(x)
            self._state = state
        else:
            with full_precision(self._state.device):
                self._state.update(x)
        self._spectrum = None
        return self

    def merge(self, other: PCA) -> Self:
        """Adds all that ``other`` has seen, as if it had been seen here; ``other`` stays as it is.

        Exact for moments; for blocks but for what either had left out. Raises ValueError for one of another method,
        number of components or features, or device, and for methods that keep no state.
        """
        if not isinstance(other, PCA):
            raise ValueError(f"other: expected a PCA, got {type(other).__name__}")
        if other.n_components != self.n_components:
            raise ValueError(f"other: expected n_components {self.n_components}, got {other.n_components}")
        for pca in (self, other):
            if pca.method in ("randomized", "exact"):
                raise ValueError(f"method: expected 'moments' or 'blocks' to merge, got {pca.method!r}")
        mine, theirs = self._state, other._state
        if self.method != other.method and "auto" not in (self.method, other.method):
            raise ValueError(f"other: expected method {self.method!r}, got {other.method!r}")
        if theirs is None:
            return self
        if mine is None:
            expected = self._resolved(theirs.features)
            if theirs.method != expected:
                raise ValueError(f"other: expected method {expected!r}, got {theirs.method!r}")
            self._state = theirs.to(theirs.device)
        else:
            if theirs.method != mine.method:
                raise ValueError(f"other: expected method {mine.method!r}, got {theirs.method!r}")
            if theirs.features != mine.features:
                raise ValueError(f"other: expected {mine.features} features, got {theirs.features}")
            if theirs.device != mine.device:
                raise ValueError(f"other: expected data on {mine.device}, got {theirs.device}")
            with full_precision(mine.device):
                # Both are of one class, which their methods name.
                mine.merge(theirs)  # type: ignore[arg-type]
        self._spectrum = None
        return self

    def all_merge(self, group: torch.distributed.ProcessGroup | None = None) -> Self:
        """Merges what all ranks of a process group have seen, in their order; all get the same bits.

        A rank that has seen nothing takes part. The first rank merges and sends the result, components included, to the
        others. group: None is the default one. Raises ValueError on every rank where `merge` would on one.
        """
        if self.method in ("randomized", "exact"):
            raise ValueError(f"method: expected 'moments' or 'blocks' to merge, got {self.method!r}")
        cpu = torch.device("cpu")
        device = cpu if self._state is None else self._state.device

        def compute(merged: PCA) -> None:
            if merged._can_compute():
                merged._computed()

        merged = merge_ranks(self._to(cpu), PCA.merge, compute, group)._to(device)
        self._state, self._spectrum = merged._state, merged._spectrum
        return self

    def transform(self, x: Tensor) -> Tensor:
        """Data (..., d) of any real dtype → components (..., k) in the dtype of ``components_``; differentiable.

        Raises ValueError for another number of features, and where whitening would divide by a variance of zero.
        """
        spectrum = self._computed()
        _check_last("x", x, spectrum.components.shape[1])
        return _project(x, spectrum, self._scale(spectrum))

    def inverse_transform(self, z: Tensor) -> Tensor:
        """Components (..., k) → data (..., d), without what the components leave out."""
        spectrum = self._computed()
        _check_last("z", z, self.n_components)
        return _reconstruct(z, spectrum, self._scale(spectrum))

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, atomically, from which `partial_fit` can go on. Raises ValueError before a fit."""
        if self._state is not None and self._can_compute():
            self._computed()
        elif self._spectrum is None and self._state is None:
            raise _unfitted()
        options = {
            "n_components": self.n_components,
            "method": self.method,
            "whiten": self.whiten,
            "seed": self.seed,
        }
        _pca_files.save(path, options, self._state, self._spectrum)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a file of `save`, onto the CPU.

        Raises CorruptWeightError or ValueError for a file that is damaged, of another version, or of something else.
        """
        options, state, spectrum = _pca_files.load(path)
        try:
            pca = cls(**options)
        except (TypeError, ValueError) as error:
            raise _pca_files.corrupt(path, "metadata", str(error)) from error
        pca._state, pca._spectrum = state, spectrum
        return pca

    def to(self, device: torch.device | str) -> Self:
        """Moves everything to a device, where later batches have to be."""
        device = torch.device(device)
        moved = self._to(device)
        self._state, self._spectrum = moved._state, moved._spectrum
        return self

    @property
    def components_(self) -> Tensor:
        """(k, d), orthonormal rows; the largest entry of each is positive."""
        return self._computed().components

    @property
    def mean_(self) -> Tensor:
        """(d)."""
        return self._computed().mean

    @property
    def explained_variance_(self) -> Tensor:
        """(k), float64, of n − 1 degrees of freedom, falling."""
        return self._computed().variance

    @property
    def explained_variance_ratio_(self) -> Tensor:
        """(k), float64, of the variance of all features; zero where that is zero."""
        spectrum = self._computed()
        return torch.where(spectrum.total > 0, spectrum.variance / spectrum.total, 0.0)

    @property
    def singular_values_(self) -> Tensor:
        """(k), float64, of the centred data."""
        spectrum = self._computed()
        return (spectrum.variance * (spectrum.samples - 1)).sqrt()

    @property
    def noise_variance_(self) -> float:
        """The mean variance of the components that were left out."""
        spectrum = self._computed()
        left_out = min(spectrum.samples, spectrum.components.shape[1]) - self.n_components
        return max(0.0, float(spectrum.total - spectrum.variance.sum())) / left_out if left_out else 0.0

    @property
    def n_components_(self) -> int:
        """The number of components, k."""
        return self.n_components

    @property
    def n_features_in_(self) -> int:
        """The number of features, d."""
        if self._state is not None:
            return self._state.features
        return self._computed().components.shape[1]

    @property
    def n_samples_seen_(self) -> int:
        """How many samples were fitted; 0 before any."""
        if self._state is not None:
            return self._state.count
        return 0 if self._spectrum is None else self._spectrum.samples

    def _resolved(self, features: int) -> str:
        if self.method != "auto":
            return self.method
        return "moments" if features <= _MOMENTS_FEATURES else "blocks"

    def _checked(self, x: object) -> Tensor:
        x = check_batch(x)
        if self.n_components > x.shape[1]:
            raise ValueError(f"n_components: expected at most the {x.shape[1]} features, got {self.n_components}")
        return x

    def _at_once(self, x: object) -> Spectrum:
        x = self._checked(x)
        if len(x) < self._least():
            raise ValueError(f"x: expected at least {self._least()} samples, got {len(x)}")
        with full_precision(x.device):
            if self.method == "exact":
                return factor.exact(x, self.n_components)
            return factor.randomized(x, self.n_components, self.seed)

    def _least(self) -> int:
        """Samples that the components need."""
        return max(2, self.n_components)

    def _can_compute(self) -> bool:
        return self.n_samples_seen_ >= self._least()

    def _computed(self) -> Spectrum:
        if self._spectrum is None:
            if self._state is None:
                raise _unfitted()
            if not self._can_compute():
                raise ValueError(
                    f"n_components: expected at least {self._least()} samples for {self.n_components} components, "
                    f"got {self._state.count}"
                )
            with full_precision(self._state.device):
                self._spectrum = self._state.spectrum(self.n_components)
        return self._spectrum

    def _scale(self, spectrum: Spectrum) -> Tensor | None:
        """(k), the deviation of each component, if they are whitened: apart from the components (math.md §6)."""
        if not self.whiten:
            return None
        scale = spectrum.variance.sqrt()
        # Below this, the deviation is what rounding left.
        least = float(spectrum.total.sqrt()) * torch.finfo(spectrum.components.dtype).eps
        bad = (scale <= least).nonzero()
        if len(bad):
            index = int(bad[0])
            raise ValueError(
                f"whiten: expected components of more than rounding's variance, got {float(scale[index]):g} as the "
                f"deviation of component {index}"
            )
        return scale

    def _to(self, device: torch.device) -> PCA:
        moved = PCA(self.n_components, method=self.method, whiten=self.whiten, seed=self.seed)
        moved._state = None if self._state is None else self._state.to(device)
        moved._spectrum = _moved(self._spectrum, device)
        return moved


def _moved(spectrum: Spectrum | None, device: torch.device) -> Spectrum | None:
    if spectrum is None:
        return None
    components, mean, variance, total, samples = spectrum
    return Spectrum(components.to(device), mean.to(device), variance.to(device), total.to(device), samples)


def _unfitted() -> ValueError:
    return ValueError("PCA: expected data, by fit or partial_fit, got none yet")


def _check_last(name: str, x: object, width: int) -> None:
    if not isinstance(x, Tensor) or x.is_complex() or x.dtype == torch.bool:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name}: expected a real tensor, got {got}")
    if not x.dim() or x.shape[-1] != width:
        raise ValueError(f"{name}: expected shape (..., {width}), got {tuple(x.shape)}")


def _project(x: Tensor, spectrum: Spectrum, scale: Tensor | None) -> Tensor:
    inverse = None if scale is None else 1 / scale
    projected: Tensor = ops.pca_project(x, spectrum.components, spectrum.mean, inverse)
    return projected


def _reconstruct(z: Tensor, spectrum: Spectrum, scale: Tensor | None) -> Tensor:
    reconstructed: Tensor = ops.pca_reconstruct(z, spectrum.components, spectrum.mean, scale)
    return reconstructed

"""Tokenizers: an image or a vector as a few principal components, in order of their variance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from infold._library import ops
from infold.tokenizers._files import load_state, reading_metadata, require_finite, save_state, take
from infold.tokenizers.monotone import MAX_SAMPLES, MonotoneSpline
from infold.tokenizers.patches import from_patches, to_patches
from infold.tokenizers.pca import PCA, Method

#: The names of the bands, by falling variance.
BANDS = ("hot", "warm", "cold")
_VERSION = 1

Data = Tensor | Iterable[Tensor]


class PCATokenizer(nn.Module):
    """Component tokens of inputs: ``((x − mean) · componentsᵀ) · scale``, on any device, differentiable.

    pca: a fitted `infold.tokenizers.PCA`; with ``whiten`` its scale is kept apart from the components.
    input_shape: one input's shape, for images and for `inverse`; by default (features,).
    patch_size: the edge of square patches, or one for each spatial dimension: every patch of an image (channels,
        *spatial) has tokens of its own, so that large images need no large PCA.
    bands: shares of the kept components' variance in the first two of the bands hot, warm and cold.

    Raises ValueError for shapes that do not fit the PCA and for shares that are none.
    """

    components: Tensor
    mean: Tensor
    scale: Tensor | None
    explained_variance_ratio: Tensor
    _kind: ClassVar[str] = "pca-tokenizer"

    def __init__(
        self,
        pca: PCA,
        *,
        input_shape: Sequence[int] | None = None,
        patch_size: int | Sequence[int] | None = None,
        bands: tuple[float, float] = (0.8, 0.15),
    ) -> None:
        super().__init__()
        ratio = pca.explained_variance_ratio_
        self._set(pca.components_.clone(), pca.mean_.clone(), pca.scale(), ratio, input_shape, patch_size, bands)

    def _set(
        self,
        components: Tensor,
        mean: Tensor,
        scale: Tensor | None,
        ratio: Tensor,
        input_shape: Sequence[int] | None,
        patch_size: int | Sequence[int] | None,
        bands: Sequence[float],
    ) -> None:
        features = components.shape[1]
        self.input_shape = (features,) if input_shape is None else tuple(input_shape)
        self.patch_size = patch_size if patch_size is None or isinstance(patch_size, int) else tuple(patch_size)
        found = math.prod(self.input_shape)
        if self.patch_size is not None:
            found = self._flat(self._empty()).shape[-1]
        if found != features:
            of = "input_shape" if self.patch_size is None else "input_shape, patch_size"
            raise ValueError(f"{of}: expected {features} numbers, as in the PCA, got {found} of {self.input_shape}")
        if len(bands) != 2 or not all(share >= 0 for share in bands) or not sum(bands) <= 1:
            raise ValueError(f"bands: expected two shares of variance, of 1 at most together, got {tuple(bands)}")
        self.shares = (float(bands[0]), float(bands[1]))
        self.register_buffer("components", components)
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.register_buffer("explained_variance_ratio", ratio)
        # Once: a loop over numbers on a GPU would wait for each.
        self.bands = _bands(ratio, self.shares)
        self.register_load_state_dict_post_hook(_find_bands)  # type: ignore[no-untyped-call]

    @classmethod
    def fit(
        cls,
        data: Data,
        n_components: int,
        *,
        patch_size: int | Sequence[int] | None = None,
        whiten: bool = False,
        method: Method = "auto",
        bands: tuple[float, float] = (0.8, 0.15),
        seed: int = 0,
    ) -> PCATokenizer:
        """Fits the PCA to data: a tensor (samples, *shape), or an iterable of such batches, float or uint8.

        With patch_size the shape has channels first: grey images are (samples, 1, height, width).

        Raises ValueError for no data, and for what is no tensor.
        """
        batches = _batches(data)
        shape, rows = _peek(batches, patch_size)
        pca = PCA(n_components, method=method, whiten=whiten, seed=seed).fit(rows)
        return cls(pca, input_shape=shape, patch_size=patch_size, bands=bands)

    @property
    def n_components(self) -> int:
        return self.components.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """(batch, *input_shape), float or uint8, → (batch, components); with patches (batch, patches, components)."""
        if tuple(x.shape[1:]) != self.input_shape:
            raise ValueError(f"x: expected shape [batch, {_text(self.input_shape)}], got {list(x.shape)}")
        tokens: Tensor = ops.pca_project(self._before(self._flat(x)), self.components, self.mean, self.scale)
        return tokens

    def inverse(self, tokens: Tensor) -> Tensor:
        """The inputs that tokens stand for, but for what the missing components held: (batch, *input_shape)."""
        patches = () if self.patch_size is None else (self._flat(self._empty()).shape[1],)
        expected = (*patches, self.n_components)
        if tuple(tokens.shape[1:]) != expected or not len(tokens.shape):
            raise ValueError(f"tokens: expected shape [batch, {_text(expected)}], got {list(tokens.shape)}")
        scale = None if self.scale is None else 1 / self.scale
        flat = self._after(ops.pca_reconstruct(tokens, self.components, self.mean, scale))
        if self.patch_size is None:
            return flat.reshape(len(tokens), *self.input_shape)
        return from_patches(flat, self.input_shape[0], self.input_shape[1:], self.patch_size)

    def band(self, tokens: Tensor, name: str) -> Tensor:
        """The tokens of one of `BANDS`. Raises ValueError for another name."""
        if name not in self.bands:
            raise ValueError(f"name: expected one of {', '.join(BANDS)}, got {name!r}")
        return tokens[..., self.bands[name]]

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, complete or not at all."""
        tensors = dict(self.state_dict())
        options = {"input_shape": self.input_shape, "patch_size": self.patch_size, "bands": self.shares}
        save_state(path, self._kind, _VERSION, tensors, options)

    @classmethod
    def load(cls, path: str | Path) -> PCATokenizer:
        """Reads a file of `save`. Raises CorruptWeightError for a damaged one, ValueError for one of something else."""
        tensors, options = load_state(path, cls._kind, _VERSION)
        require_finite(tensors, path)
        components = tensors.get("components", torch.empty(0, 0))
        dtype, (count, features) = components.dtype, components.shape if components.dim() == 2 else (0, 0)
        tokenizer = cls.__new__(cls)
        nn.Module.__init__(tokenizer)
        with reading_metadata(path):
            tokenizer._set(
                take(tensors, "components", dtype, (count, features), path),
                take(tensors, "mean", tensors["mean"].dtype, (features,), path),
                take(tensors, "scale", tensors["scale"].dtype, (count,), path) if "scale" in tensors else None,
                take(tensors, "explained_variance_ratio", dtype, (count,), path),
                options["input_shape"],
                options["patch_size"],
                options["bands"],
            )
            tokenizer._load_more(tensors, features)
        return tokenizer

    def extra_repr(self) -> str:
        patch = "" if self.patch_size is None else f", patch_size={self.patch_size}"
        sizes = ", ".join(f"{name} {band.stop - band.start}" for name, band in self.bands.items())
        return f"{self.input_shape} -> {self.n_components}{patch}, {sizes}"

    def _load_more(self, tensors: dict[str, Tensor], features: int) -> None:
        """Sets what a subclass has beside."""

    def _before(self, flat: Tensor) -> Tensor:
        return flat

    def _after(self, flat: Tensor) -> Tensor:
        return flat

    def _empty(self) -> Tensor:
        return torch.empty((1, *self.input_shape), device="meta")

    def _flat(self, x: Tensor) -> Tensor:
        return _rows(x, self.patch_size)


class SplinePCATokenizer(PCATokenizer):
    """A monotone spline in each dimension, then PCA. The spline makes skewed dimensions more normal.

    `fit` keeps the spline that reconstructs held-out data best, and none where that is best: it gains little where data
    are nearly normal (docs/tokenizers.md). The spline keeps its dtype when the tokenizer is cast.
    """

    spline: MonotoneSpline
    _kind: ClassVar[str] = "spline-pca-tokenizer"

    def __init__(self, pca: PCA, spline: MonotoneSpline, **options: Any) -> None:
        """pca: fitted to what the spline makes of data. options: those of `PCATokenizer`."""
        super().__init__(pca, **options)
        if spline.dimensions != pca.n_features_in_:
            raise ValueError(f"spline: expected {pca.n_features_in_} dimensions, got {spline.dimensions}")
        self.spline = spline
        #: Reconstruction's mean squared error on held-out data by strength, where `fit` made this.
        self.validation: dict[float, float] = {}

    @classmethod
    def fit(  # type: ignore[override]
        cls,
        data: Tensor,
        n_components: int,
        *,
        knots: int = 8,
        strengths: Sequence[float] = (0.0, 0.25, 0.5, 1.0),
        validation: float = 0.1,
        patch_size: int | Sequence[int] | None = None,
        whiten: bool = False,
        method: Method = "auto",
        bands: tuple[float, float] = (0.8, 0.15),
        seed: int = 0,
    ) -> SplinePCATokenizer:
        """Fits splines of several strengths, each with a PCA, to a part of data, and keeps the best.

        data: one tensor (samples, *shape), float or uint8, and no batches: a part of all samples is held out.
        strengths: 0 is the identity, which is always tried; 1 makes each dimension normal. validation: the share of
        samples that is held out. Up to 16,384 samples of each part make the choice; the kept spline has its PCA fitted
        again, to all data.

        Raises ValueError for data that are no tensor or too few samples and a share outside 0 to 1.
        """
        if not isinstance(data, Tensor) or data.dim() < 2:
            raise ValueError(f"data: expected one tensor (samples, *shape), got {_described(data)}")
        if not 0 < validation < 1:
            raise ValueError(f"validation: expected a share between 0 and 1, got {validation}")
        held_out = max(1, round(len(data) * validation))
        if len(data) - held_out < 2:
            raise ValueError(f"data: expected three samples or more, got {len(data)}")
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(data), generator=generator).to(data.device)
        shape = tuple(data.shape[1:])
        options: dict[str, Any] = {"input_shape": shape, "patch_size": patch_size, "bands": bands}

        def tokenizer(spline: MonotoneSpline, x: Tensor) -> SplinePCATokenizer:
            pca = PCA(n_components, method=method, whiten=whiten, seed=seed)
            rows = _rows(x, patch_size).flatten(0, -2)
            parts = torch.split(rows, max(1, _CHUNK // max(1, rows.shape[1])))
            if not bool(spline.bent.any()):
                return cls(pca.fit(rows), spline, **options)
            transformed = map(spline, parts)
            # These need all samples at once.
            at_once = method in ("exact", "randomized")
            return cls(pca.fit(torch.cat(list(transformed)) if at_once else transformed), spline, **options)

        # To choose a spline, a part is enough.
        x = _float(data[order[held_out : held_out + MAX_SAMPLES]])
        test = _float(data[order[:held_out][:MAX_SAMPLES]])
        rows = _rows(x, patch_size).flatten(0, -2)
        best: tuple[float, MonotoneSpline] | None = None
        errors: dict[float, float] = {}
        ascending = sorted({0.0, *strengths})
        for strength, spline in zip(ascending, MonotoneSpline.fit_all(rows, knots, ascending), strict=True):
            if strength and not bool(spline.bent.any()):
                errors[strength] = errors[0.0]
                continue
            candidate = tokenizer(spline, x)
            error = float((candidate.inverse(candidate(test)) - test).double().square().mean())
            errors[strength] = error
            # In ascending order, so that of equals the simplest stays.
            if best is None or error < errors[best[0]]:
                best = (strength, spline)
        assert best is not None
        final = tokenizer(best[1], _float(data))
        final.validation = errors
        return final

    @property
    def strength(self) -> float | None:
        """The strength that `fit` kept: the least validation error. None where it was not fitted here."""
        return min(self.validation, key=self.validation.__getitem__, default=None)

    def _load_more(self, tensors: dict[str, Tensor], features: int) -> None:
        parts = [tensors[f"spline.{name}"] for name in ("x_knots", "y_knots", "slopes")]
        self.spline = MonotoneSpline(*parts)
        self.validation = {}
        if self.spline.dimensions != features:
            raise ValueError(f"spline: expected {features} dimensions, got {self.spline.dimensions}")

    def _before(self, flat: Tensor) -> Tensor:
        transformed: Tensor = self.spline(flat) if self._bends() else flat
        return transformed

    def _after(self, flat: Tensor) -> Tensor:
        return self.spline.inverse(flat) if self._bends() else flat

    def _bends(self) -> bool:
        """Whether the spline may change anything. Asked each time, since knots can be loaded and trained; and taken for
        granted where they are trained, and where asking breaks a graph or waits for a device.
        """
        knots = (self.spline.x_knots, self.spline.y_knots, self.spline.slopes)
        if torch.compiler.is_compiling() or any(each.requires_grad or each.device.type != "cpu" for each in knots):
            return True
        return bool(self.spline.bent.any())


#: Numbers that a spline is evaluated on at a time while fitting.
_CHUNK = 1 << 24


def _float(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.float()


def _rows(x: Tensor, patch_size: int | Sequence[int] | None) -> Tensor:
    """(batch, *shape) → (batch, features), or with patches (batch, patches, features)."""
    return x.flatten(1) if patch_size is None else to_patches(x, patch_size)


def _batches(data: Data) -> Iterator[Tensor]:
    if isinstance(data, Tensor):
        yield data
        return
    if not isinstance(data, Iterable) or hasattr(data, "__array__"):
        raise ValueError(f"data: expected a tensor, or an iterable of tensors, got {_described(data)}")
    for batch in data:
        if not isinstance(batch, Tensor):
            got = _described(batch)
            raise ValueError(f"data: expected batches that are tensors, got {got}; of pairs, pass the inputs alone")
        yield batch


def _described(data: object) -> str:
    return f"shape {list(data.shape)}" if isinstance(data, Tensor) else type(data).__name__


def _peek(
    batches: Iterator[Tensor], patch_size: int | Sequence[int] | None
) -> tuple[tuple[int, ...], Tensor | Iterator[Tensor]]:
    """One input's shape, and rows for a PCA: a tensor where there is one batch, since some methods need all at once."""
    first = next(batches, None)
    if first is None or first.dim() < 2:
        got = "no batch" if first is None else f"shape {list(first.shape)}"
        raise ValueError(f"data: expected (samples, *shape), got {got}")
    shape = tuple(first.shape[1:])

    def rows(batch: Tensor) -> Tensor:
        if tuple(batch.shape[1:]) != shape:
            raise ValueError(f"data: expected samples of shape {list(shape)}, got {list(batch.shape[1:])}")
        return _rows(batch, patch_size).flatten(0, -2)

    second = next(batches, None)
    if second is None:
        return shape, rows(first)

    def all_rows() -> Iterator[Tensor]:
        yield rows(first)
        yield rows(second)
        yield from map(rows, batches)

    return shape, all_rows()


def _bands(ratio: Tensor, shares: tuple[float, float]) -> dict[str, slice]:
    """The fewest leading components that hold the first share of the kept variance, then the next; the rest is cold."""
    running = (ratio.double().cumsum(0) / ratio.double().sum().clamp(min=1e-300)).tolist()
    # What rounding leaves of a share of 1.
    reach = [sum(1 for held in running if held < limit - 1e-9) for limit in (shares[0], sum(shares))]
    hot = min(len(running), reach[0] + 1) if shares[0] > 0 else 0
    warm = max(hot, min(len(running), reach[1] + 1)) if shares[1] > 0 else hot
    return {"hot": slice(0, hot), "warm": slice(hot, warm), "cold": slice(warm, len(running))}


def _find_bands(tokenizer: PCATokenizer, _: object) -> None:
    if not tokenizer.explained_variance_ratio.is_meta:
        tokenizer.bands = _bands(tokenizer.explained_variance_ratio, tokenizer.shares)


def _text(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))

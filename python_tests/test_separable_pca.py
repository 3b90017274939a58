"""SeparablePCA, against dense covariances and Kronecker products in NumPy, and plain PCA of scikit-learn."""

from pathlib import Path

import numpy as np
import pytest
import sklearn.decomposition
import torch
from infold.tokenizers import SeparablePCA, from_patches, to_patches


def smooth(samples: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Samples whose axes are correlated, with a mean."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((samples, *shape))
    for axis, size in enumerate(shape, 1):
        mixing = 0.7 ** np.abs(np.subtract.outer(np.arange(size), np.arange(size))) + 0.1 * random.random((size, size))
        x = np.moveaxis(np.tensordot(x, mixing, ([axis], [1])), -1, axis)
    return torch.from_numpy(x + random.standard_normal(shape))


def dense(x: torch.Tensor, ranks: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The mean (features) and the Kronecker operator (codes, features) by partial traces of the whole covariance."""
    flat = x.flatten(1).numpy()
    shape = tuple(x.shape[1:])
    covariance = np.cov(flat, rowvar=False).reshape(shape + shape)
    operator = np.ones((1, 1))
    for mode, rank in enumerate(ranks):
        letters = [chr(97 + n) for n in range(len(shape))]
        columns = list(letters)
        columns[mode] = "z"
        partial = np.einsum(f"{''.join(letters)}{''.join(columns)}->{letters[mode]}z", covariance)
        vectors = np.linalg.eigh(partial)[1][:, ::-1][:, :rank].T
        vectors = vectors * np.sign(np.take_along_axis(vectors, np.abs(vectors).argmax(1)[:, None], 1))
        operator = np.kron(operator, vectors)
    return flat.mean(0), operator


@pytest.mark.parametrize(("shape", "ranks"), [((6, 10), (2, 4)), ((4, 5, 6), (2, 3, 3)), ((8,), (3,))])
def test_it_is_the_dense_kronecker_operator(shape, ranks) -> None:
    x = smooth(40, shape, 0)
    pca = SeparablePCA(ranks).fit(x)
    mean, operator = dense(x, ranks)
    centred = x.flatten(1).numpy() - mean
    codes = pca.transform(x)
    assert codes.shape == (40, *ranks)
    np.testing.assert_allclose(codes.flatten(1), centred @ operator.T, atol=1e-10)
    back = centred @ operator.T @ operator
    np.testing.assert_allclose(pca.inverse_transform(codes).flatten(1), back + mean, atol=1e-10)
    ratio = 1 - ((centred - back) ** 2).sum() / (centred**2).sum()
    np.testing.assert_allclose(pca.explained_variance_ratio(x), ratio, rtol=1e-10)


def test_axes_join_in_modes_in_any_order() -> None:
    x = smooth(30, (4, 5, 6), 1)
    joined = SeparablePCA((2, 7), modes=((0,), (1, 2))).fit(x)
    mean, operator = dense(x.flatten(2), (2, 7))
    expected = (x.flatten(1).numpy() - mean) @ operator.T
    np.testing.assert_allclose(joined.transform(x).flatten(1), expected, atol=1e-10)
    swapped = SeparablePCA((7, 2), modes=((1, 2), (0,))).fit(x)
    torch.testing.assert_close(swapped.transform(x), joined.transform(x).mT)
    torch.testing.assert_close(swapped.mean_, x.mean(0))
    back = swapped.inverse_transform(swapped.transform(x))
    torch.testing.assert_close(back, joined.inverse_transform(joined.transform(x)))
    crossed = SeparablePCA((9, 5), modes=((2, 0), (1,))).fit(x)
    crossing = SeparablePCA((9, 5)).fit(x.permute(0, 3, 1, 2).flatten(1, 2))
    torch.testing.assert_close(
        crossed.inverse_transform(crossed.transform(x)).permute(0, 3, 1, 2).flatten(1, 2),
        crossing.inverse_transform(crossing.transform(x.permute(0, 3, 1, 2).flatten(1, 2))),
    )


def test_full_ranks_are_exact_and_one_mode_is_pca() -> None:
    x = smooth(30, (4, 5, 6), 2)
    full = SeparablePCA((4, 5, 6)).fit(x)
    torch.testing.assert_close(full.inverse_transform(full.transform(x)), x)
    assert full.discarded_variance_ratio_ == (0.0, 0.0, 0.0)
    one = SeparablePCA((6,), modes=((0, 1, 2),)).fit(x)
    theirs = sklearn.decomposition.PCA(6, svd_solver="full").fit(x.flatten(1).numpy())
    np.testing.assert_allclose(one.transform(x).abs(), np.abs(theirs.transform(x.flatten(1).numpy())), atol=1e-8)
    np.testing.assert_allclose(one.mode_variance_[0][:6], theirs.explained_variance_, rtol=1e-9)


@pytest.mark.parametrize("ranks", [(1, 1, 1), (2, 3, 2), (4, 2, 5), (3, 5, 6), (4, 5, 3)])
def test_what_is_lost_lies_between_the_bounds_of_hosvd(ranks) -> None:
    x = smooth(50, (4, 5, 6), 3)
    pca = SeparablePCA(ranks).fit(x)
    centred = (x - x.mean(0)).numpy()
    for mode, rank in enumerate(ranks):
        values = np.linalg.svd(np.moveaxis(centred, mode + 1, 0).reshape(x.shape[mode + 1], -1))[1] ** 2
        np.testing.assert_allclose(pca.mode_variance_[mode], values / 49, rtol=1e-9)
        expected = values[rank:].sum() / values.sum()
        np.testing.assert_allclose(pca.discarded_variance_ratio_[mode], expected, atol=1e-12)
    lost = 1 - pca.explained_variance_ratio(x)
    discarded = pca.discarded_variance_ratio_
    assert max(discarded) - 1e-12 <= lost <= sum(discarded) + 1e-12


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_streams_of_batches_are_one_fit(offset) -> None:
    x = smooth(60, (4, 5, 6), 4) + offset
    x[30:] += 2  # means of batches differ
    whole = SeparablePCA((2, 3, 3)).fit(x)
    batches = x.split([1, 20, 0, 30, 9])
    stepwise = SeparablePCA((2, 3, 3)).partial_fit(x[:25]).partial_fit(x[25:])
    for other in (SeparablePCA((2, 3, 3)).fit(batches), SeparablePCA((2, 3, 3)).fit(iter(batches)), stepwise):
        assert other.n_samples_seen_ == 60
        torch.testing.assert_close(other.mean_, whole.mean_)
        for ours, theirs in zip(other.components_, whole.components_, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=0)
    again = stepwise.fit(x)
    torch.testing.assert_close(again.components_[0], whole.components_[0])
    assert again.n_samples_seen_ == 60


def test_bytes_gradients_and_single_precision() -> None:
    x = (smooth(20, (4, 5, 6), 5) * 20 + 128).clamp(0, 255).to(torch.uint8)
    pca = SeparablePCA((2, 3, 3)).fit(x)
    assert pca.mean_.dtype == pca.transform(x).dtype == torch.float32
    double = SeparablePCA((2, 3, 3)).fit(x.double())
    torch.testing.assert_close(pca.transform(x).double(), double.transform(x.double()), atol=1e-3, rtol=1e-5)
    sample = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(double.transform, sample)
    assert torch.autograd.gradcheck(double.inverse_transform, torch.randn(2, 2, 3, 3).double().requires_grad_())


def test_compression_ratio_counts_codes_or_all() -> None:
    pca = SeparablePCA((2, 3, 3)).fit(smooth(20, (4, 5, 6), 6))
    assert pca.compression_ratio() == 120 / 18
    assert pca.compression_ratio(50) == 50 * 120 / (50 * 18 + 120 + 2 * 4 + 3 * 5 + 3 * 6)


def test_patches_of_volumes() -> None:
    """Volumes of rank one in each patch come back from cores of one value."""
    random = torch.Generator().manual_seed(0)
    profile = [torch.rand(n, generator=random).double() for n in (2, 3, 4)]
    weights = torch.randn(5, 1, 2, 2, 2, generator=random).double()
    volumes = torch.kron(weights, torch.einsum("i,j,k->ijk", *profile))
    blocks = to_patches(volumes, (2, 3, 4)).reshape(-1, 2, 3, 4)
    pca = SeparablePCA((1, 1, 1)).fit(blocks)
    back = pca.inverse_transform(pca.transform(blocks)).reshape(5, 8, 24)
    torch.testing.assert_close(from_patches(back, 1, (4, 6, 8), (2, 3, 4)), volumes)


def test_few_clips_favour_separable_components_and_many_values_plain_ones(monkeypatch) -> None:
    """On clips that no fit has seen, at equal stored values; on those it was fitted on, plain PCA loses least."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    import video_pca

    clips = video_pca.clips(60, frames=8, size=16, seed=0)
    seen, new = clips[:40], clips[40:]
    pca = SeparablePCA((4, 40), modes=((0,), (1, 2))).fit(seen)
    plain = sklearn.decomposition.PCA(39, svd_solver="full").fit(seen.flatten(1).numpy())

    def explained(x: torch.Tensor) -> float:
        flat = x.flatten(1).numpy()
        back = plain.inverse_transform(plain.transform(flat))
        return 1 - ((flat - back) ** 2).sum() / ((flat - plain.mean_) ** 2).sum()

    values = 20 * 160 + pca.mean_.numel() + sum(c.numel() for c in pca.components_)
    assert values < 20 * 39 + plain.mean_.size + plain.components_.size
    assert pca.explained_variance_ratio(new) > explained(new) + 0.05
    assert pca.explained_variance_ratio(seen) < explained(seen)


@pytest.mark.parametrize("modes", [None, ((2, 0), (1,))])
def test_a_saved_one_is_the_same_and_goes_on(modes, tmp_path: Path) -> None:
    x = (smooth(40, (3, 4, 5), 8) * 20 + 128).clamp(0, 255).to(torch.uint8)
    pca = SeparablePCA((2, 3) if modes else (2, 3, 2), modes=modes)
    with pytest.raises(ValueError, match="call fit first"):
        pca.save(tmp_path / "pca")
    pca.fit(x[:25]).save(tmp_path / "pca")
    loaded = SeparablePCA.load(tmp_path / "pca")
    for _ in range(2):
        assert torch.equal(loaded.mean_, pca.mean_)
        for name in ("components_", "mode_variance_"):
            pairs = zip(getattr(loaded, name), getattr(pca, name), strict=True)
            assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
        for name in ("ranks", "modes", "discarded_variance_ratio_", "n_samples_seen_"):
            assert getattr(loaded, name) == getattr(pca, name)
        assert torch.equal(loaded.inverse_transform(loaded.transform(x)), pca.inverse_transform(pca.transform(x)))
        loaded.partial_fit(x[25:])
        pca.partial_fit(x[25:])


def test_bad_input_is_refused_by_name() -> None:
    x = smooth(10, (4, 5), 7)
    for ranks, modes in [((), None), ((0, 2), None)]:
        with pytest.raises(ValueError, match="ranks: expected one of at least 1"):
            SeparablePCA(ranks, modes=modes)
    for modes in [((0,),), ((0,), (0, 1)), ((0,), (2,)), ((0, 1), ())]:
        with pytest.raises(ValueError, match="modes: expected 2 that have each axis once"):
            SeparablePCA((1, 1), modes=modes)
    with pytest.raises(ValueError, match=r"ranks: expected at most the sizes of modes, \[4, 5\], got \[2, 6\]"):
        SeparablePCA((2, 6)).fit(x)
    with pytest.raises(ValueError, match=r"x: expected \(batch, 3 axes\), got \[10, 4, 5\]"):
        SeparablePCA((1, 1, 1)).fit(x)
    for few in (x[:1], x[:0], []):
        with pytest.raises(ValueError, match="x: expected at least 2 samples"):
            SeparablePCA((2, 2)).fit(few)
    with pytest.raises(ValueError, match=r"x: expected \(batch, 4, 5\), got \[10, 4, 4\]"):
        SeparablePCA((2, 2)).fit([x, x[:, :, :4]])
    for bad in (float("nan"), float("inf")):
        spoilt = x.clone()
        spoilt[3, 1, 1] = bad
        with pytest.raises(ValueError, match=r"x: expected finite numbers, got (nan|inf) at \[3, 1, 1\]"):
            SeparablePCA((2, 2)).fit(spoilt)
    pca = SeparablePCA((2, 2))
    for call in (pca.transform, pca.inverse_transform, pca.explained_variance_ratio):
        with pytest.raises(ValueError, match="call fit first"):
            call(x)
    with pytest.raises(ValueError, match="call fit first"):
        pca.compression_ratio()
    pca.fit(x)
    with pytest.raises(ValueError, match=r"x: expected \(batch, 4, 5\), got \[10, 5, 4\]"):
        pca.transform(x.mT)
    with pytest.raises(ValueError, match=r"z: expected \(batch, 2, 2\), got \[10, 4, 5\]"):
        pca.inverse_transform(x)


def test_samples_come_one_by_one() -> None:
    x = smooth(10, (4, 5), 9)
    pca = SeparablePCA((2, 2))
    for sample in x:
        pca.partial_fit(sample[None])
    assert pca.n_samples_seen_ == 10
    _, operator = dense(x, (2, 2))
    expected = (x.flatten(1).numpy() - x.flatten(1).numpy().mean(0)) @ operator.T
    np.testing.assert_allclose(pca.transform(x).flatten(1), expected, atol=1e-10)


def test_complex_numbers_and_arrays_are_refused() -> None:
    x = smooth(10, (4, 5), 9)
    pca = SeparablePCA((2, 2)).fit(x)
    for call in (SeparablePCA((2, 2)).fit, SeparablePCA((2, 2)).partial_fit, pca.transform):
        with pytest.raises(ValueError, match=r"x: expected uint8 or a real float dtype, got torch.complex128"):
            call(x.to(torch.complex128))
    with pytest.raises(ValueError, match=r"x: expected a tensor, got numpy.ndarray"):
        pca.partial_fit(x.numpy())

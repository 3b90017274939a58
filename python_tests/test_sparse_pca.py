"""SparsePCA, against scikit-learn, planted components and dense float64 linear algebra."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import sklearn.decomposition
import torch
from infold.tokenizers import SparsePCA


def planted(samples: int, features: int, supports: list[list[int]], scales: list[float], noise: float, seed: int):
    """Data of sparse orthogonal components, and those (k, features)."""
    random = np.random.default_rng(seed)
    components = np.zeros((len(supports), features))
    for row, support in zip(components, supports, strict=True):
        row[support] = random.uniform(0.5, 1, len(support)) * random.choice([-1, 1], len(support))
    components /= np.linalg.norm(components, axis=1, keepdims=True)
    scores = random.standard_normal((samples, len(supports))) * scales
    x = scores @ components + noise * random.standard_normal((samples, features)) + random.standard_normal(features)
    return torch.from_numpy(x), components


def spread(samples: int, features: int, seed: int) -> torch.Tensor:
    """Dense data with falling variances."""
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((features, features)) * 0.8 ** np.arange(features)[:, None]
    return torch.from_numpy(random.standard_normal((samples, features)) @ mixing + 3)


@pytest.mark.parametrize(("samples", "features"), [(200, 30), (20, 40)])
@pytest.mark.parametrize("options", [{"penalty": 0.0}, {"sparsity": "all"}, {"penalty": 0.0, "refit": False}])
def test_without_a_penalty_it_is_pca(samples, features, options) -> None:
    x = spread(samples, features, 0)
    options = {name: features if value == "all" else value for name, value in options.items()}
    ours = SparsePCA(5, **options).fit(x)
    theirs = sklearn.decomposition.PCA(5, svd_solver="full").fit(x.numpy())
    angles = scipy.linalg.subspace_angles(ours.components_.T.numpy(), theirs.components_.T)
    assert angles.max() <= 1e-6
    np.testing.assert_allclose(np.abs((ours.components_.numpy() * theirs.components_).sum(1)), 1, atol=1e-10)
    np.testing.assert_allclose(ours.explained_variance_, theirs.explained_variance_, rtol=1e-9)
    np.testing.assert_allclose(ours.explained_variance_ratio_, theirs.explained_variance_ratio_, rtol=1e-9)
    np.testing.assert_allclose(ours.mean_, theirs.mean_, rtol=1e-12)
    np.testing.assert_allclose(
        ours.inverse_transform(ours.transform(x)), theirs.inverse_transform(theirs.transform(x.numpy())), atol=1e-8
    )


@pytest.mark.parametrize("options", [{"sparsity": 4}, {"penalty": 0.3}, {"penalty": 0.3, "refit": False}])
def test_planted_components_are_found_with_their_exact_support(options) -> None:
    supports = [[0, 3, 7, 9], [11, 12, 20, 33], [1, 2, 30, 39]]
    x, components = planted(800, 40, supports, [5, 4, 3], 0.3, 1)
    found = SparsePCA(3, **options).fit(x).components_.numpy()
    assert [row.nonzero()[0].tolist() for row in found] == supports
    assert np.abs((found * components).sum(1)).min() > (0.97 if options.get("refit", True) else 0.9)


def test_a_sparse_matrix_of_rank_one_is_its_own_component() -> None:
    random = np.random.default_rng(2)
    component = np.zeros(25)
    component[[2, 5, 17]] = [-0.8, 0.36, 0.48]
    scores = random.standard_normal(60)
    x = torch.from_numpy(np.outer(scores, component) + 1)
    for options in ({"penalty": 0.0}, {"penalty": 0.2}, {"sparsity": 3}):
        pca = SparsePCA(1, **options).fit(x)
        np.testing.assert_allclose(pca.components_[0], -component, atol=1e-9)  # largest entry positive
        np.testing.assert_allclose(pca.explained_variance_[0], scores.var(ddof=1), rtol=1e-9)
        np.testing.assert_allclose(pca.transform(x)[:, 0], -(scores - scores.mean()), atol=1e-9)
        with pytest.raises(ValueError, match="n_components: expected at most 1, the rank of the data, got 2"):
            SparsePCA(2, **options).fit(x)


def test_shrunk_components_are_fixed_points_of_the_soft_thresholded_power_iteration() -> None:
    x = spread(100, 20, 3)
    pca = SparsePCA(1, penalty=0.25, refit=False, tol=1e-13).fit(x)
    centred = x.numpy() - x.numpy().mean(0)
    component = pca.components_[0].numpy()
    scores = centred @ component
    loads = centred.T @ (scores / np.linalg.norm(scores))
    gamma = 0.25 * np.linalg.norm(centred, axis=0).max()
    shrunk = np.sign(loads) * np.maximum(np.abs(loads) - gamma, 0)
    np.testing.assert_allclose(component, shrunk / np.linalg.norm(shrunk), atol=1e-10)
    assert 0 < (component == 0).sum() < 20


def test_refitted_components_are_leading_eigenvectors_on_their_support_of_the_deflated_data() -> None:
    rest = (x := spread(100, 20, 4)).numpy() - x.numpy().mean(0)
    pca = SparsePCA(4, sparsity=6).fit(x)
    for component in pca.components_.numpy():
        support = component.nonzero()[0]
        assert len(support) == 6
        values, vectors = np.linalg.eigh(rest[:, support].T @ rest[:, support])
        np.testing.assert_allclose(np.abs(vectors[:, -1] @ component[support]), 1, atol=1e-10)
        scores = rest @ component
        np.testing.assert_allclose(scores @ scores, values[-1], rtol=1e-10)
        rest = rest - np.outer(scores, scores @ rest) / (scores @ scores)


def test_explained_variance_is_that_of_scores_made_orthogonal() -> None:
    x = spread(100, 20, 5)
    pca = SparsePCA(6, sparsity=5).fit(x)
    centred = x.numpy() - x.numpy().mean(0)
    components = pca.components_.numpy()
    np.testing.assert_allclose(np.linalg.norm(components, axis=1), 1, rtol=1e-12)
    assert np.abs(components @ components.T - np.eye(6)).max() > 0.01  # not orthogonal here
    diagonal = np.diag(np.linalg.qr(centred @ components.T)[1])
    np.testing.assert_allclose(pca.explained_variance_, diagonal**2 / 99, rtol=1e-9)
    np.testing.assert_allclose(pca.explained_variance_ratio_.sum(), (diagonal**2).sum() / (centred**2).sum(), rtol=1e-9)
    plain = sklearn.decomposition.PCA(6).fit(x.numpy()).explained_variance_.sum()
    assert pca.explained_variance_.sum() < plain


def test_coordinates_are_those_of_least_squares() -> None:
    x = spread(100, 20, 6)
    pca = SparsePCA(6, sparsity=5).fit(x)
    centred = (x - pca.mean_).numpy()
    expected = np.linalg.lstsq(pca.components_.T.numpy(), centred.T, rcond=None)[0].T
    np.testing.assert_allclose(pca.transform(x), expected, atol=1e-9)
    residual = (x - pca.inverse_transform(pca.transform(x))).numpy()
    np.testing.assert_allclose(residual @ pca.components_.T.numpy(), 0, atol=1e-9)
    np.testing.assert_allclose(pca.transform(pca.inverse_transform(pca.transform(x))), pca.transform(x), atol=1e-9)


@pytest.mark.parametrize("options", [{"sparsity": 2}, {"penalty": 0.4}, {"penalty": 0.4, "refit": False}])
def test_supports_are_whole_groups(options) -> None:
    """Planted groups of different sizes, with labels in no order."""
    groups = np.random.default_rng(7).permutation(np.repeat([4, -1, 7, 2, 9, 5], [3, 8, 6, 5, 10, 8]))
    supports = [np.isin(groups, [4, 9]).nonzero()[0].tolist(), np.isin(groups, [7, 5]).nonzero()[0].tolist()]
    x, _ = planted(600, 40, supports, [6, 4], 0.2, 8)
    found = SparsePCA(2, groups=groups.tolist(), **options).fit(x).components_.numpy()
    assert [row.nonzero()[0].tolist() for row in found] == supports


def test_groups_shrink_by_their_norms() -> None:
    x = spread(100, 20, 9)
    sizes = [2, 3, 4, 5, 6]
    pca = SparsePCA(1, penalty=0.5, groups=np.repeat(range(5), sizes).tolist(), refit=False, tol=1e-13).fit(x)
    centred = x.numpy() - x.numpy().mean(0)
    blocks = np.split(centred, np.cumsum(sizes)[:-1], axis=1)
    gamma = 0.5 * max(np.linalg.norm(block, 2) / np.sqrt(size) for block, size in zip(blocks, sizes, strict=True))
    component = pca.components_[0].numpy()
    scores = centred @ component
    loads = [block.T @ (scores / np.linalg.norm(scores)) for block in blocks]
    shares = [max(0, 1 - gamma * np.sqrt(len(load)) / np.linalg.norm(load)) for load in loads]
    shrunk = np.concatenate([load * share for load, share in zip(loads, shares, strict=True)])
    np.testing.assert_allclose(component, shrunk / np.linalg.norm(shrunk), atol=1e-10)
    assert 0 < shares.count(0) < 5


def test_groups_of_one_are_no_groups() -> None:
    x = spread(60, 15, 10)
    alone = SparsePCA(3, penalty=0.3).fit(x)
    grouped = SparsePCA(3, penalty=0.3, groups=torch.arange(15).flip(0)).fit(x)
    torch.testing.assert_close(alone.components_, grouped.components_)


@pytest.mark.parametrize("penalty", [0.5, 0.9, 0.999])
def test_a_large_penalty_leaves_a_component(penalty) -> None:
    """The leading singular vector alone would be thresholded away: its variance lies in many small features."""
    random = np.random.default_rng(11)
    x = np.outer(random.standard_normal(300), np.ones(50))
    x = np.concatenate([x + 0.01 * random.standard_normal(x.shape), 3 * random.standard_normal((300, 1))], 1)
    component = SparsePCA(1, penalty=penalty).fit(torch.from_numpy(x)).components_[0]
    assert component.nonzero().flatten().tolist() == [50]


def test_the_strongest_feature_does_not_hide_weaker_ones_that_agree() -> None:
    """Power iterations that start at a feature orthogonal to all others would never leave it."""
    scores = np.random.default_rng(14).standard_normal((100, 2))
    scores = np.linalg.qr(scores - scores.mean(0))[0]
    x = torch.from_numpy(np.concatenate([3 * scores[:, :1], np.outer(scores[:, 1], np.full(10, 2))], 1))
    for options in ({"penalty": 0.0}, {"penalty": 0.1}, {"sparsity": 10}):
        component = SparsePCA(1, **options).fit(x).components_[0].numpy()
        np.testing.assert_allclose(component, [0] + [10**-0.5] * 10, atol=1e-9)


@pytest.mark.parametrize("refit", [True, False])
def test_of_features_that_are_the_same_some_are_chosen(refit) -> None:
    """Thresholding at the next feature's load would leave nothing."""
    x = torch.tensor([1.0, -1.0]).double().outer(torch.ones(6).double())
    component = SparsePCA(1, sparsity=2, refit=refit).fit(x).components_[0]
    torch.testing.assert_close(component[component != 0], torch.full((2,), 0.5).double().sqrt())


def test_results_repeat_and_follow_the_sign_and_dtype_of_the_data() -> None:
    x = spread(50, 12, 12)
    first, second, turned = (SparsePCA(3, sparsity=4).fit(data) for data in (x, x.clone(), -x))
    assert torch.equal(first.components_, second.components_)
    torch.testing.assert_close(first.components_, turned.components_)
    largest = first.components_.gather(1, first.components_.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()
    single = SparsePCA(3, sparsity=4).fit(x.float())
    assert single.components_.dtype == single.transform(x.float()).dtype == torch.float32
    images = (torch.rand(30, 10, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    of_bytes, of_floats = (SparsePCA(2, penalty=0.2).fit(data) for data in (images, images.float()))
    assert torch.equal(of_bytes.components_, of_floats.components_)
    assert torch.equal(of_bytes.transform(images), of_floats.transform(images.float()))


@pytest.mark.parametrize("options", [{"sparsity": 2, "groups": [0, 0, 0, 1, 1, 2, 2, 3]}, {"penalty": 0.2}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_saved_one_is_the_same(options, dtype, tmp_path: Path) -> None:
    x = spread(30, 8, 0).to(dtype)
    pca = SparsePCA(3, max_iter=500, tol=1e-8, refit=False, **options)
    with pytest.raises(ValueError, match="call fit first"):
        pca.save(tmp_path / "pca")
    pca.fit(x).save(tmp_path / "pca")
    loaded = SparsePCA.load(tmp_path / "pca")
    for name in ("components_", "mean_", "explained_variance_", "explained_variance_ratio_"):
        assert torch.equal(getattr(loaded, name), getattr(pca, name))
    for name in ("n_iter_", "n_samples_seen_", "n_features_in_", "penalty", "sparsity", "refit", "max_iter", "tol"):
        assert getattr(loaded, name) == getattr(pca, name)
    assert torch.equal(loaded.transform(x), pca.transform(x))
    assert torch.equal(loaded.inverse_transform(loaded.transform(x)), pca.inverse_transform(pca.transform(x)))
    more = spread(30, 8, 1).to(dtype)
    assert torch.equal(loaded.fit(more).components_, pca.fit(more).components_)


def test_bad_input_is_refused_by_name() -> None:
    x = spread(20, 6, 13)
    for options, message in [
        ({}, "penalty, sparsity: expected one"),
        ({"penalty": 0.1, "sparsity": 2}, "penalty, sparsity: expected one"),
        ({"penalty": 1.0}, "penalty: expected 0 <= penalty < 1, got 1.0"),
        ({"penalty": float("nan")}, "penalty: expected"),
        ({"sparsity": 0}, "sparsity: expected at least 1"),
        ({"penalty": 0.1, "max_iter": 0}, "max_iter: expected"),
        ({"penalty": 0.1, "groups": [0.5] * 6}, "groups: expected integers"),
    ]:
        with pytest.raises(ValueError, match=message):
            SparsePCA(1, **options)
    with pytest.raises(ValueError, match="n_components: expected at least 1"):
        SparsePCA(0, penalty=0.1)
    with pytest.raises(ValueError, match="sparsity: expected at most 6 features, got 7"):
        SparsePCA(1, sparsity=7).fit(x)
    with pytest.raises(ValueError, match="sparsity: expected at most 2 groups, got 3"):
        SparsePCA(1, sparsity=3, groups=[0, 0, 0, 1, 1, 1]).fit(x)
    with pytest.raises(ValueError, match="groups: expected one for each of 6 features, got 2"):
        SparsePCA(1, sparsity=1, groups=[0, 1]).fit(x)
    with pytest.raises(ValueError, match=r"x: expected \(samples, features\)"):
        SparsePCA(1, penalty=0.1).fit(x[0])
    with pytest.raises(ValueError, match="at least 2 samples"):
        SparsePCA(1, penalty=0.1).fit(x[:1])
    with pytest.raises(ValueError, match="n_components: expected at most 0, the rank of the data, got 1"):
        SparsePCA(1, penalty=0.1).fit(torch.ones(5, 3))
    for bad in (float("nan"), float("inf")):
        spoilt = x.clone()
        spoilt[4, 2] = bad
        with pytest.raises(ValueError, match=r"x: expected finite numbers, got (nan|inf) at \[4, 2\]"):
            SparsePCA(1, penalty=0.1).fit(spoilt)
    pca = SparsePCA(2, penalty=0.1)
    with pytest.raises(ValueError, match="call fit first"):
        pca.transform(x)
    pca.fit(x)
    with pytest.raises(ValueError, match=r"x: expected \(samples, 6\), got \[20, 5\]"):
        pca.transform(x[:, :5])
    with pytest.raises(ValueError, match=r"z: expected \(samples, 2\), got \[20, 6\]"):
        pca.inverse_transform(x)


def test_complex_numbers_and_arrays_are_refused() -> None:
    x = spread(20, 6, 13)
    pca = SparsePCA(2, penalty=0.1).fit(x)
    for call in (SparsePCA(2, penalty=0.1).fit, pca.transform):
        with pytest.raises(ValueError, match=r"x: expected uint8 or a real float dtype, got torch.complex128"):
            call(x.to(torch.complex128))
        with pytest.raises(ValueError, match=r"x: expected a tensor, got numpy.ndarray"):
            call(x.numpy())

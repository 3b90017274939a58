"""PCA against scikit-learn's and float64: subspaces, streams, merging, bad input, files."""

from __future__ import annotations

import io
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from infold import CorruptWeightError
from infold.tokenizers import PCA, moments
from infold.tokenizers.blocks import Blocks
from safetensors.torch import load_file, save_file
from scipy.linalg import subspace_angles
from sklearn import decomposition
from torch import Tensor, nn

METHODS = ("moments", "blocks", "randomized", "exact")
STREAMS = ("moments", "blocks")
EXACT = ("moments", "exact")


def spectrum(rows: int = 400, features: int = 60, decay: float = 0.8, seed: int = 0) -> Tensor:
    """Samples whose directions' deviations fall by a factor, about a mean, in float64."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(features, features, generator=generator, dtype=torch.float64))[0]
    scale = decay ** torch.arange(features, dtype=torch.float64)
    return torch.randn(rows, features, generator=generator, dtype=torch.float64) * scale @ turn + 3


def images(rows: int = 500, seed: int = 0) -> Tensor:
    return (spectrum(rows, 64, 0.9, seed) * 20 + 60).clamp(0, 255).to(torch.uint8)


def sklearn(x: Tensor, k: int) -> decomposition.PCA:
    return decomposition.PCA(k, svd_solver="full").fit(x.double().numpy())


def angle(pca: PCA, peer: decomposition.PCA) -> float:
    return float(subspace_angles(pca.components_.double().numpy().T, peer.components_.T).max())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [400, 40])
def test_every_method_finds_scikit_learns_components(method: str, rows: int) -> None:
    x = spectrum(rows)
    pca, peer = PCA(8, method=method).fit(x), sklearn(x, 8)
    limit = 1e-7 if method in EXACT else 1e-4
    assert angle(pca, peer) < limit
    np.testing.assert_allclose(pca.explained_variance_, peer.explained_variance_, rtol=limit)
    np.testing.assert_allclose(pca.explained_variance_ratio_, peer.explained_variance_ratio_, rtol=limit)
    np.testing.assert_allclose(pca.singular_values_, peer.singular_values_, rtol=limit)
    np.testing.assert_allclose(pca.mean_, peer.mean_, rtol=1e-12)
    assert pca.noise_variance_ == pytest.approx(peer.noise_variance_, rel=1e-3)
    assert (pca.n_samples_seen_, pca.n_features_in_) == (rows, 60)
    largest = pca.components_.gather(1, pca.components_.abs().argmax(1, keepdim=True))
    assert bool((largest > 0).all())


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bfloat16])
def test_exact_is_exact_in_other_dtypes(method: str, dtype: torch.dtype) -> None:
    x = images() if dtype == torch.uint8 else spectrum().to(dtype)
    pca = PCA(8, method=method).fit(x)
    assert pca.components_.dtype == pca.mean_.dtype == torch.float32
    assert angle(pca, sklearn(x, 8)) <= 1e-5


def test_bytes_are_summed_without_rounding() -> None:
    x = images(2000)
    whole, one_by_one = PCA(8).fit(x), PCA(8).fit(torch.split(x, 7))
    reference = x.double() - x.double().mean(0)
    for pca in (whole, one_by_one):
        scatter = pca._stream.scatter  # type: ignore[union-attr]
        assert float((scatter - reference.T @ reference).abs().max() / scatter.abs().max()) < 1e-14


def test_bytes_are_summed_alike_without_integer_products(monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(2000)
    x[:, 0], x[:, 1] = 0, 255
    expected = PCA(8).fit(x)
    monkeypatch.setattr(moments, "_multiplies_integers", lambda device: False)
    assert torch.equal(PCA(8).fit(x)._stream.scatter, expected._stream.scatter)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
def test_few_samples_are_not_decomposed_by_features(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = spectrum(100, 200, 0.95)
    x = (x * 20 + 60).clamp(0, 255).to(dtype) if dtype == torch.uint8 else x.to(dtype)
    limit = 1e-7 if dtype == torch.float64 else 1e-5
    sizes: list[int] = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: sizes.append(len(matrix)) or eigh(matrix))
    few = x[:50]
    pca = PCA(8).fit(passed := few.clone())
    passed.zero_()
    check_fit(pca, few, limit)
    check_fit(PCA(8).fit([few[:1], few[1:20], few[20:]]), few, limit)
    assert not sizes
    check_fit(pca.partial_fit(x[50:]), x, limit)
    assert sizes == [200]
    check_fit(PCA(8).fit([x[:60], x[60:]]), x, limit)
    check_fit(PCA(8).fit(few).merge(PCA(8).fit(x[50:])), x, limit)
    check_fit(PCA(8).fit(x[50:]).merge(PCA(8).fit(few)), x, limit)
    check_fit(PCA(8).merge(PCA(8).fit(few)), few, limit)


def check_fit(pca: PCA, x: Tensor, limit: float) -> None:
    peer = sklearn(x, 8)
    assert pca.n_samples_seen_ == len(x)
    assert angle(pca, peer) < limit
    np.testing.assert_allclose(pca.explained_variance_, peer.explained_variance_, rtol=limit)
    np.testing.assert_allclose(pca.explained_variance_ratio_, peer.explained_variance_ratio_, rtol=limit)
    np.testing.assert_allclose(pca.mean_, peer.mean_, rtol=limit)


def test_few_samples_that_are_wrong_are_refused() -> None:
    x = spectrum(10, 60).float()
    bad = x.clone()
    bad[7, 5] = float("inf")
    pca = PCA(4)
    with pytest.raises(ValueError, match=r"x: expected finite numbers, got inf at \[7, 5\]"):
        pca.partial_fit(bad)
    with pytest.raises(ValueError, match="pass float64"):
        pca.partial_fit(x * 1e30)
    assert pca.n_samples_seen_ == 0
    assert torch.equal(pca.partial_fit(x).components_, PCA(4).fit(x).components_)


def test_few_samples_are_saved_and_go_on(tmp_path: Path) -> None:
    x = spectrum(40, 60)
    pca = PCA(4, whiten=True).fit(x[:15])
    pca.save(tmp_path / "pca.safetensors")
    loaded = PCA.load(tmp_path / "pca.safetensors")
    assert torch.equal(loaded.components_, pca.components_)
    assert torch.equal(loaded.partial_fit(x[15:]).components_, pca.partial_fit(x[15:]).components_)
    assert angle(loaded, sklearn(x, 4)) < 1e-7


@pytest.mark.parametrize("method", STREAMS)
def test_batches_give_what_one_fit_gives(method: str) -> None:
    x = spectrum(600)
    peer = sklearn(x, 8)
    for batches in (torch.split(x, 1), torch.split(x, 37), [x], [x[:300], x[300:301], x[301:]]):
        pca = PCA(8, method=method).fit(iter(batches))
        assert angle(pca, peer) < (1e-7 if method == "moments" else 1e-3)
        assert float(pca.explained_variance_ratio_.sum()) == pytest.approx(
            peer.explained_variance_ratio_.sum(), rel=1e-9 if method == "moments" else 1e-3
        )


def test_a_drifting_stream_keeps_its_mean_and_variance() -> None:
    x = spectrum(600) + torch.linspace(0, 50, 600, dtype=torch.float64)[:, None]
    peer = sklearn(x, 4)
    for method in STREAMS:
        pca = PCA(4, method=method).fit(torch.split(x, 50))
        np.testing.assert_allclose(pca.mean_, peer.mean_, rtol=1e-12)
        np.testing.assert_allclose(pca.explained_variance_[:1], peer.explained_variance_[:1], rtol=1e-6)


@pytest.mark.parametrize("method", STREAMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8])
def test_four_shards_merge_to_one_fit(method: str, dtype: torch.dtype) -> None:
    x = images(800) if dtype == torch.uint8 else spectrum(800, 64, 0.9)
    shards = [PCA(8, method=method).fit(shard) for shard in (x[:100], x[100:101], x[101:500], x[500:])]
    for shard in shards[1:]:
        shards[0].merge(shard)
    peer = sklearn(x, 8)
    assert shards[0].n_samples_seen_ == 800
    # One without samples adds none, and takes all.
    empty = PCA(8, method=method)
    assert torch.equal(empty.merge(shards[0].merge(empty)).components_, shards[0].components_)
    limit = 1e-2 if method == "blocks" else 1e-5 if dtype == torch.uint8 else 1e-7
    assert angle(shards[0], peer) < limit
    np.testing.assert_allclose(shards[0].mean_, peer.mean_, rtol=1e-6)
    total = x.double().var(0).sum()
    ratio = shards[0].explained_variance_ratio_[0] * total
    assert float(ratio) == pytest.approx(float(shards[0].explained_variance_[0]), rel=1e-5)


def _shard(rank: int, port: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    try:
        pca = PCA(8)
        # One of them has nothing to add.
        if rank < 2:
            pca.partial_fit(images(600)[rank * 300 : rank * 300 + 300])
        pca.all_merge().save(Path(folder) / f"{rank}.safetensors")
    finally:
        torch.distributed.destroy_process_group()


def test_processes_merge_to_the_same_bits(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_shard, (port, str(tmp_path)), nprocs=3)
    states = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(3)]
    for state in states[1:]:
        assert all(torch.equal(tensor, state[name]) for name, tensor in states[0].items())
    assert angle(PCA.load(tmp_path / "2.safetensors"), sklearn(images(600), 8)) <= 1e-5


def test_whitening_has_its_scale_apart() -> None:
    x = spectrum()
    pca, peer = PCA(8, whiten=True).fit(x), decomposition.PCA(8, svd_solver="full", whiten=True).fit(x.numpy())
    z = pca.transform(x)
    np.testing.assert_allclose(z.abs(), np.abs(peer.transform(x.numpy())), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(z.std(0), torch.ones(8, dtype=torch.float64))
    eye = pca.components_ @ pca.components_.T
    torch.testing.assert_close(eye, torch.eye(8, dtype=torch.float64))
    plain = PCA(8).fit(x)
    torch.testing.assert_close(pca.inverse_transform(z), plain.inverse_transform(plain.transform(x)))


def test_numbers_far_from_zero_lose_nothing() -> None:
    x = spectrum(400, 20)
    far = (x + 1e6).float()
    assert angle(PCA(4).fit(far), sklearn(far, 4)) < 1e-4
    assert angle(PCA(4, method="blocks").fit(far), sklearn(far, 4)) < 1e-4
    assert angle(PCA(4, method="randomized").fit(far), sklearn(far, 4)) < 1e-4
    ill = x * torch.logspace(-4, 4, 20, dtype=torch.float64)
    assert angle(PCA(4).fit(ill), sklearn(ill, 4)) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_constant_features_and_constant_data(method: str) -> None:
    x = spectrum(100, 20)
    x[:, 3] = 7
    assert angle(PCA(4, method=method).fit(x), sklearn(x, 4)) < 1e-3
    if method == "blocks":
        with pytest.raises(ValueError, match="n_components: expected at most 0, the directions"):
            _ = PCA(2, method=method).fit(torch.full((50, 5), 3.0)).components_
        return
    pca = PCA(2, method=method, whiten=True).fit(torch.full((50, 5), 3.0))
    assert pca.explained_variance_ratio_.tolist() == [0, 0]
    torch.testing.assert_close(pca.components_ @ pca.components_.T, torch.eye(2))
    with pytest.raises(ValueError, match="whiten: expected components of some variance, got none in component 0"):
        pca.transform(torch.zeros(1, 5))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named_and_nothing_is_taken(method: str, value: float) -> None:
    x = spectrum().float()
    bad = x.clone()
    bad[17, 5] = value
    with pytest.raises(ValueError, match=r"x: expected finite numbers, got (nan|inf) at \[17, 5\]"):
        PCA(4, method=method).fit(bad)
    if method in STREAMS:
        pca = PCA(4, method=method).fit(x)
        before = pca.components_.clone()
        with pytest.raises(ValueError, match=r"\[17, 5\]"):
            pca.partial_fit(bad)
        assert pca.n_samples_seen_ == 400
        assert torch.equal(PCA(4, method=method).fit(x).components_, before)
        with pytest.raises(ValueError, match="pass float64"):
            pca.partial_fit(torch.randn(3, 60) * 1e30)


@pytest.mark.parametrize("method", METHODS)
def test_wrong_arguments_are_named(method: str) -> None:
    with pytest.raises(ValueError, match="n_components: expected one or more"):
        PCA(0, method=method)
    with pytest.raises(ValueError, match="n_components: expected at most 60, the features"):
        PCA(61, method=method).fit(spectrum())
    with pytest.raises(ValueError, match="at least 8 samples for 8 components, got 5"):
        _ = PCA(8, method=method).fit(spectrum(5)).components_
    for bad in (torch.zeros(5), torch.zeros(0, 5), torch.zeros(4, 0), torch.zeros(2, 3, 4)):
        with pytest.raises(ValueError, match="x: expected shape"):
            PCA(2, method=method).fit(bad)
    for dtype in (torch.bool, torch.complex64, torch.int64):
        with pytest.raises(ValueError, match="x: expected uint8 or a real float"):
            PCA(2, method=method).fit(torch.zeros(5, 5, dtype=dtype))
    if method in STREAMS:
        with pytest.raises(ValueError, match="x: expected 60 features, as before, got 59"):
            PCA(4, method=method).fit([spectrum(), spectrum()[:, 1:]])
        with pytest.raises(ValueError, match="merge: expected one method and as many features"):
            PCA(4, method=method).fit(spectrum()).merge(PCA(4, method=method).fit(spectrum(50, 30)))
    else:
        with pytest.raises(ValueError, match="needs all samples at once"):
            PCA(4, method=method).fit(iter([spectrum()]))
        with pytest.raises(ValueError, match="method: expected moments or blocks"):
            PCA(4, method=method).partial_fit(spectrum())
    with pytest.raises(ValueError, match="expected fit or partial_fit before"):
        PCA(4, method=method).transform(spectrum())
    with pytest.raises(ValueError, match="method: expected one of"):
        PCA(4, method="best")  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
def test_a_training_loop_around_takes_no_digits(method: str) -> None:
    x = spectrum().float()
    expected = PCA(8, method=method).fit(x).components_
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            pca = PCA(8, method=method).fit(x.requires_grad_())
            assert torch.equal(pca.components_, expected)
            assert torch.get_float32_matmul_precision() == "medium"
            assert pca.transform(x).dtype == torch.float32
    finally:
        torch.set_float32_matmul_precision(before)


def test_too_few_samples_may_become_enough() -> None:
    pca = PCA(8).fit(spectrum(5))
    with pytest.raises(ValueError, match="at least 8 samples"):
        _ = pca.components_
    assert angle(pca.partial_fit(spectrum()[5:]), sklearn(torch.cat([spectrum(5), spectrum()[5:]]), 8)) < 1e-7


def test_blocks_stay_orthonormal_over_many_updates() -> None:
    x = spectrum(6400, 64, 0.95).float()
    state = Blocks(64, 24, torch.float32, torch.device("cpu"))
    for batch in torch.split(x, 32):
        state.update(batch)
        gram = state.components.double() @ state.components.double().T
        assert float((gram - torch.eye(len(gram))).abs().max()) < 1e-4


def test_blocks_put_right_what_rounding_did() -> None:
    x = spectrum(500, 64, 0.8)
    state = Blocks(64, 64, torch.float64, torch.device("cpu"))
    state.update(x)
    turn = torch.eye(64, dtype=torch.float64) + 1e-3 * torch.randn(64, 64, dtype=torch.float64)
    rows = state.singular_values[:, None] * (turn @ state.components)
    state.components = turn @ state.components
    state._orthonormalise()
    gram = state.components @ state.components.T
    torch.testing.assert_close(gram, torch.eye(64, dtype=torch.float64))
    again = state.singular_values[:, None] * state.components
    torch.testing.assert_close(again.T @ again, rows.T @ rows)


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_pca_is_the_same_and_goes_on(method: str, tmp_path: Path) -> None:
    x = spectrum(300)
    pca = PCA(8, method=method, whiten=True, seed=3).fit(x[:200])
    pca.save(tmp_path / "pca.safetensors")
    loaded = PCA.load(tmp_path / "pca.safetensors")
    assert torch.equal(loaded.transform(x), pca.transform(x))
    assert loaded.noise_variance_ == pca.noise_variance_
    assert torch.equal(loaded.explained_variance_ratio_, pca.explained_variance_ratio_)
    if method in STREAMS:
        assert torch.equal(loaded.partial_fit(x[200:]).components_, pca.partial_fit(x[200:]).components_)


@pytest.mark.parametrize("method", ["moments", "blocks", "exact"])
def test_damaged_files_are_refused(method: str, tmp_path: Path) -> None:
    path = tmp_path / "pca.safetensors"
    PCA(2, method=method).fit(spectrum(40, 6)).save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises((CorruptWeightError, ValueError)):
            PCA.load(path)
    generator = np.random.default_rng(0)
    for place in generator.choice(len(whole), 150, replace=False):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(bytes(damaged))
        with pytest.raises((CorruptWeightError, ValueError)):
            PCA.load(path)


def test_files_that_lie_are_refused(tmp_path: Path) -> None:
    from infold.tokenizers._files import load_state, save_state

    path = tmp_path / "pca.safetensors"
    PCA(2).fit(spectrum(40, 6)).save(path)
    tensors, metadata = load_state(path, "pca", 1)
    lies: list[tuple[dict[str, Tensor], dict[str, object]]] = [
        ({}, {"n_components": 3}),
        ({}, {"stream": "blocks", "kept": 3}),
        ({}, {"count": "many"}),
        ({}, {"method": "guess"}),
        ({"scatter": torch.zeros(2, 2, dtype=torch.float64)}, {}),
        ({"mean": torch.full((6,), float("nan"), dtype=torch.float64)}, {}),
        ({"fitted.mean": torch.zeros(7, dtype=torch.float64)}, {}),
        ({"fitted.components": torch.zeros(2)}, {}),
    ]
    for changed, said in lies:
        save_state(path, "pca", 1, {**tensors, **changed}, {**metadata, **said})
        with pytest.raises(CorruptWeightError):
            PCA.load(path)
    save_state(path, "pca", 2, tensors, metadata)
    with pytest.raises(ValueError, match="expected version 1"):
        PCA.load(path)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="expected a file of kind 'pca'"):
        PCA.load(path)
    buffer = io.BytesIO()
    torch.save(nn.Linear(2, 2).state_dict(), buffer)
    path.write_bytes(buffer.getvalue())
    with pytest.raises(CorruptWeightError):
        PCA.load(path)


def wide(samples: int, features: int, spike: float) -> Tensor:
    """Float32 samples whose first feature varies far more than the rest, in float32."""
    x = torch.randn(samples, features, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= spike
    return x


@pytest.mark.parametrize(("features", "spike"), [(50, 1e4), (100, 1e5)])
def test_blocks_find_small_directions_beside_a_large_one(features: int, spike: float) -> None:
    x = wide(600, features, spike)
    pca = PCA(30, method="blocks").fit(x)
    gram = pca.components_.double() @ pca.components_.double().T
    assert float((gram - torch.eye(30)).abs().max()) < 1e-5
    centred = x.double().numpy() - x.double().numpy().mean(0)
    expected = np.linalg.svd(centred, compute_uv=False)[:30]
    np.testing.assert_allclose(pca.singular_values_, expected, rtol=0.02 if features > 94 else 1e-3)


def test_blocks_have_no_directions_that_are_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, generator=generator) @ torch.randn(3, 6, generator=generator)
    with pytest.raises(ValueError, match="expected at most 3, the directions seen so far, got 5"):
        _ = PCA(5, method="blocks").fit(x).components_


def test_blocks_of_fewer_directions_than_kept_go_on() -> None:
    x = torch.randint(0, 256, (5000, 784), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    x[:, :700] = 0
    pca = PCA(64, method="blocks").fit(x)
    variance = np.linalg.eigvalsh(np.cov(x[:, 700:].double().numpy(), rowvar=False))[::-1][:64]
    np.testing.assert_allclose(pca.explained_variance_, variance, rtol=1e-4)
    constant = PCA(1, method="blocks").fit(torch.ones(5000, 6).chunk(20))
    assert constant.n_samples_seen_ == 5000
    with pytest.raises(ValueError, match="expected at most 0, the directions"):
        _ = constant.components_


def test_bytes_of_one_feature() -> None:
    x = torch.randint(0, 256, (100, 1), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    np.testing.assert_allclose(PCA(1).fit(x).explained_variance_, x.double().numpy().var(0, ddof=1), rtol=1e-6)


@pytest.mark.parametrize("method", STREAMS)
def test_what_was_handed_out_is_not_the_streams(method: str) -> None:
    x = spectrum()
    pca = PCA(4, method=method).fit(x[:200])
    pca.mean_.fill_(1e3)
    pca.components_.zero_()
    np.testing.assert_allclose(pca.partial_fit(x[200:]).mean_, x.mean(0), rtol=1e-12)
    assert angle(pca, sklearn(x, 4)) < 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_directions_that_are_rounding_are_not_whitened(method: str) -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"variance, got none in component 3|expected at most 3, the"):
        PCA(4, method=method, whiten=True).fit(x).scale()
    scale = PCA(3, method=method, whiten=True).fit(x).scale()
    assert scale is not None
    np.testing.assert_allclose(scale, sklearn(x, 3).explained_variance_ ** -0.5, rtol=1e-4)


def test_what_cannot_merge_is_refused_by_name() -> None:
    x = torch.randn(500, 300, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="n_components: expected at most 3, the features, got 10"):
        PCA(10).merge(PCA(2).fit(x[:, :3]))
    blocks = PCA(2, method="blocks").fit(x)
    with pytest.raises(ValueError, match=r"merge: expected one method and as many features, got moments .* and blocks"):
        PCA(2, method="moments").merge(blocks)
    with pytest.raises(ValueError, match="164 directions kept and blocks of 300 features, 66 directions kept"):
        PCA(100, method="blocks").merge(blocks)
    assert PCA(3, method="moments").merge(PCA(2).fit(x)).components_.shape == (3, 300)


def test_processes_that_cannot_merge_all_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    x = spectrum()
    for other in (PCA(4, method="exact").fit(x), PCA(4, method="blocks")):
        states = [PCA(4, method="moments").fit(x), other]

        def gather(found: list[PCA], own: PCA, group: object, states: list[PCA] = states) -> None:
            found[:] = states

        monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
        for pca in states:
            with pytest.raises(ValueError, match="merge: expected"):
                pca.all_merge()


def test_precision_set_for_one_backend_stays_and_threads_share_it() -> None:
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        backends[0].fp32_precision = "tf32"
        backends[1].fp32_precision = "bf16"
        x = spectrum().float()

        def fit() -> None:
            for _ in range(30):
                PCA(2).fit(x)

        threads = [threading.Thread(target=fit) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [backend.fp32_precision for backend in backends] == ["tf32", "bf16"]
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@pytest.mark.parametrize("method", METHODS)
def test_squares_that_results_cannot_hold_are_refused(method: str) -> None:
    x = spectrum()
    with pytest.raises(ValueError, match="squares are in float32, got larger ones; pass float64"):
        PCA(2, method=method).fit(x.float() * 1e30)
    with pytest.raises(ValueError, match=r"squares are in float64, got larger ones$"):
        PCA(2, method=method).fit(x * 1e200)
    if method in STREAMS:
        pca = PCA(2, method=method).fit(x.float())
        with pytest.raises(ValueError, match="squares are in float32"):
            pca.partial_fit(x * 1e30)
        assert pca.n_samples_seen_ == 400


@pytest.mark.parametrize("method", STREAMS)
def test_a_shard_of_few_samples_is_saved_and_merges(method: str, tmp_path: Path) -> None:
    x = spectrum()
    PCA(8, method=method).fit(x[:5]).save(tmp_path / "pca.safetensors")
    loaded = PCA.load(tmp_path / "pca.safetensors")
    with pytest.raises(ValueError, match="at least 8 samples for 8 components, got 5"):
        _ = loaded.components_
    merged = PCA(8, method=method).fit(x[5:]).merge(loaded)
    assert merged.n_samples_seen_ == 400
    assert angle(merged, sklearn(x, 8)) < 1e-4
    with pytest.raises(ValueError, match="expected fit or partial_fit before"):
        PCA(8, method=method).save(tmp_path / "none.safetensors")


def test_arrays_are_refused_by_name() -> None:
    for array in (np.zeros((5, 6), np.uint8), np.zeros((5, 6))):
        with pytest.raises(ValueError, match=r"x: expected a tensor, got numpy\.ndarray"):
            PCA(2).partial_fit(array)  # type: ignore[arg-type]

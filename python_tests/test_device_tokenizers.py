"""PCA, tokenizers and splines on a GPU against themselves on the CPU, in float64."""

from __future__ import annotations

import pytest
import torch
from infold._library import ops
from infold.tokenizers import PCA, PCATokenizer, SeparablePCA, SparsePCA, SplinePCATokenizer, TrajectoryRecorder
from torch import Tensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def samples(dtype: torch.dtype, rows: int = 500) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    scale = 0.8 ** torch.arange(64, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))[0]
    x = torch.randn(rows, 64, generator=generator, dtype=torch.float64) * scale @ turn
    return (x * 20 + 60).clamp(0, 255).to(dtype)


@pytest.mark.parametrize("method", ["moments", "blocks", "randomized", "exact"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.uint8])
# int8 products there take multiples of 8 alone; a quarter of the features or less is decomposed by samples.
@pytest.mark.parametrize("rows", [496, 500, 16])
def test_pca(method: str, dtype: torch.dtype, rows: int) -> None:
    x = samples(dtype, rows)
    there, here = PCA(8, method=method).fit(x.cuda()), PCA(8, method="exact").fit(x.double())
    assert there.components_.is_cuda
    torch.testing.assert_close(there.components_.double().cpu(), here.components_, rtol=0, atol=1e-3)
    torch.testing.assert_close(there.explained_variance_.double().cpu(), here.explained_variance_, rtol=1e-3, atol=0)
    torch.testing.assert_close(there.transform(x.cuda()).double().cpu(), here.transform(x), rtol=1e-3, atol=0.2)


@pytest.mark.parametrize("kind", [PCATokenizer, SplinePCATokenizer])
def test_tokenizers(kind: type[PCATokenizer]) -> None:
    x = (samples(torch.float32) / 40).exp().reshape(-1, 1, 8, 8)
    tokenizer = kind.fit(x, 6, patch_size=4)
    if isinstance(tokenizer, SplinePCATokenizer):
        assert tokenizer.spline.bent.any()
    tokens = tokenizer(x)
    images = tokenizer.inverse(tokens)
    there = tokenizer.cuda()
    torch.testing.assert_close(there(x.cuda()).cpu(), tokens, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(there.inverse(there(x.cuda())).cpu(), images, rtol=1e-3, atol=1e-2)
    assert kind.fit(x.cuda(), 6, patch_size=4).components.is_cuda


@pytest.mark.parametrize("features", [8, 16, 17, 24, 64])
def test_moments_of_bytes_are_exact(features: int) -> None:
    """Of any number of rows and features, whatever products of int8 there are."""
    generator = torch.Generator().manual_seed(0)
    for rows in (17, 512, 140_000):
        x = torch.randint(256, (rows, features), dtype=torch.uint8, generator=generator)
        there, here = PCA(1, method="moments").fit(x.cuda()), PCA(1, method="moments").fit(x)
        torch.testing.assert_close(there._stream.scatter.cpu(), here._stream.scatter, rtol=1e-12, atol=1e-6)  # type: ignore[union-attr]


def test_statistics_on_both_devices_merge() -> None:
    x = samples(torch.float32)
    for method in ("moments", "blocks"):
        for first, second in (("cpu", "cuda"), ("cuda", "cpu")):
            pca = PCA(8, method=method).fit(x[:250].to(first)).merge(PCA(8, method=method).fit(x[250:].to(second)))  # type: ignore[arg-type]
            assert pca.components_.device.type == first
            whole = PCA(8, method="exact").fit(x)
            torch.testing.assert_close(pca.explained_variance_.cpu(), whole.explained_variance_, rtol=1e-3, atol=0)


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_products_are_whole_whatever_the_process_allows(precision: str) -> None:
    x, before = samples(torch.float32).cuda(), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        for method in ("moments", "blocks", "randomized"):
            there = PCA(8, method=method).fit(x)  # type: ignore[arg-type]
            here = PCA(8, method="exact").fit(x.double())
            torch.testing.assert_close(there.explained_variance_.double(), here.explained_variance_, rtol=1e-4, atol=0)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_other_decompositions() -> None:
    for rows in (500, 40):
        x = samples(torch.float64, rows)
        there, here = SparsePCA(3, sparsity=10).fit(x.cuda()), SparsePCA(3, sparsity=10).fit(x)
        torch.testing.assert_close(there.components_.cpu(), here.components_, rtol=0, atol=1e-6)
        torch.testing.assert_close(there.transform(x.cuda()).cpu(), here.transform(x), rtol=1e-6, atol=1e-4)
        volumes = x.reshape(-1, 4, 16)
        separable = SeparablePCA([2, 5]).fit(volumes.cuda())
        expected = SeparablePCA([2, 5]).fit(volumes)
        torch.testing.assert_close(separable.transform(volumes.cuda()).cpu(), expected.transform(volumes))


def test_trajectories() -> None:
    model = torch.nn.Linear(5, 3).cuda()
    recorders = [TrajectoryRecorder.of_weights(model, n=6, device=device) for device in ("cpu", "cuda")]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with recorders[0].attach(optimizer), recorders[1].attach(optimizer):
        for _ in range(30):
            optimizer.zero_grad()
            model(torch.ones(2, 5, device="cuda")).square().sum().backward()
            optimizer.step()
    here, there = (recorder.trajectories()["weight"] for recorder in recorders)
    assert there.spline.control.is_cuda
    torch.testing.assert_close(there.spline.control.cpu(), here.spline.control)
    torch.testing.assert_close(there.activity().cpu(), here.activity())
    ahead = [recorder.predict(3, method="linear")["weight"].cpu() for recorder in recorders]
    torch.testing.assert_close(ahead[1], ahead[0])


def test_operators() -> None:
    x, components = torch.randn(5, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    mean, scale = torch.randn(9, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    arguments = [t.cuda().requires_grad_() for t in (x, components, mean, scale)]
    torch.testing.assert_close(ops.pca_project(*arguments).cpu(), ops.pca_project(x, components, mean, scale))
    assert torch.autograd.gradcheck(ops.pca_project, arguments)
    z = torch.randn(5, 4, dtype=torch.float64, device="cuda", requires_grad=True)
    assert torch.autograd.gradcheck(ops.pca_reconstruct, (z, *arguments[1:]))
    knots = torch.tensor([0.0] * 4 + [0.5] + [1.0] * 4, dtype=torch.float64)
    points = torch.linspace(0, 1, 20, dtype=torch.float64)
    values = torch.randn(3, 20, dtype=torch.float64)
    control = ops.bspline_fit(values, knots, points)
    torch.testing.assert_close(ops.bspline_fit(values.cuda(), knots, points).cpu(), control)
    torch.testing.assert_close(
        ops.bspline_eval(control.cuda(), knots, points, 1).cpu(), ops.bspline_eval(control, knots, points, 1)
    )

"""PCA, tokenizers and splines on a GPU against themselves on the CPU, in float64."""

from __future__ import annotations

import pytest
import torch
from infold._library import ops
from infold.tokenizers import PCA, PCATokenizer, SplinePCATokenizer
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
    x = samples(torch.float32).exp().clamp(max=1e3).reshape(-1, 1, 8, 8)
    tokenizer = kind.fit(x, 6, patch_size=4)
    tokens = tokenizer(x)
    images = tokenizer.inverse(tokens)
    there = tokenizer.cuda()
    torch.testing.assert_close(there(x.cuda()).cpu(), tokens, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(there.inverse(there(x.cuda())).cpu(), images, rtol=1e-3, atol=1e-2)
    assert kind.fit(x.cuda(), 6, patch_size=4).components.is_cuda


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

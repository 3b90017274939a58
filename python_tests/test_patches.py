"""Patches, against plain slicing."""

import itertools

import pytest
import torch
from infold.tokenizers.patches import from_patches, to_patches

CASES = [((12,), (3,)), ((6, 8), (2, 4)), ((4, 6, 8), (2, 3, 4)), ((5, 3), (1, 3))]


@pytest.mark.parametrize(("spatial", "size"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_patches_are_slices_in_row_major_order_and_come_back(spatial, size, dtype) -> None:
    x = torch.randint(0, 255, (2, 3, *spatial), generator=torch.Generator().manual_seed(0)).to(dtype)
    starts = itertools.product(*(range(0, n, edge) for n, edge in zip(spatial, size, strict=True)))
    slices = [
        x[(slice(None), slice(None), *(slice(a, a + edge) for a, edge in zip(start, size, strict=True)))].flatten(1)
        for start in starts
    ]
    patches = to_patches(x, size)
    assert patches.dtype == dtype
    assert torch.equal(patches, torch.stack(slices, 1))
    assert torch.equal(from_patches(patches, 3, spatial, size), x)


def test_views_empty_batches_and_single_edges() -> None:
    x = torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
    view = x.transpose(2, 3)
    assert torch.equal(to_patches(view, 2), to_patches(view.contiguous(), (2, 2)))
    assert torch.equal(from_patches(to_patches(view, 2), 3, 4, 2), view)
    assert to_patches(x[:0], 2).shape == (0, 4, 12)
    assert from_patches(to_patches(x[:0], 2), 3, (4, 4), 2).shape == (0, 3, 4, 4)


def test_bad_sizes_are_refused_by_name() -> None:
    x = torch.zeros(1, 1, 4, 6)
    with pytest.raises(ValueError, match=r"size: expected 2 sizes that divide \[4, 6\], got \[4, 4\]"):
        to_patches(x, 4)
    with pytest.raises(ValueError, match="size: expected 2 sizes"):
        to_patches(x, (2,))
    with pytest.raises(ValueError, match="size: expected 2 sizes"):
        to_patches(x, 0)
    with pytest.raises(ValueError, match="x: expected"):
        to_patches(torch.zeros(4, 6), 2)
    with pytest.raises(ValueError, match=r"patches: expected \(batch, 6, 4\), got \[1, 6, 5\]"):
        from_patches(torch.zeros(1, 6, 5), 1, (4, 6), 2)
    with pytest.raises(ValueError, match="image_size: expected 1 to 3"):
        from_patches(torch.zeros(1, 6, 5), 1, (), 2)

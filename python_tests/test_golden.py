"""Files of earlier versions: read to the same bits, for ever."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from infold._library import ops
from infold.packed import Packed, read_header
from safetensors import safe_open

FILES = sorted((Path(__file__).parent / "data").glob("*.safetensors"))


def test_they_are_there() -> None:
    assert len(FILES) >= 18


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden_file(path: Path) -> None:
    with safe_open(path, "pt") as file:
        expected_header = json.loads(file.metadata()["header"])
        packed = Packed(*(file.get_tensor(field) for field in Packed._fields))
        dense = file.get_tensor("dense")
    header = read_header(packed, path.stem, verify=True)
    assert [str(field) for field in header] == expected_header
    scales = packed.scales if packed.scales.numel() else None
    layout = (header.codec, header.layout, header.out_features, header.in_features)
    unpacked = ops.unpack(*packed[:3], scales, *layout, dense.dtype)
    assert torch.equal(unpacked.view(torch.uint8), dense.view(torch.uint8))

    finite = torch.nan_to_num(dense, 0.0, 0.0, 0.0)
    if torch.equal(finite.view(torch.uint8), dense.view(torch.uint8)):
        x = torch.randn(5, header.in_features)
        y = ops.fused_linear(x, *packed[:3], scales, None, *layout, header.dtype)
        torch.testing.assert_close(y.double(), x.double() @ dense.double().T, rtol=1e-4, atol=1e-5)

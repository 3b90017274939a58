"""The operators without the Python package: torch.ops.load_library and nothing else.

Run: python examples/load_library.py [path of libinfold.so]
"""

import sys
from pathlib import Path

import torch

library = Path(__file__).parents[1] / "torch_ext" / "infold" / "libinfold.so"
torch.ops.load_library(sys.argv[1] if len(sys.argv) > 1 else str(library))
infold = torch.ops.infold

weight = torch.randn(512, 256)
payload, directory, tables, scales = infold.pack_int8(weight)
_, codec, layout, _, rows, cols, *_ = infold.inspect_packed(payload, directory, tables, scales.float(), True)

x = torch.randn(4, 256, requires_grad=True)
scales = scales.float().requires_grad_()
packed = (payload, directory, tables, scales)
y = infold.fused_linear(x, *packed, None, codec, layout, rows, cols, torch.float32)
y.square().sum().backward()

print(f"{8 * payload.numel() / weight.numel():.2f} bits a weight in the payload")
print(f"relative error of y: {((y - x @ weight.T).norm() / (x @ weight.T).norm()).item():.4f}")
print(f"gradients: x {tuple(x.grad.shape)}, scales {tuple(scales.grad.shape)}")

"""What is built and shipped, and the examples that show it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import infold
import pytest
import torch

ROOT = Path(__file__).parents[1]


def test_build_info_says_what_was_built() -> None:
    info = infold.build_info()
    assert info["version"] == infold.__version__
    assert info["format_version"] == 3
    assert info["cpu"] in ("generic", "neon", "avx2", "avx512", "amx")
    nvcc = Path(torch.__file__).parents[1] / "nvidia" / "cu13" / "bin" / "nvcc"
    if nvcc.is_file():
        assert info["cuda"]
        assert "compute_80" in info["cuda_architectures"]
        kernels = [
            "backward",
            "circulant_few",
            "circulant_many",
            "decode",
            "inputs",
            "lay_out",
            "linear",
            "log8",
            "quantise",
            "unpack",
            "wide",
        ]
        assert info["cuda_kernels"] == kernels
        assert info["cuda_bytes"] > 0


def test_the_library_needs_no_gpu_library_and_no_python() -> None:
    """Its needed libraries, read from the ELF file's string table by their names."""
    raw = Path(infold.library_path()).read_bytes()
    assert raw.startswith(b"\x7fELF")
    for name in (b"libtorch_cpu.so", b"libc10.so"):
        assert b"\0" + name + b"\0" in raw
    for name in (b"libtorch_cuda.so", b"libcudart.so", b"libcuda.so", b"libtorch_python.so", b"libpython"):
        assert b"\0" + name not in raw, name


def test_the_embedded_kernels_are_fatbins() -> None:
    raw = Path(infold.library_path()).read_bytes()
    # The magic number of NVIDIA's fatbin container.
    assert (b"\x50\xed\x55\xba" in raw) == infold.build_info()["cuda"]


#: What makes an example short.
ARGUMENTS = {
    "adapter": ["--steps", "3", "--seeds", "1", "--rounds", "1", "--json", "OUT/adapter.json"],
    "larger_than_memory": ["--budget", "8", "--times", "20", "--steps", "2"],
    "mnist_frequency": ["--epochs", "1", "--seeds", "1", "--out", "OUT"],
    "phase_relations": ["--steps", "5", "--seeds", "1", "--out", "OUT"],
    "resnet/imagenet_pca": [
        "--size",
        "32",
        "--images",
        "384",
        "--batch",
        "128",
        "--components",
        "64",
        "--threads",
        "1",
    ],
    "resnet/resnet20": ["--smoke", "--out", "OUT"],
    "resnet/resnet50": ["--smoke", "--folder", "OUT"],
    "video_pca": ["--quick", "--out", "OUT"],
}


@pytest.mark.parametrize(
    "name",
    [
        "adapter",
        "embed",
        "larger_than_memory",
        "load_library",
        "mnist_frequency",
        "phase_relations",
        "resnet/imagenet_pca",
        "resnet/resnet20",
        "resnet/resnet50",
        "train_on_packed",
        "video_pca",
    ],
)
def test_example(name: str, tmp_path: Path) -> None:
    arguments = [argument.replace("OUT", str(tmp_path)) for argument in ARGUMENTS.get(name, [])]
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    expected = {
        "adapter": "circulant           165,888",
        "embed": "bits a weight",
        "larger_than_memory": "20 times the budget",
        "load_library": "gradients: x (4, 256)",
        "mnist_frequency": "circulant 8       243,722   7.6x",
        "phase_relations": "8,448 parameters in every model",
        "resnet/imagenet_pca": "3,072 dimensions to 64 components",
        "resnet/resnet20": "| patches 12 | 768 |",
        "resnet/resnet50": "102.2 MB of weights; batch 1 at 64²; forwards, 1 threads; outputs are equal",
        "train_on_packed": "epoch 4",
        "video_pca": "40 clips of 8 × 16 × 16 fitted",
    }
    assert expected[name] in result.stdout
    if name == "larger_than_memory":
        # Of the memory that is allowed; with all weights in it there would be three times as much.
        assert float(result.stdout.split()[-3]) < 2
    written = {
        "adapter": {"adapter.json"},
        "mnist_frequency": {"runs.csv", "accuracy.png"},
        "phase_relations": {"runs.csv", "layer_phases.csv", "layer_phases.png", "relations.png"},
        "resnet/resnet20": {"runs.csv", "trajectories.png"},
        "video_pca": {"video_pca.png"},
    }
    assert {path.name for path in tmp_path.iterdir()} == written.get(name, set())


def test_the_library_alone_differentiates() -> None:
    """A process that knows nothing of the Python package."""
    code = (
        "import sys, torch\n"
        f"torch.ops.load_library({infold.library_path()!r})\n"
        "o = torch.ops.infold\n"
        "w = torch.randn(70, 90)\n"
        "p, d, t, s = o.pack_lossless(w)\n"
        "_, codec, layout, _, rows, cols, *_ = o.inspect_packed(p, d, t)\n"
        "x = torch.randn(3, 90, requires_grad=True)\n"
        "o.fused_linear(x, p, d, t, None, None, codec, layout, rows, cols, torch.float32).sum().backward()\n"
        "assert torch.allclose(x.grad, w.sum(0).expand(3, 90), atol=1e-4)\n"
        "assert 'infold' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

"""What gpu_check.py compares with: products and a decoder of other libraries, each only where it can be imported.

`make gpu-bundle` puts torchao and DFloat11, as they are published, into peers/.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Last: what the machine has comes first.
sys.path.append(str(Path(__file__).resolve().parent / "peers"))

Product = Callable[[Tensor], Tensor]
Products = dict[str, list[Product]]

#: Why a peer was left out, by its name.
left_out: dict[str, str] = {}


def leave_out(label: str, error: Exception) -> None:
    """Prints why, once, and keeps it for the JSON."""
    why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if left_out.get(label) != why:
        print(f"left out: {label}: {why}", flush=True)
    left_out[label] = why


def versions() -> dict[str, str]:
    """Of the packages that are here."""
    found = {}
    for name in ("torchao", "dfloat11", "dahuffman"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def torch_int4(weight: Tensor) -> Product:
    """PyTorch's own int4 product, in groups of 128."""
    groups = weight.float().view(len(weight), -1, 128)
    scales = groups.abs().amax(2).clamp(min=1e-6) / 7
    codes = (groups / scales.unsqueeze(2)).round().clamp(-8, 7).add(8).flatten(1).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    scales_and_zeros = torch.stack([scales, torch.zeros_like(scales)], 2).transpose(0, 1).contiguous().bfloat16()
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, 128, scales_and_zeros)


def torch_int8(weight: Tensor) -> Product:
    """The library's product of integers, for x that are quantised already; of more than 16 rows."""
    codes = (weight.float() * (127 / weight.abs().max())).round().to(torch.int8)
    return lambda x: torch._int_mm(x.to(torch.int8), codes.t())


def torchao_linear(weight: Tensor, config: Any) -> torch.nn.Linear:
    """A layer with torchao's form of a weight."""
    from torchao.quantization import quantize_

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    quantize_(linear, config)
    if type(linear.weight) is torch.nn.Parameter:
        raise RuntimeError("its quantize_ left the weight as it was")
    return linear


def torchao_int4(weight: Tensor) -> Product:
    """In groups of 128, packed as PyTorch's own int4 product takes it: the other packings want further packages."""
    from torchao.quantization import Int4WeightOnlyConfig

    packing: Any = "tile_packed_to_4d"
    return torchao_linear(weight, Int4WeightOnlyConfig(group_size=128, int4_packing_format=packing))


@functools.cache
def compiled_linear() -> Callable[[Tensor, Tensor], Tensor]:
    # A name of its own: F.linear itself is not traced into.
    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    # Each shape is compiled once, for all copies of a weight.
    return torch.compile(linear, dynamic=False)


def torchao_int8(weight: Tensor) -> Product:
    """A scale per row. Compiled for one row, where that makes converting and multiplying one kernel.

    For more rows either way converts the whole weight and then calls cuBLAS, and compiling would only take time.
    """
    from torchao.quantization import Int8WeightOnlyConfig

    linear = torchao_linear(weight, Int8WeightOnlyConfig())
    return lambda x: compiled_linear()(x, linear.weight) if len(x) == 1 else linear(x)


#: By the format that they are compared with.
PEERS: dict[str, dict[str, Callable[[Tensor], Product]]] = {
    "int4 g128": {"torch int4": torch_int4, "torchao int4": torchao_int4},
    "int8": {"torch int8": torch_int8, "torchao int8": torchao_int8},
}


#: What one of the peers is for.
FORMATS = ("lossless", *PEERS)


def products_of(name: str, weight: Tensor, copies_bytes: float) -> Products:
    """Other libraries' products of the same format, each over copies of its weight that take about so much together."""
    count = int(copies_bytes / weight.numel()) + 1
    there = weight.cuda()
    products: Products = {}
    for label, peer in PEERS.get(name, {}).items():
        try:
            products[label] = [peer(there) for _ in range(count)]
        except Exception as error:
            leave_out(label, error)
    if name == "lossless" and (packed := dfloat11_of(there)):
        # What is decoded is what fills the cache: few copies will do.
        target = torch.empty_like(there)
        copies = [packed.clone() for _ in range(min(8, count))]
        products["DFloat11, cuBLAS"] = [lambda x, w=w: F.linear(x, decode(w, target)) for w in copies]  # type: ignore[misc]
    return products


def runs_of(products: Products, x: Tensor) -> dict[str, list[Callable[[], object]]]:
    """Those that take this x."""
    runs: dict[str, list[Callable[[], object]]] = {}
    for label, copies in products.items():
        try:
            copies[0](x)
            torch.cuda.synchronize()
        except Exception as error:
            leave_out(f"{label}, batch {len(x)}", error)
            continue
        runs[label] = [functools.partial(run, x) for run in copies]
    return runs


#: Of its kernel: threads of a block, and bytes of code that a thread decodes.
THREADS, THREAD_BYTES = 512, 8


class DFloat11(NamedTuple):
    """A weight in DFloat11's format."""

    #: As its kernel takes them: luts, encoded_exponent, sign_mantissa, output_positions, gaps.
    tensors: tuple[Tensor, ...]
    #: Of a block: its threads' counts, and what it decodes before writing it out.
    shared_bytes: int

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def clone(self) -> DFloat11:
        return DFloat11(tuple(tensor.clone() for tensor in self.tensors), self.shared_bytes)


@functools.cache
def dfloat11_folder() -> Path:
    # Without importing it: the package itself asks for more than its encoder and its kernel do.
    spec = importlib.util.find_spec("dfloat11")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'dfloat11'")
    return Path(spec.submodule_search_locations[0])


@functools.cache
def dfloat11_utils() -> Any:
    spec = importlib.util.spec_from_file_location("dfloat11_utils", dfloat11_folder() / "dfloat11_utils.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def encode(weight: Tensor) -> DFloat11:
    """Encodes a weight where it lies, with DFloat11's own codes and tables.

    Its encoder takes a symbol at a time in Python, minutes for the largest layers; this gives the same bytes.
    """
    bits = weight.flatten().view(torch.int16)
    exponents = (bits >> 7 & 0xFF).to(torch.uint8)
    sign_mantissa = (bits >> 8 & 0x80 | bits & 0x7F).to(torch.uint8)
    counts = {exponent: count for exponent, count in enumerate(torch.bincount(exponents).tolist()) if count}
    # Both print what they do.
    with contextlib.redirect_stdout(io.StringIO()):
        table = dfloat11_utils().get_32bit_codec(counts)[2]
        luts = dfloat11_utils().get_luts(table)
    # The end of the stream is a symbol too, the only one that is no integer.
    rows = [(symbol if isinstance(symbol, int) else 256, *row) for symbol, row in table.items()]
    lengths, codes = torch.zeros(2, 257, dtype=torch.int64)
    for symbol, length, code in rows:
        lengths[symbol], codes[symbol] = length, code
    symbols = F.pad(exponents.long(), (0, 1), value=256)
    lengths, codes = lengths.to(weight.device)[symbols], codes.to(weight.device)[symbols]
    starts = lengths.cumsum(0) - lengths
    size = -(-int(starts[-1]) // 8)

    # A code of 32 bits at most lies in two words of 32.
    words = torch.zeros(size // 4 + 11, dtype=torch.int64, device=weight.device)
    pairs = codes << (64 - starts % 32 - lengths)
    words.index_add_(0, starts // 32, pairs >> 32 & 0xFFFFFFFF).index_add_(0, starts // 32 + 1, pairs & 0xFFFFFFFF)
    shifts = torch.tensor([24, 16, 8, 0], device=weight.device)
    encoded = (words.unsqueeze(1) >> shifts & 0xFF).to(torch.uint8).flatten()[:size]

    # Where the first symbol of each thread's part begins, and which is each block's. No end follows a whole byte.
    starts = starts if int(starts[-1]) % 8 else starts[:-1]

    def firsts(part_bytes: int) -> tuple[Tensor, Tensor]:
        begins = torch.arange(0, int(starts[-1]) + 1, 8 * part_bytes, device=weight.device)
        return torch.searchsorted(starts, begins), begins

    positions = F.pad(firsts(THREADS * THREAD_BYTES)[0], (0, 1), value=weight.numel()).to(torch.int32)
    first, begins = firsts(THREAD_BYTES)
    gaps = F.pad(starts[first] - begins, (0, THREADS * -(-size // (THREADS * THREAD_BYTES)) - len(begins)))
    gap_bits = (gaps.unsqueeze(1) >> torch.arange(4, -1, -1, device=weight.device) & 1).view(-1, 8)
    packed_gaps = (gap_bits << torch.arange(7, -1, -1, device=weight.device)).sum(1).to(torch.uint8)
    shared_bytes = 4 * THREADS + 4 + 2 * int(positions.diff().max())
    return DFloat11((luts.to(weight.device), encoded, sign_mantissa, positions, packed_gaps), shared_bytes)


@functools.cache
def dfloat11_kernel() -> tuple[Any, ctypes.c_void_p]:
    """The driver, and the package's PTX loaded into the context that PyTorch works in."""
    torch.zeros(1, device="cuda")
    driver = ctypes.CDLL("libcuda.so.1")
    module, kernel = ctypes.c_void_p(), ctypes.c_void_p()
    ptx = (dfloat11_folder() / "decode.ptx").read_bytes()
    check(driver.cuModuleLoadData(ctypes.byref(module), ctypes.c_char_p(ptx)))
    check(driver.cuModuleGetFunction(ctypes.byref(kernel), module, b"decode"))
    return driver, kernel


def check(status: int) -> None:
    if status:
        raise RuntimeError(f"the driver's status is {status}")


def decode(packed: DFloat11, target: Tensor) -> Tensor:
    """Decodes into target on the current stream, launched as the package does."""
    driver, kernel = dfloat11_kernel()
    luts, encoded = packed.tensors[:2]
    tensors = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (*packed.tensors, target)]
    arguments = [*tensors, *(ctypes.c_int32(size) for size in (len(luts), len(encoded), target.numel()))]
    pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
    blocks = -(-len(encoded) // (THREADS * THREAD_BYTES))
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    check(driver.cuLaunchKernel(kernel, blocks, 1, 1, THREADS, 1, 1, packed.shared_bytes, stream, pointers, None))
    return target


def dfloat11_of(weight: Tensor) -> DFloat11 | None:
    """A weight on the GPU in DFloat11's format, once its kernel has given back every bit."""
    try:
        packed = encode(weight)
        target = decode(packed, torch.full_like(weight, torch.nan))
        if not torch.equal(target.view(torch.int16), weight.view(torch.int16)):
            raise RuntimeError("its kernel does not give the weight back")
        return packed
    except Exception as error:
        leave_out("DFloat11", error)
        return None

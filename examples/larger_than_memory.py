"""Trains and serves a language model that is 45 times as large as the memory for its weights; the rest lies on disk.

The model is never whole in memory: it is made on the meta device, and its random weights are drawn a layer at a time
on their way to disk. Biases, norms and the adapters train, on the bytes of the README; all else is frozen, as in a
fine-tune. Blocks are checkpointed. At last comes the most memory that all of it took, by the system's count, beside the
budget and what training takes anyway: a checkpoint a block, one block's activations, and gradients.

Run: python examples/larger_than_memory.py [--budget MB] [--times N] [--steps N] [--text FILE] [--folder DISK]
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import infold.tiers as tiers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

RAM = tiers.TierSpec("RAM", 0, 1000, resident=True)
DISK = tiers.TierSpec("DISK", 100, 1, on_disk=True)
CONTEXT = 64
BATCH = 1
RANK = 4
#: As <malloc.h> numbers it.
M_MMAP_THRESHOLD = -3


class Block(nn.Module):
    """Pre-norm attention and a gated product, with a low-rank adapter beside the latter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mixed = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.second_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.adapter_in = nn.Linear(width, RANK, bias=False)
        self.adapter_out = nn.Linear(RANK, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.mixed(self.norm(x)).unflatten(-1, (3, -1, 32)).transpose(1, -2).unbind(2)
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        h = self.second_norm(x)
        return x + self.down(F.gelu(self.up(h))) + self.adapter_out(self.adapter_in(h))


class Model(nn.Module):
    """A byte-level language model."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.training else block(x)
        return self.head(self.norm(x))


class Drawn(Mapping[str, Tensor]):
    """Weights by name, drawn when they are asked for: what a checkpoint's file would be."""

    def __init__(self, model: nn.Module) -> None:
        self._shapes = {name: p.shape for name, p in model.named_parameters()}

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape) if name.endswith("norm.weight") else torch.zeros(shape)
        if "adapter_out" in name:
            return torch.zeros(shape)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.randn(shape, generator=generator) * shape[1] ** -0.5

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


class Watch(threading.Thread):
    """Notes the most memory that the process holds, by the system's count."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.begun = resident()
        self.peak = self.begun
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.002):
            self.peak = max(self.peak, resident())

    def stop(self) -> int:
        """Bytes beyond those at the beginning."""
        self._ended.set()
        self.join()
        return self.peak - self.begun


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def is_trained(name: str) -> bool:
    return name.endswith("bias") or "norm" in name or "adapter" in name


def make(budget: int, times: float) -> Model:
    """A model of ``times`` the budget's bytes on the meta device; a block's largest weight is a tenth of the budget."""
    width = int((budget / 10 / 16) ** 0.5) // 32 * 32
    with torch.device("meta"):
        one = Model(width, 1)
        block = sum(p.nbytes for p in one.blocks.parameters())
        rest = sum(p.nbytes for p in one.parameters()) - block
        model = Model(width, -(-int(budget * times - rest) // block))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name))
    return model


def needed_anyway(arguments: argparse.Namespace) -> int:
    """Bytes that a step of training takes beside the weights, seen in a process of its own: there all blocks have one
    block's frozen weights, so that they cost next to nothing and all else is the same.
    """
    command = [sys.executable, __file__, "--without-weights", "--budget", str(arguments.budget)]
    command += ["--times", str(arguments.times), "--text", str(arguments.text)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def share_frozen(model: Model) -> None:
    """Gives all blocks the first one's frozen weights, and the model memory."""
    first = dict(model.blocks[0].named_parameters())
    for block in model.blocks[1:]:
        for name, module in block.named_modules():
            for local, parameter in list(module.named_parameters(recurse=False)):
                if not parameter.requires_grad:
                    setattr(module, local, first[f"{name}.{local}"])
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()


def batches(text: Path, generator: torch.Generator) -> Iterator[Tensor]:
    data = torch.frombuffer(bytearray(text.read_bytes()), dtype=torch.uint8).long()
    while True:
        starts = torch.randint(len(data) - CONTEXT - 1, (BATCH,), generator=generator)
        yield torch.stack([data[start : start + CONTEXT + 1] for start in starts.tolist()])


def train(model: nn.Module, handle: tiers.Handle | None, text: Path, steps: int) -> list[float]:
    """The loss of each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    data = batches(text, torch.Generator().manual_seed(0))
    losses = []
    for _, tokens in zip(range(steps), data, strict=False):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        if handle is None:
            optimizer.step()
        else:
            handle.step(optimizer)
        losses.append(float(loss.detach()))
    return losses


@torch.inference_mode()
def generate(model: nn.Module, prompt: bytes, count: int) -> bytes:
    tokens = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([tokens[-CONTEXT:]]))[0, -1]
        tokens.append(int(logits.argmax()))
    return bytes(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=32, help="memory for weights, in MB")
    parser.add_argument("--times", type=float, default=45, help="how many times the budget the model is")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "README.md")
    parser.add_argument("--folder", help="where the file of weights lies (default: that for temporary files)")
    parser.add_argument("--without-weights", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    budget = int(arguments.budget * 1e6)
    # The C library keeps what is freed in smaller pieces; that would be counted as ours.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)

    # Everything that PyTorch and the optimizer set up once, on a model of the same kind that fits.
    small = make(budget, 0.3).to_empty(device="cpu")
    small.load_state_dict(dict(Drawn(small)))
    train(small, None, arguments.text, 1)
    del small

    model = make(budget, arguments.times)
    if arguments.without_weights:
        share_frozen(model)
        watch = Watch()
        watch.start()
        train(model, None, arguments.text, 2)
        print(watch.stop())
        return
    anyway = needed_anyway(arguments)
    nbytes = sum(p.nbytes for p in model.parameters())
    plan = tiers.plan(model, [RAM, DISK], {"RAM": budget}, "size", buffers=4)
    print(plan)
    watch = Watch()
    watch.start()
    begun = time.perf_counter()
    with tiers.attach(model, plan, weights=Drawn(model), folder=arguments.folder) as handle:
        print(f"{nbytes / 1e6:,.0f} MB of weights, {nbytes / budget:.0f} times the budget, in {_since(begun)}")
        begun = time.perf_counter()
        losses = train(model, handle, arguments.text, arguments.steps)
        print(f"loss {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps, {_since(begun)}")
        begun = time.perf_counter()
        text = generate(model.eval(), b"Infold ", 4)
        print(f"{text!r}: 4 tokens in {_since(begun)}; {handle.store_stats()['bytes_read'] / 1e9:.1f} GB read in all")
        peak, allowed = watch.stop(), budget + anyway
        print(f"budget {budget / 1e6:.1f} MB and training's own {anyway / 1e6:.1f} MB: {allowed / 1e6:.1f} MB")
        print(f"peak memory {peak / 1e6:.1f} MB beyond the start, {peak / allowed:.2f} of that")
        sys.stdout.flush()
        os._exit(0)  # bringing all of it back would take all of its memory


def _since(begun: float) -> str:
    return f"{time.perf_counter() - begun:.1f} s"


if __name__ == "__main__":
    main()

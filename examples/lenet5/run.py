"""LeNet-5 on MNIST through the stages of a roadmap: tokenizers by PCA, spline trajectories, memory tiers.

Writes tables (CSV), figures (PNG) and report.md, which states each of the roadmap's success criteria with what was
measured. What is finished is kept: a run that was killed goes on where it was, and --seeds may be raised later. Without
--data a small subset of MNIST is used, which shows that it runs and nothing else.

Run: python examples/lenet5/run.py [--data FOLDER] [--seeds N] [--epochs N] [--threads N] [--out FOLDER] [--quick]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from data import SUBSET, Mnist
from plots import draw
from report import write
from results import Results
from stages import jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SUBSET, help="a folder with MNIST's four IDX files")
    parser.add_argument("--seeds", type=int, default=3, help="2 or more give intervals (default: 3)")
    parser.add_argument("--epochs", type=int, default=10, help="of every training (default: 10)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="PyTorch's intra-op threads")
    parser.add_argument("--out", type=Path, default=Path("build/lenet5"), help="where results go, and are looked for")
    parser.add_argument("--quick", action="store_true", help="one seed, four epochs: that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.epochs = 1, 4
    if arguments.seeds < 1 or arguments.epochs < 1:
        parser.error("expected one or more seeds and epochs")
    torch.set_num_threads(arguments.threads)
    data = Mnist(arguments.data)
    counts = {f"{name} images": len(part.y) for name, part in data.images.items()}
    print(", ".join(f"{count:,} {name}" for name, count in counts.items()), f"{arguments.threads} threads", sep=", ")
    results = Results(arguments.out, {"epochs": arguments.epochs, "quick": arguments.quick, **counts})
    todo = list(jobs(data, results, arguments.seeds, arguments.epochs, 0.2 if arguments.quick else 5.0))
    for number, job in enumerate(todo, 1):
        head = f"[{number:>3}/{len(todo)}] {job.stage} {job.variant}, seed {job.seed}"
        if results.has(*job[:3]):
            print(f"{head}: done before")
            continue
        start = time.perf_counter()
        outcome = job.run()
        results.put(*job[:3], outcome)
        print(f"{head}: {outcome.line} ({time.perf_counter() - start:.1f} s)", flush=True)
    for stage in dict.fromkeys(job.stage for job in todo):
        results.write_csv(stage)
    draw(results)
    write(results)
    print(f"written to {arguments.out}: report.md, tables, figures")


if __name__ == "__main__":
    main()

"""The staged example on LeNet-5, on the subset of MNIST: all stages run, and what is finished is not run again."""

from __future__ import annotations

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from infold import tiers
from infold.tiers.models import lenet5

TIERS = ("agreement", "components", "curve", "layers")
RUN = Path(__file__).parents[1] / "examples" / "lenet5" / "run.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RUN), "--threads", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def module(name: str) -> ModuleType:
    """A module of the example, under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"lenet5_{name}", RUN.with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lenet5")
    result = run("--quick", "--out", str(folder))
    assert result.returncode == 0, result.stderr[-2000:]
    assert "done before" not in result.stdout
    return folder


def rows(out: Path, stage: str) -> list[dict[str, str]]:
    with (out / f"{stage}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_stage_writes_its_table_and_its_figures(out: Path) -> None:
    tables = {path.stem for path in out.glob("*.csv")}
    assert tables == {"variance", "splines", "accuracy", "trajectories", *TIERS, "latency"}
    figures = {path.stem for path in out.glob("*.png")}
    assert figures == {"variance", "components", "accuracy", "trajectories", "series", "curve"}
    report = (out / "report.md").read_text()
    for name in figures:
        assert f"({name}.png)" in report
    assert "nan" not in report
    plan = tiers.load(out / "tier_hints.json", lenet5())
    assert plan.placements.keys() == {"0", "3", "7", "9", "11"}


def test_networks_learn_and_variance_falls(out: Path) -> None:
    accuracies = {row["variant"]: float(row["accuracy"]) for row in rows(out, "accuracy")}
    # Ten classes: guessing gives 0.1.
    assert min(accuracies.values()) > 0.4, accuracies
    shares = [float(row["share"]) for row in rows(out, "variance")]
    assert shares == sorted(shares, reverse=True)
    assert 0.5 < sum(shares) < 1


def test_latency_is_judged_at_every_batch(out: Path) -> None:
    report = (out / "report.md").read_text().splitlines()
    table = rows(out, "latency")
    for row in table[:3]:
        what, ratio = f"{row['what']} of {row['batch']}", float(row["emulated"]) / float(row["plain"])
        (line,) = [line for line in report if f"emulated overhead < 10% on CPU, {what} " in line]
        assert line.endswith("| met |" if ratio < 1.1 else "| **not met** |")
    for row in table[:2]:
        ratio = float(row["mild"]) / float(row["plain"])
        lines = [line for line in report if f"latency, batch {row['batch']} | precision of layers, mild" in line]
        assert [line.split(" | ")[0] for line in lines] == ["| minimum", "| strong"]
        assert all(f"forward of {row['batch']} {100 * (ratio - 1):+.1f}%" in line for line in lines)


def test_tiers_and_ranks_of_layers_are_judged_apart(out: Path) -> None:
    report = (out / "report.md").read_text().splitlines()
    (ranks,) = [line for line in report if "| convolutions rank first" in line]
    (placed,) = [line for line in report if "| only convolutions in the hot tier" in line]
    plan = tiers.load(out / "tier_hints.json", lenet5())
    hot = {name for name, place in plan.placements.items() if place.tier == "RAM"}
    assert placed.endswith("| met |" if hot == {"0", "3"} else "| **not met** |")
    order = ranks.split(" | ")[2].split(", ")
    assert sorted(order, key=int) == ["0", "3", "7", "9", "11"]
    assert ranks.endswith("| met |" if set(order[:2]) == {"0", "3"} else "| **not met** |")


def test_orders_of_components_have_the_same_bytes_and_random_loses_when_some_are_dropped(out: Path) -> None:
    table = rows(out, "components")
    for scheme in ("mild", "harsh"):
        sizes = [float(row["bytes"]) for row in table if (row["cut"], row["scheme"]) == ("30/50/20", scheme)]
        assert max(sizes) < 1.01 * min(sizes)
    harsh = [row for row in table if row["scheme"] == "harsh"]

    def mean(order: str) -> float:
        own = [float(row["accuracy"]) for row in harsh if row["order"] == order]
        return sum(own) / len(own)

    assert mean("variance") > mean("random")


def test_a_finished_run_is_not_run_again_and_a_lost_one_alone_is(out: Path) -> None:
    # What later stages read is kept; what is lost is a table of one job.
    runs = out / "runs"
    (runs / "curve.tokens-64.0.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in runs.iterdir()}
    result = run("--quick", "--out", str(out))
    assert result.returncode == 0, result.stderr[-2000:]
    jobs = [line for line in result.stdout.splitlines() if line.startswith("[")]
    assert [line for line in jobs if "done before" not in line] == [line for line in jobs if "curve" in line]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (runs / "curve.tokens-64.0.json").exists()


def test_results_of_other_settings_are_refused(out: Path) -> None:
    with pytest.raises(ValueError, match=r"out: expected a folder of runs with {'epochs': 1}"):
        module("results").Results(out, {"epochs": 1})


def test_a_verdict_needs_the_whole_interval() -> None:
    estimate = module("estimates").estimate
    # Student's t for two degrees of freedom is 4.3027; the deviation is 1.
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.half) == pytest.approx((2.0, 4.3027 / 3**0.5), abs=1e-4)
    assert found.within(-0.5, 4.5) == "met"
    assert found.within(4.5) == "**not met**"
    assert found.within(0.0) == "undecided (the mean is inside)"
    assert found.within(3.0) == "undecided (the mean is outside)"
    assert estimate([2.0]).within(1.0) == "met (one seed)"
    assert estimate([2.0]).within(3.0) == "**not met** (one seed)"

"""``infold tiers``: each command, its JSON, and what it says of wrong arguments."""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import infold
import pytest
import torch
from infold import tiers
from infold.cli import main
from infold.tiers.calibrate import SIZES
from infold.tiers.cli import parse_bytes
from infold.tiers.models import lenet5, load_checkpoint, load_model
from safetensors.torch import save_file


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command prints; it must succeed."""
    assert main(["tiers", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["tiers", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.fixture
def hints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "tier_hints.json"
    budgets = ("--budget", "HBM=420KB", "--budget", "CPU=60KB")
    run(capsys, "plan", "--model", "lenet5", *budgets, "--objective", "size", "--buffers", 1, "--out", path)
    return path


def test_the_console_script_is_main() -> None:
    root = Path(__file__).parents[1]
    assert f'[project.scripts]\ninfold = "{main.__module__}:{main.__name__}"\n' in (root / "pyproject.toml").read_text()


def test_plan_writes_hints(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "hints.json"
    common = ("plan", "--model", "lenet5", "--out", out)
    printed = json.loads(run(capsys, *common, "--budget", "HBM=220KB", "--json"))
    loaded = tiers.load(out, lenet5())
    assert printed["units"] == {name: placement._asdict() for name, placement in loaded.placements.items()}
    assert printed["bytes"] == loaded.bytes_by_tier()
    assert loaded.objective == "traffic"
    assert loaded.budgets["HBM"] == 220_000
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({name: float(index) for index, name in enumerate(loaded.placements)}))
    text = run(
        capsys,
        *common,
        "--force",
        "--objective",
        "fractions",
        "--scores",
        scores,
        "--fractions",
        0.5,
        0.5,
        "--tiers",
        "A100,CXL",
    )
    assert "written to" in text
    assert "CXL" in text
    made = tiers.load(out)
    total = sum(made.bytes_by_tier().values())
    largest = max(placement.nbytes for placement in made.placements.values())
    assert abs(made.bytes_by_tier()["HBM"] - total / 2) <= largest / 2


def test_plan_by_traffic_counts_overhead(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tiers.Overhead] = []
    plan = tiers.plan

    def noted(*arguments: Any, overhead: tiers.Overhead, **options: Any) -> tiers.Plan:
        given.append(overhead)
        return plan(*arguments, overhead=overhead, **options)

    monkeypatch.setattr(tiers, "plan", noted)
    monkeypatch.setattr(tiers, "measure_overhead", lambda: tiers.Overhead(1.0, 2.0))
    for objective in ("traffic", "size"):
        run(capsys, "plan", "--model", "lenet5", "--objective", objective, "--out", tmp_path / objective)
    assert given == [tiers.Overhead(1.0, 2.0), tiers.Overhead()]


def test_plan_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    common = ("plan", "--model", "lenet5", "--out", tmp_path / "hints.json")
    assert "are missing" in refusal(capsys, *common, "--budget", "HBM=1KB")
    assert "budget: expected TIER=SIZE" in refusal(capsys, *common, "--budget", "HBM")
    assert "budgets: expected one of the tiers" in refusal(capsys, *common, "--budget", "TAPE=1GB")
    assert "expected a size" in refusal(capsys, *common, "--budget", "HBM=lots")
    assert "tiers: expected some of A100" in refusal(capsys, *common, "--tiers", "H100,floppy")
    for objective in ("importance", "inverse", "fractions"):
        expected = f"scores: expected a number for each unit for objective '{objective}', got none"
        assert expected in refusal(capsys, *common, "--objective", objective)
    some = tmp_path / "scores.json"
    some.write_text('{"0": 1}')
    expected = "scores: expected all of the model's units, '11', '3', '7', '9' missing"
    assert expected in refusal(capsys, *common, "--objective", "importance", "--scores", some)
    assert "batch size" in refusal(capsys, *common, "--batch-size", 0)
    for absent in (tmp_path / "absent", "./absent", "absent.gguf"):
        assert "a folder or file that exists" in refusal(capsys, "plan", "--model", absent)
    assert not (tmp_path / "hints.json").exists()
    assert "expected a folder" in refusal(capsys, *common[:-1], tmp_path / "absent" / "hints.json")


#: What is in a file that is none, and what is said of it.
NO_JSON = {
    "": "expected JSON, got nothing",
    "{": "expected JSON, got something else: Expecting",
    "[" * 100_000: "nests too deep",
    "[]": "JSON: expected an object, got list",
}


@pytest.mark.parametrize(
    ("command", "messages"),
    [
        (("analyze", "FILE"), {"{}": "format: expected 'infold-tiers', got none"}),
        (("predict", "FILE", "--model", "lenet5"), {"{}": "format: expected 'infold-tiers', got none"}),
        (("bench", "--model", "lenet5", "--tier-hints", "FILE"), {"{}": "format: expected 'infold-tiers', got none"}),
        (
            ("plan", "--model", "lenet5", "--specs", "FILE"),
            {
                "{}": "tiers: expected a list, got none",
                '{"tiers": 3}': "tiers: expected a list, got int",
                '{"tiers": [3]}': "tiers[0]: expected an object, got int",
                '{"tiers": [{}]}': "tiers[0]: expected the fields bandwidth_gb_s",
                '{"tiers": [{"name": "A", "setup_us": "1", "bandwidth_gb_s": 1}]}': "tiers[0].setup_us: expected",
                '{"tiers": [{"name": "A", "setup_us": 1, "bandwidth_gb_s": 0}]}': "A: bandwidth_gb_s: expected",
            },
        ),
        (
            ("plan", "--model", "lenet5", "--objective", "importance", "--scores", "FILE"),
            {'{"0": "a"}': "expected a number for each unit, got something else for '0'"},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_files_that_are_none_are_named_in_a_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    messages: dict[str, str],
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "content.json"

    def line() -> str:
        [said] = refusal(capsys, *(path if word == "FILE" else word for word in command)).splitlines()
        return said

    assert "No such file" in line()
    for text, message in {**NO_JSON, **messages}.items():
        path.write_text(text)
        assert line().startswith(f"infold: {path}: {message}" if message in messages.values() else f"infold: {path}: ")
        assert message in line()
    path.unlink()
    path.mkdir()
    assert str(path) in line()
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_plan_overwrites_no_file_unless_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ("plan", "--model", "lenet5", "--objective", "size")
    assert "written to tier_hints.json" in run(capsys, *common)
    first = Path("tier_hints.json").read_bytes()
    again = (*common, "--budget", "HBM=420KB")
    for named in ((), ("--out", "tier_hints.json")):
        assert "tier_hints.json: expected a file that is not there yet, or --force" in refusal(capsys, *again, *named)
        assert Path("tier_hints.json").read_bytes() == first
    run(capsys, *again, "--force")
    assert tiers.load("tier_hints.json").budgets["HBM"] == 420_000


def test_analyze(capsys: pytest.CaptureFixture[str], hints: Path) -> None:
    text = run(capsys, "analyze", hints, "--model", "lenet5")
    assert "of the weights stay resident" in text
    assert json.loads(run(capsys, "analyze", hints, "--json"))["bytes"] == tiers.load(hints).bytes_by_tier()
    for command in (("analyze", hints), ("predict", hints), ("bench", "--tier-hints", hints)):
        said = refusal(capsys, *command, "--model", "mlp")
        assert "expected a plan of this model, got one of another: the model has no units '11', '3', '7', '9';" in said
        assert len(said.splitlines()) == 1


def test_predict(capsys: pytest.CaptureFixture[str], hints: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    assert "a steady pass" in run(capsys, "predict", hints, "--model", "lenet5", "--plot", plot)
    assert plot.read_bytes().startswith(b"\x89PNG")
    content = json.loads(run(capsys, "predict", hints, "--model", "lenet5", "--json"))
    assert [layer["unit"] for layer in content["layers"]] == list(tiers.load(hints).placements)
    streamed = json.loads(run(capsys, "predict", "--stream", "120e9", "--json"))["stream"]
    assert [(each["from"], each["bits"]) for each in streamed] == [
        (name, bits) for bits in (4, 16) for name in ("PCIe4", "PCIe5", "NVMe4")
    ]
    assert "tokens/s" in run(capsys, "predict", "--stream", "120e9", "--device-memory", "8GB")
    assert "expected a hints file and --model" in refusal(capsys, "predict")


def test_calibrate_feeds_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any) -> None:
    measured = {
        "RAM": tiers.TierSpec("RAM", 1.5, 11.0, resident=True),
        "SSD": tiers.TierSpec("SSD", 90.0, 0.9, on_disk=True),
    }

    def calibrate(folder: Path, *, file_bytes: int, progress: Any) -> dict[str, tiers.TierSpec]:
        assert (folder, file_bytes) == (tmp_path, 2**26)
        progress("measured")
        return measured

    monkeypatch.setattr(tiers, "calibrate", calibrate)
    specs = tmp_path / "specs.json"
    common = ("calibrate", tmp_path, "--file-bytes", "64MiB", "--out", specs)
    assert "11.00" in run(capsys, *common)
    printed = json.loads(run(capsys, *common, "--json", "--force"))
    assert [tiers.TierSpec(**entry) for entry in printed["tiers"]] == list(measured.values())
    out = tmp_path / "hints.json"
    run(capsys, "plan", "--model", "lenet5", "--specs", specs, "--budget", "RAM=300KB", "--out", out)
    assert tiers.load(out).tiers == tuple(measured.values())
    some = ("plan", "--model", "lenet5", "--specs", specs, "--out", out, "--force")
    run(capsys, *some, "--tiers", "RAM")
    assert tiers.load(out).tiers == (measured["RAM"],)
    assert "tiers: expected some of RAM, SSD, got H100" in refusal(capsys, *some, "--tiers", "H100")


def test_calibrate_overwrites_no_file_unless_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def calibrate(folder: Path, *, file_bytes: int, progress: Any) -> dict[str, tiers.TierSpec]:
        measured.append(file_bytes)
        return {"RAM": tiers.TierSpec("RAM", 1.5, len(measured), resident=True)}

    monkeypatch.setattr(tiers, "calibrate", calibrate)
    common = ("calibrate", tmp_path, "--out")
    out = tmp_path / "specs.json"
    run(capsys, *common, out)
    first = out.read_bytes()
    assert "specs.json: expected a file that is not there yet, or --force" in refusal(capsys, *common, out)
    assert "expected a folder" in refusal(capsys, *common, tmp_path / "absent" / "specs.json")
    assert out.read_bytes() == first
    assert measured == [2**28]  # what cannot be written is not measured
    run(capsys, *common, out, "--force")
    assert json.loads(out.read_text())["tiers"][0]["bandwidth_gb_s"] == 2
    run(capsys, "calibrate", tmp_path)
    assert list(tmp_path.iterdir()) == [out]


def test_help_says_what_is_the_case(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def help_of(command: str) -> str:
        with pytest.raises(SystemExit):
            main(["tiers", command, "--help"])
        return " ".join(capsys.readouterr().out.split())

    assert f"{max(SIZES) >> 20}MiB or more (default: 256MiB)" in help_of("calibrate")
    assert "of bytes, one a tier (default: [0.3, 0.5, 0.2])" in help_of("plan")
    too_few = ("calibrate", tmp_path, "--file-bytes", max(SIZES) - 1)
    assert f"file_bytes: expected at least the largest of sizes, {max(SIZES)}" in refusal(capsys, *too_few)


@pytest.fixture
def attached(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A stand-in for `attach` that records its calls, and when it was left."""
    calls: list[tuple[Any, ...]] = []

    @contextlib.contextmanager
    def attach(model: Any, plan: tiers.Plan, *, mode: str, folder: Path | None) -> Iterator[None]:
        calls.append((type(model).__name__, plan.objective, mode, folder))
        yield
        calls.append(("removed",))

    monkeypatch.setattr(tiers, "attach", attach, raising=False)
    return calls


def test_bench_prints_as_the_document_does(
    capsys: pytest.CaptureFixture[str], hints: Path, attached: list[tuple[Any, ...]]
) -> None:
    common = ("bench", "--model", "lenet5", "--tier-hints", hints, "--num-iterations", 3, "--batch-size", 2)
    text = run(capsys, *common, "--baseline", "--mode", "real", "--folder", hints.parent)
    assert attached == [("Sequential", "size", "real", hints.parent), ("removed",)]
    lines = [line.split(":")[0].strip() for line in text.splitlines() if line]
    results = ["Mean latency", "Median latency", "Throughput"]
    impact = ["Latency overhead", "Throughput degradation"]
    assert lines == ["Baseline Results", *results, "Tiered Results", *results, "Impact", *impact]
    content = json.loads(run(capsys, *common, "--baseline", "--json"))
    assert content["mode"] == "emulated"
    for name in ("baseline", "tiered"):
        assert content[name]["throughput"] == pytest.approx(2e3 / content[name]["mean_ms"])
    ratio = content["tiered"]["mean_ms"] / content["baseline"]["mean_ms"]
    assert content["impact"]["latency_overhead_percent"] == pytest.approx(100 * (ratio - 1))
    assert content["impact"]["throughput_degradation_percent"] == pytest.approx(100 * (1 / ratio - 1))
    text = run(capsys, *common)
    assert "Baseline" not in text
    assert "Impact" not in text
    assert "num iterations" in refusal(capsys, *common[:-3], 0)


def test_checkpoints(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    torch.manual_seed(7)
    source, x = lenet5(), torch.randn(2, 1, 28, 28)
    save_file(source.state_dict(), tmp_path / "state.safetensors")
    torch.save(source.state_dict(), tmp_path / "state.pt")
    torch.save({"model_state_dict": source.state_dict()}, tmp_path / "nested.pt")
    infold.save(source, tmp_path / "own.safetensors")
    for name in ("state.safetensors", "state.pt", "nested.pt", "own.safetensors"):
        assert torch.equal(load_model("lenet5", tmp_path / name).model(x), source(x)), name


class Payload:
    """What a hostile pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was run",))


def test_hostile_checkpoints(tmp_path: Path) -> None:
    with open(tmp_path / "pickle.pt", "wb") as file:
        pickle.dump({"0.weight": Payload()}, file, protocol=2)
    (tmp_path / "noise.pt").write_bytes(b"\x00" * 100)
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 100)
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    for name in ("pickle.pt", "noise.pt", "noise.safetensors", "list.pt", "other.pt"):
        with pytest.raises(ValueError, match=name):
            load_checkpoint(lenet5(), tmp_path / name)
    with pytest.raises(OSError, match="absent"):
        load_checkpoint(lenet5(), tmp_path / "absent.pt")


def test_a_model_of_transformers(capsys: pytest.CaptureFixture[str], minilm_path: Path, tmp_path: Path) -> None:
    loaded = load_model(str(minilm_path), batch_size=2, seq_length=8)
    assert (loaded.items, loaded.unit) == (16, "tokens")
    assert loaded.forward().shape == (2, 8, 384)
    out = tmp_path / "hints.json"
    run(capsys, "plan", "--model", minilm_path, "--seq-length", 8, "--budget", "HBM=60MB", "--out", out)
    assert len(tiers.load(out, loaded.model).placements) > 50


@pytest.mark.parametrize(
    ("text", "count"),
    [("6GB", 6 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2**31), ("17", 17), ("0", 0), ("3kb", 3000), ("8 b", 8)],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "6XB", "-1", "nan", "inf", "1e30", "six"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size"):
        parse_bytes(text)

"""Presets, predictions and calibration."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import pytest
import torch
from infold.tiers import (
    PRESETS,
    Access,
    Overhead,
    TierSpec,
    calibrate,
    measure_compute,
    measure_overhead,
    plan,
    predict,
    simulate,
    stream,
)
from infold.tiers.calibrate import fit, read_seconds
from infold.tiers.store import Store
from torch import Tensor, nn

HBM, CPU = TierSpec("HBM", 1, 800), TierSpec("CPU", 5, 26)


def test_presets_keep_to_their_links() -> None:
    assert PRESETS["PCIe4"].bandwidth_gb_s <= 28
    assert PRESETS["PCIe5"].bandwidth_gb_s <= 63
    assert PRESETS["NVMe4"].bandwidth_gb_s <= 7.88
    assert [name for name, spec in PRESETS.items() if spec.resident] == ["A100", "H100", "H200"]
    assert [name for name, spec in PRESETS.items() if spec.on_disk] == ["NVMe4"]


class Sleeper(nn.Module):
    """Takes a known time; its parameter is what is placed."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1024))
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return x


class Twice(nn.Module):
    """Calls one module twice, with a pause of its own between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused = Sleeper(0.01), Sleeper(0.03), Sleeper(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.b(self.a(x)))
        time.sleep(0.02)
        return x


def test_computing_is_measured_in_order_of_use() -> None:
    model = Twice()
    uses = measure_compute(model, torch.zeros(1), repeats=3)
    assert [name for name, _ in uses] == ["a", "b", "a"]
    # A sleep lasts no less than it says; what follows a module's call counts to it.
    for (_, seconds), least in zip(uses, (0.01, 0.03, 0.03), strict=True):
        assert seconds >= least
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_batches_are_passed_as_they_are() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.layer(x - y)

    x = torch.ones(2, 4)
    for batch in ({"y": x, "x": x}, (x, x), [x, x]):
        assert [name for name, _ in measure_compute(Named(), batch)] == ["layer"]


def test_passes_that_differ_are_refused() -> None:
    class Alternating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.layers[self.calls % 2](x)

    model = Alternating()
    with pytest.raises(ValueError, match="the same modules in the same order"):
        measure_compute(model, torch.zeros(1, 4))
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="repeats"):
        measure_compute(model, torch.zeros(1, 4), repeats=0)


def test_a_prediction_is_the_schedule_of_its_plan(tmp_path: Path) -> None:
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(6)])
    uses = [(str(index), 1e-6) for index in range(6)]
    made = plan(model, [HBM, CPU], {"HBM": 4 * 16384}, "layer-order")
    prediction = predict(model, made, compute_seconds=uses)
    resident = [made.placements[str(index)].tier == "HBM" for index in range(6)]
    assert resident == [True, True, False, False, False, False]
    # By hand: 16384 bytes take 5 us + 0.630 us; the ring holds two, so that in a steady pass the link never rests.
    transfer = 5e-6 + 16384 / 26e9
    assert prediction.seconds == pytest.approx(4 * transfer, rel=1e-9)
    assert prediction.resident_seconds == pytest.approx(6e-6)
    # The first pass fetches two at once, and the others when theirs have computed, which is after the link is free.
    assert prediction.first_seconds == pytest.approx(4 * transfer + 1e-6, rel=1e-9)
    assert prediction.bytes_by_tier == {"HBM": 0, "CPU": 4 * 16384}
    content = prediction.as_dict()
    assert sum(layer["exposed_seconds"] for layer in content["layers"]) == pytest.approx(content["exposed_seconds"])
    assert content["tiers"]["CPU"]["exposed_seconds"] == pytest.approx(content["seconds"] - 6e-6)
    text = str(prediction)
    assert f"a steady pass {1e3 * prediction.seconds:.3f} ms" in text
    assert len(text.splitlines()) == 2 + 6 + 1 + 2 + 1
    prediction.plot(tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_overhead_is_that_of_uses_that_are_away() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(6)])
    uses = [(str(index), 1e-6) for index in range(6)]
    made = plan(model, [HBM, CPU], {"HBM": 4 * 16384}, "layer-order")
    prediction = predict(model, made, compute_seconds=uses, overhead=Overhead(20e-6))
    # By hand: four of six are away, and 21 us of computing and overhead hide all of their transfers of 5.6 us.
    assert prediction.overhead_seconds == pytest.approx(4 * 20e-6, rel=1e-9)
    assert prediction.resident_seconds == pytest.approx(6e-6, rel=1e-9)
    assert prediction.exposed_seconds == pytest.approx(0, abs=1e-12)
    assert prediction.seconds == prediction.bound_seconds == pytest.approx(86e-6, rel=1e-9)
    # Two are fetched at the start, while the two resident layers compute: the first of them is waited for.
    assert prediction.first_seconds == pytest.approx(86e-6 + 5e-6 + 16384 / 26e9 - 2e-6, rel=1e-9)
    content = prediction.as_dict()
    assert content["overhead_seconds"] == prediction.overhead_seconds
    assert [layer["overhead_seconds"] for layer in content["layers"]] == [0.0, 0.0, 20e-6, 20e-6, 20e-6, 20e-6]
    assert all(layer["compute_seconds"] == 1e-6 for layer in content["layers"])
    assert "overhead 0.080 ms, 20.0 us a use and 0.0 a fetch" in str(prediction)
    for wrong in (-1e-9, float("nan"), float("inf")):
        for overhead in (Overhead(wrong), Overhead(0.0, wrong)):
            with pytest.raises(ValueError, match="overhead: expected zero or more"):
                predict(model, made, compute_seconds=uses, overhead=overhead)
            with pytest.raises(ValueError, match="overhead: expected zero or more"):
                plan(model, [HBM, CPU], {"HBM": 4 * 16384}, overhead=overhead)


def test_overhead_of_a_fetch_is_that_of_what_is_not_in_the_ring() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(6)])
    uses = [(str(index), 1e-6) for index in range(6)]
    made = plan(model, [HBM, CPU], {"HBM": 4 * 16384}, "layer-order")
    overhead = Overhead(20e-6, 30e-6)
    prediction = predict(model, made, compute_seconds=uses, overhead=overhead)
    # By hand: four of six are away, and a ring of two has none of them when it comes back.
    assert prediction.overhead_seconds == pytest.approx(4 * 50e-6, rel=1e-9)
    assert prediction.seconds == prediction.bound_seconds == pytest.approx(206e-6, rel=1e-9)
    assert prediction.timeline.seconds == pytest.approx(
        prediction.timeline.compute_seconds + prediction.timeline.exposed_seconds, rel=1e-12
    )
    layers = [layer["overhead_seconds"] for layer in prediction.as_dict()["layers"]]
    assert layers == [0.0, 0.0, 50e-6, 50e-6, 50e-6, 50e-6]
    assert "20.0 us a use and 30.0 a fetch" in str(prediction)
    # A ring that holds all four: they are fetched in the first pass alone.
    held = predict(
        model, dataclasses.replace(made, buffer_bytes=4 * 16384, budgets={}), compute_seconds=uses, overhead=overhead
    )
    assert held.seconds == pytest.approx(86e-6, rel=1e-9)
    assert held.first_seconds == pytest.approx(206e-6 + 5e-6 + 16384 / 26e9 - 2e-6, rel=1e-9)


def test_overhead_is_measured_where_units_are_away() -> None:
    torch.set_num_threads(1)
    overhead = measure_overhead(count=12, repeats=5)
    # Python does neither in no time, nor in a thousandth of a second.
    assert all(0 < seconds < 1e-3 for seconds in overhead)


def test_overhead_is_measured_where_computing_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    made = plan(model, [HBM, CPU], {"HBM": 20_480}, "layer-order")  # a buffer, and no weight
    measured = Overhead(1.0, 2.0)
    monkeypatch.setattr(sys.modules[predict.__module__], "measure_overhead", lambda: measured)
    x = torch.zeros(2, 64)
    prediction = predict(model, made, x)
    assert prediction.overhead == measured
    assert prediction.overhead_seconds == pytest.approx(2 * 3.0)
    assert prediction.seconds >= 6.0
    assert predict(model, made, x, overhead=Overhead()).overhead_seconds == 0
    assert predict(model, made, compute_seconds=prediction.uses).overhead_seconds == 0


def test_prediction_measures_if_it_is_not_told() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    made = plan(model, [HBM, CPU], {"HBM": 40_000}, "layer-order")
    prediction = predict(model, made, torch.zeros(2, 64))
    assert [name for name, _ in prediction.uses] == ["0", "2"]
    assert prediction.seconds >= prediction.resident_seconds > 0
    with pytest.raises(ValueError, match="inputs: expected a batch or compute_seconds"):
        predict(model, made)
    with pytest.raises(ValueError, match="unit: expected one of the plan's, got '7'"):
        predict(model, made, compute_seconds=[("7", 0.0)])


@pytest.mark.parametrize("name", ["PCIe4", "PCIe5", "NVMe4"])
@pytest.mark.parametrize("bits", [4, 16])
def test_a_streamed_model_is_as_fast_as_its_link(name: str, bits: int) -> None:
    result = stream(120e9, bits, PRESETS[name], device_bytes=6_000_000_000)
    assert result.weight_bytes == pytest.approx(120e9 * bits / 8, rel=1e-6)
    assert result.resident_bytes + 2 * result.weight_bytes / 120 <= 6e9 + 2 * 4096
    spec = PRESETS[name]
    streamed = result.weight_bytes - result.resident_bytes
    transfers = round(streamed / (result.weight_bytes / 120))
    expected = streamed / (spec.bandwidth_gb_s * 1e9) + transfers * spec.setup_us * 1e-6
    assert result.seconds_per_token == pytest.approx(expected, rel=1e-9)
    for wrong in (-3.0, 0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="parameters: expected a positive number"):
            stream(wrong, bits, spec, device_bytes=6_000_000_000)
    with pytest.raises(ValueError, match="device_bytes: expected at least"):
        stream(120e9, bits, spec, device_bytes=10**8)


def test_a_fit_finds_the_line() -> None:
    sizes = [2**20, 2**22, 2**24, 2**26]
    setup, bandwidth = fit([(n, 30e-6 + n / 7e9) for n in sizes])
    assert setup == pytest.approx(30e-6, rel=1e-6)
    assert bandwidth == pytest.approx(7e9, rel=1e-6)
    # One that would start below zero, and one that falls.
    setup, bandwidth = fit([(1000, 0.5e-6), (2000, 2e-6)])
    assert setup == 0
    assert bandwidth > 0
    setup, bandwidth = fit([(1000, 2e-6), (2000, 1e-6)])
    assert (setup, bandwidth > 0) == (0, True)


def test_this_machine_is_calibrated(tmp_path: Path) -> None:
    folder = Path(__file__).parent
    before = sorted(folder.iterdir())
    lines: list[str] = []
    specs = calibrate(folder, sizes=(2**16, 2**20), file_bytes=2**21, depths=(1, 2), repeats=2, progress=lines.append)
    assert {"RAM", "SSD"} <= specs.keys()
    assert specs["RAM"].resident is not torch.cuda.is_available()
    assert specs["SSD"].on_disk
    assert specs["SSD"].depth in (1, 2)
    assert not specs["SSD"].resident
    assert all(name == spec.name for name, spec in specs.items())
    assert len([line for line in lines if "under way" in line]) == 2
    assert sorted(folder.iterdir()) == before
    # What was measured is a spec for the time model.
    assert simulate([Access("a", "SSD", 2**20, 0.0)], specs, buffer_bytes=2**20).seconds > 0
    for options, message in (
        ({"sizes": (4096,)}, "sizes"),
        ({"sizes": (4096, 5000)}, "sizes"),
        ({"sizes": (4096, 8192), "file_bytes": 4096}, "file_bytes"),
        ({"depths": ()}, "depths"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(tmp_path, **options)  # type: ignore[arg-type]


def test_reads_are_whole_and_inside_the_file(tmp_path: Path) -> None:
    store = Store(tmp_path, 3 << 20)
    assert len(read_seconds(store, 3 << 20, (1 << 20) + 4096, 5)) == 5
    assert store.stats()["bytes_read"] == 5 * ((1 << 20) + 4096)
    store.close()

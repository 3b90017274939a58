"""Trajectories of training runs, and the files and pictures of them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import infold
import numpy as np
import pytest
import scipy.interpolate
import torch
from infold import CorruptWeightError
from infold.tiers import combine, units
from infold.tokenizers import TrajectoryRecorder
from infold.tokenizers._files import load_state, save_state
from safetensors import safe_open
from test_trajectories import check, recorded, walk
from torch import nn


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, after: Callable[[], None] | None = None
) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        x = torch.randn(16, 6, generator=generator)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if after is not None:
            after()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def test_weights_of_a_training_run() -> None:
    model, raw = network(), []
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    recorder = TrajectoryRecorder.of_weights(model, n=7)

    def keep() -> None:
        raw.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})

    with recorder.attach(optimizer):
        train(model, optimizer, 90, keep)
    train(model, optimizer, 5)
    assert recorder.samples == 90
    steps = list(range(1, 91))
    found = recorder.trajectories()
    assert found.keys() == dict(model.named_parameters()).keys()
    for name in found:
        check(recorder, torch.stack([each[name] for each in raw]), steps, name)
    scores = recorder.trajectory_variance()
    assert list(scores) == [unit.name for unit in units(model)] == ["0", "2"]
    for unit in ("0", "2"):
        parts = [found[f"{unit}.{part}"].variance().flatten() for part in ("weight", "bias")]
        assert scores[unit] == pytest.approx(float(torch.cat(parts).mean()))
    assert combine(trajectory=scores).keys() == {"0", "2"}


def test_every_few_steps_and_further_runs() -> None:
    model, raw = network(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recorder = TrajectoryRecorder(5)
    recorder.add("bias", lambda: model[2].bias)
    for steps in (31, 32):
        with recorder.attach(optimizer, every=3):
            train(model, optimizer, steps, lambda: raw.append(model[2].bias.detach().clone()))
    picked = [*range(3, 31, 3), *range(34, 64, 3)]
    # The second run counts on from step 30, which was the last to be recorded.
    steps = [*range(3, 31, 3), *range(33, 61, 3)]
    assert recorder.samples == len(picked)
    check(recorder, torch.stack([raw[index - 1] for index in picked]), steps, "bias")


def test_gradient_norms() -> None:
    model, raw = network(), []
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recorder = TrajectoryRecorder.of_gradient_norms(model, n=5)

    def keep() -> None:
        raw.append([math.sqrt(sum(float((p.grad**2).sum()) for p in m.parameters() if p.requires_grad)) for m in model])

    with recorder.attach(optimizer):
        train(model, optimizer, 40, keep)
    values = torch.tensor(raw, dtype=torch.float64)
    for index in (0, 2):
        trajectory = recorder.trajectories()[f"gradient_norm({index})"]
        expected = scipy.interpolate.make_lsq_spline(
            np.arange(1, 41.0), values[:, index].numpy(), trajectory.spline.knots.numpy(), 3
        )
        np.testing.assert_allclose(trajectory.spline.control.numpy(), expected.c, rtol=1e-5)
    assert recorder.trajectory_variance().keys() == {"0", "2"}
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="gradients: expected some"):
        recorder.step()


def test_a_unit_without_gradient_has_norm_zero() -> None:
    model = nn.ModuleList([nn.Embedding(4, 3, sparse=True), nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False)])
    recorder = TrajectoryRecorder.of_gradient_norms(model, n=4)
    for _ in range(4):
        # A sparse gradient that has an index twice.
        model[0].weight.grad = None
        model[0](torch.tensor([1, 1])).sum().backward()
        recorder.step()
    found = recorder.trajectories()
    assert float(found["gradient_norm(0)"].spline(2.0)) == pytest.approx(math.sqrt(12))
    assert float(found["gradient_norm(1)"].spline(2.0)) == 0
    assert "gradient_norm(2)" not in found


def test_elements_tied_and_complex_parameters() -> None:
    model = nn.Module()
    model.a, model.b = nn.Linear(20, 10, bias=False), nn.Linear(20, 10, bias=False)
    model.b.weight = model.a.weight
    model.c = nn.Parameter(torch.complex(torch.ones(3), torch.arange(3.0)))
    recorder = TrajectoryRecorder.of_weights(model, n=4, elements=50)
    for _ in range(4):
        recorder.step()
    found = recorder.trajectories()
    assert {name: tuple(each.shape) for name, each in found.items()} == {"c": (3, 2), "a.weight": (50,)}
    torch.testing.assert_close(found["a.weight"].spline(0.0), model.a.weight.detach().flatten()[::4].double())
    torch.testing.assert_close(found["c"].spline(0.0), torch.view_as_real(model.c.detach()).double())
    assert recorder.trajectory_variance().keys() == {unit.name for unit in units(model)}


def test_scores_of_several_signals() -> None:
    model = network()
    recorder = TrajectoryRecorder.of_weights(model, n=4)
    recorder.add_gradient_norms(model)
    recorder.add("gate", lambda: 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with recorder.attach(optimizer):
        train(model, optimizer, 9)
    with pytest.raises(ValueError, match=r"signal: .*'gradient_norms', 'weights'.*name one"):
        recorder.trajectory_variance()
    with pytest.raises(ValueError, match=r"signal: .*got 'custom'"):
        recorder.trajectory_variance("custom")
    weights, norms = (recorder.trajectory_variance(signal) for signal in ("weights", "gradient_norms"))
    assert weights.keys() == norms.keys() == {"0", "2"}
    assert weights != norms
    plain = recorded(walk(9))
    with pytest.raises(ValueError, match="signal: expected series of one signal with units"):
        plain.trajectory_variance()


def test_recording_changes_nothing() -> None:
    runs = []
    for watched in (False, True):
        model = network()
        optimizer = torch.optim.Adam(model.parameters())
        recorder = TrajectoryRecorder.of_weights(model)
        recorder.add_gradient_norms(model)
        if watched:
            recorder.attach(optimizer)
        train(model, optimizer, 20)
        runs.append([parameter.detach().clone() for parameter in model.parameters()])
        assert not any(parameter.grad.requires_grad for parameter in model.parameters())
        recorder.close()
        recorder.close()
        assert not optimizer._optimizer_step_post_hooks
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# Files and pictures.


def test_a_saved_recorder_goes_on(tmp_path: Path) -> None:
    values = walk(100, 2, 3)
    turn = iter(values)
    recorder = TrajectoryRecorder(6, resolution=4)
    recorder.add("y", lambda: next(turn), unit="layer", signal="weights")
    for _ in range(57):
        recorder.step()
    recorder.save(tmp_path / "run")
    assert os.listdir(tmp_path) == ["run"]
    other = TrajectoryRecorder.load(tmp_path / "run")
    assert other.report() == recorder.report()
    assert other.trajectory_variance() == recorder.trajectory_variance()
    assert torch.equal(other.predict(2, method="hold")["y"], recorder.predict(2, method="hold")["y"])
    with pytest.raises(ValueError, match="y: expected a source, got none"):
        other.step()
    with pytest.raises(ValueError, match=r"y: expected unit 'layer' and signal 'weights' as recorded.*`add_weights`"):
        other.add("y", lambda: next(turn))
    with pytest.raises(ValueError, match="late"):
        other.add("late", lambda: next(turn))
    other.add("y", lambda: next(turn), unit="layer", signal="weights")
    for _ in range(57, 100):
        other.step()
    check(other, values)
    assert TrajectoryRecorder(6).samples == 0


def test_a_saved_recorder_of_weights_goes_on(tmp_path: Path) -> None:
    model = network()
    recorder = TrajectoryRecorder.of_weights(model, n=4, elements=10)
    for _ in range(5):
        recorder.step()
    recorder.save(tmp_path / "run")
    other = TrajectoryRecorder.load(tmp_path / "run")
    other.add_weights(model, elements=10)
    other.step()
    assert other.samples == 6
    assert {name: tuple(each.shape) for name, each in other.trajectories().items()} == {
        "0.weight": (10,), "0.bias": (8,), "2.weight": (10,), "2.bias": (3,)
    }  # fmt: skip


def test_an_empty_recorder_comes_back(tmp_path: Path) -> None:
    recorder = TrajectoryRecorder.of_weights(network())
    recorder.save(tmp_path / "run")
    other = TrajectoryRecorder.load(tmp_path / "run")
    other.add_weights(network())
    for _ in range(8):
        other.step()
    assert other.trajectories().keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    recorded(walk(20), 4, resolution=2).save(path)
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(CorruptWeightError):
            TrajectoryRecorder.load(path)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises((CorruptWeightError, ValueError)):
            TrajectoryRecorder.load(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 1), ("n", "8"), ("n", None), ("resolution", 0), ("on_nan", "x"), ("samples", -1), ("samples", "x"),
        ("length", 0), ("length", "x"), ("first", 1e300), ("last", -1.0), ("series", 3), ("series", [{}]),
        ("series", [{"name": "y", "shape": [7], "itemsize": 8, "unit": None, "signal": "custom"}]),
        ("series", [{"name": "y", "shape": [-1], "itemsize": 8, "unit": None, "signal": "custom"}]),
        ("series", [{"name": 3, "shape": [], "itemsize": 8, "unit": None, "signal": "custom"}]),
        ("n", 10**9), ("resolution", 10**12),
    ],
)  # fmt: skip
def test_forged_metadata_is_refused(tmp_path: Path, field: str, value: Any) -> None:
    """Checksums fit, but what they guard makes no sense; nothing large is made of it."""
    path = tmp_path / "run"
    recorded(walk(20), 4, resolution=2).save(path)
    tensors, metadata = load_state(path, "TrajectoryRecorder", 1)
    save_state(path, "TrajectoryRecorder", 1, tensors, {**metadata, field: value})
    with pytest.raises(CorruptWeightError):
        TrajectoryRecorder.load(path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    recorded(walk(20), 4).save(path)
    with safe_open(path, "pt") as file:
        assert file.metadata()["version"] == "1"
    save_state(path, "TrajectoryRecorder", 2, *load_state(path, "TrajectoryRecorder", 1))
    with pytest.raises(ValueError, match="expected version 1 of 'TrajectoryRecorder', got 2"):
        TrajectoryRecorder.load(path)
    infold.save(network(), path)
    with pytest.raises(ValueError, match="expected a file of kind 'TrajectoryRecorder'"):
        TrajectoryRecorder.load(path)


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    recorder = recorded(walk(40, 3, 2))
    recorder.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    recorder.plot(tmp_path / "b.svg", names=["y"], elements=100)
    text = (tmp_path / "b.svg").read_text(encoding="utf-8")
    assert "6 of 6, control points" in text
    for names in ([], ["none"]):
        with pytest.raises(ValueError, match="names"):
            recorder.plot(tmp_path / "c.png", names=names)
    with pytest.raises(ValueError, match="elements"):
        recorder.plot(tmp_path / "c.png", elements=0)

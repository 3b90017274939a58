"""Trajectories against SciPy's least-squares splines of all raw samples."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
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
from safetensors import safe_open
from torch import Tensor, nn


def walk(count: int, *shape: int, seed: int = 0) -> Tensor:
    """(count, *shape): a random walk about 10."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator, dtype=torch.float64).cumsum(0) + 10


def feed(recorder: TrajectoryRecorder, values: Tensor, steps: Sequence[float] | None = None, name: str = "y") -> None:
    """Records values[0], values[1], … as one series."""
    turn = iter(values)
    recorder.add(name, lambda: next(turn))
    for index in range(len(values)):
        recorder.step(None if steps is None else steps[index])


def recorded(values: Tensor, n: int = 8, steps: Sequence[float] | None = None, **options: Any) -> TrajectoryRecorder:
    recorder = TrajectoryRecorder(n, **options)
    feed(recorder, values, steps)
    return recorder


def check(recorder: TrajectoryRecorder, values: Tensor, steps: Sequence[float] | None = None, name: str = "y") -> None:
    """That a series (count, …) is the fit to all its samples that SciPy makes on the same knots, and its errors."""
    trajectory = recorder.trajectories()[name]
    raw = values.double().numpy()
    t = np.arange(len(raw), dtype=float) if steps is None else np.asarray(steps, dtype=float)
    knots = trajectory.spline.knots.numpy()
    assert knots[:4].tolist() == [t[0]] * 4
    np.testing.assert_allclose(knots[-4:], t[-1], rtol=1e-15)
    expected = scipy.interpolate.make_lsq_spline(t, raw, knots, 3)
    scale = np.abs(expected.c).max()
    control = np.moveaxis(trajectory.spline.control.numpy(), -1, 0)
    np.testing.assert_allclose(control, expected.c, rtol=0, atol=1e-8 * scale)
    rms = np.sqrt(((raw - expected(t)) ** 2).mean(0))
    reach = np.abs(raw - raw[0]).max()
    np.testing.assert_allclose(trajectory.error.rms.numpy(), rms, rtol=1e-8, atol=1e-7 * reach)
    np.testing.assert_allclose(trajectory.error.deviation.numpy(), raw.std(0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(trajectory.error.size.numpy(), np.sqrt((raw**2).mean(0)), rtol=1e-9)
    # Even but for the grid, which has at least half of `resolution` cells for each control point.
    n = recorder.n
    even = np.linspace(t[0], t[-1], n - 2)[1:-1]
    assert np.abs(knots[4:-4] - even).max(initial=0) <= (t[-1] - t[0]) / (recorder.resolution * n / 2) / 2 * (1 + 1e-9)
    assert (np.diff(knots[3:-3]) > 0).all()


@pytest.mark.parametrize("n", [4, 5, 8, 16, 33])
def test_at_every_length_it_is_the_fit_to_all_samples(n: int) -> None:
    values = walk(300, 3)
    recorder, turn = TrajectoryRecorder(n), iter(values)
    recorder.add("y", lambda: next(turn))
    for length in range(1, 301):
        recorder.step()
        # The space doubles as 1, 2, 4, … is passed.
        if length >= n and (length <= n + 3 or min(abs(length - 1 - 2**k) for k in range(9)) <= 1 or length == 300):
            check(recorder, values[:length])


@pytest.mark.parametrize("origin", [0.0, -7.5, 1e6])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e5])
def test_uneven_steps(origin: float, scale: float) -> None:
    gaps = torch.rand(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.05
    # A start that is far longer, and one that is far shorter than what follows.
    for first in (1.0, 40.0, 1e-3):
        gaps[1] = first
        steps = [origin + scale * float(s) for s in gaps.cumsum(0)]
        if first == 40.0:
            steps = [steps[0] + scale * k for k in (0, 5, 9, 14, 20, 26, 33)] + steps[1:]
        values = walk(len(steps), 2)
        check(recorded(values, 8, steps), values, steps)


@pytest.mark.parametrize(("n", "resolution"), [(4, 2), (7, 2), (13, 3), (8, 32)])
def test_resolutions(n: int, resolution: int) -> None:
    for count in (n, 50, 129):
        values = walk(count, 2)
        check(recorded(values, n, resolution=resolution), values)


def test_several_series_share_the_steps() -> None:
    a, b, c = walk(70, 4, 5), walk(70, 3, seed=1).float(), walk(70, seed=2)
    recorder, turn = TrajectoryRecorder(6), iter(range(1000))
    now = 0
    recorder.add("a", lambda: a[now].T)  # of any strides
    recorder.add("b", lambda: nn.Parameter(b[now]))
    recorder.add("c", lambda: float(c[now]))
    for now in turn:
        if now == 70:
            break
        recorder.step()
    check(recorder, a.transpose(1, 2), name="a")
    check(recorder, b, name="b")
    check(recorder, c, name="c")
    found = recorder.trajectories()
    assert [(each.shape, each.itemsize) for each in found.values()] == [((5, 4), 8), ((3,), 4), ((), 8)]
    assert found["b"].sample_bytes == 70 * 3 * 4
    assert found["b"].control_bytes == 6 * 3 * 4
    assert found["b"].compression_ratio == pytest.approx(70 / 6)
    samples, control = 70 * (20 * 8 + 3 * 4 + 8), 6 * (20 * 8 + 3 * 4 + 8)
    assert recorder.compression_ratio() == pytest.approx((samples + 70 * 8) / (control + 10 * 8))
    report = recorder.report().splitlines()
    assert [line.split()[0] for line in report] == ["series", "a", "b", "c"]
    assert f"{float(found['a'].error.total().to_deviation):.2%}" in report[1]


def test_memory_does_not_grow() -> None:
    sizes = set()
    recorder, values = TrajectoryRecorder(8), walk(5000, 10)
    turn = iter(values)
    recorder.add("y", lambda: next(turn))
    for _ in range(5000):
        recorder.step()
        # What its attributes hold, whatever they are called.
        tensors = [value for value in (vars(recorder) | vars(recorder._sums)).values() if isinstance(value, Tensor)]
        sizes.add(sum(tensor.untyped_storage().nbytes() for tensor in tensors))
    assert sizes == {recorder.nbytes}
    assert recorder.nbytes == 8 * (67 * 4 + 10 * (67 + 3))
    check(recorder, values)


def test_large_offsets_hide_nothing() -> None:
    """Of 1e9 ± 1, what is left over is known to 1e-7."""
    values = walk(200, 3)
    found = recorded(values + 1e9).trajectories()["y"]
    plain = recorded((values + 1e9) - 1e9).trajectories()["y"]
    torch.testing.assert_close(found.error.rms, plain.error.rms, rtol=1e-7, atol=0)
    torch.testing.assert_close(found.error.to_deviation, plain.error.to_deviation, rtol=1e-7, atol=0)


def test_constants_and_cubics_have_no_error() -> None:
    t = torch.arange(100, dtype=torch.float64)
    values = torch.stack([torch.full_like(t, 0.1), t * 0, 3 + t - t**2 / 50 + t**3 / 1e4], 1)
    trajectory = recorded(values).trajectories()["y"]
    assert trajectory.error.to_deviation[:2].tolist() == [0, 0]
    assert trajectory.error.to_size[:2].tolist() == [0, 0]
    assert float(trajectory.error.to_deviation[2]) < 1e-6
    assert trajectory.stability()[:2].tolist() == [1, 1]
    assert trajectory.activity()[:2].tolist() == [0, 0]
    assert trajectory.variance()[:2].tolist() == [0, 0]
    assert float(trajectory.spline(17.0)[0]) == pytest.approx(0.1, rel=1e-15)


def test_a_bad_fit_of_large_numbers_is_no_small_error() -> None:
    """Not even where the movement is one rounding of the samples."""
    values = 1e16 + 2 * (torch.arange(100, dtype=torch.float64) % 2)
    assert float(recorded(values).trajectories()["y"].error.to_deviation) > 0.9


def test_a_run_of_fractional_steps_ends_at_its_last() -> None:
    for seed in range(100):
        generator = np.random.default_rng(seed)
        steps = generator.uniform(0.01, 1.0, 30).cumsum().tolist()
        trajectory = recorded(walk(30), steps=steps).trajectories()["y"]
        assert trajectory.spline.domain == (steps[0], steps[-1])
        assert trajectory.spline(torch.tensor(steps, dtype=torch.float64)).shape == (30,)
        assert float(trajectory.activity(steps[-1] - steps[0])) == pytest.approx(
            float(trajectory.activity()), rel=1e-12
        )
    check(recorded(walk(30), steps=steps), walk(30), steps)


def test_activity_stability_and_variance() -> None:
    t = torch.linspace(0, 400, 401, dtype=torch.float64)
    settles = torch.exp(-t / 40)
    line, starts = 2 * t, torch.exp((t - 400) / 40)
    trajectory = recorded(torch.stack([settles, line, starts], 1), 12).trajectories()["y"]
    spline = scipy.interpolate.BSpline(trajectory.spline.knots.numpy(), trajectory.spline.control.T.numpy(), 3)

    def rms(start: float, end: float) -> np.ndarray:
        middles = start + (end - start) * (np.arange(100_000) + 0.5) / 100_000
        return np.sqrt((spline(middles, 1) ** 2).mean(0))

    np.testing.assert_allclose(trajectory.activity().numpy(), rms(0, 400), rtol=1e-6)
    np.testing.assert_allclose(trajectory.activity(50).numpy(), rms(350, 400), rtol=1e-6)
    quarters = np.stack([rms(100 * i, 100 * i + 100) for i in range(4)])
    np.testing.assert_allclose(trajectory.stability().numpy(), 1 - quarters[3] / quarters.max(0), rtol=1e-6, atol=1e-12)
    assert trajectory.stability().round(decimals=2).tolist() == pytest.approx([1, 0, 0], abs=0.02)
    middles = 400 * (np.arange(100_000) + 0.5) / 100_000
    np.testing.assert_allclose(trajectory.variance().numpy(), spline(middles).var(0), rtol=1e-6)
    for window in (0, -1, 401, math.nan):
        with pytest.raises(ValueError, match="window"):
            trajectory.activity(window)


def test_predictions() -> None:
    t = torch.arange(0, 60, 2, dtype=torch.float64)
    bent = walk(30)
    recorder = recorded(torch.stack([3 - 0.5 * t, bent], 1), 6, steps=t.tolist())
    predicted = recorder.predict(4, method="linear")["y"]
    assert predicted.shape == (2, 4)
    torch.testing.assert_close(predicted[0], 3 - 0.5 * torch.tensor([60.0, 62, 64, 66], dtype=torch.float64))
    spline = recorder.trajectories()["y"].spline
    ahead = torch.tensor([58.0, 60, 61], dtype=torch.float64)
    end, slope = spline(58.0), spline(58.0, 1)
    on = end[:, None] + slope[:, None] * (ahead - 58)
    torch.testing.assert_close(recorder.predict(ahead, method="linear")["y"], on)
    torch.testing.assert_close(recorder.predict(ahead, method="level")["y"], end[:, None].expand(2, 3))
    held = recorder.predict(3, method="hold")["y"]
    assert torch.equal(held[1], bent[-1].expand(3))
    for wrong in (0, torch.tensor([57.0]), torch.tensor(60.0), torch.tensor([math.nan])):
        with pytest.raises(ValueError, match="steps"):
            recorder.predict(wrong)
    short = recorded(bent[:3], 6)
    assert torch.equal(short.predict(2, method="hold")["y"], bent[2].expand(2))
    with pytest.raises(ValueError, match="samples: expected 6 or more"):
        short.predict(2, method="linear")
    with pytest.raises(ValueError, match="samples: expected one or more"):
        TrajectoryRecorder().predict(1, method="hold")
    with pytest.raises(ValueError, match="method"):
        recorder.predict(1, method="cubic")  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1e160])
def test_numbers_that_are_none(bad: float) -> None:
    values = walk(40, 3)
    spoilt = values.clone()
    spoilt[25, 1] = bad
    turn = iter(spoilt)
    recorder = TrajectoryRecorder(6)
    recorder.add("other", lambda: 1.0)
    recorder.add("y", lambda: next(turn))
    for _ in range(25):
        recorder.step()
    before = {name: value.clone() for name, value in vars(recorder).items() if isinstance(value, Tensor)}
    wanted = r"numbers below 1e\+150 in size" if math.isfinite(bad) else "finite numbers"
    with pytest.raises(ValueError, match=f"y: expected {wanted}, got {re.escape(str(bad))} at 1 in step 25"):
        recorder.step()
    assert all(torch.equal(getattr(recorder, name), value) for name, value in before.items())
    assert recorder.samples == 25
    recorder.step(26)
    assert recorder.samples == 26

    skipping, turn = TrajectoryRecorder(6, on_nan="skip"), iter(spoilt)
    skipping.add("y", lambda: next(turn))
    for index in range(40):
        skipping.step(index)
    assert (skipping.samples, skipping.skipped) == (39, 1)
    kept = [index for index in range(40) if index != 25]
    check(skipping, values[kept], [float(index) for index in kept])


def test_a_first_sample_that_is_skipped() -> None:
    values = walk(20)
    turn = iter(torch.cat([torch.tensor([math.nan], dtype=torch.float64), values]))
    recorder = TrajectoryRecorder(5, on_nan="skip")
    recorder.add("y", lambda: next(turn))
    for index in range(21):
        recorder.step(index)
    check(recorder, values, list(range(1, 21)))


def test_wrong_arguments_are_named() -> None:
    for message, make in {
        "n: expected 4": lambda: TrajectoryRecorder(3),
        "resolution": lambda: TrajectoryRecorder(resolution=1),
        "on_nan": lambda: TrajectoryRecorder(on_nan="ignore"),  # type: ignore[arg-type]
        "elements": lambda: TrajectoryRecorder.of_weights(nn.Linear(2, 2), elements=0),
        "model: expected parameters": lambda: TrajectoryRecorder.of_weights(nn.ReLU()),
        "model: expected a parameter that trains": lambda: TrajectoryRecorder.of_gradient_norms(nn.ReLU()),
        "series: expected one or more": lambda: TrajectoryRecorder().step(),
    }.items():
        with pytest.raises(ValueError, match=message):
            make()
    recorder = recorded(walk(7))
    with pytest.raises(ValueError, match="samples: expected 8 or more for 8 control points, got 7"):
        recorder.trajectories()
    for wrong in (6, 5.5, math.nan, math.inf, 1e301):
        with pytest.raises(ValueError, match=r"at: expected a step above 6\.0 and below"):
            recorder.step(wrong)
    with pytest.raises(ValueError, match="late: expected series to be added before the first sample, got 7"):
        recorder.add("late", lambda: 1.0)
    with pytest.raises(ValueError, match="name: expected one that is free, got 'y'"):
        recorder.add("y", lambda: 1.0)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    with recorder.attach(optimizer), pytest.raises(ValueError, match="optimizer: expected one at a time"):
        recorder.attach(optimizer)
    with pytest.raises(ValueError, match="every"):
        recorder.attach(optimizer, every=0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("text", "y: expected a number or a tensor, got str"),
        (None, "y: expected a number or a tensor, got NoneType"),
        (torch.zeros(2, dtype=torch.complex64), "y: expected real numbers"),
        (torch.zeros(0), "y: expected real numbers"),
        (torch.zeros(3), r"y: expected a value of shape \(2,\), got \(3,\)"),
    ],
)
def test_wrong_values_are_named(value: Any, message: str) -> None:
    recorder, turn = TrajectoryRecorder(4), iter([torch.zeros(2), value])
    recorder.add("y", lambda: next(turn))
    recorder.step()
    with pytest.raises(ValueError, match=message):
        recorder.step()
    assert recorder.samples == 1


def test_steps_that_leave_a_control_point_undetermined() -> None:
    steps = [*range(20), 1000.0, 1001.0, 1002.0]
    recorder = recorded(walk(23), 8, steps)
    with pytest.raises(ValueError, match="steps: expected samples that determine every control point"):
        recorder.trajectories()
    # Nothing is lost: the knots move on, and later samples make up for it.
    steps += [1002.0 + 10 * k for k in range(1, 101)]
    check(recorded(walk(123), 8, steps), walk(123), steps)


def test_many_control_points_of_hardly_more_samples() -> None:
    """Interpolation at even steps becomes ill-conditioned as there are more of them."""
    for n, count in ((48, 48), (64, 65), (100, 102)):
        check(recorded(walk(count), n), walk(count))
    for n, count in ((64, 64), (100, 100), (100, 101)):
        with pytest.raises(ValueError, match="steps: expected samples that determine"):
            recorded(walk(count), n).trajectories()


# Training runs.


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
    from infold.tokenizers._files import load_state, save_state

    path = tmp_path / "run"
    recorded(walk(20), 4, resolution=2).save(path)
    tensors, metadata = load_state(path, "TrajectoryRecorder", 1)
    save_state(path, "TrajectoryRecorder", 1, tensors, {**metadata, field: value})
    with pytest.raises(CorruptWeightError):
        TrajectoryRecorder.load(path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    from infold.tokenizers._files import load_state, save_state

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

"""Trajectories against SciPy's least-squares splines of all raw samples."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import scipy.interpolate
import torch
from infold.tokenizers import TrajectoryRecorder
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

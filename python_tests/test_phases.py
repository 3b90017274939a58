"""Phases of spectra against NumPy's transforms, closed forms and finite differences; the recorder and the plots."""

from __future__ import annotations

import builtins
import csv
import gc
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import infold
import numpy as np
import pytest
import torch
from infold import spectral
from infold.nn import FrequencyLinear
from infold.spectral import PhaseRecorder, phase_regularizer
from torch import Tensor, nn

SIZES = [1, 2, 3, 4, 7, 8, 64, 65]


def blocks(n: int, seed: int = 0) -> Tensor:
    return torch.randn(2, 3, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def penalty(z: np.ndarray, harmonic: int, target: float, weighted: bool) -> float:
    """The definition, by angles."""
    each = 0.5 * (1 - np.cos(harmonic * (np.angle(z) - target)))
    return float(np.average(each, weights=np.abs(z) ** 2 if weighted else None))


# --- amplitudes and phases --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
def test_polar_is_the_transform_of_the_blocks(n: int) -> None:
    x = blocks(n)
    amplitude, phase = spectral.polar(spectral.pack_spectrum(x))
    half = np.fft.rfft(x.numpy(), norm="ortho")
    np.testing.assert_allclose(amplitude.square().sum(-1), x.square().sum(-1), rtol=1e-12)
    # At the real frequencies, a negative number may have either sign of π.
    np.testing.assert_allclose(np.exp(1j * phase.numpy()), np.exp(1j * np.angle(half)), atol=1e-12)
    assert phase.abs().max() <= math.pi
    free = spectral.free_frequencies(spectral.pack_spectrum(x))
    np.testing.assert_allclose(free, half[..., 1 : (n + 1) // 2] * 2**0.5, atol=1e-12)


def test_polar_of_complex_numbers_and_of_half_precision() -> None:
    z = torch.tensor([1 + 1j, -2.0, 0, -3j])
    amplitude, phase = spectral.polar(z)
    torch.testing.assert_close(amplitude, torch.tensor([2**0.5, 2, 0, 3]))
    torch.testing.assert_close(phase, torch.tensor([math.pi / 4, math.pi, 0, -math.pi / 2]))
    packed = spectral.pack_spectrum(blocks(8)).bfloat16()
    assert spectral.polar(packed).phase.dtype == torch.float32
    torch.testing.assert_close(spectral.polar(packed), spectral.polar(packed.float()))


@pytest.mark.parametrize("n", [2, 5, 8])
def test_polar_differentiates(n: int) -> None:
    spectrum = spectral.pack_spectrum(blocks(n)).requires_grad_()
    assert torch.autograd.gradcheck(spectral.polar, spectrum)
    assert torch.autograd.gradgradcheck(spectral.polar, spectrum)
    zero = torch.zeros(3, n, requires_grad=True)
    amplitude, phase = spectral.polar(zero)
    (amplitude.sum() + phase.sum()).backward()
    assert torch.equal(zero.grad, torch.zeros(3, n))


@pytest.mark.parametrize("bad", [torch.zeros(()), torch.zeros(2, 0), torch.zeros(2, 4, dtype=torch.int64)])
def test_what_is_no_spectrum_is_refused(bad: Tensor) -> None:
    for function in (spectral.polar, spectral.free_frequencies, phase_regularizer, spectral.phase_histogram):
        with pytest.raises(ValueError, match="spectrum: expected"):
            function(bad)


# --- the penalty ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("harmonic", [1, 2, 3, 4])
def test_the_penalty_is_its_definition_where_amplitudes_are_large(harmonic: int, weighted: bool) -> None:
    half = np.fft.rfft(blocks(65).numpy(), norm="ortho")[..., 1:33] * 2**0.5
    packed = spectral.pack_spectrum(blocks(65))
    for target in (0.0, 1.2):
        expected = penalty(half, harmonic, target, weighted)
        options: dict[str, Any] = {"weighted": weighted, "eps": 1e-9}
        assert float(phase_regularizer(packed, harmonic, target, **options)) == pytest.approx(expected, rel=1e-9)
        assert float(phase_regularizer(torch.from_numpy(half), harmonic, target, **options)) == pytest.approx(expected)
        # A scale changes no phase.
        assert float(phase_regularizer(7 * packed, harmonic, target, **options)) == pytest.approx(expected)


def test_where_the_penalty_is_none_all_and_half() -> None:
    angles = torch.arange(4) * math.pi / 2
    z = torch.polar(torch.tensor([1.0, 2, 3, 4]), angles)
    for weighted in (False, True):
        assert float(phase_regularizer(z, weighted=weighted)) == pytest.approx(0, abs=1e-5)
        turned = z * complex(math.cos(math.pi / 4), math.sin(math.pi / 4))
        assert float(phase_regularizer(turned, weighted=weighted)) == pytest.approx(1, abs=1e-5)
        assert float(phase_regularizer(turned, 1, angles + math.pi / 4, weighted=weighted)) == pytest.approx(
            0, abs=1e-5
        )
    circle = torch.polar(torch.ones(1000), torch.linspace(0, math.tau, 1001)[:-1])
    assert float(phase_regularizer(circle)) == pytest.approx(0.5, abs=1e-5)
    assert float(phase_regularizer(torch.zeros(3, 8), weighted=False)) == 0.5
    assert float(phase_regularizer(torch.zeros(3, 8))) == 0
    for nothing in (torch.zeros(0, 8), torch.ones(3, 2)):
        assert float(phase_regularizer(nothing)) == float(phase_regularizer(nothing, weighted=False)) == 0


def test_real_frequencies_have_no_part_in_the_penalty() -> None:
    spectrum = spectral.pack_spectrum(blocks(8)).requires_grad_()
    phase_regularizer(spectrum).backward()
    assert not spectrum.grad[..., [0, 4]].any()
    assert spectrum.grad[..., [1, 2, 3, 5, 6, 7]].all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("harmonic", [1, 3, 4])
def test_the_penalty_is_smooth(harmonic: int, weighted: bool) -> None:
    """Both orders of derivatives against finite differences, in the midst of amplitudes of 0."""
    real = spectral.pack_spectrum(blocks(7))
    real[0] = 0
    real[1, 0, 2] = 0
    for spectrum in (real, spectral.free_frequencies(real)):
        leaf = spectrum.detach().clone().requires_grad_()
        target = torch.randn(3, dtype=torch.float64, requires_grad=True)

        def form(z: Tensor, t: Tensor) -> Tensor:
            # A wide eps, for finite differences have to be small beside it.
            return phase_regularizer(z, harmonic, t, weighted=weighted, eps=0.3)

        assert torch.autograd.gradcheck(form, (leaf, target))
        assert torch.autograd.gradgradcheck(form, (leaf, target))


def test_the_penalty_pulls_the_phases_of_a_layer() -> None:
    torch.manual_seed(0)
    layer = FrequencyLinear(64, 64, block=16)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    before = spectral.resultant_length(spectral.layer_frequencies(layer), 4)
    for _ in range(200):
        optimizer.zero_grad()
        phase_regularizer(layer.packed_spectrum()).backward()
        optimizer.step()
    assert before < 0.3
    assert spectral.resultant_length(spectral.layer_frequencies(layer), 4, weighted=True) > 0.99


def test_the_penalty_compiles() -> None:
    compiled = torch.compile(phase_regularizer, fullgraph=True, backend="aot_eager")
    leaves = [spectral.pack_spectrum(blocks(8)).requires_grad_() for _ in range(2)]
    values = [function(leaf) for function, leaf in zip((compiled, phase_regularizer), leaves, strict=True)]
    torch.testing.assert_close(*values)
    for value in values:
        value.backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_bad_options_of_the_penalty() -> None:
    with pytest.raises(ValueError, match="harmonic: expected a positive integer, got 0"):
        phase_regularizer(torch.ones(4), 0)
    with pytest.raises(ValueError, match="eps: expected a positive number, got 0"):
        phase_regularizer(torch.ones(4), eps=0)
    with pytest.raises(ValueError, match="harmonic"):
        spectral.resultant_length(torch.ones(4), 0)
    with pytest.raises(ValueError, match="bins"):
        spectral.phase_histogram(torch.ones(4), 0)


# --- distributions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_histogram_is_numpys(weighted: bool) -> None:
    z = torch.from_numpy(np.random.default_rng(0).standard_normal((50, 2)) @ np.array([1, 1j]))
    z[3] = 0
    z[4], z[5] = -1, complex(-1, -0.0)
    counts, edges = spectral.phase_histogram(z, 12, weighted=weighted)
    own = z.numpy()[z.numpy() != 0]
    weights = np.abs(own) ** 2 if weighted else None
    expected, expected_edges = np.histogram(np.angle(own), 12, (-np.pi, np.pi), weights=weights)
    np.testing.assert_allclose(counts, expected)
    np.testing.assert_allclose(edges, expected_edges, atol=1e-12)


@pytest.mark.parametrize("harmonic", [1, 2, 4])
def test_resultant_length(harmonic: int) -> None:
    angles = torch.tensor([0.3, 0.3 + math.tau / harmonic, 0.3 - math.tau / harmonic])
    assert spectral.resultant_length(torch.polar(torch.tensor([1.0, 2, 3]), angles), harmonic) == pytest.approx(1)
    opposite = torch.polar(torch.tensor([3.0, 1.0]), torch.tensor([0.1, 0.1 + math.pi / harmonic]))
    assert spectral.resultant_length(opposite, harmonic) == pytest.approx(0, abs=1e-6)
    assert spectral.resultant_length(opposite, harmonic, weighted=True) == pytest.approx(0.8)
    assert math.isnan(spectral.resultant_length(torch.zeros(8), harmonic))


def test_phases_of_a_drawn_layer_are_uniform() -> None:
    torch.manual_seed(0)
    z = spectral.layer_frequencies(FrequencyLinear(256, 256, block=64))
    for harmonic in (1, 2, 4):
        # Rayleigh's test: one layer in a million is farther from uniform.
        assert spectral.resultant_length(z, harmonic) < math.sqrt(-math.log(1e-6) / len(z))


@pytest.mark.parametrize("shape", [(5, 7), (5, 8), (6, 7), (6, 8), (1, 8), (8, 1), (2, 2)])
def test_frequencies_of_a_dense_layer(shape: tuple[int, int]) -> None:
    """One of each pair of conjugates of the full transform, and no real number: found by going over all of them."""
    layer = nn.Linear(shape[1], shape[0]).double()
    full = np.fft.fft2(layer.weight.detach().numpy(), norm="ortho")
    pairs = {frozenset({(u, v), (-u % shape[0], -v % shape[1])}) for u in range(shape[0]) for v in range(shape[1])}
    kept = [sorted(pair) for pair in pairs if len(pair) == 2]
    z = spectral.layer_frequencies(layer).numpy()
    assert len(z) == len(kept)
    expected = sorted((full[pair[0]].real, abs(full[pair[0]].imag)) for pair in kept)
    np.testing.assert_allclose(sorted((n.real, abs(n.imag)) for n in z / 2**0.5), expected, atol=1e-12)
    own = [full[u, v] for pair in pairs if len(pair) == 1 for u, v in pair]
    energy = float(layer.weight.detach().square().sum())
    assert np.square(np.abs(z)).sum() + np.square(np.abs(own)).sum() == pytest.approx(energy)


def test_frequencies_of_other_layers() -> None:
    linear = nn.Linear(12, 8)
    circulant = FrequencyLinear.from_linear(linear, 4)
    by_block = spectral.layer_frequencies(linear, 4)
    torch.testing.assert_close(by_block, spectral.layer_frequencies(circulant))
    assert by_block.shape == (2 * 3 * 1,)
    encoded = circulant.to_log8()
    assert (spectral.layer_frequencies(encoded) - by_block).norm() < 0.01 * by_block.norm()
    packed = infold.nn.FusedDecompressLinear.from_linear(linear, infold.FusedConfig("lossless"))
    assert torch.equal(spectral.layer_frequencies(packed), spectral.layer_frequencies(linear))
    with pytest.raises(ValueError, match="layer: expected a packed spectrum or a matrix as its weight, got a Conv1d"):
        spectral.layer_frequencies(nn.Conv1d(2, 2, 3))
    with pytest.raises(ValueError, match="block: expected a positive integer, got 0"):
        spectral.layer_frequencies(linear, 0)


# --- the recorder -----------------------------------------------------------------------------------------------------


def small_model() -> tuple[nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(FrequencyLinear(16, 16, block=8), nn.Tanh(), nn.Linear(16, 4))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.ones(2, 16)).square().sum().backward()
        optimizer.step()


def test_the_recorder_records_and_lets_go(tmp_path: Path) -> None:
    model, optimizer = small_model()
    twin, twin_optimizer = small_model()
    with PhaseRecorder(model, optimizer, every=4, layers=["0", "2"], bins=12) as recorder:
        take_steps(model, optimizer, 10)
    take_steps(model, optimizer, 5)
    take_steps(twin, twin_optimizer, 15)
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert recorder.steps == [0, 4, 8, 10]
    assert not optimizer._optimizer_step_post_hooks
    recorder.close()

    arrays = recorder.arrays()
    assert arrays["histogram"].shape == (4, 2, 12)
    np.testing.assert_allclose(arrays["histogram"].sum(-1), 1)
    again, again_optimizer = small_model()
    take_steps(again, again_optimizer, 8)
    for index, name in enumerate(("0", "2")):
        z = spectral.layer_frequencies(again.get_submodule(name))
        counts, edges = spectral.phase_histogram(z, 12)
        np.testing.assert_allclose(arrays["histogram"][2, index], counts / counts.sum())
        np.testing.assert_allclose(arrays["edges"], edges, atol=1e-12)
        assert arrays["amplitude"][2, index] == pytest.approx(float(z.abs().square().mean().sqrt()), rel=1e-6)
        assert arrays["resultant"][2, index, 2] == pytest.approx(spectral.resultant_length(z, 4))

    recorder.to_npz(tmp_path / "phases.npz")
    with np.load(tmp_path / "phases.npz", allow_pickle=False) as file:
        assert set(file) == set(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(file[name], array)
    recorder.to_csv(tmp_path / "phases.csv")
    with (tmp_path / "phases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["layer"]) for row in rows][2:4] == [("4", "0"), ("4", "2")]
    assert float(rows[3]["from_-150"]) == arrays["histogram"][1, 1, 1]
    assert float(rows[3]["resultant_2"]) == arrays["resultant"][1, 1, 1]

    reference = weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert reference() is None


def test_the_recorders_memory_is_bounded() -> None:
    model, optimizer = small_model()
    with PhaseRecorder(model, optimizer, every=1, capacity=8) as recorder:
        for count in range(1, 101):
            take_steps(model, optimizer, 1)
            assert len(recorder.steps) <= 8
            assert recorder.steps[0] == 0
            assert recorder.steps[-1] > count - recorder.every
            assert set(np.diff(recorder.steps)) <= {recorder.every}
    assert recorder.steps == [0, 16, 32, 48, 64, 80, 96, 100]


def test_the_recorder_is_taken_off_after_an_error() -> None:
    model, optimizer = small_model()

    def fail() -> None:
        with PhaseRecorder(model, optimizer, every=1):
            take_steps(model, optimizer, 2)
            raise RuntimeError("training failed")

    with pytest.raises(RuntimeError, match="training failed"):
        fail()
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every: expected at least 1, got 0"),
        ({"bins": 0}, "bins"),
        ({"capacity": 1}, "capacity: expected at least 2, got 1"),
        ({"layers": ["1"]}, "expected '1' to match a layer"),
        ({"layers": ["9"]}, "expected '9' to match a layer"),
        ({"layers": "0"}, "expected a collection"),
    ],
)
def test_bad_options_of_the_recorder(options: dict[str, Any], message: str) -> None:
    model, optimizer = small_model()
    with pytest.raises(ValueError, match=message):
        PhaseRecorder(model, optimizer, **options)
    with pytest.raises(ValueError, match="expected a model with frequency layers"):
        PhaseRecorder(nn.Linear(2, 2), optimizer)
    assert not optimizer._optimizer_step_post_hooks


# --- plots ------------------------------------------------------------------------------------------------------------


def draw_all(folder: Path) -> dict[str, Callable[[Path], None]]:
    model, optimizer = small_model()
    with PhaseRecorder(model, optimizer, every=2) as recorder:
        take_steps(model, optimizer, 5)
    spectrum = spectral.pack_spectrum(blocks(64)).requires_grad_()
    return {
        "histogram": lambda path: spectral.plot_phase_histogram(model[0], path),
        "energy": lambda path: spectral.plot_phase_histogram(spectrum, path, weighted=True),
        "space": lambda path: spectral.plot_phase_space(spectrum, path, points=50),
        "dense": lambda path: spectral.plot_phase_space(model[2], path),
        "nothing": lambda path: spectral.plot_phase_space(torch.zeros(0, 8), path),
        "no energy": lambda path: spectral.plot_phase_histogram(torch.zeros(8), path),
        "recorder": lambda path: recorder.plot(path),
        "named": lambda path: recorder.plot(path, "0"),
    }


def test_plots_are_pictures(tmp_path: Path) -> None:
    import matplotlib.image

    for name, draw in draw_all(tmp_path).items():
        draw(tmp_path / f"{name}.png")
        pixels = matplotlib.image.imread(tmp_path / f"{name}.png")
        assert min(pixels.shape[:2]) > 400
        assert np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0).shape[0] > 10


def test_plots_say_that_matplotlib_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = draw_all(tmp_path)
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for name, draw in draws.items():
        with pytest.raises(ImportError, match=r"pip install 'infold\[plot\]'"):
            draw(tmp_path / f"{name}.png")
    assert not list(tmp_path.iterdir())


def test_bad_options_of_plots(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="points: expected a positive integer, got 0"):
        spectral.plot_phase_space(torch.ones(8), tmp_path / "a.png", points=0)
    model, optimizer = small_model()
    with (
        PhaseRecorder(model, optimizer) as recorder,
        pytest.raises(ValueError, match="layer: expected one of 0, got '1'"),
    ):
        recorder.plot(tmp_path / "a.png", "1")


# --- the example's words ----------------------------------------------------------------------------------------------


def test_no_relation_of_the_example_is_trained_on_and_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = Path(__file__).parents[1] / "examples"
    monkeypatch.syspath_prepend(str(examples))
    import phase_relations

    words, concepts = phase_relations.load(examples / "data" / "relations.txt")
    assert len(words) == len(set(words)) == 320
    for seed in range(5):
        data = phase_relations.split(concepts, torch.randn(len(words), 3), seed)
        seen, known, new = ({frozenset(pair) for pair in part.words.tolist()} for part in data[:3])
        assert not seen & known
        assert frozenset.union(*known) <= frozenset.union(*seen)
        assert not frozenset.union(*new) & frozenset.union(*seen, *known)
        assert [len(part.words) for part in data[:3]] == [576, 128, 160]
        assert [int((part.relation == 1).sum()) for part in data[:3]] == [256, 64, 64]

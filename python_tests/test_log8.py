"""log8: a byte for each coefficient, its operators and the layer that is stored in it."""

from __future__ import annotations

import copy
import pickle

import infold
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from infold import Log8, log8_decode, log8_encode
from infold._library import ops
from infold.nn import FrequencyLinear
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def coefficients(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(got: Tensor, expected: Tensor) -> float:
    with torch.no_grad():
        return float((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300))


def encoded(*shape: int) -> Log8:
    return log8_encode(coefficients(*shape))


# --- the format -------------------------------------------------------------------------------------------------------


def reference(encoded: Log8) -> Tensor:
    """The format as `docs/log8.md` has it, in float64 but for the rounding of levels and products."""
    values = []
    for index, byte in enumerate(encoded.codes.flatten().tolist()):
        word = encoded.words[index // 64].item() & 0xFFFF
        mu = [1, 2, 4, 8, 16, 32, 64, 256][word >> 13]
        scale = torch.tensor(min((word & 0x1FFF) << 18, 0x7F7FFFFF), dtype=torch.int32).view(torch.float32)
        code = 0 if byte == 128 else byte - 256 if byte > 128 else byte
        level = ((1 + mu) ** (abs(code) / 127) - 1) / mu
        values.append(torch.tensor(level if code >= 0 else -level, dtype=torch.float32) * scale)
    return torch.stack(values).view(encoded.codes.shape)


def test_decodes_as_the_document_says() -> None:
    x = coefficients(3, 100) * torch.logspace(-3, 3, 100)
    torch.testing.assert_close(log8_decode(log8_encode(x)), reference(log8_encode(x)), rtol=2e-7, atol=0)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (1000,), generator=generator, dtype=torch.uint8)
    words = torch.randint(-(2**15), 2**15, (16,), generator=generator, dtype=torch.int16)
    words[0] = 0x1FFF
    got = log8_decode(Log8(codes, words))
    assert got.isfinite().all()
    torch.testing.assert_close(got, reference(Log8(codes, words)), rtol=2e-7, atol=1e-44)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (64,), (65,), (4, 5, 7), (2, 640)])
def test_dtypes_and_shapes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = coefficients(*shape).to(dtype)
    codes, words = result = log8_encode(x)
    assert (codes.dtype, words.dtype) == (torch.uint8, torch.int16)
    assert (codes.shape, words.shape) == (x.shape, (-(-x.numel() // 64),))
    y = log8_decode(result, dtype)
    assert (y.dtype, y.shape) == (dtype, x.shape)
    # Against what float32 makes of the same numbers, rounded once more.
    torch.testing.assert_close(y, log8_decode(log8_encode(x.float())).to(dtype), rtol=0, atol=0)
    assert error(y, x) < (0.02 if dtype == torch.bfloat16 else 0.007)


def test_size_is_eight_and_a_quarter_bits() -> None:
    result = encoded(1000, 64)
    assert 8 * result.nbytes == 8.25 * 64000


def test_strided_and_offset_inputs() -> None:
    x = coefficients(9, 40, 6)[1:, ::2].permute(2, 0, 1)
    assert not x.is_contiguous()
    result, expected = log8_encode(x), log8_encode(x.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    codes = torch.stack([result.codes, result.codes], -1)[..., 1]
    words = torch.stack([result.words, result.words], -1)[..., 1]
    assert torch.equal(log8_decode(Log8(codes, words)), log8_decode(expected))
    # Words that begin at an odd byte.
    apart = torch.cat([torch.zeros(1, dtype=torch.uint8), result.words.view(torch.uint8)])[1:]
    assert torch.equal(log8_decode(Log8(codes, apart.clone().view(torch.int16))), log8_decode(expected))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 400), st.floats(-40, 38), st.floats(0, 3), st.integers(0, 1000))
def test_encoding_again_changes_nothing(count: int, exponent: float, spread: float, seed: int) -> None:
    x = coefficients(2, count, seed=seed).double()
    x = (x[0] * 10 ** (exponent + spread * x[1]).clamp(max=37)).clamp(-3e38, 3e38)
    y = log8_decode(log8_encode(x))
    assert torch.equal(log8_decode(log8_encode(y)), y)
    assert torch.equal(log8_decode(log8_encode(-x)), -y)


def test_numbers_at_the_ends_of_each_dtype_stay_finite() -> None:
    for dtype in DTYPES:
        x = torch.tensor([1.0, -1.0, 0.3]).to(dtype) * min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
        y = log8_decode(log8_encode(x), dtype)
        assert y.isfinite().all()
        assert error(y / 2**10, x / 2**10) < 0.02
    assert not log8_decode(log8_encode(torch.zeros(100))).any()


def test_bits_do_not_depend_on_threads() -> None:
    x = coefficients(301, 257)
    torch.set_num_threads(1)
    one = log8_encode(x)
    torch.set_num_threads(3)
    assert all(torch.equal(a, b) for a, b in zip(log8_encode(x), one, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: log8_encode(torch.tensor([[0.0, 1.0], [float("nan"), 2.0]])), r"x: .* finite .* got NaN at \[1, 0\]"),
        (lambda: log8_encode(torch.tensor(float("-inf"))), r"got -inf at \[\]"),
        (lambda: log8_encode(torch.tensor([0, 1e300], dtype=torch.float64)), r"got inf at \[1\]"),
        (lambda: log8_encode(torch.arange(3)), "x: expected a float32"),
        (lambda: log8_decode(Log8(encoded(65).codes, encoded(64).words)), r"words: expected shape \[2\]"),
        (lambda: log8_decode(Log8(encoded(64).codes, encoded(64).words[None])), r"words: expected shape \[1\]"),
        (lambda: log8_decode(Log8(encoded(64).codes.int(), encoded(64).words)), "codes: expected dtype"),
        (lambda: log8_decode(Log8(encoded(64).codes, encoded(64).words.int())), "words: expected dtype"),
        (lambda: log8_decode(encoded(64), torch.int32), "dtype: expected float32"),
        (lambda: log8_decode(Log8(*(t.to("meta") for t in encoded(65)))._replace(words=encoded(64).words)), "words"),
    ],
)
def test_wrong_arguments_are_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_opcheck() -> None:
    for dtype in DTYPES:
        results = torch.library.opcheck(ops.log8_decode.default, (*encoded(5, 33), dtype))
        assert set(results.values()) == {"SUCCESS"}, results
    codes, words = encoded(2, 3, 6)
    x, bias = coefficients(2, 13).requires_grad_(), coefficients(10).requires_grad_()
    for sample in ((x, codes, words, bias, 10), (x.detach(), codes, words, None, 12)):
        results = torch.library.opcheck(ops.frequency_linear_log8.default, sample)
        assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    @torch.compile(fullgraph=True, dynamic=dynamic)
    def decode(codes: Tensor, words: Tensor) -> Tensor:
        return ops.log8_decode(codes, words, torch.float32) * 2

    for rows in (4, 7, 9):
        result = encoded(rows, 100)
        assert torch.equal(decode(*result), log8_decode(result) * 2)


# --- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,)])
def test_the_layer_is_that_of_the_decoded_spectrum(dtype: torch.dtype, batch: tuple[int, ...]) -> None:
    layer = FrequencyLinear(190, 130, 65)
    frozen = layer.to_log8()
    assert frozen.bias is layer.bias
    decoded = frozen.to_float()
    assert torch.equal(decoded.spectrum, frozen.packed_spectrum())
    x = coefficients(*batch, 190).to(dtype)
    y = ops.frequency_linear_log8(x, frozen.codes, frozen.words, frozen.bias.to(dtype), 130)
    assert torch.equal(y, ops.frequency_linear(x, decoded.spectrum, frozen.bias.to(dtype), 130))
    if 0 not in batch:
        assert error(frozen(x.float()), layer(x.float())) < 0.007
    torch.testing.assert_close(frozen.dense_weight(), decoded.dense_weight())
    torch.testing.assert_close(frozen.to_linear()(x.float()), frozen(x.float()))


def test_gradients_are_those_of_the_decoded_spectrum() -> None:
    codes, words = encoded(2, 3, 6)
    x = coefficients(4, 13).double().requires_grad_()
    bias = coefficients(10).double().requires_grad_()

    def product(x: Tensor, bias: Tensor) -> Tensor:
        return ops.frequency_linear_log8(x, codes, words, bias, 10)

    assert torch.autograd.gradcheck(product, (x, bias))
    assert torch.autograd.gradgradcheck(product, (x, bias))
    spectrum = log8_decode(Log8(codes, words), torch.float64)
    got = torch.autograd.grad(product(x, bias).square().sum(), (x, bias))
    expected = torch.autograd.grad(ops.frequency_linear(x, spectrum, bias, 10).square().sum(), (x, bias))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_only_the_bias_trains() -> None:
    layer = FrequencyLinear(96, 64, 32, storage="log8")
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]
    before = layer.packed_spectrum()
    optimizer = torch.optim.SGD((p for p in layer.parameters() if p.requires_grad), lr=0.1)
    x = coefficients(8, 96).requires_grad_()
    bias = layer.bias.detach().clone()
    layer(x).square().sum().backward()
    optimizer.step()
    assert x.grad is not None
    assert x.grad.any()
    assert not torch.equal(layer.bias, bias)
    assert torch.equal(layer.packed_spectrum(), before)
    with pytest.raises(ValueError, match="a log8 layer does not train its spectrum"):
        layer.requires_grad_()
    assert not layer.requires_grad_(False).bias.requires_grad
    thawed = layer.to_float().requires_grad_()
    thawed(x).sum().backward()
    assert thawed.spectrum.grad is not None


def test_state_dicts_dtypes_and_copies() -> None:
    layer = FrequencyLinear(40, 24, 16, storage="log8")
    assert set(layer.state_dict()) == {"codes", "words", "bias"}
    other = FrequencyLinear(40, 24, 16, storage="log8")
    other.load_state_dict(layer.state_dict())
    x = coefficients(3, 40)
    for same in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(same(x), layer(x))
    codes, words = layer.codes.clone(), layer.words.clone()
    half = copy.deepcopy(layer).bfloat16()
    assert half.bias.dtype == torch.bfloat16
    assert torch.equal(half.codes, codes)
    assert torch.equal(half.words, words)
    assert error(half(x.bfloat16()), layer(x)) < 0.02
    with pytest.raises(RuntimeError, match="codes"):
        layer.load_state_dict(FrequencyLinear(40, 24, 16).state_dict())
    assert "storage=log8" in repr(layer)
    assert {name for name, _ in FrequencyLinear(40, 24, 16).state_dict().items()} == {"spectrum", "bias"}
    meta = FrequencyLinear(40, 24, 16, device="meta", storage="log8")
    meta.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(meta(x), layer(x))


def test_size_of_the_layer() -> None:
    layer = FrequencyLinear(512, 256, 64, bias=False, storage="log8")
    stored = sum(tensor.nbytes for tensor in layer.state_dict().values())
    assert 8 * stored == 8.25 * (512 * 256 / 64)


def test_from_linear() -> None:
    linear = torch.nn.Linear(100, 60)
    layer = FrequencyLinear.from_linear(linear, 20)
    frozen = FrequencyLinear.from_linear(linear, 20, storage="log8")
    assert torch.equal(frozen.packed_spectrum(), layer.to_log8().packed_spectrum())
    assert torch.equal(frozen.bias, linear.bias)
    assert 0 < error(frozen.dense_weight(), layer.dense_weight()) < 0.007


def test_the_layer_compiles_and_exports() -> None:
    net = torch.nn.Sequential(FrequencyLinear(96, 64, 32, storage="log8"), torch.nn.ReLU(), FrequencyLinear(64, 10, 16))
    x = coefficients(5, 96)
    torch.testing.assert_close(torch.compile(net, fullgraph=True, dynamic=True)(x), net(x))
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(net, (x,), dynamic_shapes=({0: batch},)).module()
    more = coefficients(9, 96)
    torch.testing.assert_close(exported(more), net(more))


def test_autocast() -> None:
    layer = FrequencyLinear(96, 64, 32, storage="log8")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(coefficients(5, 96)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FrequencyLinear(8, 12, 4, storage="int8"), "storage: expected one of"),
        (lambda: FrequencyLinear(8, 12, 4, storage="log8").to_log8(), 'storage: expected "float"'),
        (lambda: FrequencyLinear(8, 12, 4).to_float(), 'storage: expected "log8"'),
        (
            lambda: ops.frequency_linear_log8(coefficients(2, 8), *encoded(3, 2, 4), None, 13),
            "out_features: expected 9 to 12",
        ),
        (
            lambda: ops.frequency_linear_log8(coefficients(2, 4), *encoded(3, 2, 4), None, 12),
            "x's last dimension: expected 5 to 8",
        ),
        (
            lambda: ops.frequency_linear_log8(coefficients(2, 8), encoded(3, 2, 4).codes, encoded(65).words, None, 12),
            r"words: expected shape \[1\]",
        ),
    ],
)
def test_wrong_layers_are_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_a_spectrum_that_is_not_finite_is_named() -> None:
    layer = FrequencyLinear(8, 12, 4)
    with torch.no_grad():
        layer.spectrum[1, 0, 2] = float("nan")
    with pytest.raises(ValueError, match=r"NaN at \[1, 0, 2\]"):
        layer.to_log8()


def test_exported_names() -> None:
    assert {"Log8", "log8_decode", "log8_encode"} <= set(infold.__all__)

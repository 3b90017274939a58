//! The GPU's kernels of the block-circulant product, emulated on the host, against the CPU's in float64.

mod emulation;
mod support;

use emulation::{Guarded, emulate};
use half::{bf16, f16};
use infold::cuda::frequency::{self, Product};
use infold::cuda::params::{Circulant, Dtype, Log8, Log8Decode, Spectra};
use infold::parallel::Threads;
use infold::spectral::{self, log8};
use support::*;

unsafe extern "C" {
    fn infold_log8_fields(parameters: *mut Log8Decode) -> usize;
    fn infold_circulant_fields(parameters: *mut Circulant) -> usize;
    fn infold_circulant_few_shared(n: i32, inputs: i32) -> usize;
    fn infold_circulant_many_shared(n: i32, features: i32) -> usize;
}

#[derive(Debug, Clone, Copy)]
struct Case {
    n: usize,
    out_features: usize,
    in_features: usize,
    rows: usize,
    dtype: Dtype,
    /// log8 where it is None.
    stored: Option<Dtype>,
    backward: bool,
    with_bias: bool,
}

/// Values as a dtype has them: its bytes, and the numbers that they stand for.
fn rounded(values: &[f32], dtype: Dtype) -> (Guarded, Vec<f64>) {
    match dtype {
        Dtype::F32 => (Guarded::new(values), values.iter().map(|&value| f64::from(value)).collect()),
        Dtype::F16 => {
            let halves: Vec<f16> = values.iter().map(|&value| f16::from_f32(value)).collect();
            (Guarded::new(&halves), halves.iter().map(|half| half.to_f64()).collect())
        }
        Dtype::Bf16 => {
            let halves = to_bf16(values);
            (Guarded::new(&halves), halves.iter().map(|half| half.to_f64()).collect())
        }
    }
}

fn read(memory: &Guarded, dtype: Dtype) -> Vec<f64> {
    match dtype {
        Dtype::F32 => memory.values::<f32>().into_iter().map(f64::from).collect(),
        Dtype::F16 => memory.values::<f16>().into_iter().map(f64::from).collect(),
        Dtype::Bf16 => memory.values::<bf16>().into_iter().map(f64::from).collect(),
    }
}

/// Numbers in log8 and what they stand for; the levels lie before the codes, the words behind them.
struct Encoded {
    levels: Guarded,
    codes: Guarded,
    words: Guarded,
    values: Vec<f32>,
}

impl Encoded {
    fn new(values: &[f32]) -> Self {
        let (mut codes, mut words) = (vec![0; values.len()], vec![0; log8::words(values.len())]);
        log8::encode(values, &mut codes, &mut words, &Threads(2)).unwrap();
        let mut decoded = vec![0f32; values.len()];
        log8::decode(&codes, &words, &mut decoded, &Threads(2));
        let levels = log8::tables().map(|values| &values[..]).concat();
        Self {
            levels: Guarded::new(&levels),
            codes: Guarded::new(&codes),
            words: Guarded::new(&words),
            values: decoded,
        }
    }

    fn view(&self) -> Log8 {
        Log8 { codes: self.codes.pointer(), words: self.words.pointer().cast(), levels: self.levels.pointer().cast() }
    }
}

/// The result and what it should be.
fn run(case: Case, product: Product, random: &mut Random) -> (Vec<f64>, Vec<f64>) {
    let Case { n, out_features, in_features, rows, dtype, .. } = case;
    let (outputs, inputs) = (out_features.div_ceil(n), in_features.div_ceil(n));
    let (from, to) = if case.backward { (out_features, in_features) } else { (in_features, out_features) };
    let (x, x_values) = rounded(&random.normals(rows * from, 1.0), dtype);
    let spectra = random.normals(outputs * inputs * n, 0.1);
    let encoded = Encoded::new(&spectra);
    let (spectrum, spectra) = match case.stored {
        None => (Guarded::of_bytes(0), encoded.values.iter().map(|&value| f64::from(value)).collect()),
        Some(dtype) => rounded(&spectra, dtype),
    };
    let (bias, bias_values) = rounded(&random.normals(to, 0.5), dtype);
    let y = rounded(&vec![f32::NAN; rows * to], dtype).0;
    let words = if product == Product::Many { frequency::tile_words(n, from.div_ceil(n), to.div_ceil(n)) } else { 0 };
    let tiles = Guarded::of_bytes(4 * words);
    let (input_stride, output_stride) = if case.backward { (inputs as i32, 1) } else { (1, inputs as i32) };
    let with_bias = case.with_bias && !case.backward;
    let parameters = Circulant {
        x: x.pointer().cast(),
        spectrum: spectrum.pointer().cast(),
        log8: encoded.view(),
        bias: if with_bias { bias.pointer().cast() } else { std::ptr::null() },
        y: y.pointer().cast(),
        tiles: tiles.pointer().cast(),
        dtype,
        spectrum_dtype: case.stored.map_or(Spectra::Log8, Spectra::from),
        batch: rows as i32,
        in_features: from as i32,
        out_features: to as i32,
        n: n as i32,
        inputs: from.div_ceil(n) as i32,
        outputs: to.div_ceil(n) as i32,
        input_stride,
        output_stride,
        conjugate: case.backward.into(),
        input_steps: 0,
        outputs_each: 0,
    };
    if product == Product::Few {
        emulate(frequency::few(parameters));
    } else {
        frequency::many(parameters).into_iter().for_each(emulate);
    }

    let shape = spectral::Circulant::new(out_features, in_features, n).unwrap();
    let mut expected = vec![f64::NAN; rows * to];
    if case.backward {
        spectral::input_gradient(&shape, (&x_values, rows), &spectra, &mut expected, &Threads(2));
    } else {
        let bias = with_bias.then_some(&bias_values[..]);
        spectral::product(&shape, (&x_values, rows), &spectra, bias, &mut expected, &Threads(2));
    }
    (read(&y, dtype), expected)
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|value| value * value).sum::<f64>().sqrt()
}

fn relative_error(actual: &[f64], expected: &[f64]) -> f64 {
    norm(actual.iter().zip(expected).map(|(a, e)| a - e)) / norm(expected.iter().copied())
}

#[test]
fn few_rows_in_every_dtype() {
    let mut random = Random(1);
    for n in [16, 32, 64, 128, 256] {
        // More blocks than are transformed at a time.
        let many = [(16, 130), (32, 130), (64, 66), (128, 66), (256, 34)].into_iter().find(|&(size, _)| size == n);
        let many = n * many.map_or(1, |(_, blocks)| blocks);
        for (out_features, in_features, rows) in [(n, n, 1), (2 * n + 3, 3 * n - 5, 2), (1, 1, 3), (n + 1, many, 1)] {
            for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
                for backward in [false, true] {
                    let stored = [None, Some(Dtype::F32), Some(dtype)][rows % 3];
                    let case =
                        Case { n, out_features, in_features, rows, dtype, stored, backward, with_bias: rows != 2 };
                    let (actual, expected) = run(case, Product::Few, &mut random);
                    // Sums are in float32; the result is rounded once.
                    let size = norm(expected.iter().copied());
                    let step = match dtype {
                        Dtype::F32 => 0.0,
                        Dtype::F16 => 2f64.powi(-11),
                        Dtype::Bf16 => 2f64.powi(-8),
                    };
                    for (a, e) in actual.iter().zip(&expected) {
                        assert!((a - e).abs() <= 2e-6 * size + 1.001 * step * e.abs(), "{case:?}: {a} for {e}");
                    }
                }
            }
        }
    }
}

#[test]
fn many_rows() {
    let mut random = Random(2);
    for (n, out_features, in_features, rows) in [
        (32, 32, 32, 1),
        // More tasks than blocks.
        (32, 32, 32, 16 * 133),
        (32, 70, 4096, 17),
        (32, 70, 1024, 17),
        (32, 4100, 33, 5),
        (64, 64, 64, 16),
        (64, 72 * 8, 64 * 8, 33),
        (64, 60, 50, 3),
        (64, 650, 1001, 18),
        (64, 65, 4096, 2),
        (128, 128, 256, 20),
        (128, 777, 1300, 16),
    ] {
        for backward in [false, true] {
            if backward && out_features > 4096 {
                continue;
            }
            let stored = [Some(Dtype::F32), Some(Dtype::Bf16), None][rows % 3];
            let with_bias = rows != 16;
            let case = Case { n, out_features, in_features, rows, dtype: Dtype::Bf16, stored, backward, with_bias };
            let (actual, expected) = run(case, Product::Many, &mut random);
            // Both matrices, both spectra and the weights are rounded to bfloat16, and the result.
            let error = relative_error(&actual, &expected);
            let limit = if actual.len() < 100 { 1e-2 } else { 5e-3 };
            assert!(error < limit, "{case:?}: {error}");
        }
    }
}

#[test]
fn a_spectrum_of_one_frequency() {
    // Exact in bfloat16 all through: a matrix of ones, and signs that alternate.
    let (n, rows) = (64, 3);
    for slot in [0, n / 2] {
        let mut spectrum = vec![0f32; n];
        spectrum[slot] = 8.0;
        let x: Vec<bf16> = (0..rows * n).map(|i| bf16::from_f32(f32::from(u8::from(i % 7 == 0)))).collect();
        let (x, spectrum) = (Guarded::new(&x), Guarded::new(&spectrum));
        let tiles = Guarded::of_bytes(4 * frequency::tile_words(n, 1, 1));
        let y = Guarded::new(&vec![bf16::NAN; rows * n]);
        let parameters = Circulant {
            x: x.pointer().cast(),
            spectrum: spectrum.pointer().cast(),
            log8: Log8::NONE,
            bias: std::ptr::null(),
            y: y.pointer().cast(),
            tiles: tiles.pointer().cast(),
            dtype: Dtype::Bf16,
            spectrum_dtype: Spectra::F32,
            batch: rows as i32,
            in_features: n as i32,
            out_features: n as i32,
            n: n as i32,
            inputs: 1,
            outputs: 1,
            input_stride: 1,
            output_stride: 1,
            conjugate: 0,
            input_steps: 0,
            outputs_each: 0,
        };
        let sign = |i: usize| if slot > 0 && i % 2 == 1 { -1.0 } else { 1.0 };
        let values = read(&x, Dtype::Bf16);
        let expected: Vec<f64> =
            (0..rows * n).map(|i| (0..n).map(|j| sign(i % n) * sign(j) * values[i / n * n + j]).sum()).collect();
        frequency::many(parameters).into_iter().for_each(emulate);
        assert_eq!(read(&y, Dtype::Bf16), expected);
        emulate(frequency::few(parameters));
        assert_eq!(read(&y, Dtype::Bf16), expected);
    }
}

#[test]
fn rust_and_device_agree_on_parameters_and_memory() {
    let mut parameters = std::mem::MaybeUninit::<Circulant>::uninit();
    // SAFETY: every field is set before the structure is read.
    let parameters = unsafe {
        assert_eq!(infold_circulant_fields(parameters.as_mut_ptr()), size_of::<Circulant>());
        parameters.assume_init()
    };
    let mut decode = std::mem::MaybeUninit::<Log8Decode>::uninit();
    // SAFETY: as above.
    let decode = unsafe {
        assert_eq!(infold_log8_fields(decode.as_mut_ptr()), size_of::<Log8Decode>());
        decode.assume_init()
    };
    let of_log8 = |log8: Log8| [log8.codes.addr(), log8.words.addr(), log8.levels.addr()];
    assert_eq!((of_log8(decode.numbers), decode.out.addr(), decode.count), ([1, 2, 3], 4, 5));
    assert_eq!((decode.dtype, of_log8(parameters.log8)), (Dtype::F16, [17, 18, 19]));
    let pointers = [parameters.x, parameters.spectrum, parameters.bias, parameters.y, parameters.tiles.cast()];
    assert_eq!(pointers.map(|pointer| pointer.addr()), [1, 2, 3, 4, 5]);
    assert_eq!((parameters.dtype, parameters.spectrum_dtype), (Dtype::F16, Spectra::F32));
    let Circulant { batch, in_features, out_features, n, inputs, outputs, .. } = parameters;
    assert_eq!([batch, in_features, out_features, n, inputs, outputs], [6, 7, 8, 9, 10, 11]);
    let Circulant { input_stride, output_stride, conjugate, input_steps, outputs_each, .. } = parameters;
    assert_eq!([input_stride, output_stride, conjugate, input_steps, outputs_each], [12, 13, 14, 15, 16]);

    for n in [16, 32, 64, 128, 256] {
        for inputs in [1, 2, 7] {
            let parameters = Circulant { n, inputs, outputs: 9, batch: 40, ..parameters };
            // SAFETY: only numbers are asked for.
            let expected = unsafe { infold_circulant_few_shared(n, inputs) };
            assert_eq!(frequency::few(parameters).shared as usize, expected);
        }
        for features in [1024, 4096].into_iter().filter(|_| (32..=128).contains(&n)) {
            let parameters = Circulant { n, inputs: features / n, outputs: 9, batch: 40, ..parameters };
            // SAFETY: as above.
            let expected = unsafe { infold_circulant_many_shared(n, features) };
            assert_eq!(frequency::many(parameters)[1].shared as usize, expected);
        }
    }
}

#[test]
fn log8_decodes_to_the_hosts_bits() {
    let mut random = Random(3);
    let mut values = random.normals(64 * 9 + 5, 1.0);
    values.iter_mut().enumerate().for_each(|(i, value)| *value *= (10.0 * (i / 64) as f32 - 50.0).exp2());
    values[..64].fill(0.0);
    values[64..128].iter_mut().for_each(|value| *value *= 1e-38);
    values[130] = f32::MAX;
    let mut encoded = Encoded::new(&values);
    // Whatever the words are, infinity's included.
    let words: Vec<u16> = (0..values.len().div_ceil(64)).map(|i| [0x1fff, 0xfc00, 0x0001, 0x3f80][i % 4]).collect();
    for foreign in [false, true] {
        if foreign {
            encoded.words = Guarded::new(&words);
        }
        let (codes, words) = (encoded.codes.values::<u8>(), encoded.words.values::<i16>());
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            let out = rounded(&vec![f32::NAN; values.len()], dtype).0;
            let count = values.len() as u64;
            emulate(frequency::decode(Log8Decode { numbers: encoded.view(), out: out.pointer().cast(), count, dtype }));
            let (mut floats, mut halves, mut others) =
                (vec![0f32; values.len()], vec![bf16::ZERO; values.len()], vec![f16::ZERO; values.len()]);
            log8::decode(&codes, &words, &mut floats, &Threads(2));
            log8::decode(&codes, &words, &mut halves, &Threads(2));
            log8::decode(&codes, &words, &mut others, &Threads(2));
            match dtype {
                Dtype::F32 => assert_eq!(out.values::<u32>(), floats.iter().map(|v| v.to_bits()).collect::<Vec<_>>()),
                Dtype::Bf16 => assert_eq!(out.values::<u16>(), halves.iter().map(|v| v.to_bits()).collect::<Vec<_>>()),
                _ => assert_eq!(out.values::<u16>(), others.iter().map(|v| v.to_bits()).collect::<Vec<_>>()),
            }
        }
    }
}

#[test]
fn who_computes_what() {
    type Has = fn(&str) -> bool;
    let of = |n, inputs, rows, dtype, has: Has| Product::of(n, inputs, rows, dtype, |name| Ok(has(name))).unwrap();
    let (all, none): (Has, Has) = (|_| true, |_| false);
    let no_large: Has = |name| !name.ends_with("_4096");
    assert_eq!(of(64, 64, 1, Dtype::Bf16, all), Product::Few);
    assert_eq!(of(64, 64, 4096, Dtype::Bf16, all), Product::Many);
    assert_eq!(of(64, 64, 4096, Dtype::F32, all), Product::Composed);
    assert_eq!(of(64, 65, 4096, Dtype::Bf16, all), Product::Composed);
    assert_eq!(of(48, 1, 1, Dtype::Bf16, all), Product::Composed);
    assert_eq!(of(64, 1 << 20, 1, Dtype::Bf16, all), Product::Composed);
    assert_eq!(of(64, 1, 1 << 31, Dtype::Bf16, all), Product::Composed);
    // Where a kernel does not fit.
    assert_eq!(of(64, 64, 1, Dtype::Bf16, none), Product::Composed);
    assert_eq!(of(64, 64, 4096, Dtype::Bf16, no_large), Product::Composed);
    assert_eq!(of(64, 64, 40, Dtype::Bf16, no_large), Product::Few);
    assert_eq!(of(64, 16, 4096, Dtype::Bf16, no_large), Product::Many);
}

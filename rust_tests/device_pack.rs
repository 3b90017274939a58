//! Packing by the emulated kernels, against packing on the host: taken back from the device, every byte is the same.

mod emulation;
mod support;

use emulation::{Emulator, Guarded};
use infold::codec::*;
use infold::cuda::lay_out::Codes;
use infold::cuda::pack::{self, Dense, Laid};
use infold::cuda::weight::{Tables, from_device, to_device};
use infold::parallel::{Serial, Threads};
use support::*;

const FORMATS: [Quantizer; 3] = [Quantizer::Lossless, Quantizer::Int8, Quantizer::Int4];

fn symmetric(format: Quantizer) -> Symmetric {
    if format == Quantizer::Int8 { Symmetric::INT8 } else { Symmetric::int4(64).unwrap() }
}

fn on_host(values: &[f32], half: bool, rows: usize, cols: usize, format: Quantizer) -> infold::Result<Packed> {
    let halves = to_bf16(values);
    let weights = if half { Weights::Bf16(&halves) } else { Weights::F32(values) };
    match format {
        Quantizer::Int8 => pack_int8(weights, rows, cols, &Serial),
        Quantizer::Int4 => pack_int4(weights, rows, cols, 64, &Serial),
        _ => pack_lossless(weights, rows, cols, &Serial),
    }
}

fn on_device(values: &[f32], half: bool, rows: usize, cols: usize, format: Quantizer) -> Option<Laid<Guarded>> {
    let halves = to_bf16(values);
    let memory = if half { Guarded::new(&halves) } else { Guarded::new(values) };
    if format == Quantizer::Lossless {
        let codes = Codes { memory, levels: false };
        return pack::lossless(&Emulator, &codes, Geometry::new(rows, cols), &Threads(2)).unwrap();
    }
    let dtype = if half { Dtype::Bf16 } else { Dtype::F32 };
    pack::symmetric(&Emulator, &Dense { memory, dtype, rows, cols }, symmetric(format), &Threads(2)).unwrap()
}

/// Packs a weight in both places and compares what is taken back, and what the device holds; false where the device leaves
/// it to the host.
fn compare(values: &[f32], half: bool, rows: usize, cols: usize, format: Quantizer) -> bool {
    let host = on_host(values, half, rows, cols, format).unwrap();
    let Some(laid) = on_device(values, half, rows, cols, format) else { return false };
    let (payload, tables) = to_device(&open(&host), &Serial).unwrap();
    let parsed = Tables::parse(&laid.tables).unwrap().unwrap();
    let own: Vec<u8> = laid.payload.values();
    assert!(own[..payload.len()] == payload && own.len() < payload.len() + 16, "payload of {rows} x {cols}");
    let expected = Tables::parse(&tables).unwrap().unwrap();
    assert_eq!((parsed.kind, parsed.lo), (expected.kind, expected.lo));
    let back = Packed { scales: laid.scales, ..from_device(&payload, &parsed, &Serial).unwrap() };
    assert!(back == host, "{format:?} of {rows} x {cols}");
    assert_eq!(Header { directory_crc: host.header.directory_crc, ..laid.header }, host.header);
    true
}

#[test]
fn every_format_gives_the_hosts_bits() {
    let mut random = Random(41);
    for (rows, cols) in [(40, 100), (70, 330), (33, 1100), (17, 64)] {
        let mut values = random.normals(rows * cols, 0.05);
        values[rows * cols / 3] = -1.25;
        values[7] = 0.0;
        for format in FORMATS {
            assert!(compare(&values, true, rows, cols, format), "{format:?}");
            if format != Quantizer::Lossless {
                assert!(compare(&values, false, rows, cols, format), "{format:?}");
            }
        }
    }
}

/// Ties, the largest level and the smallest numbers: where division or rounding would show.
#[test]
fn levels_are_rounded_as_on_the_host() {
    let (rows, cols) = (32, 256);
    let mut random = Random(42);
    for scale in [1.0f32, 3e-38, 1e-30, 2e30] {
        // Half-integers of the scale, and neighbours of these.
        let value = |random: &mut Random| {
            let tie = ((random.next() % 509) as f32 - 254.0) / 2.0 * scale;
            f32::from_bits(tie.to_bits().wrapping_add((random.next() % 3) as u32).saturating_sub(1))
        };
        let mut values: Vec<f32> = (0..rows * cols).map(|_| value(&mut random)).collect();
        values.iter_mut().step_by(64).for_each(|value| *value = 127.0 * scale);
        for format in [Quantizer::Int8, Quantizer::Int4] {
            for half in [false, true] {
                // Next to nothing is stored without loss, by the host.
                let is_taken = compare(&values, half, rows, cols, format);
                assert_eq!(is_taken, scale > 1e-35, "{scale} {format:?}");
            }
        }
    }
}

#[test]
fn predictors_are_found_as_on_the_host() {
    let (rows, cols) = (96, 200);
    let smooth: Vec<f32> = (0..rows * cols).map(|i| (i as f32 / 400.0).sin() + 1.5).collect();
    let ramp: Vec<f32> = (0..rows * cols).map(|index| 2f32.powi((index % cols / 16) as i32)).collect();
    for (values, format) in [(smooth, Quantizer::Int8), (ramp, Quantizer::Lossless)] {
        let host = on_host(&values, true, rows, cols, format).unwrap();
        assert_ne!(host.header.predictor, Predictor::None);
        assert!(compare(&values, true, rows, cols, format));
    }
}

/// A sample of its tiles is looked at first, and where a predictor pays for these, all.
#[test]
fn a_large_weight_is_sampled() {
    let (rows, cols) = (2112, 1024);
    let values: Vec<f32> = (0..rows * cols).map(|index| 2f32.powi((index % cols / 100) as i32)).collect();
    assert_ne!(on_host(&values, true, rows, cols, Quantizer::Lossless).unwrap().header.predictor, Predictor::None);
    assert!(compare(&values, true, rows, cols, Quantizer::Lossless));
}

#[test]
fn what_the_host_has_to_pack() {
    let mut random = Random(43);
    let (rows, cols) = (32, 128);
    let normal = random.normals(rows * cols, 0.05);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut values = normal.clone();
        values[rows * cols - 1] = bad;
        for half in [false, true] {
            assert!(on_device(&values, half, rows, cols, Quantizer::Int8).is_none());
            assert!(on_device(&values, half, rows, cols, Quantizer::Int4).is_none());
        }
    }
    let zeros = vec![0.0; rows * cols];
    assert!(on_device(&zeros, true, rows, cols, Quantizer::Int8).is_none());
    // One level in a row's every weight costs more than it saves here.
    assert!(on_device(&normal[..3], true, 3, 1, Quantizer::Int8).is_none());
    let sparse: Vec<f32> = normal.iter().enumerate().map(|(i, &v)| if i % 8 == 0 { 0.0 } else { v }).collect();
    assert!(on_device(&sparse, true, rows, cols, Quantizer::Lossless).is_none());
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { failure_persistence: None, ..proptest::prelude::ProptestConfig::with_cases(32) })]

    #[test]
    fn any_weight_is_packed_as_on_the_host(
        seed: u64, format in 0usize..3, half: bool, rows in 1usize..100, cols in 1usize..200,
    ) {
        let mut random = Random(seed);
        let mut values = random.normals(rows * cols, 0.05);
        for _ in 0..rows * cols / 300 {
            let index = random.next() as usize % values.len();
            values[index] *= (random.normal() * 6.0).exp2() as f32;
        }
        let half = half || format == 0;
        let is_taken = compare(&values, half, rows, cols, FORMATS[format]);
        // Small weights have many exponents for their size, or fixed costs.
        proptest::prop_assert!(is_taken || rows * cols < 4096 || format == 0);
    }
}

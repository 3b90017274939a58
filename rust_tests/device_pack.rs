//! Packing by the emulated kernels, against packing on the host: taken back from the device, every byte is the same.

mod emulation;
mod support;

use emulation::{Emulator, Guarded};
use infold::codec::*;
use infold::cuda::lay_out::Codes;
use infold::cuda::pack::{self, Dense, Laid, OnDevice};
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

fn dense(values: &[f32], half: bool, rows: usize, cols: usize) -> Dense<Guarded> {
    let memory = if half { Guarded::new(&to_bf16(values)) } else { Guarded::new(values) };
    Dense { memory, dtype: if half { Dtype::Bf16 } else { Dtype::F32 }, rows, cols }
}

fn on_device(values: &[f32], half: bool, rows: usize, cols: usize, format: Quantizer) -> Option<Laid<Guarded>> {
    let dense = dense(values, half, rows, cols);
    if format == Quantizer::Lossless {
        let codes = Codes { memory: dense.memory, levels: false };
        return pack::lossless(&Emulator, &codes, Geometry::new(rows, cols), &Threads(2)).unwrap();
    }
    pack::symmetric(&Emulator, &dense, symmetric(format), &Threads(2)).unwrap()
}

/// Packs a weight in both places and compares what is taken back, and what the device holds; false where the device leaves
/// it to the host.
fn compare(values: &[f32], half: bool, rows: usize, cols: usize, format: Quantizer) -> bool {
    let host = on_host(values, half, rows, cols, format).unwrap();
    let Some(laid) = on_device(values, half, rows, cols, format) else { return false };
    same(&host, laid);
    true
}

/// The same of ECSQ; the grid of the scales, or None.
fn compare_ecsq(values: &[f32], half: bool, rows: usize, cols: usize, target: EcsqTarget) -> Option<ScaleGrid> {
    let halves = to_bf16(values);
    let weights = if half { Weights::Bf16(&halves) } else { Weights::F32(values) };
    let host = pack_ecsq(weights, rows, cols, target, &Serial).unwrap();
    let laid = pack::ecsq(&Emulator, &dense(values, half, rows, cols), target, &Threads(2)).unwrap()?;
    same(&host, laid);
    Some(host.header.scale_grid)
}

fn same(host: &Packed, laid: Laid<Guarded>) {
    let Geometry { rows, cols, .. } = host.header.geometry;
    let (payload, tables) = to_device(&open(host), &Serial).unwrap();
    let parsed = Tables::parse(&laid.tables).unwrap().unwrap();
    let own: Vec<u8> = laid.payload.values();
    assert!(own[..payload.len()] == payload && own.len() < payload.len() + 16, "payload of {rows} x {cols}");
    let expected = Tables::parse(&tables).unwrap().unwrap();
    assert_eq!((parsed.kind, parsed.lo), (expected.kind, expected.lo));
    let back = Packed { scales: laid.scales, ..from_device(&payload, &parsed, &Serial).unwrap() };
    assert!(back == *host, "{:?} of {rows} x {cols}", host.header.quantizer);
    assert_eq!(Header { directory_crc: host.header.directory_crc, ..laid.header }, host.header);
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

const TARGETS: [EcsqTarget; 4] =
    [EcsqTarget::Bits(2.0), EcsqTarget::Bits(3.3), EcsqTarget::Error(0.2), EcsqTarget::Error(0.03)];

#[test]
fn ecsq_gives_the_hosts_bits() {
    let mut random = Random(44);
    let mut grids = Vec::new();
    for (rows, cols) in [(40, 100), (33, 500), (97, 64)] {
        let normal = random.normals(rows * cols, 0.05);
        // Rows of different sizes.
        let row_scale = |row: usize| ((row * 7 % 13) as f32 / 12.0 - 0.5).exp2();
        let of_rows: Vec<f32> = normal.iter().enumerate().map(|(i, &v)| v * row_scale(i / cols)).collect();
        let mut outliers = normal.clone();
        outliers[5 * cols..6 * cols].fill(0.0);
        for (index, outlier) in [3.0, -40.0, 900.0, -2e6].into_iter().enumerate() {
            outliers[rows * cols / 5 * index + 3] = outlier;
        }
        for target in TARGETS {
            for half in [false, true] {
                assert!(compare_ecsq(&normal, half, rows, cols, target).is_some(), "{rows} x {cols}: {target:?}");
                grids.extend(compare_ecsq(&of_rows, half, rows, cols, target));
                compare_ecsq(&outliers, half, rows, cols, target);
            }
        }
    }
    assert!(grids.contains(&ScaleGrid::Row) && grids.contains(&ScaleGrid::Tensor));
}

/// Of which the search looks at some of the rows first.
#[test]
fn ecsq_of_a_large_weight() {
    let (rows, cols) = (1060, 1000);
    let values = Random(45).normals(rows * cols, 0.02);
    assert!(compare_ecsq(&values, true, rows, cols, EcsqTarget::Error(0.08)).is_some());
}

/// Every sum, to the last bit: at levels that are counted here, there or not at all, and at ties.
#[test]
fn sums_are_the_hosts() {
    let mut random = Random(46);
    for (rows, cols) in [(1, 1), (3, 31), (20, 65), (50, 700)] {
        let geometry = Geometry::new(rows, cols);
        let scales: Vec<f32> = (0..rows).map(|row| ((row % 9) as f32 / 1.3 - 9.0).exp2()).collect();
        let edges = [0.0f32, 0.5, 511.5, 512.0, 513.0, 4095.5, 4096.0, 4097.0, 3e5, 1e9];
        let value = |random: &mut Random, index: usize| {
            let scale = scales[index / cols];
            let edge = edges[random.next() as usize % edges.len()]
                * if random.next().is_multiple_of(2) { scale } else { -scale };
            if random.next().is_multiple_of(4) { edge } else { (random.normal() * 4.0) as f32 * scale }
        };
        let values: Vec<f32> = (0..rows * cols).map(|index| value(&mut random, index)).collect();
        for half in [false, true] {
            let halves = to_bf16(&values);
            let weights = if half { Weights::Bf16(&halves) } else { Weights::F32(&values) };
            let dense = dense(&values, half, rows, cols);
            let device = OnDevice { device: &Emulator, dense: &dense };
            for every in [1, 3] {
                for (grid, scales) in [(ScaleGrid::Row, scales.clone()), (ScaleGrid::Tensor, vec![scales[0]])] {
                    let steps = Steps::new(scales, geometry);
                    let host = OnHost { weights, geometry, pool: &Threads(2) }.sums(grid, &steps, every).unwrap();
                    assert!(host == device.sums(grid, &steps, every).unwrap(), "{rows} x {cols}, {grid:?}, {every}");
                }
            }
            let row_of = |row: usize| values[row * cols..(row + 1) * cols].iter().zip(&halves[row * cols..]);
            let squares = (0..rows).map(|row| {
                let mut lanes = [0f64; 32];
                for (col, (value, bf16)) in row_of(row).enumerate() {
                    lanes[col % 32] += if half { f64::from(bf16.to_f32()) } else { f64::from(*value) }.powi(2);
                }
                lanes.iter().sum::<f64>()
            });
            assert_eq!(device.squares().unwrap(), squares.collect::<Vec<_>>());
        }
    }
}

/// Against sums in float64, as the formulas have them.
#[test]
fn sums_are_what_they_stand_for() {
    let (rows, cols) = (40, 500);
    let geometry = Geometry::new(rows, cols);
    let values = Random(47).normals(rows * cols, 1.0);
    let scales: Vec<f32> = (0..rows).map(|row| 0.25 + row as f32 / 64.0).collect();
    let steps = Steps::new(scales.clone(), geometry);
    let sums = OnHost { weights: Weights::F32(&values), geometry, pool: &Serial };
    let sums = sums.sums(ScaleGrid::Row, &steps, 1).unwrap();
    let (mut weights, mut moments, mut counts) = ([0f64; 11], [0f64; 11], [0u64; 11]);
    for (row, values) in values.chunks(cols).enumerate() {
        let scale = f64::from(scales[row]);
        let mut distortion = 0.0;
        for &value in values {
            let level = (value / scales[row]).round_ties_even();
            let error = f64::from(value) - scale * f64::from(level);
            distortion += error * error;
            if level.abs() <= 5.0 {
                let place = (level + 5.0) as usize;
                counts[place] += 1;
                weights[place] += scale * scale;
                moments[place] += scale * error;
            }
        }
        assert!((sums.distortions[row] / distortion - 1.0).abs() < 1e-6);
    }
    for place in 0..11 {
        let own = 4096 - 5 + place;
        assert_eq!(sums.levels.counts[own], counts[place]);
        let centroid = sums.moments[own] as f64 / sums.weights[own] as f64 / 16384.0;
        assert!((centroid - moments[place] / weights[place]).abs() < 1e-5, "{centroid}");
        let share = sums.weights[own] as f64 / sums.weights[4096] as f64;
        assert!((share / (weights[place] / weights[5]) - 1.0).abs() < 1e-6);
    }
    assert_eq!(sums.distortions.len(), rows);
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
            let dense = dense(&values, half, rows, cols);
            assert!(pack::ecsq(&Emulator, &dense, EcsqTarget::Bits(4.0), &Serial).unwrap().is_none());
        }
    }
    let refused = |target| pack::ecsq(&Emulator, &dense(&normal, true, rows, cols), target, &Serial).err().unwrap();
    for target in [EcsqTarget::Bits(1.5), EcsqTarget::Bits(f64::NAN), EcsqTarget::Error(1.0)] {
        let weights = Weights::F32(&normal);
        assert_eq!(
            refused(target).to_string(),
            pack_ecsq(weights, rows, cols, target, &Serial).unwrap_err().to_string()
        );
    }
    // Levels of 10 bits have no layout there; an error that no step keeps, zeros and next to nothing are stored without loss.
    assert!(compare_ecsq(&normal, false, rows, cols, EcsqTarget::Error(1e-3)).is_none());
    assert!(compare_ecsq(&normal, false, rows, cols, EcsqTarget::Error(1e-9)).is_none());
    for value in [0.0, 1e-35] {
        let values = vec![value; rows * cols];
        assert!(compare_ecsq(&values, false, rows, cols, EcsqTarget::Bits(4.0)).is_none(), "{value}");
    }
    assert!(compare_ecsq(&vec![0.7; rows * cols], true, rows, cols, EcsqTarget::Bits(4.0)).is_some());
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

    #[test]
    fn any_weight_is_packed_by_ecsq_as_on_the_host(
        seed: u64, half: bool, bits in 2f64..6.0, by_error: bool, rows in 1usize..80, cols in 1usize..150,
    ) {
        let mut random = Random(seed);
        let mut values = random.normals(rows * cols, 0.05);
        for _ in 0..rows * cols / 300 {
            let index = random.next() as usize % values.len();
            values[index] *= (random.normal() * 6.0).exp2() as f32;
        }
        let target = if by_error { EcsqTarget::Error((-bits).exp2()) } else { EcsqTarget::Bits(bits) };
        compare_ecsq(&values, half, rows, cols, target);
    }
}

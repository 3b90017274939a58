//! The coder of sixteen classes and the fast layout: exact both ways, the same products to the last bit.

mod support;

use half::bf16;
use infold::codec::*;
use infold::linear::{Input, forward, input_gradient};
use infold::parallel::{Serial, Threads};
use support::*;

fn ecsq(values: &[f32], rows: usize, cols: usize, bits: f64) -> Packed {
    pack_ecsq(Weights::F32(values), rows, cols, EcsqTarget::Bits(bits), &Threads(2)).unwrap()
}

/// Weights of every kind of plane: all codings, widths, escapes, centroids, one and several streams, ragged edges.
fn weights() -> Vec<(String, Packed)> {
    let mut random = Random(51);
    let mut all = Vec::new();
    for (rows, cols) in [(1, 1), (33, 65), (70, 300), (64, 2048), (90, 1100)] {
        let mut values = random.normals(rows * cols, 0.05);
        if rows > 1 {
            values[7] = 300.0;
            values[rows * cols - 1] = -1e-12;
        }
        let name = |what: &str| format!("{what} {rows}x{cols}");
        let mut halves = to_bf16(&values);
        if rows > 1 {
            halves[3] = bf16::NAN;
            halves[40] = bf16::NEG_INFINITY;
            halves[64] = bf16::NEG_ZERO;
        }
        all.push((name("bf16"), pack_lossless(Weights::Bf16(&halves), rows, cols, &Serial).unwrap()));
        let f16s = to_f16(&values);
        all.push((name("f16"), pack_lossless(Weights::F16(&f16s), rows, cols, &Serial).unwrap()));
        all.push((name("f32"), pack_lossless(Weights::F32(&values), rows, cols, &Serial).unwrap()));
        for bits in [2.0, 3.3, 4.0, 6.5] {
            all.push((name(&format!("ecsq {bits}")), ecsq(&values, rows, cols, bits)));
        }
        all.push((name("int8"), pack_int8(Weights::F32(&values), rows, cols, &Serial).unwrap()));
        all.push((name("int4"), pack_int4(Weights::F32(&values), rows, cols, 64, &Serial).unwrap()));
    }
    let smooth: Vec<f32> = (0..96 * 192).map(|i| (i % 192) as f32 / 31.0 + (i / 192) as f32 / 17.0).collect();
    let predicted = pack_ecsq(Weights::F32(&smooth), 96, 192, EcsqTarget::Error(0.002), &Serial).unwrap();
    assert_ne!(predicted.header.predictor, Predictor::None);
    all.push(("predicted".into(), predicted));
    // Zeros are far from every other exponent: two of them in a block are listed apart, sixty are in the palette. Sixty
    // values of all exponents are listed apart.
    for share in [0.001, 0.03] {
        for (what, smallest) in [("zeros", 0.0), ("outliers", 1e-30)] {
            let mut values = random.normals(97 * 320, 0.05);
            for value in &mut values {
                if random.uniform() < share {
                    *value = f32::copysign(smallest * f32::exp2(90.0 * random.uniform() as f32), *value);
                }
            }
            let packed = pack_lossless(Weights::Bf16(&to_bf16(&values)), 97, 320, &Serial).unwrap();
            all.push((format!("{share} {what} in bf16"), packed));
        }
    }
    // Large enough for levels to be coded in sixteen classes, with low bits apart and without.
    let large = random.normals(1024 * 1024, 0.02);
    all.push(("large ecsq 4".into(), ecsq(&large, 1024, 1024, 4.0)));
    all.push(("large int8".into(), pack_int8(Weights::F32(&large), 1024, 1024, &Threads(2)).unwrap()));
    all.push(("large int4".into(), pack_int4(Weights::F32(&large), 1024, 1024, 128, &Threads(2)).unwrap()));
    all
}

fn bits<T: Copy, B>(values: &[T], of: impl Fn(T) -> B) -> Vec<B> {
    values.iter().map(|&value| of(value)).collect()
}

#[test]
fn the_fast_layout_is_exact_and_leads_back_to_the_same_bytes() {
    for (name, compact) in weights() {
        let fast = in_layout(&compact, Layout::Fast);
        assert_eq!(fast.header.layout, Layout::Fast, "{name}");
        open(&fast).verify(Some(&fast.scales)).unwrap();
        assert_eq!(fast.header.codec(), Codec::Raw, "{name}");
        let (a, b) = (unpack::<f32>(&compact), unpack::<f32>(&fast));
        assert_eq!(bits(&a, f32::to_bits), bits(&b, f32::to_bits), "{name}");
        let back = in_layout(&fast, Layout::Compact);
        assert_eq!(back.tables, compact.tables, "{name}");
        assert_eq!(back.payload, compact.payload, "{name}");
        assert_eq!(back.directory, compact.directory, "{name}");
        // Where a weight lies that way already, nothing changes.
        assert_eq!(in_layout(&fast, Layout::Fast).payload, fast.payload, "{name}");
        assert_eq!(in_layout(&compact, Layout::Compact).payload, compact.payload, "{name}");
    }
}

#[test]
fn frequent_exponents_need_not_be_neighbours() {
    let mut values = to_bf16(&Random(54).normals(128 * 512, 0.05));
    values.iter_mut().step_by(50).for_each(|value| *value = bf16::ZERO);
    values.iter_mut().step_by(1000).for_each(|value| *value = bf16::NEG_ZERO);
    let compact = pack_lossless(Weights::Bf16(&values), 128, 512, &Serial).unwrap();
    let fast = in_layout(&compact, Layout::Fast);
    // Zeros listed apart would take 8 bytes each.
    let most = 12 * values.len() / 8 * 101 / 100;
    assert!(fast.payload.len() < most, "{} bytes", fast.payload.len());
    // An older library refuses it by its version.
    assert_eq!((fast.header.version, compact.header.version), (3, 2));
}

#[test]
fn products_do_not_depend_on_the_layout_or_the_batch() {
    let mut random = Random(52);
    for (name, compact) in weights() {
        if name.starts_with("bf16") {
            continue; // holds NaNs
        }
        let Geometry { rows, cols, .. } = compact.header.geometry;
        let fast = in_layout(&compact, Layout::Fast);
        let x = random.normals(19 * cols, 1.0);
        let run = |packed: &Packed, from: usize, batch: usize| {
            let mut out = vec![0.0f32; batch * rows];
            let input = Input { values: &x[from * cols..(from + batch) * cols], rows: batch };
            forward(&open(packed), Scales::Real(&packed.scales), input, None, &mut out, &Threads(2)).unwrap();
            bits(&out, f32::to_bits)
        };
        let all = run(&compact, 0, 19);
        assert_eq!(all, run(&fast, 0, 19), "{name}");
        for row in [0, 7, 18] {
            let alone = &all[row * rows..(row + 1) * rows];
            assert_eq!(alone, run(&compact, row, 1), "{name}, row {row}");
            assert_eq!(alone, run(&fast, row, 1), "{name}, row {row}");
        }
        let gradient = random.normals(3 * rows, 1.0);
        let back = |packed: &Packed| {
            let mut out = vec![0.0f32; 3 * cols];
            let input = Input { values: &gradient, rows: 3 };
            input_gradient(&open(packed), Scales::Real(&packed.scales), input, &mut out, &Serial).unwrap();
            bits(&out, f32::to_bits)
        };
        assert_eq!(back(&compact), back(&fast), "{name}");
    }
}

#[test]
fn large_weights_use_the_coder_of_sixteen_classes_at_little_cost() {
    let values = Random(53).normals(1024 * 4096, 0.02);
    let weight = ecsq(&values, 1024, 4096, 4.0);
    let size = 8.0 * weight.bytes() as f64 / values.len() as f64;
    assert!((3.95..=4.0).contains(&size), "{size}");
    // What the levels carry, at this step.
    let scale = f64::from(weight.scales[0]);
    let mut counts = std::collections::HashMap::new();
    for &value in &values {
        *counts.entry((f64::from(value) / scale).round() as i64).or_insert(0u64) += 1;
    }
    let total = values.len() as f64;
    let entropy: f64 = counts.values().map(|&count| count as f64 / total * (total / count as f64).log2()).sum();
    assert!(size < 1.012 * entropy, "{size} bits against an entropy of {entropy}");
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(48))]

    /// Exponents of any skew: from one value nearly always to many equally often.
    #[test]
    fn any_distribution_survives(seed: u64, spread in 0u32..40, rows in 1usize..80, cols in 1usize..200) {
        let mut random = Random(seed);
        let values: Vec<bf16> = (0..rows * cols)
            .map(|_| {
                let skewed = (0..4).map(|_| random.next() as u32 % (spread + 1)).min().unwrap_or(0);
                bf16::from_bits(((120 - skewed) << 7) as u16 | (random.next() as u16 & 0x807f))
            })
            .collect();
        let packed = pack_lossless(Weights::Bf16(&values), rows, cols, &Serial).unwrap();
        proptest::prop_assert_eq!(&unpack::<bf16>(&packed), &values);
        proptest::prop_assert_eq!(&unpack::<bf16>(&in_layout(&packed, Layout::Fast)), &values);
    }
}

#[test]
fn a_row_of_a_long_batch_has_the_bits_that_it_has_alone() {
    let (batch, mut random) = (150, Random(55));
    // Narrow enough for a tile to be kept decoded, with ragged edges, and wider.
    for (rows, cols) in [(97, 200), (64, 384), (40, 1100)] {
        let values = random.normals(rows * cols, 0.05);
        let weights = [
            pack_lossless(Weights::Bf16(&to_bf16(&values)), rows, cols, &Serial).unwrap(),
            pack_int8(Weights::F32(&values), rows, cols, &Serial).unwrap(),
        ];
        let x = random.normals(batch * cols, 1.0);
        let half_x = to_bf16(&x);
        for compact in weights {
            let packed = in_layout(&compact, Layout::Fast);
            let (weight, scales) = (open(&packed), Scales::Real(&packed.scales[..]));
            let run = |first: usize, batch: usize| {
                let (mut out, mut half_out) = (vec![0.0f32; batch * rows], vec![0.0f32; batch * rows]);
                let range = first * cols..(first + batch) * cols;
                let input = Input { values: &x[range.clone()], rows: batch };
                forward(&weight, scales, input, None, &mut out, &Threads(2)).unwrap();
                let input = Input { values: &half_x[range], rows: batch };
                forward(&weight, scales, input, None, &mut half_out, &Threads(2)).unwrap();
                bits(&[out, half_out].concat(), f32::to_bits)
            };
            let all = run(0, batch);
            for row in [0, 15, 16, 63, 64, 149] {
                let at = |half: usize| &all[(half * batch + row) * rows..][..rows];
                assert_eq!(run(row, 1), [at(0), at(1)].concat(), "{rows}x{cols}, row {row}");
            }
        }
    }
}

//! The codec against what it must give back.

mod support;

use half::{bf16, f16};
use infold::codec::{
    Codec, EcsqTarget, Packed, Predictor, ScaleGrid, Weights, pack_ecsq, pack_int4, pack_int8, pack_lossless,
};
use infold::parallel::{Serial, Threads};
use proptest::prelude::*;
use support::*;

fn lossless_bf16(values: &[bf16], rows: usize, cols: usize) -> Packed {
    pack_lossless(Weights::Bf16(values), rows, cols, &Serial).expect("any bf16 weight packs")
}

fn bits_per_weight(packed: &Packed) -> f64 {
    8.0 * packed.bytes() as f64 / packed.header.geometry.elements() as f64
}

#[test]
fn every_16_bit_pattern_comes_back() {
    // In an order that no predictor knows.
    let mix = |x: u16| (x ^ x >> 7).wrapping_mul(40503);
    let patterns: Vec<u16> = (0..=u16::MAX).map(|i| mix(mix(mix(i)))).collect();
    let as_bf16: Vec<bf16> = patterns.iter().map(|&p| bf16::from_bits(p)).collect();
    let packed = lossless_bf16(&as_bf16, 256, 256);
    let back: Vec<u16> = unpack::<bf16>(&packed).iter().map(|v| v.to_bits()).collect();
    assert_eq!(back, patterns);
    assert_eq!(packed.header.codec(), Codec::Raw, "uniform patterns do not compress");

    let as_f16: Vec<f16> = patterns.iter().map(|&p| f16::from_bits(p)).collect();
    let packed = pack_lossless(Weights::F16(&as_f16), 64, 1024, &Serial).unwrap();
    let back: Vec<u16> = unpack::<f16>(&packed).iter().map(|v| v.to_bits()).collect();
    assert_eq!(back, patterns);
}

#[test]
fn special_values_survive_among_ordinary_ones() {
    let mut values = to_bf16(&Random(1).normals(100 * 70, 0.02));
    let special = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 0.0, 1e-40, 3e38];
    for (i, special) in special.into_iter().enumerate() {
        values[i * 501] = bf16::from_f32(special);
    }
    values[77] = bf16::from_bits(0x7fa5); // a NaN with a payload
    let packed = lossless_bf16(&values, 100, 70);
    assert_eq!(packed.header.codec(), Codec::Rans);
    let bits = |v: &[bf16]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&unpack::<bf16>(&packed)), bits(&values));
}

#[test]
fn degenerate_shapes_and_contents() {
    for (rows, cols) in [(0, 0), (0, 5), (5, 0), (1, 1), (1, 4099), (4099, 1), (33, 65), (64, 64), (65, 1025)] {
        for fill in [0.0f32, -0.0, 1.5, f32::NAN] {
            let values = vec![fill; rows * cols];
            let packed = pack_lossless(Weights::F32(&values), rows, cols, &Serial).unwrap();
            let back = unpack::<f32>(&packed);
            assert!(back.iter().all(|v| v.to_bits() == fill.to_bits()));
            assert!(packed.payload.is_empty(), "a constant needs no payload");
        }
        let values = Random(2).normals(rows * cols, 1.0);
        for packed in [
            pack_ecsq(Weights::F32(&values), rows, cols, EcsqTarget::Bits(4.0), &Serial).unwrap(),
            pack_int8(Weights::F32(&values), rows, cols, &Serial).unwrap(),
            pack_int4(Weights::F32(&values), rows, cols, 128, &Serial).unwrap(),
        ] {
            let error =
                relative_error(unpack::<f32>(&packed).iter().map(|&v| v.into()), values.iter().map(|&v| v.into()));
            assert!(error < 0.2, "{rows}x{cols} {:?}: {error}", packed.header.quantizer);
        }
    }
}

#[test]
fn float32_planes_are_exact_and_use_what_is_there() {
    let values = Random(3).normals(128 * 384, 0.05);
    let packed = pack_lossless(Weights::F32(&values), 128, 384, &Serial).unwrap();
    assert_eq!(unpack::<f32>(&packed), values);
    assert!(bits_per_weight(&packed) < 27.0, "{}", bits_per_weight(&packed));
    // Two planes of a bf16 weight stored as f32 are zero and cost nothing.
    let rounded: Vec<f32> = to_bf16(&values).iter().map(|v| v.to_f32()).collect();
    let packed = pack_lossless(Weights::F32(&rounded), 128, 384, &Serial).unwrap();
    assert_eq!(unpack::<f32>(&packed), rounded);
    assert!(bits_per_weight(&packed) < 10.8, "{}", bits_per_weight(&packed));
}

#[test]
fn lossless_size_is_near_the_entropy() {
    let values = to_bf16(&Random(4).normals(1024 * 4096, 0.02));
    let packed = lossless_bf16(&values, 1024, 4096);
    let mut counts = [0u64; 256];
    values.iter().for_each(|v| counts[usize::from(v.to_bits() >> 7 & 0xff)] += 1);
    let n = values.len() as f64;
    let entropy: f64 = counts.iter().filter(|&&c| c > 0).map(|&c| c as f64 / n * (n / c as f64).log2()).sum();
    let bound = 8.0 + entropy;
    assert!(bits_per_weight(&packed) < 1.004 * bound, "{} against {bound}", bits_per_weight(&packed));
}

#[test]
fn ecsq_meets_rates_and_errors() {
    let values = Random(5).normals(512 * 768, 0.3);
    let weights = Weights::F32(&values);
    for bits in [2.0, 2.5, 3.3, 4.0, 5.0, 6.7, 8.0] {
        let packed = pack_ecsq(weights, 512, 768, EcsqTarget::Bits(bits), &Serial).unwrap();
        let got = bits_per_weight(&packed);
        assert!(got <= bits && got > bits - 0.03, "asked {bits}, got {got}");
        // Against the rate-distortion bound of a Gaussian, 2^-b: 0.255 bit of uniform quantiser, and the overheads.
        let error = relative_error(unpack::<f32>(&packed).iter().map(|&v| v.into()), values.iter().map(|&v| v.into()));
        assert!(error < (0.255f64 + 0.07 - bits).exp2(), "at {bits} bits: {error}");
    }
    for bound in [0.3, 0.127, 0.05, 0.01] {
        let packed = pack_ecsq(weights, 512, 768, EcsqTarget::Error(bound), &Serial).unwrap();
        let error = relative_error(unpack::<f32>(&packed).iter().map(|&v| v.into()), values.iter().map(|&v| v.into()));
        assert!(error <= bound && error > 0.96 * bound, "asked {bound}, got {error}");
    }
}

#[test]
fn ecsq_keeps_outliers() {
    let mut values = Random(6).normals(256 * 512, 0.02);
    values[1000] = 40.0;
    values[70_000] = -77.0;
    let packed = pack_ecsq(Weights::F32(&values), 256, 512, EcsqTarget::Bits(4.0), &Serial).unwrap();
    let back = unpack::<f32>(&packed);
    assert!((back[1000] - 40.0).abs() < 1.0 && (back[70_000] + 77.0).abs() < 1.0);
    assert!(bits_per_weight(&packed) <= 4.0);
}

#[test]
fn the_better_scale_grid_is_chosen() {
    let grid = |values: &[f32], bits| {
        let packed = pack_ecsq(Weights::F32(values), 512, 512, EcsqTarget::Bits(bits), &Serial).unwrap();
        let got = bits_per_weight(&packed);
        assert!(got <= bits, "asked {bits}, got {got}");
        packed.header.scale_grid
    };
    let mut random = Random(7);
    // Gaussian rows, a thousandfold apart: reverse water-filling gives all the same step.
    let mut values = random.normals(512 * 512, 1.0);
    for (row, values) in values.chunks_exact_mut(512).enumerate() {
        values.iter_mut().for_each(|v| *v *= 10f32.powi((row % 4) as i32 - 3));
    }
    assert_eq!(grid(&values, 6.0), ScaleGrid::Tensor);
    // Rows of two values each: a step of a row's own makes every level the same.
    for values in values.chunks_exact_mut(512) {
        let size = (3.0 * random.normal()).exp() as f32;
        values.iter_mut().for_each(|v| *v = size.copysign(*v));
    }
    assert_eq!(grid(&values, 2.0), ScaleGrid::Row);
}

#[test]
fn weights_too_small_for_a_step_keep_every_bit() {
    for size in [1e-36, 1e-40] {
        let values = Random(18).normals(64 * 64, size);
        let error = |packed: Packed| {
            relative_error(unpack::<f32>(&packed).iter().map(|&v| v.into()), values.iter().map(|&v| v.into()))
        };
        let weights = Weights::F32(&values);
        assert_eq!(error(pack_ecsq(weights, 64, 64, EcsqTarget::Error(1e-4), &Serial).unwrap()), 0.0);
        assert_eq!(error(pack_int8(weights, 64, 64, &Serial).unwrap()), 0.0);
        assert_eq!(error(pack_int4(weights, 64, 64, 64, &Serial).unwrap()), 0.0);
    }
}

#[test]
fn int8_and_int4_are_the_rounded_quotients() {
    let values = Random(8).normals(70 * 200, 0.1);
    for packed in [
        pack_int8(Weights::F32(&values), 70, 200, &Serial).unwrap(),
        pack_int4(Weights::F32(&values), 70, 200, 128, &Serial).unwrap(),
    ] {
        let grid = packed.header.scale_grid;
        let back = unpack::<f32>(&packed);
        for (index, (&value, &back)) in values.iter().zip(&back).enumerate() {
            let scale = match grid {
                ScaleGrid::Row => packed.scales[index / 200],
                ScaleGrid::Group(128) => packed.scales[index / 200 * 2 + index % 200 / 128],
                other => panic!("{other:?}"),
            };
            assert_eq!(back, (value / scale).round_ties_even() * scale);
            assert_eq!(bf16::from_f32(scale).to_f32(), scale, "scales are stored in bf16");
        }
        let error = relative_error(back.iter().map(|&v| v.into()), values.iter().map(|&v| v.into()));
        assert!(error < if grid == ScaleGrid::Row { 0.01 } else { 0.14 });
    }
}

#[test]
fn a_predictor_is_recorded_only_where_it_wins() {
    let noise = Random(9).normals(128 * 256, 1.0);
    let packed = pack_int8(Weights::F32(&noise), 128, 256, &Serial).unwrap();
    assert_eq!(packed.header.predictor, Predictor::None);

    // A smooth surface with a bump: neighbours tell a value.
    let smooth: Vec<f32> = (0..128 * 256)
        .map(|i| {
            let (row, col) = ((i / 256) as f32, (i % 256) as f32);
            (row / 31.0).sin() + (col / 47.0).cos() + 0.002 * noise[i]
        })
        .collect();
    for pack in [
        pack_int8(Weights::F32(&smooth), 128, 256, &Serial).unwrap(),
        pack_ecsq(Weights::F32(&smooth), 128, 256, EcsqTarget::Error(0.01), &Serial).unwrap(),
    ] {
        assert_ne!(pack.header.predictor, Predictor::None);
        let error = relative_error(unpack::<f32>(&pack).iter().map(|&v| v.into()), smooth.iter().map(|&v| v.into()));
        assert!(error < 0.0101, "{:?}: {error}", pack.header.predictor);
    }
}

#[test]
fn results_do_not_depend_on_threads() {
    let values = Random(10).normals(300 * 500, 0.1);
    let pack = |pool: &dyn infold::parallel::Pool| {
        pack_ecsq(Weights::F32(&values), 300, 500, EcsqTarget::Bits(3.7), pool).unwrap()
    };
    assert_eq!(pack(&Serial), pack(&Threads(3)));
}

#[test]
fn bad_arguments_are_named() {
    let mut values = vec![1.0f32; 12];
    let pack =
        |values: &[f32], bits| pack_ecsq(Weights::F32(values), 3, 4, EcsqTarget::Bits(bits), &Serial).unwrap_err();
    assert_eq!(pack(&values, 9.0).to_string(), "bits: expected 2 to 8, got 9");
    assert_eq!(pack(&values[1..], 4.0).to_string(), "weight elements: expected 12, got 11");
    values[6] = f32::INFINITY;
    assert_eq!(pack(&values, 4.0).to_string(), "weight[1, 2] is inf: quantised formats need finite weights");
    let group = pack_int4(Weights::F32(&values), 3, 4, 100, &Serial).unwrap_err();
    assert_eq!(group.to_string(), "group_size: expected a positive multiple of 64, got 100");
}

proptest! {
    #[test]
    fn any_bits_come_back(rows in 0usize..90, cols in 0usize..150, seed: u64, spread in 0u32..17) {
        let mut random = Random(seed);
        let values: Vec<bf16> = (0..rows * cols)
            .map(|_| bf16::from_bits((random.next() >> 48 >> (16 - spread)) as u16))
            .collect();
        let packed = lossless_bf16(&values, rows, cols);
        open(&packed).verify(Some(&packed.scales)).unwrap();
        let back = unpack::<bf16>(&packed);
        prop_assert!(back.iter().zip(&values).all(|(a, b)| a.to_bits() == b.to_bits()));
    }

    #[test]
    fn rare_values_escape_and_come_back(seed: u64, rare in 1usize..40) {
        let mut random = Random(seed);
        let mut values = to_bf16(&random.normals(512 * 1100, 0.02));
        for _ in 0..rare {
            let at = random.next() as usize % values.len();
            values[at] = bf16::from_bits(random.next() as u16);
        }
        let packed = lossless_bf16(&values, 512, 1100);
        let back = unpack::<bf16>(&packed);
        prop_assert!(back.iter().zip(&values).all(|(a, b)| a.to_bits() == b.to_bits()));
    }
}

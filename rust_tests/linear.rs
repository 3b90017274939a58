//! The products against the dense operator in float64, and their gradients against finite differences.

mod support;

use approx::assert_relative_eq;
use half::bf16;
use infold::codec::{
    BLOCK, Dtype, EcsqTarget, LANES, Layout, Packed, Scales, Weights, pack_ecsq, pack_int4, pack_int8, pack_lossless,
};
use infold::linear::{Input, embedding, embedding_scale_gradient, forward, input_gradient, scale_gradient};
use infold::parallel::{Pool, Serial, Threads};
use support::*;

const SHAPES: [(usize, usize, usize); 6] =
    [(1, 1, 1), (3, 70, 130), (1, 33, 64), (67, 64, 1030), (130, 97, 200), (5, 4, 0)];

fn weights(values: &[f32], rows: usize, cols: usize) -> Vec<Packed> {
    let packed = [
        pack_lossless(Weights::F32(values), rows, cols, &Serial),
        pack_ecsq(Weights::F32(values), rows, cols, EcsqTarget::Bits(4.0), &Serial),
        pack_int8(Weights::F32(values), rows, cols, &Serial),
        pack_int4(Weights::F32(values), rows, cols, 64, &Serial),
    ];
    packed.into_iter().collect::<Result<_, _>>().unwrap()
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| v.into()).collect()
}

fn y(packed: &Packed, scales: &[f64], x: &[f64], rows: usize) -> Vec<f64> {
    let mut out = vec![0.0; rows * packed.header.geometry.rows];
    forward(&open(packed), Scales::Real(scales), Input { values: x, rows }, None, &mut out, &Serial).unwrap();
    out
}

#[test]
fn forward_equals_the_dense_product() {
    for (batch, rows, cols) in SHAPES {
        let mut random = Random(11);
        let values = random.normals(rows * cols, 0.1);
        let x = random.normals(batch * cols, 1.0);
        let bias = random.normals(rows, 1.0);
        for packed in weights(&values, rows, cols) {
            let dense = unpack::<f32>(&packed);
            let expected = if cols == 0 { vec![0.0; batch * rows] } else { product(&x, &dense, cols, rows) };
            let expected = expected.iter().enumerate().map(|(i, y)| y + f64::from(bias[i % rows]));
            let mut out = vec![f32::NAN; batch * rows];
            let input = Input { values: &x, rows: batch };
            forward(&open(&packed), Scales::Real(&packed.scales), input, Some(&bias), &mut out, &Serial).unwrap();
            let error = relative_error(out.iter().map(|&v| v.into()), expected);
            assert!(error < 1e-6, "{batch}x{rows}x{cols} {:?}: {error}", packed.header.quantizer);
        }
    }
}

/// Weights that bf16 activations are multiplied with, in both layouts: lossless, with zeros and outliers too, and levels.
fn bf16_weights(values: &[f32], rows: usize, cols: usize) -> Vec<Packed> {
    let mut uneven = values.to_vec();
    uneven.iter_mut().step_by(17).for_each(|value| *value = 0.0);
    uneven.iter_mut().skip(5).step_by(301).for_each(|value| *value = 1e4);
    let lossless = |values: &[f32]| pack_lossless(Weights::Bf16(&to_bf16(values)), rows, cols, &Serial);
    let packed = [
        lossless(values),
        lossless(&uneven),
        pack_ecsq(Weights::F32(values), rows, cols, EcsqTarget::Bits(4.0), &Serial),
        pack_ecsq(Weights::F32(values), rows, cols, EcsqTarget::Bits(7.0), &Serial),
        pack_int8(Weights::F32(&uneven), rows, cols, &Serial),
        pack_int4(Weights::F32(values), rows, cols, 64, &Serial),
        pack_int4(Weights::F32(values), rows, cols, 128, &Serial),
    ];
    let packed = packed.into_iter().collect::<Result<Vec<_>, _>>().unwrap();
    let fast: Vec<_> = packed.iter().map(|packed| in_layout(packed, Layout::Fast)).collect();
    packed.into_iter().chain(fast).collect()
}

#[test]
fn bf16_activations_lose_no_more_than_a_bf16_weight() {
    for (batch, rows, cols) in SHAPES.into_iter().chain([(17, 40, 70), (64, 33, 1100), (100, 32, 1088), (300, 33, 200)])
    {
        let mut random = Random(18);
        let values = random.normals(rows * cols, 0.1);
        let x = to_bf16(&random.normals(batch * cols, 1.0));
        let wide_x: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
        for packed in bf16_weights(&values, rows, cols) {
            let weight = open(&packed);
            let dense = unpack::<f32>(&packed);
            let expected = if cols == 0 { vec![0.0; batch * rows] } else { product(&wide_x, &dense, cols, rows) };
            let mut out = vec![f32::NAN; batch * rows];
            let input = Input { values: &x, rows: batch };
            forward(&weight, Scales::Real(&packed.scales), input, None, &mut out, &Threads(2)).unwrap();
            let error = relative_error(out.iter().map(|&v| v.into()), expected);
            let canonical = packed.header.origin.as_deref().unwrap_or(&packed.header);
            // Centroids, and floats where levels did not pay, are rounded to bf16; levels up to 256 and bf16 itself are not.
            let rounds = packed.header.element.float() == Some(Dtype::F32)
                || canonical.planes.iter().any(|plane| !plane.centroids.is_empty());
            let most = if rounds { 2e-3 } else { 2e-6 };
            assert!(error < most, "{batch}x{rows}x{cols} {:?}: {error}", packed.header.quantizer);
            for row in [0, batch / 2, batch - 1] {
                let mut alone = vec![f32::NAN; rows];
                let input = Input { values: &x[row * cols..(row + 1) * cols], rows: 1 };
                forward(&weight, Scales::Real(&packed.scales), input, None, &mut alone, &Serial).unwrap();
                assert_eq!(alone, out[row * rows..(row + 1) * rows], "row {row} of {batch}x{rows}x{cols}");
            }
        }
    }
}

#[test]
fn what_is_no_number_stays_in_its_row() {
    let (batch, rows, cols) = (70, 40, 1100);
    let mut random = Random(23);
    let values = random.normals(rows * cols, 0.1);
    let mut x = to_bf16(&random.normals(batch * cols, 1.0));
    let packed = pack_lossless(Weights::Bf16(&to_bf16(&values)), rows, cols, &Serial).unwrap();
    let run = |x: &[bf16]| {
        let (mut y, mut dx) = (vec![0.0f32; batch * rows], vec![0.0f32; batch * cols]);
        forward(&open(&packed), Scales::Real(&[]), Input { values: x, rows: batch }, None, &mut y, &Serial).unwrap();
        let gradient = Input { values: &x[..batch * rows], rows: batch };
        input_gradient(&open(&packed), Scales::Real(&[]), gradient, &mut dx, &Serial).unwrap();
        (y, dx)
    };
    let (y, dx) = run(&x);
    // In the row 1 of x, and as a gradient in row 28.
    x[cols + 20] = bf16::NAN;
    let (changed_y, changed_dx) = run(&x);
    for row in 0..batch {
        let (y_row, dx_row) = (row * rows..(row + 1) * rows, row * cols..(row + 1) * cols);
        if row == 1 {
            assert!(changed_y[y_row].iter().all(|y| y.is_nan()));
        } else {
            assert_eq!(changed_y[y_row.clone()], y[y_row], "row {row} of y");
        }
        if row == (cols + 20) / rows {
            assert!(changed_dx[dx_row].iter().all(|dx| dx.is_nan()));
        } else {
            assert_eq!(changed_dx[dx_row.clone()], dx[dx_row], "row {row} of dx");
        }
    }
}

#[test]
fn bf16_gradients_lose_little() {
    for (batch, rows, cols) in SHAPES.into_iter().chain([(16, 32, 64), (17, 40, 70), (33, 64, 128), (150, 97, 200)]) {
        let mut random = Random(20);
        let values = random.normals(rows * cols, 0.1);
        let gradient = to_bf16(&random.normals(batch * rows, 1.0));
        let wide_gradient: Vec<f32> = gradient.iter().map(|g| g.to_f32()).collect();
        for packed in bf16_weights(&values, rows, cols) {
            let weight = open(&packed);
            let dense = unpack::<f32>(&packed);
            let expected = product(&wide_gradient, &transpose(&dense, cols), rows, cols);
            let run = |gradient: &[bf16], pool: &dyn Pool| {
                let mut out = vec![f32::NAN; gradient.len() / rows * cols];
                let input = Input { values: gradient, rows: gradient.len() / rows };
                input_gradient(&weight, Scales::Real(&packed.scales), input, &mut out, pool).unwrap();
                out
            };
            let out = run(&gradient, &Threads(2));
            let error = relative_error(out.iter().map(|&v| v.into()), expected);
            // The gradient is rounded under its scales, and so are centroids, and floats where levels did not pay.
            let is_exact = packed.scales.is_empty() && packed.header.element.float() != Some(Dtype::F32);
            let most = if is_exact { 2e-6 } else { 3e-3 };
            assert!(error < most, "{batch}x{rows}x{cols} {:?}: {error}", packed.header.quantizer);
            for row in [0, batch / 2, batch - 1] {
                let alone = run(&gradient[row * rows..(row + 1) * rows], &Serial);
                assert_eq!(alone, out[row * cols..(row + 1) * cols], "row {row} of {batch}x{rows}x{cols}");
            }
        }
    }
}

#[test]
fn pairs_are_the_points_in_bf16() {
    for (rows, cols) in [(32, 64), (70, 130), (40, 97)] {
        for packed in bf16_weights(&Random(19).normals(rows * cols, 0.1), rows, cols) {
            let weight = open(&packed);
            for tile in 0..weight.geometry().tiles() {
                let mut decoder = weight.tile(tile).unwrap();
                while let Some(shape) = decoder.next_block() {
                    let (mut points, mut pairs) = ([f32::NAN; BLOCK], [u32::MAX; BLOCK / 2]);
                    decoder.points(&mut points);
                    decoder.pairs(&mut pairs);
                    for (index, &pair) in pairs.iter().enumerate() {
                        let (pair_col, lane) = (index / LANES * 2, index % LANES);
                        for (col, bits) in [(pair_col, pair & 0xffff), (pair_col + 1, pair >> 16)] {
                            let there = col < shape.cols && lane < shape.lanes;
                            let point = if there { points[col * LANES + lane] } else { 0.0 };
                            let found = bf16::from_bits(bits as u16).to_f32();
                            assert!(
                                (found - point).abs() <= point.abs() / 256.0,
                                "{found} for {point} at {col}, {lane}"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn input_gradient_equals_the_dense_product() {
    for (batch, rows, cols) in SHAPES {
        let mut random = Random(12);
        let values = random.normals(rows * cols, 0.1);
        let gradient = random.normals(batch * rows, 1.0);
        for packed in weights(&values, rows, cols) {
            let dense = unpack::<f32>(&packed);
            let expected = product(&gradient, &transpose(&dense, cols), rows, cols);
            let mut out = vec![f32::NAN; batch * cols];
            let gradient = Input { values: &gradient, rows: batch };
            input_gradient(&open(&packed), Scales::Real(&packed.scales), gradient, &mut out, &Serial).unwrap();
            let error = relative_error(out.iter().map(|&v| v.into()), expected);
            assert!(error < 1e-6, "{batch}x{rows}x{cols} {:?}: {error}", packed.header.quantizer);
        }
    }
}

/// T(g, s, x) = Σ g · y(s, x); its derivatives by central differences, exact up to rounding since T is linear in each.
#[test]
fn gradients_equal_finite_differences() {
    let (batch, rows, cols) = (3, 40, 130);
    let mut random = Random(13);
    let values = random.normals(rows * cols, 0.1);
    let x = wide(&random.normals(batch * cols, 1.0));
    let gradient = wide(&random.normals(batch * rows, 1.0));
    let objective = |packed: &Packed, scales: &[f64], x: &[f64]| -> f64 {
        y(packed, scales, x, batch).iter().zip(&gradient).map(|(y, g)| y * g).sum()
    };
    for packed in weights(&values, rows, cols) {
        let scales = wide(&packed.scales);
        let weight = open(&packed);
        let mut dx = vec![0.0; batch * cols];
        let g = Input { values: &gradient[..], rows: batch };
        input_gradient(&weight, Scales::Real(&scales), g, &mut dx, &Serial).unwrap();
        for at in (0..x.len()).step_by(37) {
            let (mut up, mut down) = (x.clone(), x.clone());
            up[at] += 0.5;
            down[at] -= 0.5;
            let slope = objective(&packed, &scales, &up) - objective(&packed, &scales, &down);
            assert_relative_eq!(dx[at], slope, max_relative = 1e-8, epsilon = 1e-9);
        }
        if scales.is_empty() {
            continue;
        }
        let mut ds = vec![0.0; scales.len()];
        scale_gradient(&weight, g, Input { values: &x[..], rows: batch }, &mut ds, &Serial).unwrap();
        for at in (0..scales.len()).step_by(7) {
            let (mut up, mut down) = (scales.clone(), scales.clone());
            up[at] += 0.5;
            down[at] -= 0.5;
            let slope = objective(&packed, &up, &x) - objective(&packed, &down, &x);
            assert_relative_eq!(ds[at], slope, max_relative = 1e-8, epsilon = 1e-9);
        }
    }
}

#[test]
fn bit_equal_over_threads_and_batch_positions() {
    let (batch, rows, cols) = (70, 200, 300);
    let mut random = Random(14);
    let values = random.normals(rows * cols, 0.1);
    let x = random.normals(batch * cols, 1.0);
    for packed in weights(&values, rows, cols) {
        let weight = open(&packed);
        let run = |x: &[f32], pool: &dyn Pool| {
            let batch = x.len() / cols;
            let mut out = vec![0.0f32; batch * rows];
            forward(&weight, Scales::Real(&packed.scales), Input { values: x, rows: batch }, None, &mut out, pool)
                .unwrap();
            let mut dx = vec![0.0f32; batch * cols];
            let y = Input { values: &out[..], rows: batch };
            input_gradient(&weight, Scales::Real(&packed.scales), y, &mut dx, pool).unwrap();
            (out, dx)
        };
        let (y, dx) = run(&x, &Serial);
        assert_eq!((y.clone(), dx.clone()), run(&x, &Threads(3)));
        for row in [0, 1, 2, 63, 64, 69] {
            let (alone_y, alone_dx) = run(&x[row * cols..(row + 1) * cols], &Serial);
            assert_eq!(alone_y, y[row * rows..(row + 1) * rows]);
            assert_eq!(alone_dx, dx[row * cols..(row + 1) * cols]);
        }
    }
}

#[test]
fn embedding_looks_rows_up() {
    let (rows, cols) = (150, 100);
    let mut random = Random(15);
    let values = random.normals(rows * cols, 0.1);
    let indices = [149, 0, 3, 3, 70, 64, 31, 32, 149];
    for packed in weights(&values, rows, cols) {
        let weight = open(&packed);
        let dense = unpack::<f32>(&packed);
        let mut out = vec![f32::NAN; indices.len() * cols];
        embedding(&weight, Scales::Real(&packed.scales), &indices, &mut out, &Threads(2)).unwrap();
        for (out, &index) in out.chunks_exact(cols).zip(&indices) {
            assert_eq!(out, &dense[index as usize * cols..][..cols]);
        }
        for bad in [-1, 150, i64::MAX] {
            let error =
                embedding(&weight, Scales::Real(&packed.scales), &[bad], &mut out[..cols], &Serial).unwrap_err();
            assert_eq!(error.to_string(), format!("embedding index: expected 0 to 149, got {bad}"));
        }
        if packed.scales.is_empty() {
            continue;
        }
        // Linear in s, so its gradient times s is the objective, and unit steps give each slope.
        let gradient = wide(&random.normals(out.len(), 1.0));
        let objective = |scales: &[f64]| -> f64 {
            let mut out = vec![0.0; gradient.len()];
            embedding(&weight, Scales::Real(scales), &indices, &mut out, &Serial).unwrap();
            out.iter().zip(&gradient).map(|(y, g)| y * g).sum()
        };
        let scales = wide(&packed.scales);
        let mut ds = vec![0.0; scales.len()];
        embedding_scale_gradient(&weight, &gradient, &indices, &mut ds, &Serial).unwrap();
        for at in 0..scales.len() {
            let mut up = scales.clone();
            up[at] += 1.0;
            assert_relative_eq!(ds[at], objective(&up) - objective(&scales), max_relative = 1e-8, epsilon = 1e-9);
        }
    }
}

#[test]
fn half_outputs_round_once() {
    let mut random = Random(16);
    let (values, x) = (to_bf16(&random.normals(64 * 96, 0.1)), random.normals(2 * 96, 1.0));
    let packed = pack_lossless(Weights::Bf16(&values), 64, 96, &Serial).unwrap();
    let run = |out: &mut [bf16]| {
        forward(&open(&packed), Scales::Real(&[]), Input { values: &x, rows: 2 }, None, out, &Serial)
    };
    let (mut half, mut full) = (vec![bf16::ZERO; 128], vec![0.0f32; 128]);
    run(&mut half).unwrap();
    forward(&open(&packed), Scales::Real(&[]), Input { values: &x, rows: 2 }, None, &mut full, &Serial).unwrap();
    assert!(half.iter().zip(&full).all(|(h, f)| *h == bf16::from_f32(*f)));
}

#[test]
fn wrong_sizes_are_named() {
    let packed = pack_int8(Weights::F32(&[0.5; 6]), 2, 3, &Serial).unwrap();
    let packed = if packed.scales.is_empty() {
        // Six weights do not pay for a header; take enough of them.
        pack_int8(Weights::F32(&Random(17).normals(600, 1.0)), 200, 3, &Serial).unwrap()
    } else {
        packed
    };
    let mut out = [0.0f32; 200];
    let weight = open(&packed);
    let x = Input { values: &[0.0f32; 4][..], rows: 1 };
    let error = forward(&weight, Scales::Real(&packed.scales), x, None, &mut out, &Serial).unwrap_err();
    assert_eq!(error.to_string(), "input elements: expected 3, got 4");
    let x = Input { values: &[0.0f32; 3][..], rows: 1 };
    let error = forward(&weight, Scales::Real(&packed.scales[1..]), x, None, &mut out, &Serial).unwrap_err();
    assert_eq!(error.to_string(), "scales: expected 200 elements, got 199");
    let error = forward(&weight, Scales::Real(&packed.scales), x, None, &mut out[1..], &Serial).unwrap_err();
    assert_eq!(error.to_string(), "output elements: expected 200, got 199");
}

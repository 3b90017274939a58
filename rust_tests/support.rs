//! Weights to test with, and the dense oracle in float64.
#![allow(dead_code)] // each test file uses its own part

use half::{bf16, f16};
use infold::codec::{Layout, Packed, PackedWeight, Real, Scalar, Scales, lay_out};
use infold::parallel::Serial;

/// A small generator of its own, so that test data does not depend on a library's version.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        // SplitMix64 (Steele et al. 2014).
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    pub fn normals(&mut self, count: usize, scale: f64) -> Vec<f32> {
        (0..count).map(|_| (self.normal() * scale) as f32).collect()
    }
}

pub fn to_bf16(values: &[f32]) -> Vec<bf16> {
    values.iter().map(|&v| bf16::from_f32(v)).collect()
}

pub fn to_f16(values: &[f32]) -> Vec<f16> {
    values.iter().map(|&v| f16::from_f32(v)).collect()
}

pub fn open(packed: &Packed) -> PackedWeight<'_> {
    PackedWeight::new(&packed.payload, &packed.directory, &packed.tables).expect("a packed weight opens")
}

/// The same weight in another layout.
pub fn in_layout(packed: &Packed, layout: Layout) -> Packed {
    let moved = lay_out(&open(packed), layout, &Serial).expect("a packed weight can be laid out");
    Packed { scales: packed.scales.clone(), ..moved }
}

pub fn unpack<O: Scalar + Default>(packed: &Packed) -> Vec<O> {
    let mut out = vec![O::default(); packed.header.geometry.elements()];
    open(packed).unpack(Scales::Real(&packed.scales), &mut out, &Serial).expect("a packed weight unpacks");
    out
}

/// a (m × k) times b (n × k) transposed, in float64.
pub fn product<T: Real>(a: &[T], b: &[T], k: usize, n: usize) -> Vec<f64> {
    let dot = |a: &[T], b: &[T]| a.iter().zip(b).map(|(x, y)| x.to_f64() * y.to_f64()).sum::<f64>();
    a.chunks_exact(k).flat_map(|a| b.chunks_exact(k).take(n).map(move |b| dot(a, b))).collect()
}

pub fn transpose<T: Copy>(a: &[T], cols: usize) -> Vec<T> {
    (0..cols).flat_map(|col| a.iter().skip(col).step_by(cols).copied()).collect()
}

/// ‖a − b‖ / ‖b‖.
pub fn relative_error(a: impl IntoIterator<Item = f64>, b: impl IntoIterator<Item = f64>) -> f64 {
    let (mut difference, mut norm) = (0.0, 0.0);
    for (a, b) in a.into_iter().zip(b) {
        difference += (a - b) * (a - b);
        norm += b * b;
    }
    (difference / norm.max(1e-300)).sqrt()
}

//! The block-circulant maps against the dense matrices that they stand for, and their gradients against finite differences.

use approx::assert_relative_eq;
use infold::parallel::{Serial, Threads};
use infold::spectral::{self, Circulant};
use proptest::prelude::*;

/// Numbers between −1 and 1 without a pattern.
fn numbers(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// The block of which `packed` is the orthonormal spectrum: every basis vector's contribution, as the definition has it.
fn block_of(packed: &[f64]) -> Vec<f64> {
    let n = packed.len();
    let (lone, pair) = ((1.0 / n as f64).sqrt(), (2.0 / n as f64).sqrt());
    (0..n)
        .map(|j| {
            let angle = |k: usize| std::f64::consts::TAU * (j * k) as f64 / n as f64;
            let real = (0..=n / 2).map(|k| {
                let scale = if k == 0 || 2 * k == n { lone } else { pair };
                scale * packed[k] * angle(k).cos()
            });
            let imaginary = (1..n.div_ceil(2)).map(|k| -pair * packed[n / 2 + k] * angle(k).sin());
            real.chain(imaginary).sum()
        })
        .collect()
}

struct Case {
    out_features: usize,
    in_features: usize,
    n: usize,
    rows: usize,
    spectrum: Vec<f64>,
    x: Vec<f64>,
    g: Vec<f64>,
    bias: Vec<f64>,
}

impl Case {
    fn new(out_features: usize, in_features: usize, n: usize, rows: usize) -> Self {
        let blocks = out_features.div_ceil(n) * in_features.div_ceil(n);
        Self {
            out_features,
            in_features,
            n,
            rows,
            spectrum: numbers(blocks * n, 1),
            x: numbers(rows * in_features, 2),
            g: numbers(rows * out_features, 3),
            bias: numbers(out_features, 4),
        }
    }

    fn shape<T: spectral::Real>(&self) -> Circulant<T> {
        Circulant::new(self.out_features, self.in_features, self.n).expect("a shape")
    }

    /// `out_features` by `in_features`: circular convolutions with each block.
    fn dense(&self) -> Vec<Vec<f64>> {
        let (n, inputs) = (self.n, self.in_features.div_ceil(self.n));
        let blocks: Vec<_> = self.spectrum.chunks(n).map(block_of).collect();
        let entry = |o: usize, i: usize| blocks[o / n * inputs + i / n][(o % n + n - i % n) % n];
        (0..self.out_features).map(|o| (0..self.in_features).map(|i| entry(o, i)).collect()).collect()
    }

    fn product(&self, x: &[f64], spectrum: &[f64]) -> Vec<f64> {
        let mut y = vec![f64::NAN; self.rows * self.out_features];
        spectral::product(&self.shape(), (x, self.rows), spectrum, Some(&self.bias), &mut y, &Threads(2));
        y
    }

    /// Σ g·y, whose derivatives the gradients are.
    fn form(&self, x: &[f64], spectrum: &[f64]) -> f64 {
        self.product(x, spectrum).iter().zip(&self.g).map(|(y, g)| y * g).sum()
    }

    fn gradients(&self) -> (Vec<f64>, Vec<f64>) {
        let shape = self.shape();
        let mut dx = vec![f64::NAN; self.x.len()];
        spectral::input_gradient(&shape, (&self.g, self.rows), &self.spectrum, &mut dx, &Threads(3));
        let mut dw = vec![f64::NAN; self.spectrum.len()];
        spectral::spectrum_gradient(&shape, &self.g, &self.x, self.rows, &mut dw, &Threads(2));
        (dx, dw)
    }
}

fn check(case: &Case) {
    let dense = case.dense();
    let y = case.product(&case.x, &case.spectrum);
    let (dx, dw) = case.gradients();
    let scale = 1e-13 * (1.0 + case.in_features.max(case.out_features) as f64).sqrt() * case.n as f64;
    for row in 0..case.rows {
        let x = &case.x[row * case.in_features..(row + 1) * case.in_features];
        let g = &case.g[row * case.out_features..(row + 1) * case.out_features];
        for o in 0..case.out_features {
            let want = case.bias[o] + dense[o].iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
            assert_relative_eq!(y[row * case.out_features + o], want, epsilon = scale, max_relative = 1e-11);
        }
        for i in 0..case.in_features {
            let want: f64 = dense.iter().zip(g).map(|(w, g)| w[i] * g).sum();
            assert_relative_eq!(dx[row * case.in_features + i], want, epsilon = scale, max_relative = 1e-11);
        }
    }
    // The form is linear in the spectrum: a difference over any step is the derivative.
    let step = 0.5;
    for index in (0..case.spectrum.len()).step_by((case.spectrum.len() / 7).max(1)) {
        let moved = |by: f64| {
            let mut spectrum = case.spectrum.clone();
            spectrum[index] += by;
            case.form(&case.x, &spectrum)
        };
        let want = (moved(step) - moved(-step)) / (2.0 * step);
        assert_relative_eq!(dw[index], want, epsilon = 1e-9 * case.n as f64, max_relative = 1e-8);
    }
}

#[test]
fn every_block_size() {
    for n in (1..=40).chain([48, 63, 64, 65, 96, 127, 128, 129, 130, 200, 251, 256, 512, 513, 600]) {
        check(&Case::new(2 * n + n / 2, 3 * n - n / 3, n, 4));
    }
}

#[test]
fn more_rows_than_a_panel() {
    check(&Case::new(64, 48, 16, 131));
    check(&Case::new(32, 512, 32, 70));
    check(&Case::new(35, 70, 5, 67));
}

#[test]
fn more_blocks_than_are_multiplied_at_a_time() {
    check(&Case::new(8 * 45, 8 * 19, 8, 30));
    check(&Case::new(2 * 19, 2 * 45, 2, 30));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_shape(out in 1usize..90, inputs in 1usize..90, n in 1usize..50, rows in 0usize..9) {
        check(&Case::new(out, inputs, n, rows));
    }
}

#[test]
fn finite_differences_of_the_input() {
    let case = Case::new(21, 34, 12, 3);
    let (dx, _) = case.gradients();
    for (index, &got) in dx.iter().enumerate() {
        let moved = |by: f64| {
            let mut x = case.x.clone();
            x[index] += by;
            case.form(&x, &case.spectrum)
        };
        assert_relative_eq!(got, (moved(1e-3) - moved(-1e-3)) / 2e-3, epsilon = 1e-9, max_relative = 1e-8);
    }
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|value| value * value).sum::<f64>().sqrt()
}

/// A case in float32, of which any rows are computed by any number of threads.
struct Narrow {
    shape: Circulant<f32>,
    x: Vec<f32>,
    g: Vec<f32>,
    spectrum: Vec<f32>,
    bias: Vec<f32>,
}

impl Narrow {
    fn new(case: &Case) -> Self {
        let narrow = |values: &[f64]| values.iter().map(|&value| value as f32).collect::<Vec<_>>();
        let (x, g) = (narrow(&case.x), narrow(&case.g));
        Self { shape: case.shape(), x, g, spectrum: narrow(&case.spectrum), bias: narrow(&case.bias) }
    }

    fn product(&self, rows: std::ops::Range<usize>, threads: usize) -> Vec<f32> {
        let mut y = vec![f32::NAN; rows.len() * self.shape.out_features];
        let x = &self.x[rows.start * self.shape.in_features..rows.end * self.shape.in_features];
        spectral::product(&self.shape, (x, rows.len()), &self.spectrum, Some(&self.bias), &mut y, &Threads(threads));
        y
    }

    fn input_gradient(&self, rows: std::ops::Range<usize>, threads: usize) -> Vec<f32> {
        let mut dx = vec![f32::NAN; rows.len() * self.shape.in_features];
        let g = &self.g[rows.start * self.shape.out_features..rows.end * self.shape.out_features];
        spectral::input_gradient(&self.shape, (g, rows.len()), &self.spectrum, &mut dx, &Threads(threads));
        dx
    }

    fn spectrum_gradient(&self, rows: usize, threads: usize) -> Vec<f32> {
        let mut dw = vec![f32::NAN; self.spectrum.len()];
        spectral::spectrum_gradient(&self.shape, &self.g, &self.x, rows, &mut dw, &Threads(threads));
        dw
    }
}

fn assert_near(got: &[f32], want: &[f64], what: &str) {
    let error = norm(got.iter().zip(want).map(|(&a, b)| f64::from(a) - b));
    assert!(error < 1e-6 * norm(want.iter().copied()), "{what}: {error}");
}

/// One block by itself: the transforms of each size, against the definition.
#[test]
fn every_block_size_in_float32() {
    for n in (1..=130).chain([192, 243, 251, 256, 500, 512, 600]) {
        let case = Case::new(n, n, n, 3);
        let narrow = Narrow::new(&case);
        let (block, g_row) = (block_of(&case.spectrum), |row: usize| &case.g[row * n..(row + 1) * n]);
        let entry = |o: usize, i: usize| block[(o + n - i) % n];
        let y = (0..3 * n).map(|at| {
            let x = &case.x[at / n * n..][..n];
            case.bias[at % n] + x.iter().enumerate().map(|(i, x)| entry(at % n, i) * x).sum::<f64>()
        });
        assert_near(&narrow.product(0..3, 1), &y.collect::<Vec<_>>(), &format!("y, n = {n}"));
        let dx = (0..3 * n).map(|at| (0..n).map(|o| entry(o, at % n) * g_row(at / n)[o]).sum::<f64>());
        assert_near(&narrow.input_gradient(0..3, 1), &dx.collect::<Vec<_>>(), &format!("dx, n = {n}"));
        assert_near(&narrow.spectrum_gradient(3, 1), &case.gradients().1, &format!("dw, n = {n}"));
    }
}

#[test]
fn float32_is_near_float64_and_the_same_bits_for_any_threads_and_batch() {
    for n in [3, 4, 7, 8, 16, 24, 32, 64, 128, 256, 600] {
        let case = Case::new(5 * n, 4 * n + n.min(3), n, 67);
        let narrow = Narrow::new(&case);
        let (y, dx, dw) = (narrow.product(0..67, 1), narrow.input_gradient(0..67, 1), narrow.spectrum_gradient(67, 1));
        let (want_dx, want_dw) = case.gradients();
        assert_near(&y, &case.product(&case.x, &case.spectrum), &format!("y, n = {n}"));
        assert_near(&dx, &want_dx, &format!("dx, n = {n}"));
        assert_near(&dw, &want_dw, &format!("dw, n = {n}"));
        for threads in [2, 3, 8] {
            assert!(y == narrow.product(0..67, threads), "n = {n}, {threads} threads");
            assert!(dx == narrow.input_gradient(0..67, threads), "n = {n}, {threads} threads");
            assert!(dw == narrow.spectrum_gradient(67, threads), "n = {n}, {threads} threads");
        }
        for rows in [0..1, 1..2, 66..67, 3..6, 10..30] {
            let of = |features: usize| rows.start * features..rows.end * features;
            assert!(narrow.product(rows.clone(), 2) == y[of(case.out_features)], "n = {n}, rows {rows:?}");
            assert!(narrow.input_gradient(rows.clone(), 2) == dx[of(case.in_features)], "n = {n}, rows {rows:?}");
        }
    }
}

#[test]
fn nothing_in_nothing_out() {
    let shape = Circulant::<f32>::new(3, 0, 4).expect("a shape");
    let mut y = vec![f32::NAN; 6];
    spectral::product(&shape, (&[], 2), &[], Some(&[1.0, 2.0, 3.0]), &mut y, &Serial);
    assert_eq!(y, [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]);
    assert!(Circulant::<f32>::new(3, 3, 0).is_err());
}

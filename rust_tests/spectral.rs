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
    for n in (1..=40).chain([48, 63, 64, 65, 96, 127, 128, 129, 130, 200, 251, 256]) {
        check(&Case::new(2 * n + n / 2, 3 * n - n / 3, n, 4));
    }
}

#[test]
fn more_rows_than_a_panel() {
    check(&Case::new(64, 48, 16, 101));
    check(&Case::new(32, 512, 32, 50));
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

#[test]
fn float32_is_near_float64_and_the_same_bits_for_any_threads_and_batch() {
    for n in [7, 8, 16, 24, 64, 256] {
        let case = Case::new(5 * n, 4 * n + 3, n, 53);
        let narrow = |values: &[f64]| values.iter().map(|&value| value as f32).collect::<Vec<_>>();
        let (x, spectrum, bias) = (narrow(&case.x), narrow(&case.spectrum), narrow(&case.bias));
        let shape = case.shape::<f32>();
        let run = |x: &[f32], rows: usize, threads: usize| {
            let mut y = vec![f32::NAN; rows * case.out_features];
            spectral::product(&shape, (x, rows), &spectrum, Some(&bias), &mut y, &Threads(threads));
            y
        };
        let y = run(&x, 53, 1);
        let want = case.product(&case.x, &case.spectrum);
        let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
        let error = norm(&mut y.iter().zip(&want).map(|(&a, b)| f64::from(a) - b));
        assert!(error < 1e-6 * norm(&mut want.iter().copied()), "n = {n}: {error}");
        assert_eq!(y, run(&x, 53, 3));
        for row in [0, 1, 52] {
            let alone = run(&x[row * case.in_features..(row + 1) * case.in_features], 1, 2);
            assert_eq!(alone, y[row * case.out_features..(row + 1) * case.out_features], "n = {n}, row {row}");
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

//! The maps of sparse two-dimensional spectra against the dense matrices that they stand for, and their gradients against
//! finite differences.

use approx::assert_relative_eq;
use infold::parallel::{Serial, Threads};
use infold::spectral::Real;
use infold::spectral::sparse::Sparse;
use proptest::prelude::*;

mod support;
use support::{Random, relative_error};

struct Case {
    outputs: usize,
    inputs: usize,
    rows: usize,
    scale: f64,
    indices: [Vec<i32>; 2],
    coefficients: Vec<f64>,
    x: Vec<f64>,
    g: Vec<f64>,
    bias: Vec<f64>,
}

/// Every index of the half-plane.
fn half_plane(outputs: usize, inputs: usize) -> Vec<[i32; 2]> {
    let last = |v: usize| if v == 0 || 2 * v == inputs { outputs / 2 } else { outputs - 1 };
    (0..=inputs / 2).flat_map(|v| (0..=last(v)).map(move |u| [u as i32, v as i32])).collect()
}

impl Case {
    /// `count` coefficients at random indices, some of which come twice; all of them, once, if there are no more.
    fn new(outputs: usize, inputs: usize, rows: usize, count: usize) -> Self {
        let mut random = Random((outputs * 1000 + inputs) as u64);
        let all = half_plane(outputs, inputs);
        let chosen: Vec<_> = if count >= all.len() {
            all
        } else {
            (0..count).map(|_| all[random.next() as usize % all.len()]).collect()
        };
        let mut numbers = |count: usize| (0..count).map(|_| random.normal()).collect::<Vec<_>>();
        Self {
            outputs,
            inputs,
            rows,
            scale: 0.75,
            coefficients: numbers(2 * chosen.len()),
            x: numbers(rows * inputs),
            g: numbers(rows * outputs),
            bias: numbers(outputs),
            indices: [0, 1].map(|part| chosen.iter().map(|index| index[part]).collect()),
        }
    }

    fn map<T: Real>(&self) -> Sparse<T> {
        Sparse::new(self.outputs, self.inputs, self.scale, &self.indices[0], &self.indices[1]).expect("indices")
    }

    /// The definition.
    fn dense(&self) -> Vec<f64> {
        let [us, vs] = &self.indices;
        let terms: Vec<_> = us.iter().zip(vs).zip(self.coefficients.chunks(2)).collect();
        let angle = |index: i32, at: usize, size: usize| {
            std::f64::consts::TAU * (index as usize * at % size) as f64 / size as f64
        };
        let element = |i: usize, j: usize| {
            let term = |&((&u, &v), c): &((&i32, &i32), &[f64])| {
                let turn = angle(u, i, self.outputs) - angle(v, j, self.inputs);
                c[0] * turn.cos() - c[1] * turn.sin()
            };
            self.scale * terms.iter().map(term).sum::<f64>()
        };
        (0..self.outputs).flat_map(|i| (0..self.inputs).map(move |j| (i, j))).map(|(i, j)| element(i, j)).collect()
    }

    fn product(&self, x: &[f64], coefficients: &[f64]) -> Vec<f64> {
        let mut y = vec![f64::NAN; self.rows * self.outputs];
        self.map().product((x, self.rows), coefficients, Some(&self.bias), &mut y, &Threads(2));
        y
    }

    fn form(&self, x: &[f64], coefficients: &[f64]) -> f64 {
        self.product(x, coefficients).iter().zip(&self.g).map(|(y, g)| y * g).sum()
    }

    fn gradients(&self) -> (Vec<f64>, Vec<f64>) {
        let mut dx = vec![f64::NAN; self.x.len()];
        self.map().input_gradient((&self.g, self.rows), &self.coefficients, &mut dx, &Threads(3));
        let mut dc = vec![f64::NAN; self.coefficients.len()];
        self.map().coefficient_gradient(&self.g, &self.x, self.rows, &mut dc, &Threads(2));
        (dx, dc)
    }
}

fn check(case: &Case) {
    let dense = case.dense();
    let (dx, dc) = case.gradients();
    let y = case.product(&case.x, &case.coefficients);
    let mut want_y = Vec::new();
    let mut want_dx = Vec::new();
    for row in 0..case.rows {
        let x = &case.x[row * case.inputs..][..case.inputs];
        let g = &case.g[row * case.outputs..][..case.outputs];
        let rows = dense.chunks(case.inputs);
        want_y.extend(
            rows.clone().zip(&case.bias).map(|(w, bias)| bias + w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>()),
        );
        want_dx.extend((0..case.inputs).map(|j| rows.clone().zip(g).map(|(w, g)| w[j] * g).sum::<f64>()));
    }
    let shape = (case.outputs, case.inputs, case.rows);
    assert!(relative_error(y, want_y) < 1e-12, "{shape:?}");
    assert!(relative_error(dx, want_dx) < 1e-12, "{shape:?}");
    // The form is linear in the coefficients: a difference over any step is the derivative.
    let size = case.g.iter().map(|g| g.abs()).sum::<f64>() * case.inputs as f64;
    for (index, &got) in dc.iter().enumerate().step_by((dc.len() / 13).max(1)) {
        let moved = |by: f64| {
            let mut coefficients = case.coefficients.clone();
            coefficients[index] += by;
            case.form(&case.x, &coefficients)
        };
        assert_relative_eq!(got, moved(0.5) - moved(-0.5), epsilon = 1e-12 * size, max_relative = 1e-9);
    }
}

#[test]
fn small_and_odd_and_prime_sizes() {
    for outputs in 1..=9 {
        for inputs in 1..=9 {
            check(&Case::new(outputs, inputs, 3, usize::MAX));
        }
    }
    for (outputs, inputs) in [(31, 17), (128, 127), (129, 130), (211, 64), (1, 257), (256, 1), (150, 300)] {
        check(&Case::new(outputs, inputs, 2, 200));
    }
}

#[test]
fn one_row_and_more_than_panels_and_few_coefficients() {
    for rows in [1, 15, 16, 17, 33, 150] {
        check(&Case::new(24, 31, rows, 60));
    }
    check(&Case::new(40, 50, 5, 1));
    check(&Case::new(40, 50, 5, 0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_shape(outputs in 1usize..60, inputs in 1usize..60, rows in 0usize..40, count in 0usize..300) {
        check(&Case::new(outputs, inputs, rows, count));
    }
}

#[test]
fn finite_differences_of_the_input() {
    let case = Case::new(21, 34, 3, 80);
    let (dx, _) = case.gradients();
    for (index, &got) in dx.iter().enumerate() {
        let moved = |by: f64| {
            let mut x = case.x.clone();
            x[index] += by;
            case.form(&x, &case.coefficients)
        };
        assert_relative_eq!(got, (moved(1e-3) - moved(-1e-3)) / 2e-3, epsilon = 1e-8, max_relative = 1e-8);
    }
}

#[test]
fn imaginary_parts_of_what_is_its_own_conjugate_count_for_nothing() {
    let (outputs, inputs) = (12, 10);
    let mut case = Case::new(outputs, inputs, 4, 0);
    case.indices = [vec![0, 6, 0, 6], vec![0, 0, 5, 5]];
    case.coefficients = vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0];
    let mut real = case.coefficients.clone();
    real.iter_mut().skip(1).step_by(2).for_each(|im| *im = 0.0);
    assert_eq!(case.product(&case.x, &case.coefficients), case.product(&case.x, &real));
    let (_, dc) = case.gradients();
    assert!(dc.iter().skip(1).step_by(2).all(|&im| im == 0.0));
    assert!(dc.iter().step_by(2).all(|&re| re != 0.0));
}

#[test]
fn float32_is_near_float64_and_the_same_bits_for_any_threads_and_batch() {
    for (outputs, inputs, count) in [(24, 31, 100), (300, 260, 2000), (64, 96, 4000)] {
        let case = Case::new(outputs, inputs, 150, count);
        let narrow = |values: &[f64]| values.iter().map(|&value| value as f32).collect::<Vec<_>>();
        let (x, g, c, bias) = (narrow(&case.x), narrow(&case.g), narrow(&case.coefficients), narrow(&case.bias));
        let map = case.map::<f32>();
        let run = |x: &[f32], g: &[f32], rows: usize, threads: usize| {
            let mut y = vec![f32::NAN; rows * outputs];
            map.product((x, rows), &c, Some(&bias), &mut y, &Threads(threads));
            let mut dx = vec![f32::NAN; rows * inputs];
            map.input_gradient((g, rows), &c, &mut dx, &Threads(threads));
            let mut dc = vec![f32::NAN; c.len()];
            map.coefficient_gradient(g, x, rows, &mut dc, &Threads(threads));
            (y, dx, dc)
        };
        let (y, dx, dc) = run(&x, &g, 150, 1);
        let (want_dx, want_dc) = case.gradients();
        let wide = |values: &[f32]| values.iter().map(|&value| f64::from(value)).collect::<Vec<_>>();
        for (got, want) in [(&y, case.product(&case.x, &case.coefficients)), (&dx, want_dx), (&dc, want_dc)] {
            let error = relative_error(wide(got), want);
            assert!(error < 1e-6, "{outputs} by {inputs}: {error}");
        }
        for threads in [2, 5] {
            assert_eq!(
                (&y, &dx, &dc),
                (&run(&x, &g, 150, threads).0, &run(&x, &g, 150, threads).1, &run(&x, &g, 150, threads).2)
            );
        }
        for (first, rows) in [(0, 1), (77, 1), (149, 1), (3, 20), (16, 129)] {
            let (x, g) = (&x[first * inputs..(first + rows) * inputs], &g[first * outputs..(first + rows) * outputs]);
            let (few_y, few_dx, _) = run(x, g, rows, 2);
            assert_eq!(few_y, y[first * outputs..(first + rows) * outputs], "rows {first} and {rows}");
            assert_eq!(few_dx, dx[first * inputs..(first + rows) * inputs], "rows {first} and {rows}");
        }
    }
}

#[test]
fn indices_outside_the_half_plane_are_named() {
    for (u, v, position) in [
        ([0, 8], [0, 1], 1),
        ([-1, 0], [1, 1], 0),
        ([0, 0], [1, 6], 1),
        ([0, 0], [1, -1], 1),
        ([0, 5], [1, 0], 1),
        ([5, 0], [5, 1], 0),
        ([i32::MAX, 0], [1, 1], 0),
        ([0, 0], [i32::MIN, 1], 0),
    ] {
        let error = Sparse::<f32>::new(8, 10, 1.0, &u, &v).err().expect("an error");
        let message = error.to_string();
        assert!(error.is_argument() && message.starts_with("indices: expected 0 <= v <= 5"), "{message}");
        assert!(message.ends_with(&format!("at position {position}")), "{message}");
    }
    for value in [i64::MAX, i64::MIN, 1 << 32, (1 << 32) + 1] {
        assert!(Sparse::<f64>::new(8, 10, 1.0, &[value], &[1]).is_err());
        assert!(Sparse::<f64>::new(8, 10, 1.0, &[1], &[value]).is_err());
    }
    assert!(Sparse::<f64>::new(8, 10, 1.0, &[7i64], &[4]).is_ok());
    assert!(Sparse::<f64>::new(8, 10, f64::NAN, &[7i64], &[4]).is_err());
    assert!(Sparse::<f64>::new(0, 10, 1.0, &[0i64], &[0]).is_err());
}

#[test]
fn nothing_in_nothing_out() {
    let map = Sparse::<f32>::new(3, 0, 1.0, &[] as &[i32], &[]).expect("a map");
    let mut y = vec![f32::NAN; 6];
    map.product((&[], 2), &[], Some(&[1.0, 2.0, 3.0]), &mut y, &Serial);
    assert_eq!(y, [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]);
    map.product((&[], 2), &[], None, &mut y, &Serial);
    assert_eq!(y, [0.0; 6]);
    let map = Sparse::<f32>::new(0, 3, 1.0, &[] as &[i32], &[]).expect("a map");
    let mut dx = vec![f32::NAN; 6];
    map.input_gradient((&[], 2), &[], &mut dx, &Serial);
    assert_eq!(dx, [0.0; 6]);
    map.product((&[0.0; 6], 2), &[], None, &mut [], &Serial);
}

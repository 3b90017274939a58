//! Convolutions by spectra against the definition, summed directly, and their gradients against it and finite differences.

use infold::parallel::{Serial, Threads};
use infold::spectral::conv::{self, Axis, Boundary, Convolution};
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

#[derive(Debug, Clone)]
struct Case {
    batch: usize,
    /// Of one group.
    ins: usize,
    outs: usize,
    groups: usize,
    axes: Vec<Axis>,
    circular: bool,
}

impl Case {
    fn shape(&self) -> Convolution {
        let boundary = if self.circular { Boundary::Circular } else { Boundary::Zeros };
        let (ins, outs) = (self.ins * self.groups, self.outs * self.groups);
        Convolution::new(self.batch, ins, outs, self.groups, &self.axes, boundary).expect("a shape")
    }

    fn volume(&self, of: impl Fn(&Axis) -> usize) -> usize {
        self.axes.iter().map(of).product()
    }

    fn x(&self) -> Vec<f64> {
        numbers(self.batch * self.ins * self.groups * self.volume(|axis| axis.input), 1)
    }

    fn weight(&self) -> Vec<f64> {
        numbers(self.ins * self.outs * self.groups * self.volume(|axis| axis.kernel), 2)
    }

    fn gradient(&self) -> Vec<f64> {
        numbers(self.batch * self.outs * self.groups * self.volume(Axis::output), 3)
    }

    /// Calls `term(y, w, x)` with the indices of every product in the definition.
    fn terms(&self, mut term: impl FnMut(usize, usize, usize)) {
        let [inputs, kernels, outputs] = [|axis: &Axis| axis.input, |axis: &Axis| axis.kernel, Axis::output];
        for (n, group, o, i) in indices(self.batch, self.groups, self.outs, self.ins) {
            let (output, input) = (group * self.outs + o, group * self.ins + i);
            for result in 0..self.volume(outputs) {
                'taps: for tap in 0..self.volume(kernels) {
                    let (mut result_left, mut tap_left, mut place, mut size) = (result, tap, 0, 1);
                    for axis in self.axes.iter().rev() {
                        let (at, k) = (result_left % axis.output(), tap_left % axis.kernel);
                        (result_left, tap_left) = (result_left / axis.output(), tap_left / axis.kernel);
                        let from = (at * axis.stride + k * axis.dilation) as isize - axis.before as isize;
                        let length = axis.input as isize;
                        if !self.circular && !(0..length).contains(&from) {
                            continue 'taps;
                        }
                        place += from.rem_euclid(length) as usize * size;
                        size *= axis.input;
                    }
                    term(
                        (n * self.groups * self.outs + output) * self.volume(outputs) + result,
                        (output * self.ins + i) * self.volume(kernels) + tap,
                        (n * self.groups * self.ins + input) * self.volume(inputs) + place,
                    );
                }
            }
        }
    }

    fn check(&self) {
        let (shape, x, w, g) = (self.shape(), self.x(), self.weight(), self.gradient());
        let channels = self.outs * self.groups;
        let bias = numbers(channels, 4);
        let each = self.volume(Axis::output);
        let mut expected: Vec<f64> = (0..g.len()).map(|index| bias[index / each % channels]).collect();
        let (mut expected_dx, mut expected_dw) = (vec![0.0; x.len()], vec![0.0; w.len()]);
        self.terms(|at_y, at_w, at_x| {
            expected[at_y] += w[at_w] * x[at_x];
            expected_dx[at_x] += w[at_w] * g[at_y];
            expected_dw[at_w] += g[at_y] * x[at_x];
        });
        let mut y = vec![f64::NAN; g.len()];
        conv::forward(&shape, &x, &w, Some(&bias), &mut y, &Threads(2));
        close(&y, &expected, [&x, &w], 1e-12, "y");
        let mut dx = vec![f64::NAN; x.len()];
        conv::input_gradient(&shape, &g, &w, &mut dx, &Threads(2));
        close(&dx, &expected_dx, [&g, &w], 1e-12, "dx");
        let mut dw = vec![f64::NAN; w.len()];
        conv::weight_gradient(&shape, &g, &x, &mut dw, &Threads(2));
        close(&dw, &expected_dw, [&g, &x], 1e-12, "dw");

        // In float32, and serially: the same to its accuracy, and the same bits.
        let single = |values: &[f64]| values.iter().map(|&value| value as f32).collect::<Vec<_>>();
        let factors = [&x[..], &w];
        let [x, w, g, bias] = [&x, &w, &g, &bias].map(|values| single(values));
        let mut y = vec![f32::NAN; g.len()];
        conv::forward(&shape, &x, &w, Some(&bias), &mut y, &Threads(3));
        let y: Vec<_> = y.into_iter().map(f64::from).collect();
        close(&y, &expected, factors, 1e-6, "y in float32");
        let run = |pool: &dyn infold::parallel::Pool| {
            let (mut y, mut dx, mut dw) = (vec![0.0; g.len()], vec![0.0; x.len()], vec![0.0; w.len()]);
            conv::forward(&shape, &x, &w, None, &mut y, pool);
            conv::input_gradient(&shape, &g, &w, &mut dx, pool);
            conv::weight_gradient(&shape, &g, &x, &mut dw, pool);
            [y, dx, dw].map(|values| values.iter().map(|value: &f32| value.to_bits()).collect::<Vec<_>>())
        };
        assert_eq!(run(&Serial), run(&Threads(3)), "{self:?}");
    }
}

fn indices(a: usize, b: usize, c: usize, d: usize) -> impl Iterator<Item = (usize, usize, usize, usize)> {
    (0..a * b * c * d).map(move |index| (index / (b * c * d), index / (c * d) % b, index / d % c, index % d))
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|value| value * value).sum::<f64>().sqrt()
}

/// Sums of many products round by the factors' sizes, even where they cancel or where there is nothing to sum.
fn close(got: &[f64], expected: &[f64], factors: [&[f64]; 2], limit: f64, what: &str) {
    assert_eq!(got.len(), expected.len());
    let error = norm(got.iter().zip(expected).map(|(a, b)| a - b));
    let size = norm(expected.iter().copied());
    let scale = factors.map(|factor| norm(factor.iter().copied())).iter().product::<f64>();
    assert!(error <= limit * size.max(0.1 * scale), "{what}: {error:e} of {size:e}");
}

/// A dimension whose kernel fits.
fn axis(largest: usize) -> impl Strategy<Value = Axis> {
    let sizes = (1..=largest, 1..=largest, 1usize..4, 1usize..4, 0usize..6, 0usize..6);
    sizes.prop_map(|(input, kernel, stride, dilation, before, after)| {
        // For both boundaries.
        let (before, after) = (before.min(input), after.min(input));
        let dilation = dilation.min((input + before + after) / kernel.max(1)).max(1);
        let kernel = kernel.min((input + before + after - 1) / dilation + 1);
        Axis { input, kernel, stride, dilation, before, after }
    })
}

fn case(dimensions: usize, largest: usize) -> impl Strategy<Value = Case> {
    let axes = proptest::collection::vec(axis(largest), dimensions);
    (1usize..4, 1usize..6, 1usize..6, 1usize..3, axes, any::<bool>())
        .prop_map(|(batch, ins, outs, groups, axes, circular)| Case { batch, ins, outs, groups, axes, circular })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn one_dimension(case in case(1, 60)) {
        case.check();
    }

    #[test]
    fn two_dimensions(case in case(2, 11)) {
        case.check();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn three_dimensions(case in case(3, 5)) {
        case.check();
    }
}

fn one(input: usize, kernel: usize, stride: usize, dilation: usize, padding: usize) -> Axis {
    Axis { input, kernel, stride, dilation, before: padding, after: padding }
}

#[test]
fn long_inputs_are_cut_into_tiles() {
    for circular in [false, true] {
        let axes = vec![one(5000, 9, 1, 1, 4)];
        Case { batch: 2, ins: 1, outs: 1, groups: 2, axes, circular }.check();
        let axes = vec![one(3001, 40, 3, 2, 50)];
        Case { batch: 3, ins: 2, outs: 2, groups: 1, axes, circular }.check();
        let axes = vec![one(90, 3, 2, 1, 1), one(200, 5, 1, 1, 2)];
        Case { batch: 1, ins: 2, outs: 3, groups: 1, axes, circular }.check();
    }
}

#[test]
fn large_ones_are_shared_by_threads() {
    // In parts of one group, in parts of one thread's tiles, and step by step.
    for (batch, ins, groups, input) in [(3, 1, 12, 4000), (9, 4, 2, 2500), (1, 9, 1, 3000)] {
        for circular in [false, true] {
            let axes = vec![one(input, 50, 1, 1, 7)];
            Case { batch, ins, outs: ins, groups, axes, circular }.check();
        }
    }
    let axes = vec![one(60, 6, 1, 1, 2), one(70, 5, 2, 1, 2)];
    Case { batch: 5, ins: 4, outs: 5, groups: 2, axes, circular: false }.check();
}

#[test]
fn many_channels_and_strides_beyond_the_kernel() {
    let axes = vec![one(12, 3, 1, 1, 1), one(10, 3, 1, 1, 1)];
    Case { batch: 9, ins: 17, outs: 19, groups: 1, axes, circular: false }.check();
    Case { batch: 2, ins: 1, outs: 2, groups: 9, axes: vec![one(300, 2, 41, 1, 30)], circular: false }.check();
    // No input is in reach of the kernel.
    Case { batch: 1, ins: 1, outs: 1, groups: 1, axes: vec![one(2, 3, 9, 1, 4)], circular: false }.check();
}

#[test]
fn gradients_are_the_derivatives() {
    let axes = vec![one(7, 3, 2, 2, 3), one(9, 4, 1, 1, 2)];
    for circular in [false, true] {
        let case = Case { batch: 2, ins: 2, outs: 3, groups: 2, axes: axes.clone(), circular };
        let (shape, x, w, g) = (case.shape(), case.x(), case.weight(), case.gradient());
        let form = |x: &[f64], w: &[f64]| {
            let mut y = vec![0.0; g.len()];
            conv::forward(&shape, x, w, None, &mut y, &Serial);
            y.iter().zip(&g).map(|(y, g)| y * g).sum::<f64>()
        };
        let (mut dx, mut dw) = (vec![0.0; x.len()], vec![0.0; w.len()]);
        conv::input_gradient(&shape, &g, &w, &mut dx, &Serial);
        conv::weight_gradient(&shape, &g, &x, &mut dw, &Serial);
        // The form is linear in each, so that a wide step loses nothing.
        let moved = |values: &[f64], index: usize, by: f64| {
            let mut values = values.to_vec();
            values[index] += by;
            values
        };
        for (index, &dx) in dx.iter().enumerate().step_by(7) {
            let slope = (form(&moved(&x, index, 0.5), &w) - form(&moved(&x, index, -0.5), &w)) / 1.0;
            assert!((slope - dx).abs() < 1e-10, "dx[{index}]: {dx}, by differences {slope}");
        }
        for (index, &dw) in dw.iter().enumerate().step_by(3) {
            let slope = (form(&x, &moved(&w, index, 0.5)) - form(&x, &moved(&w, index, -0.5))) / 1.0;
            assert!((slope - dw).abs() < 1e-10, "dw[{index}]: {dw}, by differences {slope}");
        }
    }
}

#[test]
fn an_element_of_a_batch_has_the_bits_that_it_has_alone() {
    let axes = vec![one(700, 30, 1, 1, 3)];
    let case = Case { batch: 13, ins: 3, outs: 5, groups: 2, axes, circular: false };
    let [x, w] = [case.x(), case.weight()].map(|values| values.iter().map(|&value| value as f32).collect::<Vec<_>>());
    let alone = Case { batch: 1, ..case.clone() };
    let mut all = vec![0.0f32; case.gradient().len()];
    conv::forward(&case.shape(), &x, &w, None, &mut all, &Serial);
    for (x, y) in x.chunks(x.len() / 13).zip(all.chunks(all.len() / 13)) {
        let mut one = vec![0.0f32; y.len()];
        conv::forward(&alone.shape(), x, &w, None, &mut one, &Serial);
        assert!(one.iter().zip(y).all(|(a, b)| a.to_bits() == b.to_bits()));
    }
}

#[test]
fn empty_tensors() {
    for (batch, ins, input) in [(0, 1, 5), (2, 0, 5), (2, 1, 0)] {
        let axis = Axis { input, kernel: 2, stride: 1, dilation: 1, before: 2, after: 2 };
        let shape = Convolution::new(batch, ins, 3, 1, &[axis], Boundary::Zeros).expect("a shape");
        let (x, w) = (numbers(batch * ins * input, 1), numbers(3 * ins * 2, 2));
        let mut y = vec![f64::NAN; batch * 3 * axis.output()];
        conv::forward(&shape, &x, &w, Some(&[1.0, 2.0, 3.0]), &mut y, &Serial);
        assert!(y.chunks(axis.output()).enumerate().all(|(c, y)| y.iter().all(|&y| y == (c % 3 + 1) as f64)));
        let (mut dx, mut dw) = (vec![f64::NAN; x.len()], vec![f64::NAN; w.len()]);
        conv::input_gradient(&shape, &y, &w, &mut dx, &Serial);
        conv::weight_gradient(&shape, &y, &x, &mut dw, &Serial);
        assert!(dx.iter().chain(&dw).all(|&value| value == 0.0));
    }
}

#[test]
fn wrong_arguments_are_named() {
    let axis = one(8, 3, 1, 1, 1);
    let refused = |axes: &[Axis], groups: usize, boundary: Boundary| {
        Convolution::new(1, 4, 6, groups, axes, boundary).map(|_| ()).expect_err("refused").to_string()
    };
    let zeros = Boundary::Zeros;
    assert!(refused(&[], 1, zeros).starts_with("kernel_size: expected 1 to 3"));
    assert!(refused(&[axis], 3, zeros).starts_with("groups: expected a divisor of in_channels"));
    assert!(refused(&[axis], 4, zeros).starts_with("groups: expected a divisor of out_channels"));
    assert!(refused(&[Axis { stride: 0, ..axis }], 1, zeros).starts_with("stride: expected positive"));
    assert!(refused(&[Axis { kernel: 11, ..axis }], 1, zeros).starts_with("kernel_size: expected at most"));
    let wide = Axis { before: 9, ..axis };
    assert!(refused(&[wide], 1, Boundary::Circular).starts_with("padding: expected at most the input's 8"));
}

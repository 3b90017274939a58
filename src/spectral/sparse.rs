//! The product with a matrix of a sparse two-dimensional spectrum, M by N, and its two companions: the partial derivatives of
//! one trilinear form T(g, c, x) = s·Re Σ_k c_k·x̂_v·conj(ĝ_u), so each one's gradients are the other two.
//!
//! ```text
//! W[i, j] = s·Re Σ_k c_k·exp(2πi(u·i/M − v·j/N))
//! y = s·Re Σ_u exp(2πi·u·i/M)·Y_u,  Y_u = Σ_v c·x̂_v        x̂, ĝ: sums without a scale
//! dx = s·Re Σ_v exp(2πi·v·j/N)·D_v,  D_v = Σ_u conj(c)·ĝ_u
//! dc = s·ĝ_u·conj(x̂_v)
//! ```
//!
//! The matrix is never built. Transforms are real ones, which have frequencies up to half their size: what is at u > M/2 is
//! counted at M − u, as its conjugate.

use realfft::num_complex::Complex;

use super::Real;
use super::terms::{self, Entry, OUTER_WIDTH, Term, Terms, WIDTH};
use super::whole::Whole;
use crate::memory::{AlignedVec, Scratch};
use crate::parallel::{DisjointSlice, Pool, Serial};
use crate::{Error, Result, codec};

/// With so many panels, each is one thread's from beginning to end; of fewer, all threads share every step.
const PANELS: usize = 8;
/// Steps that are not worth waking another thread for: they take about 0.1 ms.
const SMALL: usize = 1 << 19;

/// A sparse spectrum's shape and scale, and where its coefficients are.
pub struct Sparse<T> {
    pub out_features: usize,
    pub in_features: usize,
    scale: f64,
    entries: Vec<Entry>,
    output: Whole<T>,
    input: Whole<T>,
}

/// Whose frequencies a product has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Output,
    Input,
}

impl<T: Real> Sparse<T> {
    /// Of coefficients at (u[k], v[k]): 0 ≤ v ≤ N/2, and 0 ≤ u < M, or u ≤ M/2 where v is 0 or N/2. An index may come twice:
    /// its coefficients are added up. Features are below 2³¹.
    pub fn new<I: Copy + Into<i64>>(
        out_features: usize,
        in_features: usize,
        scale: f64,
        u: &[I],
        v: &[I],
    ) -> Result<Self> {
        if !scale.is_finite() {
            return Err(Error::argument("scale", "a finite number", scale));
        }
        let entries = Self::entries(out_features as i64, in_features as i64, u, v)?;
        // A transform of nothing is never run.
        let (output, input) = (Whole::get(out_features.max(1)), Whole::get(in_features.max(1)));
        Ok(Self { out_features, in_features, scale, entries, output, input })
    }

    fn entries<I: Copy + Into<i64>>(rows: i64, cols: i64, u: &[I], v: &[I]) -> Result<Vec<Entry>> {
        let mut entries = Vec::with_capacity(u.len());
        let nyquist = if cols % 2 == 0 { cols / 2 } else { -1 };
        for (&u, &v) in u.iter().zip(v) {
            let (u, v): (i64, i64) = (u.into(), v.into());
            let last = if v == 0 || v == nyquist { rows / 2 } else { rows - 1 };
            if !(0..=cols / 2).contains(&v) || !(0..=last).contains(&u) || rows == 0 || cols == 0 {
                let half = format!("0 <= v <= {}, 0 <= u < {rows}, u <= {} where v is 0 or N/2", cols / 2, rows / 2);
                let got = format!("(u, v) = ({u}, {v}) at position {}", entries.len());
                return Err(Error::argument("indices", half, got));
            }
            let conjugate = 2 * u > rows;
            entries.push(Entry::new(if conjugate { rows - u } else { u } as u32, v as u32, conjugate));
        }
        Ok(entries)
    }

    /// Coefficients: pairs of numbers.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// y = x·Wᵀ + bias for `rows` rows of x.
    pub fn product(
        &self,
        (x, rows): (&[T], usize),
        coefficients: &[T],
        bias: Option<&[T]>,
        y: &mut [T],
        pool: &dyn Pool,
    ) {
        if self.in_features == 0 {
            for y in y.chunks_exact_mut(self.out_features.max(1)) {
                match bias {
                    None => y.fill(T::default()),
                    Some(bias) => y.copy_from_slice(bias),
                }
            }
            return;
        }
        let terms = self.terms(coefficients, Side::Output);
        self.multiply([&self.input, &self.output], &terms, (x, rows), bias, y, pool);
    }

    /// dx = g·W for `rows` rows of g.
    pub fn input_gradient(&self, (g, rows): (&[T], usize), coefficients: &[T], dx: &mut [T], pool: &dyn Pool) {
        if self.out_features == 0 {
            return dx.fill(T::default());
        }
        let terms = self.terms(coefficients, Side::Input);
        self.multiply([&self.output, &self.input], &terms, (g, rows), None, dx, pool);
    }

    /// The gradient by the coefficients' real and imaginary parts, summed over the rows of g and x in their order.
    pub fn coefficient_gradient(&self, g: &[T], x: &[T], rows: usize, dc: &mut [T], pool: &dyn Pool) {
        dc.fill(T::default());
        if dc.is_empty() {
            return;
        }
        let width = if rows == 1 { 1 } else { OUTER_WIDTH };
        let pool = self.worthwhile(rows, pool);
        let mut g_panel = AlignedVec::new(frequencies(self.out_features) * 2 * width);
        let mut x_panel = AlignedVec::new(frequencies(self.in_features) * 2 * width);
        let sums = DisjointSlice::new(dc);
        for first in (0..rows).step_by(width) {
            let last = (first + width).min(rows);
            if last - first < width {
                // These rows are summed too.
                g_panel.fill(T::default());
                x_panel.fill(T::default());
            }
            transform(&self.output, &g[first * self.out_features..last * self.out_features], width, &mut g_panel, pool);
            transform(&self.input, &x[first * self.in_features..last * self.in_features], width, &mut x_panel, pool);
            pool.for_ranges(self.len(), &|range| {
                // SAFETY: a pool visits each entry once.
                #[allow(unsafe_code)]
                let sums = unsafe { sums.range_mut(2 * range.start..2 * range.end) };
                terms::add_outer(width, &self.entries[range], &g_panel, &x_panel, sums);
            });
        }
        let scale = real_of::<T>(self.scale);
        dc.iter_mut().for_each(|sum| *sum = *sum * scale);
    }

    /// The pool, unless there is little to do.
    fn worthwhile<'a>(&self, rows: usize, pool: &'a dyn Pool) -> &'a dyn Pool {
        let work = (self.out_features + self.in_features) * 8 + self.len() * 4;
        if work.saturating_mul(rows) < SMALL { &Serial } else { pool }
    }

    /// The coefficients by the frequencies of one side, in their order.
    fn terms(&self, coefficients: &[T], side: Side) -> Terms<T> {
        let split = |entry: Entry| match side {
            Side::Output => (entry.u() as usize, entry.v),
            Side::Input => (entry.v as usize, entry.u()),
        };
        let term = |(&entry, pair): (&Entry, &[T])| {
            let (re, im, sign) = (pair[0], pair[1], entry.sign::<T>());
            // c·z for y and conj(c)·z for dx; for y its conjugate, and for dx of z's, where u is beyond the half.
            let factors = match side {
                Side::Output => [re, -im, sign * re, sign * im],
                Side::Input => [re, sign * im, sign * re, -im],
            };
            Term { at: split(entry).1, factors }
        };
        let features = if side == Side::Output { self.out_features } else { self.in_features };
        let mut starts = vec![0; frequencies(features) + 1];
        let (mut is_sorted, mut last) = (true, 0);
        for &entry in &self.entries {
            let target = split(entry).0;
            starts[target + 1] += 1;
            is_sorted &= last <= target;
            last = target;
        }
        let mut sum = 0;
        for start in &mut starts {
            sum += *start;
            *start = sum;
        }
        let pairs = self.entries.iter().zip(coefficients.chunks_exact(2));
        if is_sorted {
            return Terms { starts, terms: pairs.map(term).collect() };
        }
        let mut next = starts.clone();
        let mut terms = vec![Term { at: 0, factors: [T::default(); 4] }; self.len()];
        for (entry, pair) in pairs {
            let target = split(*entry).0;
            terms[next[target]] = term((entry, pair));
            next[target] += 1;
        }
        Terms { starts, terms }
    }

    fn multiply(
        &self,
        [from, to]: [&Whole<T>; 2],
        terms: &Terms<T>,
        (values, rows): (&[T], usize),
        bias: Option<&[T]>,
        out: &mut [T],
        pool: &dyn Pool,
    ) {
        let (inputs, outputs) = (from.n(), to.n());
        if out.is_empty() {
            return;
        }
        let width = if rows == 1 { 1 } else { WIDTH };
        let panels = rows.div_ceil(width);
        let pool = self.worthwhile(rows, pool);
        let (outer, inner): (&dyn Pool, &dyn Pool) = if panels >= PANELS { (pool, &Serial) } else { (&Serial, pool) };
        let out = DisjointSlice::new(out);
        outer.for_ranges(panels, &|range| {
            let size = frequencies(inputs) * 2 * width;
            let mut scratch = Scratch::new(size + frequencies(outputs) * 2 * width);
            let (spectra, sums) = scratch.split_at_mut(size);
            for panel in range {
                let (first, last) = (panel * width, ((panel + 1) * width).min(rows));
                if last - first < width {
                    spectra.fill(T::default());
                }
                transform(from, &values[first * inputs..last * inputs], width, spectra, inner);
                let shared = DisjointSlice::new(sums);
                inner.for_ranges(frequencies(outputs), &|targets| {
                    // SAFETY: a pool visits each frequency once.
                    #[allow(unsafe_code)]
                    let sums = unsafe { shared.range_mut(targets.start * 2 * width..targets.end * 2 * width) };
                    terms::multiply(width, terms, targets, spectra, sums);
                });
                // SAFETY: a pool visits each panel once.
                #[allow(unsafe_code)]
                let out = unsafe { out.range_mut(first * outputs..last * outputs) };
                transform_back(to, sums, width, self.scale, bias, out, inner);
            }
        });
    }
}

/// Frequencies of a real transform of `n`.
fn frequencies(n: usize) -> usize {
    n / 2 + 1
}

fn real_of<T: Real>(value: f64) -> T {
    <T as codec::Scalar>::from_f64(value)
}

/// Writes the spectra of some rows to the first lanes of a panel of `width`.
fn transform<T: Real>(transform: &Whole<T>, rows: &[T], width: usize, panel: &mut [T], pool: &dyn Pool) {
    let n = transform.n();
    let panel = DisjointSlice::new(panel);
    pool.for_ranges(rows.len() / n, &|range| {
        let mut workspace = transform.workspace();
        for row in range {
            for (k, z) in transform.forward(&rows[row * n..(row + 1) * n], &mut workspace).iter().enumerate() {
                let place = k * 2 * width + row;
                // SAFETY: a pool visits each row once, and a row has a lane of its own.
                #[allow(unsafe_code)]
                unsafe {
                    panel.set(place, z.re);
                    panel.set(place + width, if transform.is_alone(k) { T::default() } else { z.im });
                }
            }
        }
    });
}

/// out = scale·Re Σ_u exp(2πi·u·i/n)·Z_u + bias for the first lanes of a panel: imaginary parts of what is alone count for nothing.
fn transform_back<T: Real>(
    transform: &Whole<T>,
    panel: &[T],
    width: usize,
    scale: f64,
    bias: Option<&[T]>,
    out: &mut [T],
    pool: &dyn Pool,
) {
    let n = transform.n();
    let rows = out.len() / n;
    // A frequency's conjugate has half of it.
    let (lone, pair) = (real_of::<T>(scale), real_of::<T>(scale / 2.0));
    let out = DisjointSlice::new(out);
    pool.for_ranges(rows, &|range| {
        let mut workspace = transform.workspace();
        for row in range {
            let number = |k: usize| {
                let (re, im) = (panel[2 * k * width + row], panel[(2 * k + 1) * width + row]);
                if transform.is_alone(k) {
                    Complex::new(re * lone, T::default())
                } else {
                    Complex::new(re * pair, im * pair)
                }
            };
            let values = transform.inverse(number, &mut workspace);
            // SAFETY: a pool visits each row once.
            #[allow(unsafe_code)]
            let out = unsafe { out.range_mut(row * n..(row + 1) * n) };
            match bias {
                None => out.copy_from_slice(values),
                Some(bias) => {
                    for ((out, &value), &bias) in out.iter_mut().zip(values).zip(bias) {
                        *out = value + bias;
                    }
                }
            }
        }
    });
}

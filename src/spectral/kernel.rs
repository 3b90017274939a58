//! The inner loops, compiled once per instruction set: sums of products in registers, in one order whatever else is
//! computed beside them.

use super::Real;
use super::vector::{Vector, Vectors};
use crate::codec::Isa;

/// The lanes of a vector that blocks of `n` fill; else those of a narrower one, which may be partly empty.
pub fn lanes(n: usize) -> usize {
    if n.is_multiple_of(16) && matches!(Isa::get(), Isa::Avx512 | Isa::Amx) { 16 } else { 8 }
}

/// Compiles `$body` for each instruction set, with its vector of `$lanes` lanes in the place of `V` and the rows and items whose sums
/// its registers hold as constants, and calls the one for this process.
macro_rules! per_isa_tiled {
    ($(#[$attribute:meta])* fn $name:ident = $body:ident($lanes:ident: usize, $($argument:ident: $type:ty),* $(,)?), avx512: ($($wide:literal),*), others: ($($narrow:literal),*)) => {
        $(#[$attribute])*
        pub fn $name<T: Real>($lanes: usize, $($argument: $type),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            fn avx512<T: Real>($($argument: $type),*) {
                $body::<T, <T as Vectors>::Avx512, $($wide),*>($($argument),*);
            }
            /// The narrower vectors, but as many registers.
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            fn avx512_half<T: Real>($($argument: $type),*) {
                $body::<T, <T as Vectors>::Avx, $($wide),*>($($argument),*);
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2<T: Real>($($argument: $type),*) {
                $body::<T, <T as Vectors>::Avx, $($narrow),*>($($argument),*);
            }
            match Isa::get() {
                // SAFETY: `Isa::get` names only what the CPU has.
                #[cfg(target_arch = "x86_64")]
                #[allow(unsafe_code)]
                Isa::Avx512 | Isa::Amx if $lanes == 16 => unsafe { avx512::<T>($($argument),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                #[allow(unsafe_code)]
                Isa::Avx512 | Isa::Amx => unsafe { avx512_half::<T>($($argument),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                #[allow(unsafe_code)]
                Isa::Avx2 => unsafe { avx2::<T>($($argument),*) },
                Isa::Neon => $body::<T, <T as Vectors>::Fused, $($narrow),*>($($argument),*),
                _ => $body::<T, <T as Vectors>::Portable, $($narrow),*>($($argument),*),
            }
        }
    };
}
pub(super) use per_isa_tiled;

/// Some items and where their elements lie: `values[item · i + step · s + lane]`.
#[derive(Clone, Copy)]
pub struct Factor<'a, T> {
    pub values: &'a [T],
    pub items: usize,
    pub item: usize,
    pub step: usize,
}

per_isa_tiled!(
    /// `out[i][j][part][lane] = Σ_s a[i][s][lane] · b[j][s][part][lane]` for the lanes of one vector: every item `i` of `a`, and the
    /// items `j` of `b`, which lie one after the other. In `out`, they and parts are as far apart as `strides` says.
    fn contract = contract_all(
        lanes: usize,
        a: Factor<T>,
        b: &[T],
        items: usize,
        steps: usize,
        out: &mut [T],
        strides: [usize; 3],
    ),
    avx512: (4, 3), others: (3, 2)
);

#[inline(always)]
fn contract_all<T: Real, V: Vector<T>, const I: usize, const J: usize>(
    a: Factor<T>,
    b: &[T],
    items: usize,
    steps: usize,
    out: &mut [T],
    strides: [usize; 3],
) {
    let mut item = 0;
    macro_rules! rows {
        ($row:ident, $height:expr, $width:expr) => {
            while a.items - $row >= $height {
                let a = Factor { values: &a.values[$row * a.item..], ..a };
                let b = &b[item * steps * 2 * V::LANES..];
                let out = &mut out[$row * strides[0] + item * strides[1]..];
                contract_tile::<T, V, { $height }, { $width }>(a, b, steps, out, strides);
                $row += $height;
            }
        };
    }
    macro_rules! items {
        ($width:expr, $height:expr) => {
            while items - item >= $width {
                let mut row = 0;
                rows!(row, $height, $width);
                rows!(row, 1, $width);
                item += $width;
            }
        };
    }
    items!(J, I);
    items!(2, I);
    // One item alone has registers for more rows.
    items!(1, 4);
}

#[inline(always)]
fn contract_tile<T: Real, V: Vector<T>, const I: usize, const J: usize>(
    a: Factor<T>,
    b: &[T],
    steps: usize,
    out: &mut [T],
    strides: [usize; 3],
) {
    let last = (I - 1) * a.item + steps.saturating_sub(1) * a.step + V::LANES;
    assert!((steps == 0 || last <= a.values.len()) && J * steps * 2 * V::LANES <= b.len());
    let mut sums = [[[V::zero(); 2]; J]; I];
    for s in 0..steps {
        for (i, sums) in sums.iter_mut().enumerate() {
            // SAFETY: the assertion is of the last of them. A check of each took as long as the product.
            #[allow(unsafe_code)]
            let row = unsafe { V::load_at(a.values, i * a.item + s * a.step) };
            for (j, sums) in sums.iter_mut().enumerate() {
                for (part, sum) in sums.iter_mut().enumerate() {
                    // SAFETY: as above.
                    #[allow(unsafe_code)]
                    let item = unsafe { V::load_at(b, ((j * steps + s) * 2 + part) * V::LANES) };
                    *sum = row.multiply_add(item, *sum);
                }
            }
        }
    }
    for (i, sums) in sums.iter().enumerate() {
        for (j, sums) in sums.iter().enumerate() {
            for (part, sum) in sums.iter().enumerate() {
                sum.store(&mut out[i * strides[0] + j * strides[1] + part * strides[2]..]);
            }
        }
    }
}

/// A small matrix whose columns lie in vectors: `[vector][row][lane]`, zero beyond its columns.
pub struct Matrix<T> {
    values: Vec<T>,
    rows: usize,
    columns: usize,
    lanes: usize,
}

impl<T: Real> Matrix<T> {
    pub fn new(rows: usize, columns: usize, value: impl Fn(usize, usize) -> f64) -> Self {
        let lanes = lanes(columns);
        let mut values = vec![T::default(); columns.next_multiple_of(lanes) * rows];
        for (index, out) in values.iter_mut().enumerate() {
            let column = index / lanes / rows * lanes + index % lanes;
            if column < columns {
                *out = <T as crate::codec::Scalar>::from_f64(value(index / lanes % rows, column));
            }
        }
        Self { values, rows, columns, lanes }
    }

    /// Columns, with those that fill the last vector.
    pub fn width(&self) -> usize {
        self.columns.next_multiple_of(self.lanes)
    }

    /// `out[m] = input[m] · matrix` for `count` rows that lie `input_stride` and `out_stride` apart.
    pub fn apply(&self, input: &[T], input_stride: usize, out: &mut [T], out_stride: usize, count: usize) {
        for (vector, matrix) in self.values.chunks_exact((self.rows * self.lanes).max(1)).enumerate() {
            multiply(self.lanes, (input, input_stride), matrix, &mut out[vector * self.lanes..], out_stride, count);
        }
    }
}

per_isa_tiled!(
    /// `out[m][lane] = Σ_k a[m][k] · matrix[k][lane]` for `count` rows; those of `a` and `out` lie some way apart.
    fn multiply = multiply_all(
        lanes: usize,
        a: (&[T], usize),
        matrix: &[T],
        out: &mut [T],
        out_stride: usize,
        count: usize,
    ),
    avx512: (12), others: (12)
);

#[inline(always)]
fn multiply_all<T: Real, V: Vector<T>, const M: usize>(
    (a, a_stride): (&[T], usize),
    matrix: &[T],
    out: &mut [T],
    out_stride: usize,
    count: usize,
) {
    let mut row = 0;
    macro_rules! rows {
        ($height:expr) => {
            while count - row >= $height {
                let (a, out) = (&a[row * a_stride..], &mut out[row * out_stride..]);
                multiply_tile::<T, V, { $height }>(a, a_stride, matrix, out, out_stride);
                row += $height;
            }
        };
    }
    rows!(M);
    rows!(4);
    rows!(1);
}

#[inline(always)]
fn multiply_tile<T: Real, V: Vector<T>, const M: usize>(
    a: &[T],
    a_stride: usize,
    matrix: &[T],
    out: &mut [T],
    out_stride: usize,
) {
    let depth = matrix.len() / V::LANES;
    let mut sums = [V::zero(); M];
    assert!(depth == 0 || (M - 1) * a_stride + depth <= a.len());
    for k in 0..depth {
        let row = V::load(&matrix[k * V::LANES..]);
        for (m, sum) in sums.iter_mut().enumerate() {
            // SAFETY: the assertion is of the last of them.
            #[allow(unsafe_code)]
            let x = unsafe { *a.get_unchecked(m * a_stride + k) };
            *sum = V::splat(x).multiply_add(row, *sum);
        }
    }
    for (m, sum) in sums.iter().enumerate() {
        sum.store(&mut out[m * out_stride..]);
    }
}

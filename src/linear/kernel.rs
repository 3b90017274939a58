//! The inner product of activations with one decoded block, compiled once per instruction set.

use crate::codec::{Isa, Real};

/// `c[m][..N] += Σ_p a[m][p] · b[p][..N]` for rows `m` and `p` below `depth`, with `N` the row length of `b`. The sum over
/// `p` is in order and starts from zero, so a row's result does not depend on the others.
pub struct BlockProduct<'a, T> {
    pub a: &'a [T],
    pub a_stride: usize,
    pub depth: usize,
    /// A block's worth.
    pub b: &'a [T],
    pub c: &'a mut [T],
    pub c_stride: usize,
    pub rows: usize,
}

impl<T: Real> BlockProduct<'_, T> {
    /// Runs the product on the best instruction set.
    pub fn run<const N: usize>(self) {
        let Self { a, a_stride, depth, b, c, c_stride, rows } = self;
        match Isa::get() {
            // SAFETY: `Isa::get` names only what the CPU has.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Isa::Avx512 | Isa::Amx => unsafe { avx512::<T, N>(a, a_stride, depth, b, c, c_stride, rows) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Isa::Avx2 => unsafe { avx2::<T, N>(a, a_stride, depth, b, c, c_stride, rows) },
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => neon::<T, N>(a, a_stride, depth, b, c, c_stride, rows),
            _ => generic::<T, N>(a, a_stride, depth, b, c, c_stride, rows),
        }
    }
}

/// The product in tiles of `$m` rows by `$strip` columns, whose sums stay in registers. The fields are arguments here: from
/// a struct the compiler could not tell that they do not overlap, and the tiles came out ten times slower.
macro_rules! tiled {
    ($(#[$attribute:meta])* $name:ident, $m:literal x $strip:literal, fused: $fused:literal) => {
        $(#[$attribute])*
        fn $name<T: Real, const N: usize>(
            a: &[T],
            a_stride: usize,
            depth: usize,
            b: &[T],
            c: &mut [T],
            c_stride: usize,
            rows: usize,
        ) {
            let mut row = 0;
            macro_rules! rows_of {
                ($height:expr) => {{
                    let (a, c) = (&a[row * a_stride..], &mut c[row * c_stride..]);
                    tile::<T, N, { if $height <= $m { $height } else { 1 } }, $strip, $fused>(a, a_stride, depth, b, c, c_stride);
                    row += $height;
                }};
            }
            while row < rows {
                // As many rows at a time as registers hold sums of, but no one or two at the end that a better cut avoids:
                // their sums wait for each other.
                match rows - row {
                    left if left >= $m && !(1..=2).contains(&(left - $m)) => rows_of!($m),
                    left if left >= 8 && $m > 8 => rows_of!(8),
                    4.. if $m >= 4 => rows_of!(4),
                    2.. => rows_of!(2),
                    _ => rows_of!(1),
                }
            }
        }
    };
}

tiled!(generic, 4 x 16, fused: false);
tiled!(
    /// In f32, 24 registers of sums, of 32.
    #[cfg(target_arch = "aarch64")]
    neon, 6 x 16, fused: true
);
tiled!(
    /// In f32, twelve registers of sums, two of b, one broadcast.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    avx2, 6 x 16, fused: true
);
tiled!(
    /// In f32, 24 registers of sums, of 32.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx2,fma")]
    avx512, 12 x 32, fused: true
);

/// `M` rows of the product. `FUSED` says whether the target has a fused multiply-add; without one, `mul_add` would be a
/// library call.
#[inline(always)]
fn tile<T: Real, const N: usize, const M: usize, const STRIP: usize, const FUSED: bool>(
    a: &[T],
    a_stride: usize,
    depth: usize,
    b: &[T],
    c: &mut [T],
    c_stride: usize,
) {
    let inputs: [&[T]; M] = std::array::from_fn(|m| &a[m * a_stride..m * a_stride + depth]);
    for strip in (0..N).step_by(STRIP) {
        let mut sums = [[T::default(); STRIP]; M];
        for (p, b) in b.chunks_exact(N).take(depth).enumerate() {
            let b = &b[strip..strip + STRIP];
            for (sums, input) in sums.iter_mut().zip(&inputs) {
                let x = input[p];
                for (sum, &b) in sums.iter_mut().zip(b) {
                    *sum = if FUSED { x.fused_multiply_add(b, *sum) } else { x * b + *sum };
                }
            }
        }
        for (m, sums) in sums.iter().enumerate() {
            let c = &mut c[m * c_stride + strip..m * c_stride + strip + STRIP];
            c.iter_mut().zip(sums).for_each(|(c, &sum)| *c += sum);
        }
    }
}

//! The inner product of a few activations with one decoded block, compiled once per instruction set.

use crate::codec::{BLOCK, Real};

/// `c[m][..N] += Σ_p a[m][p] · b[p][..N]` for every row `m` of `a`: the sum over `p` is in order and starts from zero, so
/// a row's result does not depend on the others. `a` is `depth` wide at stride `a_stride`, `c` at stride `c_stride`.
pub fn multiply_block<T: Real, const N: usize>(
    a: &[T],
    a_stride: usize,
    depth: usize,
    b: &[T; BLOCK],
    c: &mut [T],
    c_stride: usize,
    rows: usize,
) {
    match isa() {
        // SAFETY: `isa` found the instructions on this CPU.
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        Isa::Avx512 => unsafe { avx512::<T, N>(a, a_stride, depth, b, c, c_stride, rows) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        Isa::Avx2 => unsafe { avx2::<T, N>(a, a_stride, depth, b, c, c_stride, rows) },
        Isa::Generic => tiled::<T, N, 4, 16, false>(a, a_stride, depth, b, c, c_stride, rows),
    }
}

#[derive(Clone, Copy)]
enum Isa {
    Generic,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// The best instruction set that this CPU has.
fn isa() -> Isa {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            return Isa::Avx512;
        }
        if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
            return Isa::Avx2;
        }
    }
    Isa::Generic
}

/// The name of the instruction set that products run on.
pub fn instruction_set() -> &'static str {
    match isa() {
        Isa::Generic => "generic",
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => "avx2",
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => "avx512",
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2<T: Real, const N: usize>(
    a: &[T],
    a_stride: usize,
    depth: usize,
    b: &[T; BLOCK],
    c: &mut [T],
    c_stride: usize,
    rows: usize,
) {
    // 6 rows by 2 registers of f32: twelve sums, two of b, one broadcast.
    tiled::<T, N, 6, 16, true>(a, a_stride, depth, b, c, c_stride, rows);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
fn avx512<T: Real, const N: usize>(
    a: &[T],
    a_stride: usize,
    depth: usize,
    b: &[T; BLOCK],
    c: &mut [T],
    c_stride: usize,
    rows: usize,
) {
    // 12 rows by 2 registers of f32: 24 sums of 32 registers.
    tiled::<T, N, 12, 32, true>(a, a_stride, depth, b, c, c_stride, rows);
}

/// The product in tiles of `M` rows by `STRIP` columns, whose sums stay in registers. `FUSED` says whether the target has
/// a fused multiply-add; without one, `mul_add` would be a library call.
#[inline(always)]
fn tiled<T: Real, const N: usize, const M: usize, const STRIP: usize, const FUSED: bool>(
    a: &[T],
    a_stride: usize,
    depth: usize,
    b: &[T; BLOCK],
    c: &mut [T],
    c_stride: usize,
    rows: usize,
) {
    let mut row = 0;
    while row + M <= rows {
        tile::<T, N, M, STRIP, FUSED>(&a[row * a_stride..], a_stride, depth, b, &mut c[row * c_stride..], c_stride);
        row += M;
    }
    while row + 2 <= rows {
        tile::<T, N, 2, STRIP, FUSED>(&a[row * a_stride..], a_stride, depth, b, &mut c[row * c_stride..], c_stride);
        row += 2;
    }
    if row < rows {
        tile::<T, N, 1, STRIP, FUSED>(&a[row * a_stride..], a_stride, depth, b, &mut c[row * c_stride..], c_stride);
    }
}

#[inline(always)]
fn tile<T: Real, const N: usize, const M: usize, const STRIP: usize, const FUSED: bool>(
    a: &[T],
    a_stride: usize,
    depth: usize,
    b: &[T; BLOCK],
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

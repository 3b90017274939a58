//! The inner product of activations with one decoded block, compiled once per instruction set.

use crate::codec::{BLOCK, Real};

/// `c[m][..N] += Σ_p a[m][p] · b[p][..N]` for rows `m` and `p` below `depth`, with `N` the row length of `b`. The sum over
/// `p` is in order and starts from zero, so a row's result does not depend on the others.
pub struct BlockProduct<'a, T> {
    pub a: &'a [T],
    pub a_stride: usize,
    pub depth: usize,
    pub b: &'a [T; BLOCK],
    pub c: &'a mut [T],
    pub c_stride: usize,
    pub rows: usize,
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

impl<T: Real> BlockProduct<'_, T> {
    /// Runs the product on the best instruction set.
    pub fn run<const N: usize>(self) {
        match isa() {
            // SAFETY: `isa` found the instructions on this CPU.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Isa::Avx512 => unsafe { self.avx512::<N>() },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Isa::Avx2 => unsafe { self.avx2::<N>() },
            Isa::Generic => self.tiled::<N, 4, 16, false>(),
        }
    }

    /// 6 rows by 2 registers of f32: twelve sums, two of b, one broadcast.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    fn avx2<const N: usize>(self) {
        self.tiled::<N, 6, 16, true>();
    }

    /// 12 rows by 2 registers of f32: 24 sums of 32 registers.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx2,fma")]
    fn avx512<const N: usize>(self) {
        self.tiled::<N, 12, 32, true>();
    }

    /// In tiles of `M` rows by `STRIP` columns, whose sums stay in registers. `FUSED` says whether the target has a fused
    /// multiply-add; without one, `mul_add` would be a library call.
    #[inline(always)]
    fn tiled<const N: usize, const M: usize, const STRIP: usize, const FUSED: bool>(mut self) {
        let mut row = 0;
        while row + M <= self.rows {
            self.tile::<N, M, STRIP, FUSED>(row);
            row += M;
        }
        while row + 2 <= self.rows {
            self.tile::<N, 2, STRIP, FUSED>(row);
            row += 2;
        }
        if row < self.rows {
            self.tile::<N, 1, STRIP, FUSED>(row);
        }
    }

    #[inline(always)]
    fn tile<const N: usize, const M: usize, const STRIP: usize, const FUSED: bool>(&mut self, row: usize) {
        let inputs: [&[T]; M] = std::array::from_fn(|m| &self.a[(row + m) * self.a_stride..][..self.depth]);
        for strip in (0..N).step_by(STRIP) {
            let mut sums = [[T::default(); STRIP]; M];
            for (p, b) in self.b.chunks_exact(N).take(self.depth).enumerate() {
                let b = &b[strip..strip + STRIP];
                for (sums, input) in sums.iter_mut().zip(&inputs) {
                    let x = input[p];
                    for (sum, &b) in sums.iter_mut().zip(b) {
                        *sum = if FUSED { x.fused_multiply_add(b, *sum) } else { x * b + *sum };
                    }
                }
            }
            for (m, sums) in sums.iter().enumerate() {
                let c = &mut self.c[(row + m) * self.c_stride + strip..][..STRIP];
                c.iter_mut().zip(sums).for_each(|(c, &sum)| *c += sum);
            }
        }
    }
}

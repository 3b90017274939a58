//! AVX and AVX-512.

use std::arch::x86_64::*;

use super::{Array, MOST_LANES, Tile, Vector};

macro_rules! intrinsics {
    (
        $name:ident($vector:ty), $lanes:literal lanes, $registers:literal registers, $transpose:ident,
        $splat:ident, $load:ident, $store:ident, $add:ident, $subtract:ident, $multiply:ident, $multiply_add:ident,
        $subtract_from:ident
    ) => {
        #[derive(Clone, Copy)]
        pub struct $name($vector);

        // SAFETY, of every block: the CPU has the instruction (see the trait), and slices the lanes.
        impl Vector<f32> for $name {
            const LANES: usize = $lanes;
            const REGISTERS: usize = $registers;
            type Lane = Array<f32, 1, $registers, true>;

            #[inline(always)]
            fn splat(value: f32) -> Self {
                Self(unsafe { $splat(value) })
            }

            #[inline(always)]
            fn load(from: &[f32]) -> Self {
                let from = &from[..$lanes];
                Self(unsafe { $load(from.as_ptr()) })
            }

            #[inline(always)]
            unsafe fn load_at(from: &[f32], index: usize) -> Self {
                Self(unsafe { $load(from.as_ptr().add(index)) })
            }

            #[inline(always)]
            fn store(self, to: &mut [f32]) {
                let to = &mut to[..$lanes];
                unsafe { $store(to.as_mut_ptr(), self.0) }
            }

            #[inline(always)]
            unsafe fn store_to(self, to: *mut f32) {
                unsafe { $store(to, self.0) }
            }

            #[inline(always)]
            fn prefetch(from: &[f32], index: usize) {
                unsafe { _mm_prefetch::<_MM_HINT_T0>(from.as_ptr().wrapping_add(index).cast()) };
            }

            #[inline(always)]
            fn add(self, b: Self) -> Self {
                Self(unsafe { $add(self.0, b.0) })
            }

            #[inline(always)]
            fn subtract(self, b: Self) -> Self {
                Self(unsafe { $subtract(self.0, b.0) })
            }

            #[inline(always)]
            fn multiply(self, b: Self) -> Self {
                Self(unsafe { $multiply(self.0, b.0) })
            }

            #[inline(always)]
            fn multiply_add(self, b: Self, sum: Self) -> Self {
                Self(unsafe { $multiply_add(self.0, b.0, sum.0) })
            }

            #[inline(always)]
            fn subtract_from(self, b: Self, sum: Self) -> Self {
                Self(unsafe { $subtract_from(self.0, b.0, sum.0) })
            }

            #[inline(always)]
            fn transpose(rows: &mut Tile<Self>) {
                let mut vectors: [$vector; $lanes] = std::array::from_fn(|row| rows[row].0);
                unsafe { $transpose(&mut vectors) };
                rows.iter_mut().zip(vectors).for_each(|(row, vector)| row.0 = vector);
            }
        }
    };
}

intrinsics!(
    Avx(__m256), 8 lanes, 16 registers, transpose_256,
    _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_add_ps, _mm256_sub_ps, _mm256_mul_ps, _mm256_fmadd_ps,
    _mm256_fnmadd_ps
);
intrinsics!(
    Avx512(__m512), 16 lanes, 32 registers, transpose_512,
    _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_add_ps, _mm512_sub_ps, _mm512_mul_ps, _mm512_fmadd_ps,
    _mm512_fnmadd_ps
);

const _: () = assert!(Avx512::LANES <= MOST_LANES);

/// Of each quarter (128 bits) of four rows apart: columns become rows.
macro_rules! transpose_quarters {
    ($rows:ident, $low:ident, $high:ident, $low_pairs:ident, $high_pairs:ident, $cast:ident, $back:ident) => {
        for rows in $rows.as_chunks_mut::<4>().0 {
            let [a, b, c, d] = *rows;
            let [ab, cd] = [$cast($low(a, b)), $cast($low(c, d))];
            let [ab_high, cd_high] = [$cast($high(a, b)), $cast($high(c, d))];
            *rows =
                [$low_pairs(ab, cd), $high_pairs(ab, cd), $low_pairs(ab_high, cd_high), $high_pairs(ab_high, cd_high)]
                    .map(|row| $back(row));
        }
    };
}

/// # Safety
/// The CPU has AVX.
#[inline(always)]
unsafe fn transpose_256(rows: &mut [__m256; 8]) {
    // SAFETY: by the caller's promise.
    unsafe {
        transpose_quarters!(
            rows,
            _mm256_unpacklo_ps,
            _mm256_unpackhi_ps,
            _mm256_unpacklo_pd,
            _mm256_unpackhi_pd,
            _mm256_castps_pd,
            _mm256_castpd_ps
        );
        for column in 0..4 {
            let (a, b) = (rows[column], rows[column + 4]);
            rows[column] = _mm256_permute2f128_ps::<0x20>(a, b);
            rows[column + 4] = _mm256_permute2f128_ps::<0x31>(a, b);
        }
    }
}

/// # Safety
/// The CPU has AVX-512.
#[inline(always)]
unsafe fn transpose_512(rows: &mut [__m512; 16]) {
    // SAFETY: by the caller's promise.
    unsafe {
        transpose_quarters!(
            rows,
            _mm512_unpacklo_ps,
            _mm512_unpackhi_ps,
            _mm512_unpacklo_pd,
            _mm512_unpackhi_pd,
            _mm512_castps_pd,
            _mm512_castpd_ps
        );
        for column in 0..4 {
            // Quarters 0 and 2 of two rows, and 1 and 3; then of those.
            let [a, b, c, d] = [0, 4, 8, 12].map(|row| rows[row + column]);
            let [even_ab, even_cd] = [_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(c, d)];
            let [odd_ab, odd_cd] = [_mm512_shuffle_f32x4::<0xdd>(a, b), _mm512_shuffle_f32x4::<0xdd>(c, d)];
            rows[column] = _mm512_shuffle_f32x4::<0x88>(even_ab, even_cd);
            rows[column + 4] = _mm512_shuffle_f32x4::<0x88>(odd_ab, odd_cd);
            rows[column + 8] = _mm512_shuffle_f32x4::<0xdd>(even_ab, even_cd);
            rows[column + 12] = _mm512_shuffle_f32x4::<0xdd>(odd_ab, odd_cd);
        }
    }
}

//! The inner loops of `sparse.rs`: sums of products of complex numbers that are picked from anywhere, for many rows at a time.
//!
//! Spectra of several rows lie in a *panel*, `[frequency][real, imaginary][row]`, so that lanes are rows: which frequencies
//! meet is the same for all of them. A row alone is a panel of width 1, and its sums have the bits of a lane's.

use std::ops::Range;

use super::Real;
use super::kernel::per_isa_tiled;
use super::vector::{Vector, Vectors};
use crate::codec::Isa;

/// Rows of a panel that is multiplied.
pub const WIDTH: usize = 16;
/// Rows of panels that are multiplied with one another, row by row, and summed.
pub const OUTER_WIDTH: usize = 32;
/// No vector has more lanes.
const MOST_LANES: usize = 16;

/// What one frequency of a product has from another, z: f₀·Re z + f₁·Im z as its real part and f₂·Im z + f₃·Re z as its imaginary
/// part.
#[derive(Clone, Copy)]
pub struct Term<T> {
    pub at: u32,
    pub factors: [T; 4],
}

/// The terms of each frequency, one frequency's after another's.
pub struct Terms<T> {
    pub starts: Vec<usize>,
    pub terms: Vec<Term<T>>,
}

/// Two frequencies that meet: one of the results and one of the inputs.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// Of a frequency beyond the half, the one whose conjugate it is, and [`Self::CONJUGATE`].
    marked_u: u32,
    pub v: u32,
}

impl Entry {
    const CONJUGATE: u32 = 1 << 31;

    /// Both are below 2³¹.
    pub fn new(u: u32, v: u32, conjugate: bool) -> Self {
        Self { marked_u: if conjugate { u | Self::CONJUGATE } else { u }, v }
    }

    #[inline(always)]
    pub fn u(self) -> u32 {
        self.marked_u & !Self::CONJUGATE
    }

    /// −1 where the frequency is a conjugate, else 1.
    #[inline(always)]
    pub fn sign<T: Real>(self) -> T {
        if self.marked_u & Self::CONJUGATE == 0 { T::one() } else { -T::one() }
    }
}

per_isa_tiled!(
    /// The frequencies `targets` of a product, which `out` has alone, of a panel of `width` rows: 1 or [`WIDTH`].
    fn sums_of = sums_of_all(
        lanes: usize,
        width: usize,
        terms: &Terms<T>,
        targets: Range<usize>,
        panel: &[T],
        out: &mut [T],
    ),
    avx512: (1), others: (2)
);

/// See [`sums_of`].
pub fn multiply<T: Real>(width: usize, terms: &Terms<T>, targets: Range<usize>, panel: &[T], out: &mut [T]) {
    debug_assert!(width == 1 || width == WIDTH);
    sums_of(WIDTH, width, terms, targets, panel, out);
}

#[inline(always)]
fn sums_of_all<T: Real, V: Vector<T>, const N: usize>(
    width: usize,
    terms: &Terms<T>,
    targets: Range<usize>,
    panel: &[T],
    out: &mut [T],
) {
    if width == 1 {
        sums_of_width::<T, V::Lane, 1>(terms, targets, panel, out);
    } else {
        sums_of_width::<T, V, N>(terms, targets, panel, out);
    }
}

#[inline(always)]
fn sums_of_width<T: Real, V: Vector<T>, const N: usize>(
    terms: &Terms<T>,
    targets: Range<usize>,
    panel: &[T],
    out: &mut [T],
) {
    let (lanes, width) = (V::LANES, N * V::LANES);
    let one = V::splat(T::one());
    for (target, out) in targets.zip(out.chunks_exact_mut(2 * width)) {
        // Four, so that a product waits for one sum and not for two.
        let mut sums = [[V::zero(); 4]; N];
        for term in &terms.terms[terms.starts[target]..terms.starts[target + 1]] {
            let z = &panel[term.at as usize * 2 * width..][..2 * width];
            let factors = term.factors.map(V::splat);
            for (i, sums) in sums.iter_mut().enumerate() {
                let (re, im) = (V::load(&z[i * lanes..]), V::load(&z[width + i * lanes..]));
                sums[0] = factors[0].multiply_add(re, sums[0]);
                sums[1] = factors[1].multiply_add(im, sums[1]);
                sums[2] = factors[2].multiply_add(im, sums[2]);
                sums[3] = factors[3].multiply_add(re, sums[3]);
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            one.multiply_add(sums[0], sums[1]).store(&mut out[i * lanes..]);
            one.multiply_add(sums[2], sums[3]).store(&mut out[width + i * lanes..]);
        }
    }
}

per_isa_tiled!(
    /// Adds Σ ĝ_u·conj(x̂_v) over two panels' rows, of `width` 1 or [`OUTER_WIDTH`], to each entry's pair of `out`.
    fn outer_of = outer_of_all(lanes: usize, width: usize, entries: &[Entry], g: &[T], x: &[T], out: &mut [T]),
    avx512: (2), others: (4)
);

/// See [`outer_of`].
pub fn add_outer<T: Real>(width: usize, entries: &[Entry], g: &[T], x: &[T], out: &mut [T]) {
    debug_assert!(width == 1 || width == OUTER_WIDTH);
    outer_of(WIDTH, width, entries, g, x, out);
}

#[inline(always)]
fn outer_of_all<T: Real, V: Vector<T>, const N: usize>(
    width: usize,
    entries: &[Entry],
    g: &[T],
    x: &[T],
    out: &mut [T],
) {
    if width == 1 {
        outer_of_width::<T, V::Lane, 1>(entries, g, x, out);
    } else {
        outer_of_width::<T, V, N>(entries, g, x, out);
    }
}

#[inline(always)]
fn outer_of_width<T: Real, V: Vector<T>, const N: usize>(entries: &[Entry], g: &[T], x: &[T], out: &mut [T]) {
    let (lanes, width) = (V::LANES, N * V::LANES);
    let minus = V::splat(-T::one());
    for (entry, out) in entries.iter().zip(out.chunks_exact_mut(2)) {
        let g = &g[entry.u() as usize * 2 * width..][..2 * width];
        let x = &x[entry.v as usize * 2 * width..][..2 * width];
        let mut sums = [V::zero(); 4];
        for i in 0..N {
            let (g_re, g_im) = (V::load(&g[i * lanes..]), V::load(&g[width + i * lanes..]));
            let (x_re, x_im) = (V::load(&x[i * lanes..]), V::load(&x[width + i * lanes..]));
            sums[0] = g_re.multiply_add(x_re, sums[0]);
            sums[1] = g_im.multiply_add(x_im, sums[1]);
            sums[2] = g_im.multiply_add(x_re, sums[2]);
            sums[3] = g_re.multiply_add(x_im, sums[3]);
        }
        let sign = V::splat(entry.sign());
        out[0] += total(sign.multiply_add(sums[1], sums[0]));
        out[1] += total(sign.multiply_add(sums[2], minus.multiply_add(sums[3], V::zero())));
    }
}

/// The sum of a vector's lanes.
#[inline(always)]
fn total<T: Real, V: Vector<T>>(vector: V) -> T {
    if V::LANES == 1 {
        let mut value = [T::default()];
        vector.store(&mut value);
        return value[0];
    }
    let mut values = [T::default(); MOST_LANES];
    vector.store(&mut values);
    let mut half = V::LANES / 2;
    while half > 0 {
        for i in 0..half {
            values[i] += values[i + half];
        }
        half /= 2;
    }
    values[0]
}

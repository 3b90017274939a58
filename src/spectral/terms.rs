//! The inner loops of `sparse.rs`: sums of products of complex numbers that are picked from anywhere, for many rows at a time.
//!
//! Spectra of several rows lie in a *panel*, `[frequency][real, imaginary][row]`, so that lanes are rows: which frequencies
//! meet is the same for all of them. A row alone is a panel of width 1, and its sums have the bits of a lane's.

use std::ops::Range;

use super::Real;
use super::vector::{Kernel, MOST_LANES, Vector, dispatch, lanes};

/// Rows of a panel that is multiplied.
pub const WIDTH: usize = 16;
/// Rows of panels that are multiplied with one another, row by row, and summed.
pub const OUTER_WIDTH: usize = 32;

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

/// Calls `$function` of vectors side by side that have `$width` lanes together.
macro_rules! side_by_side {
    ($width:expr, $function:ident::<$type:ty, $vector:ty>($($argument:expr),*)) => {
        match $width / <$vector>::LANES {
            1 => $function::<$type, $vector, 1>($($argument),*),
            2 => $function::<$type, $vector, 2>($($argument),*),
            4 => $function::<$type, $vector, 4>($($argument),*),
            8 => $function::<$type, $vector, 8>($($argument),*),
            _ => $function::<$type, $vector, 16>($($argument),*),
        }
    };
}

/// The frequencies `targets` of a product, which `out` has alone, of a panel of `width` rows: 1 or [`WIDTH`].
pub fn multiply<T: Real>(width: usize, terms: &Terms<T>, targets: Range<usize>, panel: &[T], out: &mut [T]) {
    debug_assert!(width == 1 || width == WIDTH);
    dispatch(lanes::<T>(usize::MAX), Multiply { width, terms, targets, panel, out });
}

struct Multiply<'a, T> {
    width: usize,
    terms: &'a Terms<T>,
    targets: Range<usize>,
    panel: &'a [T],
    out: &'a mut [T],
}

impl<T: Real> Kernel<T> for Multiply<'_, T> {
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let Self { width, terms, targets, panel, out } = self;
        if width == 1 {
            sums_of_width::<T, V::Lane, 1>(terms, targets, panel, out);
        } else {
            side_by_side!(WIDTH, sums_of_width::<T, V>(terms, targets, panel, out));
        }
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
    for (target, out) in targets.zip(out.chunks_exact_mut(2 * width)) {
        // Four, so that a product waits for one sum and not for two.
        let mut sums = [[V::splat(T::default()); 4]; N];
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
            sums[0].add(sums[1]).store(&mut out[i * lanes..]);
            sums[2].add(sums[3]).store(&mut out[width + i * lanes..]);
        }
    }
}

/// Adds Σ ĝ_u·conj(x̂_v) over two panels' rows, of `width` 1 or [`OUTER_WIDTH`], to each entry's pair of `out`.
pub fn add_outer<T: Real>(width: usize, entries: &[Entry], g: &[T], x: &[T], out: &mut [T]) {
    debug_assert!(width == 1 || width == OUTER_WIDTH);
    dispatch(lanes::<T>(usize::MAX), AddOuter { width, entries, g, x, out });
}

struct AddOuter<'a, T> {
    width: usize,
    entries: &'a [Entry],
    g: &'a [T],
    x: &'a [T],
    out: &'a mut [T],
}

impl<T: Real> Kernel<T> for AddOuter<'_, T> {
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let Self { width, entries, g, x, out } = self;
        if width == 1 {
            outer_of_width::<T, V::Lane, 1>(entries, g, x, out);
        } else {
            side_by_side!(OUTER_WIDTH, outer_of_width::<T, V>(entries, g, x, out));
        }
    }
}

#[inline(always)]
fn outer_of_width<T: Real, V: Vector<T>, const N: usize>(entries: &[Entry], g: &[T], x: &[T], out: &mut [T]) {
    let (lanes, width) = (V::LANES, N * V::LANES);
    for (entry, out) in entries.iter().zip(out.chunks_exact_mut(2)) {
        let g = &g[entry.u() as usize * 2 * width..][..2 * width];
        let x = &x[entry.v as usize * 2 * width..][..2 * width];
        let mut sums = [V::splat(T::default()); 4];
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
        out[1] += total(sign.multiply_add(sums[2], V::splat(T::default()).subtract(sums[3])));
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

//! How the spectra of a table of blocks, `items` by `steps`, lie for their products, and the sums that are made of those.
//!
//! Of a spectrum there are three planes of [`Transform::half`] numbers: real plus imaginary parts, real, and imaginary parts. The product of
//! two complex numbers is then made of three real ones (Karatsuba):
//!
//!     re = re·re′ − im·im′        im = (re + im)·(re′ + im′) − re·re′ − im·im′
//!
//! so a plane of one factor meets the same of the other and no more. What stands in the place of frequency 0 are two real
//! numbers, which are multiplied each by itself; [`Fold`] sees to that.

use super::Real;
use super::transform::Transform;
use super::vector::{self, MOST_LANES, Vector, store_part};
use crate::codec;
use crate::parallel::DisjointSlice;

/// Planes of a spectrum.
pub const PLANES: usize = 3;

/// Where the spectra's vectors lie: `[plane][vector][item][step][lane]`. Where spectra are short, a vector has those of several
/// steps side by side.
#[derive(Clone, Copy)]
pub struct Planes {
    pub half: usize,
    pub lanes: usize,
    /// Vectors of a plane of one spectrum.
    pub vectors: usize,
    /// Steps in one vector.
    pub together: usize,
    /// Vectors that hold one item's steps.
    pub steps: usize,
    /// Numbers from one item, vector of a spectrum and plane to the next.
    pub item: usize,
    pub vector: usize,
    pub plane: usize,
    /// Whether the last vector of steps is full.
    full: bool,
}

impl Planes {
    pub fn new<T: Real>(transform: &Transform<T>, items: usize, steps: usize) -> Self {
        let half = transform.half();
        let lanes = vector::lanes::<T>(half);
        let together = (lanes / half).max(1);
        let (vectors, full) = (half.div_ceil(lanes), steps.is_multiple_of(together));
        let steps = steps.div_ceil(together);
        let item = steps * lanes;
        let vector = items * item;
        Self { half, lanes, vectors, together, steps, item, vector, plane: vectors * vector, full }
    }

    /// Numbers of all planes.
    pub fn len(&self) -> usize {
        PLANES * self.plane
    }

    /// Numbers of one pair's sums.
    pub fn spectrum(&self) -> usize {
        PLANES * self.vectors * self.lanes
    }

    /// Prepares a place for spectra, whatever is in it.
    pub fn clear<T: Real>(&self, values: &mut [T]) {
        if !self.full {
            values.fill(T::default());
        }
    }

    /// Where a spectrum begins.
    pub fn start(&self, item: usize, step: usize) -> usize {
        match self.together {
            1 => item * self.item + step * self.lanes,
            together => item * self.item + step / together * self.lanes + step % together * self.half,
        }
    }

    /// Writes a vector of the spectrum that begins at `start`. No other call may write it.
    #[inline(always)]
    pub fn put<T: Real, V: Vector<T>>(&self, values: &DisjointSlice<T>, start: usize, vector: usize, re: V, im: V) {
        if self.together == 1 {
            return self.put_whole(values, start, vector, re, im);
        }
        for (plane, numbers) in [re.add(im), re, im].iter().enumerate() {
            let start = start + plane * self.plane;
            // SAFETY: by the caller's promise.
            #[allow(unsafe_code)]
            let out = unsafe { values.range_mut(start..start + self.half) };
            store_part(*numbers, out);
        }
    }

    /// The same, with all lanes: of as many spectra as a vector has side by side.
    #[inline(always)]
    pub fn put_whole<T: Real, V: Vector<T>>(
        &self,
        values: &DisjointSlice<T>,
        start: usize,
        vector: usize,
        re: V,
        im: V,
    ) {
        let start = start + vector * self.vector;
        assert!(start + 2 * self.plane + V::LANES <= values.len());
        for (plane, numbers) in [re.add(im), re, im].iter().enumerate() {
            // SAFETY: it is there by the assertion, and nobody else's by the caller's promise.
            #[allow(unsafe_code)]
            unsafe {
                numbers.store_to(values.as_ptr().add(start + plane * self.plane));
            }
        }
    }
}

/// What makes a spectrum of the three planes' sums of products, each number times a scale.
#[derive(Clone, Copy)]
pub struct Fold<V> {
    half: usize,
    vectors: usize,
    together: usize,
    scale: V,
    /// Of the first vector, whose first lane has frequency 0: the scales of both parts, what zeroes that lane, and 1 there
    /// and −1 elsewhere.
    first: [V; 2],
    others: V,
    sign: V,
}

impl<V> Fold<V> {
    /// `lone` is the scale of the two numbers that stand alone.
    #[inline(always)]
    pub fn new<T: Real>(transform: &Transform<T>, planes: &Planes, lone: f64, pair: f64) -> Self
    where
        V: Vector<T>,
    {
        let with_first = |first: f64, others: f64| {
            let mut lanes = [<T as codec::Scalar>::from_f64(others); MOST_LANES];
            lanes[0] = <T as codec::Scalar>::from_f64(first);
            lanes
        };
        let nyquist = if transform.n().is_multiple_of(2) { lone } else { 0.0 };
        Self {
            half: planes.half,
            vectors: planes.vectors,
            together: planes.together,
            scale: V::load(&with_first(pair, pair)),
            first: [V::load(&with_first(lone, pair)), V::load(&with_first(nyquist, pair))],
            others: V::load(&with_first(0.0, 1.0)),
            sign: V::load(&with_first(1.0, -1.0)),
        }
    }

    /// The vectors of both halves. Sums lie `[plane][vector][lane]`.
    #[inline(always)]
    pub fn halves<T: Real>(&self, sums: &[T], vector: usize) -> [V; 2]
    where
        V: Vector<T>,
    {
        let [sum, re, im] = [
            self.gather(&sums[vector * V::LANES..]),
            self.gather(&sums[(self.vectors + vector) * V::LANES..]),
            self.gather(&sums[(2 * self.vectors + vector) * V::LANES..]),
        ];
        let cross = sum.subtract(re);
        if vector > 0 {
            return [re.subtract(im).multiply(self.scale), cross.subtract(im).multiply(self.scale)];
        }
        [
            im.subtract_from(self.others, re).multiply(self.first[0]),
            im.multiply_add(self.sign, cross.multiply(self.others)).multiply(self.first[1]),
        ]
    }

    /// A vector of sums, or the sum of all that stand side by side in it.
    #[inline(always)]
    fn gather<T: Real>(&self, sums: &[T]) -> V
    where
        V: Vector<T>,
    {
        if self.together == 1 {
            return V::load(sums);
        }
        let mut lanes = [T::default(); MOST_LANES];
        match self.half {
            1 => add_parts::<T, 1>(sums, self.together, &mut lanes),
            2 => add_parts::<T, 2>(sums, self.together, &mut lanes),
            4 => add_parts::<T, 4>(sums, self.together, &mut lanes),
            half => {
                for sums in sums[..self.together * half].chunks_exact(half) {
                    lanes.iter_mut().zip(sums).for_each(|(lane, &sum)| *lane += sum);
                }
            }
        }
        V::load(&lanes)
    }
}

/// Adds parts of a common length.
#[inline(always)]
fn add_parts<T: Real, const HALF: usize>(sums: &[T], parts: usize, lanes: &mut [T; MOST_LANES]) {
    for sums in &sums.as_chunks::<HALF>().0[..parts] {
        lanes.iter_mut().zip(sums).for_each(|(lane, &sum)| *lane += sum);
    }
}

//! Vectors of floats, so that what is computed stays in registers: of plain arrays the compiler makes vectors only sometimes.
#![allow(unsafe_code)] // intrinsics; each block says why it holds

#[cfg(target_arch = "x86_64")]
mod x86;

use super::Real;
use crate::codec::Isa;

/// The most lanes that a vector has.
pub const MOST_LANES: usize = 16;

/// Some lanes of `T`. Its operations are inlined into functions that are compiled for an instruction set which the process
/// has, as [`dispatch`] sees to.
pub trait Vector<T>: Copy {
    const LANES: usize;
    /// How many of them the CPU has.
    const REGISTERS: usize;
    /// One lane, which rounds as each of these does.
    type Lane: Vector<T>;
    fn splat(value: T) -> Self;
    /// The first lanes of a slice.
    fn load(from: &[T]) -> Self;
    /// The lanes from `index` on.
    ///
    /// # Safety
    /// They lie inside the slice.
    unsafe fn load_at(from: &[T], index: usize) -> Self;
    fn store(self, to: &mut [T]);
    /// # Safety
    /// The place has room for the lanes, and nothing else has it.
    unsafe fn store_to(self, to: *mut T);
    /// Asks for the cache line of a number, which need not be there.
    #[inline(always)]
    fn prefetch(_from: &[T], _index: usize) {}
    fn add(self, b: Self) -> Self;
    fn subtract(self, b: Self) -> Self;
    fn multiply(self, b: Self) -> Self;
    /// `self · b + sum`, rounded once where the instruction set can.
    fn multiply_add(self, b: Self, sum: Self) -> Self;
    /// `sum - self · b`, rounded once where the instruction set can.
    fn subtract_from(self, b: Self, sum: Self) -> Self;
    /// Exchanges rows and lanes of the first `LANES` rows.
    fn transpose(rows: &mut Tile<Self>);
}

/// Rows of a square, of which a vector of fewer lanes uses the first.
pub type Tile<V> = [V; MOST_LANES];

/// The first numbers of a slice, and zeros if there are too few.
#[inline(always)]
pub fn load_part<T: Real, V: Vector<T>>(from: &[T]) -> V {
    if from.len() >= V::LANES {
        return V::load(from);
    }
    let mut lanes = [T::default(); MOST_LANES];
    copy_few(from, &mut lanes);
    V::load(&lanes)
}

/// As many of the lanes as there is room for.
#[inline(always)]
pub fn store_part<T: Real, V: Vector<T>>(vector: V, to: &mut [T]) {
    if to.len() >= V::LANES {
        return vector.store(to);
    }
    let mut lanes = [T::default(); MOST_LANES];
    vector.store(&mut lanes);
    let len = to.len();
    copy_few(&lanes[..len], to);
}

/// Copies numbers to the first places of a slice. The common counts are no calls.
#[inline(always)]
pub fn copy_few<T: Copy>(from: &[T], to: &mut [T]) {
    match from.len() {
        8 => to[..8].copy_from_slice(&from[..8]),
        4 => to[..4].copy_from_slice(&from[..4]),
        2 => to[..2].copy_from_slice(&from[..2]),
        1 => to[0] = from[0],
        len => to[..len].copy_from_slice(from),
    }
}

/// For the compiler to make vectors of. `FUSED` says whether the target has a fused multiply-add; without one, `mul_add`
/// would be a library call.
#[derive(Clone, Copy)]
pub struct Array<T, const L: usize, const REGISTERS: usize, const FUSED: bool>([T; L]);

impl<T: Real, const L: usize, const REGISTERS: usize, const FUSED: bool> Array<T, L, REGISTERS, FUSED> {
    #[inline(always)]
    fn zip(self, b: Self, f: impl Fn(T, T) -> T) -> Self {
        Self(std::array::from_fn(|lane| f(self.0[lane], b.0[lane])))
    }
}

impl<T: Real, const L: usize, const REGISTERS: usize, const FUSED: bool> Vector<T> for Array<T, L, REGISTERS, FUSED> {
    const LANES: usize = L;
    const REGISTERS: usize = REGISTERS;
    type Lane = Array<T, 1, REGISTERS, FUSED>;

    #[inline(always)]
    fn splat(value: T) -> Self {
        Self([value; L])
    }

    #[inline(always)]
    fn load(from: &[T]) -> Self {
        let mut out = [T::default(); L];
        out.copy_from_slice(&from[..L]);
        Self(out)
    }

    #[inline(always)]
    unsafe fn load_at(from: &[T], index: usize) -> Self {
        // SAFETY: by the caller's promise.
        Self::load(unsafe { from.get_unchecked(index..index + L) })
    }

    #[inline(always)]
    fn store(self, to: &mut [T]) {
        to[..L].copy_from_slice(&self.0);
    }

    #[inline(always)]
    unsafe fn store_to(self, to: *mut T) {
        // SAFETY: by the caller's promise.
        unsafe { to.cast::<[T; L]>().write(self.0) }
    }

    #[inline(always)]
    fn add(self, b: Self) -> Self {
        self.zip(b, |a, b| a + b)
    }

    #[inline(always)]
    fn subtract(self, b: Self) -> Self {
        self.zip(b, |a, b| a - b)
    }

    #[inline(always)]
    fn multiply(self, b: Self) -> Self {
        self.zip(b, |a, b| a * b)
    }

    #[inline(always)]
    fn multiply_add(self, b: Self, sum: Self) -> Self {
        let fused = |lane: usize| self.0[lane].fused_multiply_add(b.0[lane], sum.0[lane]);
        let plain = |lane: usize| self.0[lane] * b.0[lane] + sum.0[lane];
        Self(if FUSED { std::array::from_fn(fused) } else { std::array::from_fn(plain) })
    }

    #[inline(always)]
    fn subtract_from(self, b: Self, sum: Self) -> Self {
        let negative = Self(std::array::from_fn(|lane| -self.0[lane]));
        negative.multiply_add(b, sum)
    }

    #[inline(always)]
    fn transpose(rows: &mut Tile<Self>) {
        for row in 0..L {
            for lane in 0..row {
                (rows[row].0[lane], rows[lane].0[row]) = (rows[lane].0[row], rows[row].0[lane]);
            }
        }
    }
}

/// The vectors of a float type on each instruction set.
pub trait Vectors: Sized {
    #[cfg(target_arch = "x86_64")]
    type Avx512: Vector<Self>;
    #[cfg(target_arch = "x86_64")]
    type Avx: Vector<Self>;
    /// Where the compiler makes vectors, with and without fused multiply-adds.
    type Fused: Vector<Self>;
    type Portable: Vector<Self>;
}

impl Vectors for f32 {
    #[cfg(target_arch = "x86_64")]
    type Avx512 = x86::Avx512;
    #[cfg(target_arch = "x86_64")]
    type Avx = x86::Avx;
    type Fused = Array<f32, 4, 32, true>;
    type Portable = Array<f32, 4, 16, false>;
}

impl Vectors for f64 {
    #[cfg(target_arch = "x86_64")]
    type Avx512 = x86::Avx512Double;
    #[cfg(target_arch = "x86_64")]
    type Avx = x86::AvxDouble;
    type Fused = Array<f64, 2, 32, true>;
    type Portable = Array<f64, 2, 16, false>;
}

/// What is written once for any vector. Its functions are inlined, so that all of it is compiled for an instruction set.
pub trait Kernel<T> {
    fn run<V: Vector<T>>(self);
}

/// Runs a kernel with this process's vectors of `lanes` lanes.
pub fn dispatch<T: Real>(lanes: usize, kernel: impl Kernel<T>) {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    fn avx512<T: Real>(kernel: impl Kernel<T>) {
        kernel.run::<<T as Vectors>::Avx512>();
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    fn avx2<T: Real>(kernel: impl Kernel<T>) {
        kernel.run::<<T as Vectors>::Avx>();
    }
    match Isa::get() {
        // SAFETY: `Isa::get` names only what the CPU has.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx if lanes == <T as Vectors>::Avx512::LANES => unsafe { avx512(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx | Isa::Avx2 => unsafe { avx2(kernel) },
        Isa::Neon => kernel.run::<<T as Vectors>::Fused>(),
        _ => kernel.run::<<T as Vectors>::Portable>(),
    }
}

/// Lanes of the vectors for `numbers` side by side: this process's widest, unless narrower ones take them all.
pub fn lanes<T: Real>(numbers: usize) -> usize {
    match Isa::get() {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx if numbers > <T as Vectors>::Avx::LANES => <T as Vectors>::Avx512::LANES,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx | Isa::Avx2 => <T as Vectors>::Avx::LANES,
        Isa::Neon => <T as Vectors>::Fused::LANES,
        _ => <T as Vectors>::Portable::LANES,
    }
}

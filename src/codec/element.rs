//! From a weight to its integer code and back, and from a code to its planes.
//!
//! | element | code | planes (symbol first) |
//! | --- | --- | --- |
//! | bf16 | its 16 bits | exponent; sign and mantissa |
//! | f16 | its 16 bits | high byte; low byte |
//! | f32 | its 32 bits | exponent; sign and 7 bits of mantissa; two low bytes |
//! | level | a signed integer q | q >> r; its r low bits |
//! | swapped bf16 | its 16 bits | as bf16, but the sign in the exponent's lowest bit and that in the sign's place |

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::arch::per_isa;

/// The dtype of the dense weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Dtype {
    F32 = 0,
    F16 = 1,
    Bf16 = 2,
}

impl Dtype {
    pub fn from_byte(byte: u8) -> Option<Self> {
        [Self::F32, Self::F16, Self::Bf16].into_iter().find(|&d| d as u8 == byte)
    }

    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// What a code means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// The bit pattern of a float.
    Bits(Dtype),
    /// The bit pattern of a bf16 in the fast layout: the first plane makes its high byte, the second is its low byte.
    SwappedBf16,
    /// A quantisation level, its `low_bits` low bits in a plane of their own.
    Level { low_bits: u32 },
}

/// Evaluates `$body` with `$split` the function from a code to its value in a plane: a vector loop for each kind.
macro_rules! split_by {
    ($element:expr, $plane:expr, $split:ident => $body:expr) => {{
        macro_rules! byte {
            ($value:expr) => {{
                let $split = |code: u32| i32::from($value(code) as u8);
                $body
            }};
        }
        match ($element, $plane) {
            (Element::Bits(Dtype::Bf16), 0) => byte!(|code: u32| code >> 7),
            (Element::Bits(Dtype::Bf16), _) => byte!(|code: u32| code >> 8 & 0x80 | code & 0x7f),
            (Element::Bits(Dtype::F32), 0) => byte!(|code: u32| code >> 23),
            (Element::Bits(Dtype::F32), 1) => byte!(|code: u32| code >> 24 & 0x80 | code >> 16 & 0x7f),
            (Element::Bits(dtype), plane) => {
                let shift = 8 * (dtype.bytes() - 1 - plane);
                byte!(|code: u32| code >> shift)
            }
            (Element::SwappedBf16, 0) => byte!(|code: u32| code >> 7 & 0xfe | code >> 15),
            (Element::SwappedBf16, _) => byte!(|code: u32| code),
            (Element::Level { low_bits }, 0) => {
                let $split = |code: u32| code as i32 >> low_bits;
                $body
            }
            (Element::Level { low_bits }, _) => byte!(|code: u32| code & ((1 << low_bits) - 1)),
        }
    }};
}

impl Element {
    /// Number of planes.
    pub fn planes(self) -> usize {
        match self {
            Self::Bits(dtype) => dtype.bytes(),
            Self::SwappedBf16 => 2,
            Self::Level { low_bits } => 1 + usize::from(low_bits > 0),
        }
    }

    /// Plain low bits of a level.
    pub fn low_bits(self) -> u32 {
        match self {
            Self::Level { low_bits } => low_bits,
            _ => 0,
        }
    }

    /// The dtype whose bits this is, None for a level.
    pub fn float(self) -> Option<Dtype> {
        match self {
            Self::Bits(dtype) => Some(dtype),
            Self::SwappedBf16 => Some(Dtype::Bf16),
            Self::Level { .. } => None,
        }
    }

    /// Width of a plane of plain bits, None for one that needs a model.
    pub fn plane_width(self, plane: usize) -> Option<u32> {
        match self {
            Self::Bits(_) | Self::SwappedBf16 => Some(8),
            Self::Level { low_bits } if plane == 1 => Some(low_bits),
            Self::Level { .. } => None,
        }
    }

    /// The value of `code` in plane `plane`.
    pub fn split(self, code: u32, plane: usize) -> i32 {
        split_by!(self, plane, split => split(code))
    }

    /// [`Element::split`] less `lo` of each code, as far as a byte says, and the largest such difference taken as unsigned.
    pub fn split_all(self, codes: &[u32], plane: usize, lo: i32, out: &mut [u8], most: &mut u32) {
        split_all(self, codes, plane, lo, out, most);
    }

    /// Adds the values `lo + symbol` of plane `plane` to codes whose bits there are zero; the inverse of [`Element::split`].
    pub fn place(self, plane: usize, lo: i32, symbols: &[u8], codes: &mut [u32]) {
        place(self, plane, lo, symbols, codes);
    }
}

per_isa! {
    /// The crate's own conversion makes every NaN quiet, which is not a vector instruction.
    fn widen(values: &[bf16], out: &mut [f32]) {
        out.iter_mut().zip(values).for_each(|(out, value)| *out = f32::from_bits(u32::from(value.to_bits()) << 16));
    }
}

per_isa! {
    /// Turns a block's bytes of the two planes of a bf16 into those of a swapped one, or back: the lowest bit of the first and
    /// the highest of the second change places.
    pub fn swap_bf16(first: &mut [u8], second: &mut [u8]) {
        for (a, b) in first.iter_mut().zip(second) {
            (*a, *b) = (*a & 0xfe | *b >> 7, *a << 7 | *b & 0x7f);
        }
    }
}

per_isa! {
    fn split_all(element: Element, codes: &[u32], plane: usize, lo: i32, out: &mut [u8], most: &mut u32) {
        let mut largest = 0;
        split_by!(element, plane, split => {
            for (&code, out) in codes.iter().zip(out) {
                let difference = split(code).wrapping_sub(lo) as u32;
                largest = largest.max(difference);
                *out = difference as u8;
            }
        });
        *most = largest;
    }
}

per_isa! {
    fn place(element: Element, plane: usize, lo: i32, symbols: &[u8], codes: &mut [u32]) {
        // A loop for each kind of plane, so that each is a vector loop.
        #[inline(always)]
        fn each(lo: i32, symbols: &[u8], codes: &mut [u32], place: impl Fn(u32) -> u32) {
            for (code, &symbol) in codes.iter_mut().zip(symbols) {
                *code |= place(lo.wrapping_add(i32::from(symbol)) as u32);
            }
        }
        match (element, plane) {
            (Element::Bits(Dtype::Bf16), 0) => each(lo, symbols, codes, |v| (v & 0xff) << 7),
            (Element::Bits(Dtype::Bf16), _) => each(lo, symbols, codes, |v| (v & 0x80) << 8 | v & 0x7f),
            (Element::Bits(Dtype::F32), 0) => each(lo, symbols, codes, |v| (v & 0xff) << 23),
            (Element::Bits(Dtype::F32), 1) => each(lo, symbols, codes, |v| (v & 0x80) << 24 | (v & 0x7f) << 16),
            (Element::Bits(dtype), plane) => {
                let shift = 8 * (dtype.bytes() - 1 - plane);
                each(lo, symbols, codes, |v| (v & 0xff) << shift);
            }
            (Element::SwappedBf16, 0) => each(lo, symbols, codes, |v| (v & 1) << 15 | (v & 0xfe) << 7),
            (Element::SwappedBf16, _) => each(lo, symbols, codes, |v| v & 0xff),
            (Element::Level { low_bits }, 0) => each(lo, symbols, codes, |v| v << low_bits),
            (Element::Level { .. }, _) => each(lo, symbols, codes, |v| v),
        }
    }
}

/// Arithmetic that the kernels run in: f32, or f64 where gradients are checked.
pub trait Real:
    Scalar + Default + std::ops::Add<Output = Self> + std::ops::AddAssign + std::ops::Mul<Output = Self>
{
    /// `self · a + b`, rounded once.
    fn fused_multiply_add(self, a: Self, b: Self) -> Self;
    fn to_f64(self) -> f64;
}

/// A float type that a weight or an output may have.
pub trait Scalar: Copy + Send + Sync + 'static {
    fn from_f32(value: f32) -> Self;
    fn from_f64(value: f64) -> Self;
    fn from_real<T: Real>(value: T) -> Self {
        Self::from_f64(value.to_f64())
    }
    /// What makes a float of a lossless code of this very type; None for codes of another.
    fn from_bits(dtype: Dtype) -> Option<impl Fn(u32) -> Self>;
}

macro_rules! real {
    ($type:ty, $bits:expr) => {
        impl Scalar for $type {
            fn from_f32(value: f32) -> Self {
                value as $type
            }
            fn from_f64(value: f64) -> Self {
                value as $type
            }
            fn from_bits(dtype: Dtype) -> Option<impl Fn(u32) -> Self> {
                $bits(dtype)
            }
        }
        impl Real for $type {
            #[inline(always)]
            fn fused_multiply_add(self, a: Self, b: Self) -> Self {
                self.mul_add(a, b)
            }
            fn to_f64(self) -> f64 {
                f64::from(self)
            }
        }
    };
}
real!(f32, |dtype| (dtype == Dtype::F32).then_some(f32::from_bits));
real!(f64, |_| None::<fn(u32) -> f64>);

macro_rules! half {
    ($type:ty, $dtype:expr) => {
        impl Scalar for $type {
            fn from_f32(value: f32) -> Self {
                <$type>::from_f32(value)
            }
            fn from_f64(value: f64) -> Self {
                // By way of f32, as PyTorch does.
                <$type>::from_f32(value as f32)
            }
            fn from_bits(dtype: Dtype) -> Option<impl Fn(u32) -> Self> {
                (dtype == $dtype).then_some(|code| <$type>::from_bits(code as u16))
            }
        }
    };
}
half!(f16, Dtype::F16);
half!(bf16, Dtype::Bf16);

/// The float that the bits `code` of `dtype` stand for.
#[inline(always)]
pub fn bits_to_f32(code: u32, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F32 => f32::from_bits(code),
        Dtype::F16 => f16::from_bits(code as u16).to_f32(),
        Dtype::Bf16 => f32::from_bits(code << 16),
    }
}

/// The scales of a weight, as their owner holds them: read in place, for converting those of int4 would cost a copy.
#[derive(Clone, Copy)]
pub enum Scales<'a, T> {
    Bf16(&'a [bf16]),
    Real(&'a [T]),
}

impl<T: Real> Scales<'_, T> {
    pub fn count(self) -> usize {
        match self {
            Self::Bf16(scales) => scales.len(),
            Self::Real(scales) => scales.len(),
        }
    }

    /// The scale at `index`, None for a lossless weight.
    #[inline(always)]
    pub fn get(self, index: usize) -> Option<T> {
        match self {
            Self::Bf16(scales) => scales.get(index).map(|scale| T::from_f32(scale.to_f32())),
            Self::Real(scales) => scales.get(index).copied(),
        }
    }
}

/// A dense weight, row-major.
#[derive(Clone, Copy)]
pub enum Weights<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
}

impl Weights<'_> {
    pub fn dtype(self) -> Dtype {
        match self {
            Self::F32(_) => Dtype::F32,
            Self::F16(_) => Dtype::F16,
            Self::Bf16(_) => Dtype::Bf16,
        }
    }

    pub fn elements(self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F16(values) => values.len(),
            Self::Bf16(values) => values.len(),
        }
    }

    /// The bit patterns of the elements from `start` on.
    pub fn bits(self, start: usize, out: &mut [u32]) {
        let range = start..start + out.len();
        match self {
            Self::F32(values) => {
                let pairs = out.iter_mut().zip(&values[range]);
                pairs.for_each(|(out, v)| *out = v.to_bits());
            }
            Self::F16(values) => {
                let pairs = out.iter_mut().zip(&values[range]);
                pairs.for_each(|(out, v)| *out = u32::from(v.to_bits()));
            }
            Self::Bf16(values) => {
                let pairs = out.iter_mut().zip(&values[range]);
                pairs.for_each(|(out, v)| *out = u32::from(v.to_bits()));
            }
        }
    }

    /// The values of the elements from `start` on.
    pub fn values(self, start: usize, out: &mut [f32]) {
        let range = start..start + out.len();
        match self {
            Self::F32(values) => out.copy_from_slice(&values[range]),
            Self::F16(values) => values[range].convert_to_f32_slice(out),
            Self::Bf16(values) => widen(&values[range], out),
        }
    }
}

//! What kernels are launched with: the structures of `cuda/params.h`, compared with them by the tests.

use std::ffi::c_void;

/// A weight that its layout has no code for.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[repr(C)]
pub struct Escape {
    pub col: u32,
    /// Before its scale.
    pub value: f32,
}

/// What a payload begins with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Head {
    /// Of the window; of pairs, the bfloat16 that stands for what is listed apart; or 0.
    pub base: u32,
    /// Columns under one scale.
    pub group_cols: u32,
    /// That the values of pairs of levels have, or 0.
    pub upper_bytes: [u32; 2],
}

/// A weight on the device.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Weight {
    pub head: *const Head,
    pub values: *const f32,
    pub tiles: *const u32,
    pub escape_starts: *const u32,
    pub escapes: *const Escape,
    pub scales: *const c_void,
    pub scales_are_bf16: i32,
    pub scale_stride: i32,
    pub rows: i32,
    pub cols: i32,
    /// From the head on.
    pub payload_bytes: u64,
}

/// What x, y, a bias and a dense weight are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Dtype {
    Bf16 = 0,
    F16 = 1,
    F32 = 2,
}

/// What spectra are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Spectra {
    Bf16 = Dtype::Bf16 as i32,
    F16 = Dtype::F16 as i32,
    F32 = Dtype::F32 as i32,
    Log8 = 3,
}

impl From<Dtype> for Spectra {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::Bf16 => Self::Bf16,
            Dtype::F16 => Self::F16,
            Dtype::F32 => Self::F32,
        }
    }
}

/// Numbers of a byte each.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Log8 {
    pub codes: *const u8,
    pub words: *const u16,
    pub levels: *const f32,
}

impl Log8 {
    /// Where there are none.
    pub const NONE: Self = Self { codes: std::ptr::null(), words: std::ptr::null(), levels: std::ptr::null() };
}

/// All of them in a dtype.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Log8Decode {
    pub numbers: Log8,
    pub out: *mut c_void,
    pub count: u64,
    pub dtype: Dtype,
}

impl Dtype {
    /// How many bfloat16s a value is the sum of.
    pub fn parts(self) -> usize {
        self as usize + 1
    }
}

/// x as columns of bfloat16; in tiles where `columns` is not 0.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Inputs {
    pub x: *const c_void,
    pub out: *mut u16,
    pub dtype: Dtype,
    pub batch: i32,
    pub cols: i32,
    pub parts: i32,
    pub columns: i32,
    pub order: Order,
}

/// Of the columns within a tile of inputs: as W's fragments have them, or as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Order {
    Fragment = 0,
    Plain = 1,
}

/// y = x·Wᵀ + bias.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Linear {
    pub weight: Weight,
    pub x: *const u16,
    pub bias: *const c_void,
    pub y: *mut c_void,
    pub dtype: Dtype,
    pub batch: i32,
    pub parts: i32,
}

/// The same of many columns, of `row_count` rows of W; or dx = g·W, of so many of its columns.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Wide {
    pub weight: Weight,
    pub x: *const u16,
    pub sums: *mut f32,
    pub bias: *const c_void,
    pub y: *mut c_void,
    pub dtype: Dtype,
    pub batch: i32,
    pub parts: i32,
    pub columns: i32,
    pub splits: i32,
    pub first_row: i32,
    pub row_count: i32,
}

/// The block-circulant product, or dx of it.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Circulant {
    pub x: *const c_void,
    pub spectrum: *const c_void,
    pub log8: Log8,
    pub bias: *const c_void,
    pub y: *mut c_void,
    pub tiles: *mut u32,
    pub dtype: Dtype,
    pub spectrum_dtype: Spectra,
    pub batch: i32,
    pub in_features: i32,
    pub out_features: i32,
    pub n: i32,
    pub inputs: i32,
    pub outputs: i32,
    pub input_stride: i32,
    pub output_stride: i32,
    pub conjugate: i32,
    pub input_steps: i32,
    pub outputs_each: i32,
}

/// Rows of the dense weight: those that `indices` name, or all of them if it is null.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Unpack {
    pub weight: Weight,
    pub indices: *const i64,
    pub out: *mut c_void,
    pub dtype: Dtype,
}

/// How a plane of the canonical form is coded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Plane {
    /// 0 plain bits, of a constant none; 1 rANS; 2 alias.
    pub coding: i32,
    /// Plain bits of a symbol.
    pub width: i32,
    /// Of a coder.
    pub streams: i32,
    /// Whether a list of them follows plain bits.
    pub escapes: i32,
    /// The value of symbol 0.
    pub lo: i32,
}

/// One plane of a weight in its canonical form, into its codes.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Decode {
    pub payload: *const u8,
    pub payload_bytes: u64,
    pub directory: *const u32,
    pub slots: *const u32,
    pub codes: *mut c_void,
    pub damage: *mut u64,
    /// The plane before it in a tile; where there is none, one without bytes.
    pub before: Plane,
    pub own: Plane,
    pub plane: i32,
    pub workers: i32,
    pub low_bits: i32,
    pub tile_rows: i32,
    pub rows: i32,
    pub cols: i32,
}

/// How often codes occur.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Histogram {
    pub codes: *const c_void,
    pub count: u64,
    pub counts: *mut u64,
}

/// Codes into a layout of the device.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct LayOut {
    pub codes: *const c_void,
    pub rows: i32,
    pub cols: i32,
    pub lo: i32,
    pub values: i32,
    pub tiles: *mut u32,
    pub row_counts: *mut u32,
    pub escape_starts: *const u32,
    pub escapes: *mut Escape,
    pub centroids: *const f32,
    pub first_centroid: i32,
    pub centroid_count: i32,
}

/// A dense weight into levels.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Quantise {
    pub weights: *const c_void,
    pub largest: *mut u32,
    pub scales: *const f32,
    pub levels: *mut i32,
    pub rows: i32,
    pub cols: i32,
    pub group_cols: i32,
    pub max: f32,
}

/// Sums over a dense weight, of every `every`th row.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Measure {
    pub weights: *const c_void,
    pub scales: *const f32,
    pub squares: *const u32,
    pub counts: *mut u64,
    pub level_weights: *mut u64,
    pub moments: *mut i64,
    pub distortions: *mut f64,
    pub rows: i32,
    pub cols: i32,
    pub every: i32,
    pub max: f32,
}

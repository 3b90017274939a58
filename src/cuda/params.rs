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

/// y = x·Wᵀ + bias.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Linear {
    pub weight: Weight,
    pub x: *const u16,
    pub bias: *const u16,
    pub y: *mut u16,
    pub batch: i32,
}

/// Rows of the dense weight: those that `indices` name, or all of them if it is null.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Unpack {
    pub weight: Weight,
    pub indices: *const i64,
    pub out: *mut c_void,
    pub out_is_bf16: i32,
}

//! What kernels are launched with: the structures of `cuda/params.h`, compared with them by the tests.

/// A weight that the window does not hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Escape {
    /// In its stripe of 16 rows.
    pub row: u16,
    /// Of the bfloat16.
    pub bits: u16,
    pub col: u32,
}

/// A weight in the window layout, on the device.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct WindowWeight {
    pub base: *const u32,
    pub tiles: *const u32,
    pub escape_starts: *const u32,
    pub escapes: *const Escape,
    pub rows: i32,
    pub cols: i32,
}

/// y = x·Wᵀ + bias.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct WindowLinear {
    pub weight: WindowWeight,
    pub x: *const u16,
    pub bias: *const u16,
    pub y: *mut u16,
    pub batch: i32,
}

/// The dense weight.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct WindowUnpack {
    pub weight: WindowWeight,
    pub out: *mut u16,
}

/// Some rows of it.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct WindowEmbedding {
    pub weight: WindowWeight,
    pub indices: *const i64,
    pub out: *mut u16,
}

//! AMX: products of tiles of bf16, summed in f32. In assembly, for Rust's intrinsics are not stable.
//!
//! Subnormal numbers count as zero, in what is multiplied and in the sums.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::marker::PhantomData;

use half::bf16;

use super::{Matrix, TILE_HEIGHT};
use crate::codec::geometry::LANES;

/// Columns of a that one product of tiles takes.
const DEPTH: usize = 32;
/// Bytes of a row of a tile register.
const ROW_BYTES: usize = 64;

/// Whether the CPU has AMX-BF16 and the system lets this process use it.
pub fn is_supported() -> bool {
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    let features = __cpuid_count(7, 0).edx;
    features & BF16 != 0 && features & TILE != 0 && is_permitted()
}

/// Asks for the 8 KB of tile registers, which a process does not have by itself.
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: i32 = 0x1023;
    const XFEATURE_XTILEDATA: i32 = 18;
    // SAFETY: a system call that takes two integers and changes what this process may do, for the wider.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// This thread's tile registers, configured: 0 to 3 for c, 4 and 5 for a, 6 and 7 for b.
pub struct Tiles {
    /// Rows of a in a tile.
    height: usize,
    /// They belong to the thread.
    thread: PhantomData<*const ()>,
}

impl Tiles {
    /// For tiles of `height` rows of a.
    ///
    /// # Safety
    /// [`is_supported`] has said so, and the thread has no other `Tiles`.
    pub unsafe fn new(height: usize) -> Self {
        assert!((1..=TILE_HEIGHT).contains(&height));
        let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        config.row_bytes[..8].fill(ROW_BYTES as u16);
        config.rows[..6].fill(height as u8);
        config.rows[6..8].fill((DEPTH / 2) as u8);
        // SAFETY: the CPU has the instruction; the compiler uses no tile register.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly, preserves_flags)) };
        Self { height, thread: PhantomData }
    }

    /// Adds the first `depth` columns of a times as many rows of b, which come in pairs, to c: `tiles` tiles of rows by
    /// [`LANES`] columns.
    pub fn multiply_add(
        &self,
        a: Matrix<bf16>,
        b: Matrix<u32>,
        depth: usize,
        c: &mut [f32],
        c_stride: usize,
        tiles: usize,
    ) {
        let (rows, steps) = (tiles * self.height, depth.div_ceil(DEPTH));
        assert!(a.holds(rows, steps * DEPTH) && b.holds(steps * DEPTH / 2, LANES));
        assert!(Matrix { values: c, stride: c_stride }.holds(rows, LANES));
        for tile in (0..tiles).step_by(2) {
            let row = tile * self.height;
            let a = Matrix { values: &a.values[row * a.stride..], ..a };
            let c = &mut c[row * c_stride..];
            // SAFETY: `Tiles` exists where the CPU has the instructions, and the lengths are checked above.
            unsafe {
                if tile + 1 < tiles {
                    self.multiply_tiles::<2>(a, b, steps, c, c_stride);
                } else {
                    self.multiply_tiles::<1>(a, b, steps, c, c_stride);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn multiply_tiles<const TILES: usize>(
        &self,
        a: Matrix<bf16>,
        b: Matrix<u32>,
        steps: usize,
        c: &mut [f32],
        c_stride: usize,
    ) {
        let (a_bytes, b_bytes, c_bytes) = (a.stride * size_of::<bf16>(), b.stride * 4, c_stride * 4);
        let (a_stride, b_stride) = (a.stride, b.stride);
        let (a, b, c) = (a.values.as_ptr(), b.values.as_ptr(), c.as_mut_ptr());
        macro_rules! load {
            ($tile:literal, $at:expr, $bytes:expr) => {
                asm!(
                    concat!("tileloadd tmm", $tile, ", [{at} + {bytes}]"),
                    at = in(reg) $at, bytes = in(reg) $bytes, options(nostack, readonly, preserves_flags)
                )
            };
        }
        macro_rules! store {
            ($tile:literal, $at:expr) => {
                asm!(
                    concat!("tilestored [{at} + {bytes}], tmm", $tile),
                    at = in(reg) $at, bytes = in(reg) c_bytes, options(nostack, preserves_flags)
                )
            };
        }
        macro_rules! product {
            ($c:literal, $a:literal, $b:literal) => {
                asm!(concat!("tdpbf16ps tmm", $c, ", tmm", $a, ", tmm", $b), options(nomem, nostack, preserves_flags))
            };
        }
        // SAFETY: the caller's slices have the rows that are read and written; no tile register is the compiler's.
        unsafe {
            let second_a = a.add(self.height * a_stride * (TILES - 1));
            let second_c = c.add(self.height * c_stride * (TILES - 1));
            load!(0, c, c_bytes);
            load!(1, c.add(LANES / 2), c_bytes);
            if TILES == 2 {
                load!(2, second_c, c_bytes);
                load!(3, second_c.add(LANES / 2), c_bytes);
            }
            for step in 0..steps {
                let b = b.add(step * DEPTH / 2 * b_stride);
                load!(6, b, b_bytes);
                load!(7, b.add(LANES / 2), b_bytes);
                load!(4, a.add(step * DEPTH), a_bytes);
                product!(0, 4, 6);
                product!(1, 4, 7);
                if TILES == 2 {
                    load!(5, second_a.add(step * DEPTH), a_bytes);
                    product!(2, 5, 6);
                    product!(3, 5, 7);
                }
            }
            store!(0, c);
            store!(1, c.add(LANES / 2));
            if TILES == 2 {
                store!(2, second_c);
                store!(3, second_c.add(LANES / 2));
            }
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: as in `new`.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
    }
}

//! AMX: products of tiles of bf16, summed in f32. In assembly, for Rust's intrinsics are not stable.
//!
//! Subnormal numbers count as zero, in what is multiplied and in the sums.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::marker::PhantomData;

use half::bf16;

use super::{Chunks, TILE_HEIGHT};
use crate::codec::geometry::{CHUNK, LANES};

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

/// Where the columns of a step begin.
fn a_offset(a: Chunks<bf16>, step: usize) -> usize {
    const STEPS: usize = CHUNK / DEPTH;
    step / STEPS * a.chunk + step % STEPS * DEPTH
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

    /// Adds the first `depth` columns of a times as many rows of b, which come in pairs every `b_row` values, to c: `tiles`
    /// tiles of rows, which begin every `c_row` values, by [`LANES`] columns.
    #[allow(clippy::too_many_arguments)] // three matrices
    pub fn multiply_add(
        &self,
        a: Chunks<bf16>,
        b: &[u32],
        b_row: usize,
        depth: usize,
        c: &mut [f32],
        c_row: usize,
        tiles: usize,
    ) {
        let (last, steps) = ((tiles * self.height).saturating_sub(1), depth.div_ceil(DEPTH));
        let last_step = steps.saturating_sub(1);
        assert!(last * a.row + a_offset(a, last_step) + DEPTH <= a.values.len());
        assert!((steps * DEPTH / 2).saturating_sub(1) * b_row + LANES <= b.len());
        assert!(last * c_row + LANES <= c.len());
        for tile in (0..tiles).step_by(2) {
            let row = tile * self.height;
            let (a, c) = (a.at(row, 0), &mut c[row * c_row..]);
            // SAFETY: `Tiles` exists where the CPU has the instructions, and the lengths are checked above.
            unsafe {
                if tile + 1 < tiles {
                    self.multiply_tiles::<2>(a, b, b_row, steps, c, c_row);
                } else {
                    self.multiply_tiles::<1>(a, b, b_row, steps, c, c_row);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn multiply_tiles<const TILES: usize>(
        &self,
        a: Chunks<bf16>,
        b: &[u32],
        b_row: usize,
        steps: usize,
        c: &mut [f32],
        c_row: usize,
    ) {
        let (a_bytes, b_bytes, c_bytes) = (a.row * size_of::<bf16>(), b_row * 4, c_row * 4);
        let (b, c) = (b.as_ptr(), c.as_mut_ptr());
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
            let second_c = c.add(self.height * c_row * (TILES - 1));
            load!(0, c, c_bytes);
            load!(1, c.add(LANES / 2), c_bytes);
            if TILES == 2 {
                load!(2, second_c, c_bytes);
                load!(3, second_c.add(LANES / 2), c_bytes);
            }
            for step in 0..steps {
                let b = b.add(step * DEPTH / 2 * b_row);
                let at = a.values.as_ptr().add(a_offset(a, step));
                load!(6, b, b_bytes);
                load!(7, b.add(LANES / 2), b_bytes);
                load!(4, at, a_bytes);
                product!(0, 4, 6);
                product!(1, 4, 7);
                if TILES == 2 {
                    load!(5, at.add(self.height * a.row), a_bytes);
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

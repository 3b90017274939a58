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
/// Steps of so many columns in a chunk.
const STEPS: usize = CHUNK / DEPTH;
/// Bytes of a row of a tile register.
const ROW_BYTES: usize = 64;

/// Whether the CPU has AMX-BF16 and the system lets this process use it.
pub fn is_supported() -> bool {
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    // SAFETY: this leaf is there where AVX2 is, without which nobody asks. A safe function from Rust 1.94 on.
    #[allow(unused_unsafe)]
    let features = unsafe { __cpuid_count(7, 0) }.edx;
    features & BF16 != 0 && features & TILE != 0 && is_permitted()
}

/// Asks for the 8 KB of tile registers, which a process does not have by itself.
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: a system call that takes two integers and changes what this process may do, for the wider.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// Where the columns of a step begin.
fn a_offset(a: Chunks<bf16>, step: usize) -> usize {
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
    /// [`is_supported`] has said so, and nothing else on the thread uses tile registers while this lives.
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

    /// Adds the first `depth` columns of a times as many rows of b, which come in pairs every `b_row` values, to
    /// [`LANES`] columns of `rows` rows of c, which begin every `c_row` values. a and c have rows for whole tiles.
    #[allow(clippy::too_many_arguments)] // three matrices
    pub fn multiply_add(
        &self,
        a: Chunks<bf16>,
        b: &[u32],
        b_row: usize,
        depth: usize,
        c: &mut [f32],
        c_row: usize,
        rows: usize,
    ) {
        if depth == 0 {
            return;
        }
        let (tiles, steps) = (rows.div_ceil(self.height), depth.div_ceil(DEPTH));
        let last = (tiles * self.height).saturating_sub(1);
        assert!(steps <= STEPS || a.chunk >= CHUNK);
        assert!(last * a.row + a_offset(a, steps - 1) + DEPTH <= a.values.len());
        assert!((steps * DEPTH / 2 - 1) * b_row + LANES <= b.len());
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
        let a_row = a.row * size_of::<bf16>();
        // From a step to the next, and from one to that in the next chunk.
        let a_step = DEPTH * size_of::<bf16>();
        let a_chunk = (a.chunk * size_of::<bf16>()).wrapping_sub(a_step);
        let (b_row, c_row) = (b_row * size_of::<u32>(), c_row * size_of::<f32>());
        let (a, b, c) = (a.values.as_ptr().cast::<u8>(), b.as_ptr(), c.as_mut_ptr().cast::<u8>());
        // One block, for register contents do not outlive one; the arguments are what a second tile of rows adds.
        macro_rules! product {
            ($load:literal, $multiply:literal, $advance:literal, $store:literal $(, $name:ident = $value:expr)*) => {
                asm!(
                    "tileloadd tmm0, [{c} + {c_row}]",
                    "tileloadd tmm1, [{c} + {c_row} + 64]",
                    $load,
                    "2:",
                    "tileloadd tmm6, [{b} + {b_row}]",
                    "tileloadd tmm7, [{b} + {b_row} + 64]",
                    "tileloadd tmm4, [{a} + {a_row}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    $multiply,
                    "add {b}, {b_step}",
                    "add {a}, {a_step}",
                    $advance,
                    "xchg {a_step}, {a_chunk}",
                    "dec {steps}",
                    "jnz 2b",
                    "tilestored [{c} + {c_row}], tmm0",
                    "tilestored [{c} + {c_row} + 64], tmm1",
                    $store,
                    a = inout(reg) a => _, a_row = in(reg) a_row,
                    a_step = inout(reg) a_step => _, a_chunk = inout(reg) a_chunk => _,
                    b = inout(reg) b => _, b_row = in(reg) b_row, b_step = in(reg) DEPTH / 2 * b_row,
                    c = in(reg) c, c_row = in(reg) c_row, steps = inout(reg) steps => _,
                    $($name = inout(reg) $value => _,)*
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack)
                )
            };
        }
        // SAFETY: the caller's slices have the rows that are read and written, and there is a step.
        unsafe {
            if TILES == 2 {
                product!(
                    "tileloadd tmm2, [{c2} + {c_row}]\ntileloadd tmm3, [{c2} + {c_row} + 64]",
                    "tileloadd tmm5, [{a2} + {a_row}]\ntdpbf16ps tmm2, tmm5, tmm6\ntdpbf16ps tmm3, tmm5, tmm7",
                    "add {a2}, {a_step}",
                    "tilestored [{c2} + {c_row}], tmm2\ntilestored [{c2} + {c_row} + 64], tmm3",
                    a2 = a.add(self.height * a_row),
                    c2 = c.add(self.height * c_row)
                );
            } else {
                product!("", "", "", "");
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

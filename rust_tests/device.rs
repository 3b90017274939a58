//! The GPU's decoders, compiled for the host: each lane's registers against the weight that was packed, by the operand tables of
//! the PTX manual.

mod support;

use half::bf16;
use infold::codec::*;
use infold::parallel::Serial;
use support::*;

const ROWS: usize = 16;
const COLS: usize = 64;
const STEPS: usize = 4;
const TILE_WORDS: usize = ROWS * COLS * 12 / 32;

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Escape {
    row: u16,
    bits: u16,
    col: u32,
}

unsafe extern "C" {
    fn infold_simulate_window_encode(
        weight: *const u16,
        rows: i32,
        cols: i32,
        base: u32,
        tiles: *mut u32,
        escape_starts: *mut u32,
        escapes: *mut Escape,
    ) -> usize;
    fn infold_simulate_window_decode(tile: *const u32, lane: i32, base: u32, registers: *mut u32);
}

/// A weight in the window layout.
struct Window {
    base: u32,
    across: usize,
    tiles: Vec<u32>,
    escape_starts: Vec<u32>,
    escapes: Vec<Escape>,
}

impl Window {
    fn new(weight: &[bf16], rows: usize, cols: usize, base: u32) -> Self {
        let (stripes, across) = (rows.div_ceil(ROWS), cols.div_ceil(COLS));
        let mut tiles = vec![0; stripes * across * TILE_WORDS];
        let (mut escape_starts, mut escapes) = (vec![0; stripes + 1], vec![Escape::default(); weight.len()]);
        // SAFETY: the buffers have room for every tile, stripe and weight.
        let count = unsafe {
            infold_simulate_window_encode(
                weight.as_ptr().cast(),
                rows as i32,
                cols as i32,
                base,
                tiles.as_mut_ptr(),
                escape_starts.as_mut_ptr(),
                escapes.as_mut_ptr(),
            )
        };
        escapes.truncate(count);
        Self { base, across, tiles, escape_starts, escapes }
    }

    /// What a lane holds in each step's registers: halves of the four, the lower first.
    fn registers(&self, stripe: usize, tile: usize, lane: usize) -> [[[u16; 2]; 4]; STEPS] {
        let words = &self.tiles[(stripe * self.across + tile) * TILE_WORDS..][..TILE_WORDS];
        let mut registers = [0u32; 4 * STEPS];
        // SAFETY: a tile's words, and a lane's registers.
        unsafe { infold_simulate_window_decode(words.as_ptr(), lane as i32, self.base, registers.as_mut_ptr()) };
        std::array::from_fn(|step| {
            std::array::from_fn(|register| {
                let word = registers[4 * step + register];
                [word as u16, (word >> 16) as u16]
            })
        })
    }

    /// Operand A of each step of a tile, `[step][row][k]`, by the manual's table for `mma.m16n8k16` with bf16.
    fn operands(&self, stripe: usize, tile: usize) -> [[[u16; 16]; 16]; STEPS] {
        let mut a = [[[0; 16]; 16]; STEPS];
        for lane in 0..32 {
            for (step, registers) in self.registers(stripe, tile, lane).iter().enumerate() {
                for (register, halves) in registers.iter().enumerate() {
                    let row = lane / 4 + if register == 1 || register == 3 { 8 } else { 0 };
                    for (half, &bits) in halves.iter().enumerate() {
                        let k = lane % 4 * 2 + half + if register >= 2 { 8 } else { 0 };
                        a[step][row][k] = bits;
                    }
                }
            }
        }
        a
    }

    fn escapes_of(&self, stripe: usize) -> &[Escape] {
        &self.escapes[self.escape_starts[stripe] as usize..self.escape_starts[stripe + 1] as usize]
    }

    fn filler(&self) -> u16 {
        (self.base << 7) as u16
    }
}

/// The column of a tile whose weight and whose x meet at `k` of a step: lanes hold sixteen neighbours of x, in pairs, two pairs
/// for a step.
fn column(step: usize, k: usize) -> usize {
    let (lane, half, pair) = (k % 8 / 2, k % 2, 2 * step + k / 8);
    16 * lane + 2 * pair + half
}

/// The dense weight that the tiles and what is listed apart make.
fn dense(window: &Window, rows: usize, cols: usize) -> Vec<u16> {
    let mut out = vec![0; rows * cols];
    for stripe in 0..rows.div_ceil(ROWS) {
        for tile in 0..window.across {
            let operands = window.operands(stripe, tile);
            for (step, a) in operands.iter().enumerate() {
                for (row, values) in a.iter().enumerate() {
                    for (k, &bits) in values.iter().enumerate() {
                        let (row, col) = (stripe * ROWS + row, tile * COLS + column(step, k));
                        if row < rows && col < cols {
                            out[row * cols + col] = bits;
                        }
                    }
                }
            }
        }
        for escape in window.escapes_of(stripe) {
            let at = &mut out[(stripe * ROWS + usize::from(escape.row)) * cols + escape.col as usize];
            assert_eq!(*at, window.filler(), "the filler stands where {escape:?} belongs");
            *at = escape.bits;
        }
    }
    out
}

#[test]
fn every_bf16_comes_back() {
    let weight: Vec<bf16> = (0..=u16::MAX).map(|bits| bf16::from_bits(bits.wrapping_mul(40503))).collect();
    for base in [0, 1, 100, 112, 239, 240] {
        let window = Window::new(&weight, 256, 256, base);
        // Sixteen exponents of 256 are in the window.
        assert_eq!(window.escapes.len(), 240 * 256);
        assert_eq!(dense(&window, 256, 256), weight.iter().map(|w| w.to_bits()).collect::<Vec<_>>(), "base {base}");
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]

    /// What the codec unpacks, laid out for the device and decoded there, and the product of it.
    #[test]
    fn the_codecs_weight_and_its_product(seed: u64, rows in 1usize..70, cols in 1usize..200, batch in 1usize..9) {
        let mut random = Random(seed);
        let mut values = to_bf16(&random.normals(rows * cols, 0.05));
        values[0] = bf16::from_bits(0x8000);
        values[rows * cols / 2] = bf16::from_f32(-1e20);
        let packed = pack_lossless(Weights::Bf16(&values), rows, cols, &Serial).unwrap();
        let weight = unpack::<bf16>(&packed);
        let window = Window::new(&weight, rows, cols, 112);
        proptest::prop_assert_eq!(dense(&window, rows, cols), weight.iter().map(|w| w.to_bits()).collect::<Vec<_>>());

        // Each warp's mma: operand B by the manual's table from what its lanes read of x, zero beyond it.
        let x: Vec<f64> = to_bf16(&random.normals(batch * cols, 1.0)).iter().map(|x| x.to_f64()).collect();
        let value = |bits: u16| bf16::from_bits(bits).to_f64();
        let input = |row: usize, col: usize| if row < batch && col < cols { x[row * cols + col] } else { 0.0 };
        for stripe in 0..rows.div_ceil(ROWS) {
            let mut sums = [[0.0; 8]; 16];
            for tile in 0..window.across {
                for (step, a) in window.operands(stripe, tile).iter().enumerate() {
                    for (sums, a) in sums.iter_mut().zip(a) {
                        for (n, sum) in sums.iter_mut().enumerate() {
                            let products = a.iter().enumerate();
                            *sum += products.map(|(k, &a)| value(a) * input(n, tile * COLS + column(step, k))).sum::<f64>();
                        }
                    }
                }
            }
            for escape in window.escapes_of(stripe) {
                for (n, sum) in sums[usize::from(escape.row)].iter_mut().enumerate() {
                    *sum += (value(escape.bits) - value(window.filler())) * input(n, escape.col as usize);
                }
            }
            for (row, sums) in (stripe * ROWS..rows.min(stripe * ROWS + ROWS)).zip(&sums) {
                for (n, &sum) in sums[..batch].iter().enumerate() {
                    let terms: Vec<f64> =
                        (0..cols).map(|k| weight[row * cols + k].to_f64() * x[n * cols + k]).collect();
                    let scale: f64 = terms.iter().map(|term| term.abs()).sum();
                    let expected: f64 = terms.iter().sum();
                    proptest::prop_assert!((sum - expected).abs() <= 1e-12 * scale.max(1.0), "{} {}", sum, expected);
                }
            }
        }
    }
}

//! From the symbols of a block's planes to floats: those of a lossless weight, or the reconstruction points r(q) of levels.

use super::arch::{Simd, per_simd};
use super::element::{Dtype, Element, bits_to_f32};
use super::format::Header;
use super::geometry::{BLOCK, CHUNK, LANES};
use super::stream::Symbols;
use super::symbols::{Coding, PALETTE};

/// Entries of a vector table.
const PIECE: usize = 16;
/// Levels this far out are still exact in the vector units' fixed-point numbers.
const MAX_LEVEL: i64 = 1 << 15;

/// How a weight's planes make floats.
pub struct Assembly {
    element: Element,
    /// The value of symbol 0 in the first plane.
    lo: i32,
    /// The high byte that each symbol of four bits stands for.
    high: [u8; PALETTE],
    /// r(q) less q for each symbol of the first plane from the first on, in 1/256, plus 128; empty for none.
    offsets: Vec<[u8; PIECE]>,
    /// r(q) of the levels from the given one on; others are their own.
    centroids: (i32, Vec<f32>),
    /// Whether the vector units' numbers hold every value, and the second plane counts from zero.
    vector: bool,
}

impl Assembly {
    pub fn new(header: &Header) -> Self {
        let plane = &header.planes[0];
        let lo = plane.coding.lo();
        let second_from_zero =
            header.planes.get(1).is_none_or(|plane| plane.coding.lo() == 0 && !plane.coding.escapes());
        let values = match &plane.coding {
            Coding::Palette { values, .. } => *values,
            _ => std::array::from_fn(|symbol| (lo as u8).wrapping_add(symbol as u8)),
        };
        // A rotation takes the sign to the top.
        let high = values.map(|value| value.rotate_right(1));
        let Element::Level { low_bits } = header.element else {
            // Four planes go the portable way.
            let vector = second_from_zero && header.planes.len() == 2;
            return Self { element: header.element, lo, high, offsets: Vec::new(), centroids: (0, Vec::new()), vector };
        };
        let canonical = &header.origin.as_deref().unwrap_or(header).planes[0];
        let stored: &[i8] = if low_bits == 0 { &canonical.centroids } else { &[] };
        let first_level = canonical.coding.lo();
        let point =
            |(index, &offset): (usize, &i8)| first_level.wrapping_add(index as i32) as f32 + f32::from(offset) / 256.0;
        let pieces = if stored.is_empty() { 0 } else { (1usize << u8::BITS) / PIECE };
        let skipped = lo.wrapping_sub(first_level) as usize;
        let offset = |symbol: usize| stored.get(skipped.wrapping_add(symbol)).map_or(0, |&offset| i32::from(offset));
        let offset = |symbol: usize| (offset(symbol) + 128) as u8;
        let piece = |piece: usize| std::array::from_fn(|i| offset(piece * PIECE + i));
        let used = plane.coding.values().div_ceil(PIECE);
        // A damaged stream may name the symbol of escapes without listing one.
        let symbols = plane.coding.values() + usize::from(plane.coding.is_modelled() && plane.coding.escapes());
        let (first, count) = (i64::from(lo) << low_bits, symbols << low_bits);
        Self {
            element: header.element,
            lo,
            high,
            offsets: (0..pieces.min(used)).map(piece).collect(),
            centroids: (first_level, stored.iter().enumerate().map(point).collect()),
            vector: second_from_zero && low_bits <= 6 && count <= 256 && first.abs() <= MAX_LEVEL,
        }
    }

    /// r(q) of a level, or the float of a lossless code.
    #[inline(always)]
    pub fn point(&self, code: u32) -> f32 {
        match self.element {
            Element::Bits(dtype) => bits_to_f32(code, dtype),
            Element::SwappedBf16 => bits_to_f32(code, Dtype::Bf16),
            Element::Level { .. } => {
                let level = code as i32;
                let (first, centroids) = &self.centroids;
                centroids.get(level.wrapping_sub(*first) as usize).copied().unwrap_or(level as f32)
            }
        }
    }

    /// The first level that has a centroid, and theirs from it on.
    pub fn centroids(&self) -> (i32, &[f32]) {
        (self.centroids.0, &self.centroids.1)
    }

    /// Whether the vector units can assemble this weight.
    pub fn is_vector(&self) -> bool {
        self.vector
    }
}

/// Calls [`columns`] with the widths of the two planes as constants if they are listed, and else at run time.
macro_rules! by_widths {
    ($simd:expr, $planes:expr, $start:expr, $cols:expr, $(($first:literal, $second:literal))*, $visit:expr) => {
        match ($planes[0].width(), $planes[1].width()) {
            $(($first, $second) => columns::<_, $first, $second>($simd, $planes, $start, $cols, $visit),)*
            _ => columns::<_, ANY, ANY>($simd, $planes, $start, $cols, $visit),
        }
    };
}

per_simd! {
    /// Writes `cols` columns of a plane as bytes: its symbols, or what they pick from a palette.
    pub fn unpack(simd, symbols: Symbols, palette: Option<&[u8; PALETTE]>, cols: usize, out: &mut [u8]) -> () {
        let out = out.as_chunks_mut::<LANES>().0;
        let cols = cols.min(out.len());
        let planes = [symbols, Symbols::Zero];
        if let Some(palette) = palette {
            let palette = simd.table(palette);
            columns::<_, 4, 0>(simd, planes, 0, cols, |col, symbols, _| {
                simd.store(simd.lookup(palette, symbols), &mut out[col]);
            });
        } else {
            by_widths!(simd, planes, 0, cols, (4, 0), |col, symbols, _| simd.store(symbols, &mut out[col]));
        }
    }
}

per_simd! {
    /// Writes the first `cols` columns of a block.
    pub fn assemble(simd, assembly: &Assembly, planes: [Symbols; 2], cols: usize, out: &mut [f32; BLOCK]) -> () {
        let out = out.as_chunks_mut::<LANES>().0;
        each_column(simd, assembly, planes, 0, cols.min(out.len()), |col, floats| simd.store_floats(floats, &mut out[col]));
    }
}

per_simd! {
    /// Writes the first `cols` columns of a block, an even number, as pairs of bf16; see [`super::TileDecoder::pairs`].
    pub fn assemble_pairs(
        simd,
        assembly: &Assembly,
        planes: [Symbols; 2],
        cols: usize,
        out: &mut [u32; BLOCK / 2]
    ) -> () {
        let pairs = out.as_chunks_mut::<LANES>().0;
        let pairs = Pairs { floats: simd.zero(), bytes: [simd.splat(0); 2], pairs };
        each_column(simd, assembly, planes, 0, cols.min(CHUNK), pairs);
    }
}

per_simd! {
    /// Adds x[p] times column p to `sums`, column after column from zero.
    pub fn multiply(simd, assembly: &Assembly, planes: [Symbols; 2], x: &[f32], sums: &mut [f32; LANES]) -> () {
        let mut sum = simd.zero();
        let add = |col: usize, floats| sum = simd.fused_multiply_add(x[col], floats, sum);
        each_column(simd, assembly, planes, 0, x.len(), add);
        add_to(simd, sum, sums);
    }
}

per_simd! {
    /// [`multiply`] where some floats are others than the planes say: `far` has their places, by column, and values.
    pub fn multiply_far(
        simd,
        assembly: &Assembly,
        planes: [Symbols; 2],
        x: &[f32],
        far: impl Iterator<Item = (usize, f32)>,
        sums: &mut [f32; LANES]
    ) -> () {
        let mut far = far.peekable();
        let mut sum = simd.zero();
        let mut start = 0;
        while start < x.len() {
            let end = far.peek().map_or(x.len(), |(index, _)| index / LANES).min(x.len());
            let part = &x[start..end];
            let add = |col: usize, floats| sum = simd.fused_multiply_add(part[col], floats, sum);
            each_column(simd, assembly, planes, start, part.len(), add);
            if let Some(&x) = x.get(end) {
                let mut column = [0.0; LANES];
                each_column(simd, assembly, planes, end, 1, |_, floats| simd.store_floats(floats, &mut column));
                while let Some((index, value)) = far.next_if(|(index, _)| index / LANES == end) {
                    column[index % LANES] = value;
                }
                sum = simd.fused_multiply_add(x, simd.load_floats(&column), sum);
            }
            start = end + 1;
        }
        add_to(simd, sum, sums);
    }
}

#[inline(always)]
fn add_to<S: Simd>(simd: S, sum: S::Floats, sums: &mut [f32; LANES]) {
    let mut product = [0.0; LANES];
    simd.store_floats(sum, &mut product);
    sums.iter_mut().zip(product).for_each(|(sum, product)| *sum += product);
}

/// What is done with the floats of a column. Closures are enough where they are so small that they are inlined into all the
/// loops of [`each_column`].
trait Visit<S: Simd> {
    fn visit(&mut self, simd: S, col: usize, floats: S::Floats);

    /// [`Visit::visit`] of floats that are bf16, by their low and high bytes.
    #[inline(always)]
    fn visit_bytes(&mut self, simd: S, col: usize, low: S::Bytes, high: S::Bytes) {
        self.visit(simd, col, simd.floats(low, high));
    }
}

impl<S: Simd, F: FnMut(usize, S::Floats)> Visit<S> for F {
    #[inline(always)]
    fn visit(&mut self, _: S, col: usize, floats: S::Floats) {
        self(col, floats);
    }
}

/// Stores columns in pairs.
struct Pairs<'a, S: Simd> {
    /// The last even column, as floats or as bytes.
    floats: S::Floats,
    bytes: [S::Bytes; 2],
    pairs: &'a mut [[u32; LANES]],
}

impl<S: Simd> Visit<S> for Pairs<'_, S> {
    #[inline(always)]
    fn visit(&mut self, simd: S, col: usize, floats: S::Floats) {
        if col.is_multiple_of(2) {
            self.floats = floats;
        } else {
            simd.store_pairs(self.floats, floats, &mut self.pairs[col / 2]);
        }
    }

    #[inline(always)]
    fn visit_bytes(&mut self, simd: S, col: usize, low: S::Bytes, high: S::Bytes) {
        if col.is_multiple_of(2) {
            self.bytes = [low, high];
        } else {
            simd.store_byte_pairs(self.bytes, [low, high], &mut self.pairs[col / 2]);
        }
    }
}

/// Visits each of `cols` columns from `first` on, which is its column 0.
#[inline(always)]
fn each_column<S: Simd>(
    simd: S,
    assembly: &Assembly,
    planes: [Symbols; 2],
    first: usize,
    cols: usize,
    mut visitor: impl Visit<S>,
) {
    let (zero, lo) = (simd.splat(0), simd.splat(assembly.lo as u8));
    match assembly.element {
        Element::Bits(Dtype::Bf16) => {
            let (sign, mantissa) = (simd.splat(0x80), simd.splat(0x7f));
            by_widths!(simd, planes, first, cols, (8, 8), |col, exponent, rest| {
                let exponent = simd.add(exponent, lo);
                let high = simd.or(simd.and(rest, sign), simd.shift_right::<1>(exponent));
                let low = simd.or(simd.and(rest, mantissa), simd.shift_left::<7>(exponent));
                visitor.visit_bytes(simd, col, low, high);
            });
        }
        Element::SwappedBf16 if planes[0].width() == 4 => {
            let high = simd.table(&assembly.high);
            by_widths!(simd, planes, first, cols, (4, 8), |col, symbol, low| {
                visitor.visit_bytes(simd, col, low, simd.lookup(high, symbol));
            });
        }
        Element::SwappedBf16 => by_widths!(simd, planes, first, cols, (8, 8), |col, symbol, low| {
            let byte = simd.add(symbol, lo);
            let high = simd.or(simd.shift_right::<1>(byte), simd.shift_left::<7>(byte));
            visitor.visit_bytes(simd, col, low, high);
        }),
        Element::Bits(_) => by_widths!(simd, planes, first, cols, (8, 8), |col, high, low| {
            visitor.visit(simd, col, simd.halves(low, simd.add(high, lo)));
        }),
        Element::Level { low_bits: 0 } if assembly.offsets.is_empty() => {
            let lo = assembly.lo as f32;
            by_widths!(simd, planes, first, cols, (8, 0)(4, 0)(5, 0), |col, level, _| {
                visitor.visit(simd, col, simd.fixed_point(zero, level, lo));
            });
        }
        Element::Level { low_bits: 0 } => {
            let (lo, limit) = (assembly.lo as f32 - 0.5, simd.splat(0x70));
            by_widths!(simd, planes, first, cols, (8, 0)(4, 0)(5, 0), |col, level, _| {
                let mut fraction = zero;
                for (piece, table) in assembly.offsets.iter().enumerate() {
                    // Symbols of other pieces saturate, and find nothing.
                    let index = simd.add(level, simd.splat((piece * PIECE).wrapping_neg() as u8));
                    let index = simd.add_saturating(index, limit);
                    fraction = simd.or(fraction, simd.lookup(simd.table(table), index));
                }
                visitor.visit(simd, col, simd.fixed_point(fraction, level, lo));
            });
        }
        Element::Level { low_bits } => {
            let lo = (assembly.lo << low_bits) as f32;
            // Shifts are by constants, and a product by 2^r is not; but for one and four bits there is better.
            match low_bits {
                1 => by_widths!(simd, planes, first, cols, (8, 1)(4, 1), |col, level, low| {
                    visitor.visit(simd, col, simd.fixed_point(zero, simd.add(simd.add(level, level), low), lo));
                }),
                4 => by_widths!(simd, planes, first, cols, (8, 4)(4, 4), |col, level, low| {
                    visitor.visit(simd, col, simd.fixed_point(zero, simd.add(simd.shift_left::<4>(level), low), lo));
                }),
                _ => by_widths!(simd, planes, first, cols, (8, 2), |col, level, low| {
                    let (level, _) = simd.multiply_add(simd.splat(1 << low_bits), level, low);
                    visitor.visit(simd, col, simd.fixed_point(zero, level, lo));
                }),
            }
        }
    }
}

/// As [`each_column`], with the symbols in two planes.
#[inline(always)]
fn columns<S: Simd, const A: usize, const B: usize>(
    simd: S,
    planes: [Symbols; 2],
    first: usize,
    cols: usize,
    mut visit: impl FnMut(usize, S::Bytes, S::Bytes),
) {
    // Steps that are as long as what is loaded: no bounds are checked in this loop.
    if const { is_whole(A) && (B == 0 || is_whole(B)) } {
        let a = whole_steps::<A>(planes[0], first, cols);
        let b = if B == 0 { a } else { whole_steps::<B>(planes[1], first, cols) };
        let (ahead_a, ahead_b) = (planes[0].ahead(), planes[1].ahead());
        let steps =
            a.chunks_exact(step_bytes(A)).zip(b.chunks_exact(if B == 0 { step_bytes(A) } else { step_bytes(B) }));
        for (col, (a, b)) in steps.enumerate() {
            simd.prefetch(a.as_ptr().wrapping_add(ahead_a));
            simd.prefetch(b.as_ptr().wrapping_add(ahead_b));
            visit(col, load_step::<S, A>(simd, a), load_step::<S, B>(simd, b));
        }
    } else {
        let (mut a, mut b) = (Reader::<A>::new(planes[0], first), Reader::<B>::new(planes[1], first));
        for col in 0..cols {
            let symbols = a.next(simd);
            visit(col, symbols, b.next(simd));
        }
    }
}

/// Whether a step of this width is as long as what is loaded for it.
const fn is_whole(width: usize) -> bool {
    width == 4 || width == 8
}

const fn step_bytes(width: usize) -> usize {
    LANES / 8 * width
}

/// The steps of some columns; all of them are there, or a block is unpacked first.
#[inline(always)]
fn whole_steps<const WIDTH: usize>(symbols: Symbols<'_>, first: usize, cols: usize) -> &[u8] {
    let step = step_bytes(WIDTH);
    match symbols {
        Symbols::Packed { bytes, .. } => bytes.get(first * step..(first + cols) * step).unwrap_or_default(),
        Symbols::Zero => &[],
    }
}

#[inline(always)]
fn load_step<S: Simd, const WIDTH: usize>(simd: S, step: &[u8]) -> S::Bytes {
    match (step.first_chunk(), step.first_chunk()) {
        (_, Some(bytes)) if WIDTH == 8 => simd.load(bytes),
        (Some(nibbles), _) if WIDTH == 4 => simd.nibbles(nibbles),
        _ => simd.splat(0),
    }
}

/// A width that is known at run time only.
const ANY: usize = 9;

/// Reads a plane's symbols column by column.
struct Reader<'a, const WIDTH: usize> {
    width: usize,
    bytes: &'a [u8],
    at: usize,
    ahead: usize,
}

impl<'a, const WIDTH: usize> Reader<'a, WIDTH> {
    #[inline(always)]
    fn new(symbols: Symbols<'a>, col: usize) -> Self {
        let width = if WIDTH == ANY { symbols.width() as usize } else { WIDTH };
        match symbols {
            Symbols::Zero => Self { width, bytes: &[0; LANES], at: 0, ahead: 0 },
            Symbols::Packed { bytes, ahead, .. } => Self { width, bytes, at: col * LANES / 8 * width, ahead },
        }
    }

    #[inline(always)]
    fn next<S: Simd>(&mut self, simd: S) -> S::Bytes {
        if WIDTH == 0 {
            return simd.splat(0);
        }
        let Some(bytes) = self.bytes[self.at..].first_chunk() else { return simd.splat(0) };
        simd.prefetch(bytes.as_ptr().wrapping_add(self.ahead));
        self.at += LANES / 8 * self.width;
        match self.width {
            0 => simd.splat(0),
            1 => simd.packed::<1>(bytes),
            2 => simd.packed::<2>(bytes),
            3 => simd.packed::<3>(bytes),
            4 => simd.nibbles(bytes.first_chunk().unwrap_or(&[0; LANES / 2])),
            5 => simd.packed::<5>(bytes),
            6 => simd.packed::<6>(bytes),
            7 => simd.packed::<7>(bytes),
            _ => simd.load(bytes),
        }
    }
}

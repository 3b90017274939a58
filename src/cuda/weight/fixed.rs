//! Laying weights out in a window or in codes, on the host.

use super::{Kind, Parts, STRIPE, Tables, check, choose, count};
use crate::Result;
use crate::codec::{Assembly, Header, PackedWeight};
use crate::cuda::params::Escape;
use crate::parallel::{Pool, map};

unsafe extern "C" {
    fn infold_window_encode(
        weights: *const u16,
        rows: i32,
        cols: i32,
        base: u32,
        tiles: *mut u32,
        apart: *mut u32,
    ) -> usize;
    fn infold_codes_encode(bits: i32, weights: *const u8, rows: i32, cols: i32, tiles: *mut u32) -> bool;
}

/// What a payload begins with: its head, and the value of each code.
pub fn front(kind: Kind, lo: i32, header: &Header, assembly: &Assembly) -> Vec<u8> {
    let base = if kind == Kind::Window { lo as u32 } else { 0 };
    let group_cols = header.scale_grid.group_cols(header.geometry).max(1) as u32;
    let values = (0..kind.values()).map(|code| assembly.point(lo.wrapping_add(code as i32) as u32).to_bits());
    [base, group_cols, 0, 0].into_iter().chain(values).flat_map(u32::to_le_bytes).collect()
}

/// Where the escapes of rows with so many begin and the last's end, padded.
pub fn escape_starts(parts: Parts, counts: impl Iterator<Item = u32>) -> (Vec<u8>, u32) {
    let mut bytes = Vec::with_capacity(parts.escapes() - parts.start(0));
    let mut start = 0;
    for count in counts {
        bytes.extend(u32::to_le_bytes(start));
        start += count;
    }
    bytes.extend(start.to_le_bytes());
    bytes.resize(parts.escapes() - parts.start(0), 0);
    (bytes, start)
}

/// A weight's payload and tables for the device.
pub fn to_device(weight: &PackedWeight, pool: &dyn Pool) -> Result<(Vec<u8>, Vec<u8>)> {
    let (header, geometry) = (&weight.header, weight.geometry());
    check(header)?;
    let (kind, lo) = choose(header, &count(weight, pool)?)?;
    let parts = Parts::new(kind, geometry.rows, geometry.cols);
    let canonical = header.origin.as_deref().unwrap_or(header);
    let assembly = Assembly::new(canonical);
    let encoded = map(pool, geometry.tiles(), |tile| -> Result<_> {
        let codes = weight.tile_codes(tile)?;
        let stripes = codes.chunks(STRIPE * geometry.cols);
        Ok(stripes.map(|stripe| encode_stripe(stripe, parts, lo, &assembly)).collect::<Vec<_>>())
    });
    let encoded: Vec<_> = encoded.into_iter().collect::<Result<_>>()?;
    let stripes = || encoded.iter().flatten();

    let rows = || stripes().flat_map(|(_, rows)| rows);
    let mut payload = front(kind, lo, header, &assembly);
    payload.reserve(parts.bytes());
    stripes().flat_map(|(tiles, _)| tiles).for_each(|word| payload.extend(word.to_le_bytes()));
    payload.extend(escape_starts(parts, rows().map(|escapes| escapes.len() as u32)).0);
    for escape in rows().flatten() {
        payload.extend(escape.col.to_le_bytes());
        payload.extend(escape.value.to_bits().to_le_bytes());
    }
    Ok((payload, Tables { kind, lo, header: canonical.clone() }.to_bytes()))
}

/// The tiles of a stripe, and each row's escapes.
fn encode_stripe(codes: &[u32], parts: Parts, lo: i32, assembly: &Assembly) -> (Vec<u32>, Vec<Vec<Escape>>) {
    let Parts { kind, cols, .. } = parts;
    let height = codes.len() / cols;
    let mut tiles = vec![0; parts.stripe_bytes() / size_of::<u32>()];
    let mut escapes = vec![Vec::new(); height];
    let mut list = |row: usize, col: usize| {
        let value = assembly.point(codes[row * cols + col]);
        escapes[row].push(Escape { col: col as u32, value });
    };
    if kind == Kind::Window {
        let bits: Vec<u16> = codes.iter().map(|&code| code as u16).collect();
        let mut apart = vec![0u32; bits.len()];
        // SAFETY: a stripe's rows, room for its tiles, and for a place each weight.
        let count = unsafe {
            let (rows, cols) = (height as i32, cols as i32);
            infold_window_encode(bits.as_ptr(), rows, cols, lo as u32, tiles.as_mut_ptr(), apart.as_mut_ptr())
        };
        apart[..count].iter().for_each(|&place| list(place as usize % STRIPE, place as usize / STRIPE));
    } else {
        let code = |index: usize| {
            let code = (codes[index] as i32).wrapping_sub(lo) as u32 as usize;
            (code < kind.values()).then_some(code as u8)
        };
        let bytes: Vec<u8> = (0..codes.len())
            .map(|index| {
                code(index).unwrap_or_else(|| {
                    list(index / cols, index % cols);
                    0
                })
            })
            .collect();
        // SAFETY: as above.
        unsafe {
            infold_codes_encode(kind.bits() as i32, bytes.as_ptr(), height as i32, cols as i32, tiles.as_mut_ptr());
        }
    }
    escapes.iter_mut().for_each(|row| row.sort_by_key(|escape| escape.col));
    (tiles, escapes)
}

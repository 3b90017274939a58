//! Lossless weights that no layout of the device makes smaller: their floats as they are, row by row, which the library's own
//! operators read in place.

use std::ops::Range;

use super::{Kind, Tables};
use crate::codec::{Codes, Dtype, Header, Packed, PackedWeight, Quantizer, encode_as};
use crate::parallel::{Pool, map};
use crate::{Error, Result};

/// The kind for floats of a dtype.
pub fn kind_of(dtype: Dtype) -> Kind {
    match dtype {
        Dtype::Bf16 => Kind::RawBf16,
        Dtype::F16 => Kind::RawF16,
        Dtype::F32 => Kind::RawF32,
    }
}

fn width(dtype: Dtype) -> usize {
    if dtype == Dtype::F32 { 4 } else { 2 }
}

/// A weight's payload and tables for the device.
pub fn to_device(weight: &PackedWeight, pool: &dyn Pool) -> Result<(Vec<u8>, Vec<u8>)> {
    let header = &weight.header;
    if header.quantizer != Quantizer::Lossless {
        return Err(Error::argument("layout for CUDA", "a lossless weight", format!("{:?}", header.quantizer)));
    }
    let width = width(header.dtype);
    let tiles = map(pool, weight.geometry().tiles(), |tile| weight.tile_codes(tile));
    let mut payload = Vec::with_capacity(weight.geometry().elements() * width);
    for tile in tiles {
        tile?.into_iter().for_each(|code| payload.extend(&code.to_le_bytes()[..width]));
    }
    let canonical = header.origin.as_deref().unwrap_or(header);
    let tables = Tables { kind: kind_of(header.dtype), lo: 0, header: canonical.clone() };
    Ok((payload, tables.to_bytes()))
}

struct Floats<'a> {
    payload: &'a [u8],
    cols: usize,
    width: usize,
}

impl Codes for Floats<'_> {
    fn rows(&self, rows: Range<usize>, out: &mut [u32]) {
        let row = self.cols * self.width;
        let floats = self.payload[rows.start * row..rows.end * row].chunks_exact(self.width);
        for (out, float) in out.iter_mut().zip(floats) {
            let mut bytes = [0; 4];
            bytes[..self.width].copy_from_slice(float);
            *out = u32::from_le_bytes(bytes);
        }
    }
}

/// The canonical form again.
pub fn from_device(payload: &[u8], header: &Header, pool: &dyn Pool) -> Result<Packed> {
    let (cols, width) = (header.geometry.cols, width(header.dtype));
    let expected = header.geometry.elements() * width;
    if payload.len() != expected {
        return Err(Error::corrupt("device payload", format!("{expected} bytes"), payload.len()));
    }
    encode_as(header.clone(), &Floats { payload, cols, width }, Vec::new(), pool)
}

//! pack_* and inspect_packed: making packed weights and reading their headers.

use tch::{Device, Kind, Tensor};

use super::tensor::{contiguous, of_bytes, slice};
use super::{device, gpu};
use crate::codec::{self, Codec, Dtype, EcsqTarget, Header, Layout, Packed, PackedWeight, Symmetric, Weights};
use crate::cuda::weight::Tables;
use crate::parallel::Pool;
use crate::{Error, Result};

/// Checks the dense weight and packs it with `pack(weights, rows, cols)`.
fn pack(weight: &Tensor, pack: impl FnOnce(Weights, usize, usize) -> Result<Packed>) -> Result<Packed> {
    let [rows, cols] = weight.size()[..] else {
        return Err(Error::argument("weight", "two dimensions", format!("shape {:?}", weight.size())));
    };
    let (rows, cols) = (rows as usize, cols as usize);
    let kind = weight.f_kind()?;
    let weight = contiguous(&weight.f_to_device(Device::Cpu)?, "weight", kind)?;
    match kind {
        Kind::Float => pack(Weights::F32(slice(&weight)?), rows, cols),
        Kind::Half => pack(Weights::F16(slice(&weight)?), rows, cols),
        Kind::BFloat16 => pack(Weights::Bf16(slice(&weight)?), rows, cols),
        other => Err(Error::argument("weight", "a float32, float16 or bfloat16 tensor", format!("{other:?}"))),
    }
}

/// payload, directory, tables and scales. A weight without scales has an empty one.
fn tensors(packed: Packed, pool: &dyn Pool) -> Result<Vec<Tensor>> {
    let mut tensors = without_scales(&packed, pool)?;
    tensors.push(scales(&packed.header, &packed.scales)?);
    Ok(tensors)
}

/// A weight's scales in their dtype and shape.
pub fn scales(header: &Header, scales: &[f32]) -> Result<Tensor> {
    let grid = header.scale_grid;
    let (rows, groups) = grid.shape(header.geometry).unwrap_or((0, 0));
    let kind = if grid.bytes_each() == 2 { Kind::BFloat16 } else { Kind::Float };
    Ok(Tensor::f_from_slice(scales)?.f_reshape([rows as i64, groups as i64])?.f_to_kind(kind)?)
}

pub fn lossless(weight: &Tensor, pool: &dyn Pool) -> Result<Vec<Tensor>> {
    if let Some(packed) = gpu::pack_lossless(weight, pool)? {
        return Ok(packed);
    }
    tensors(pack(weight, |weights, rows, cols| codec::pack_lossless(weights, rows, cols, pool))?, pool)
}

/// Exactly one of `bits` and `max_error` is a number, the other NaN.
pub fn ecsq(weight: &Tensor, bits: f64, max_error: f64, pool: &dyn Pool) -> Result<Vec<Tensor>> {
    let target = match (bits.is_nan(), max_error.is_nan()) {
        (false, true) => EcsqTarget::Bits(bits),
        (true, false) => EcsqTarget::Error(max_error),
        _ => return Err(Error::argument("bits, max_error", "exactly one of the two", "both or neither")),
    };
    if let Some(packed) = gpu::pack_ecsq(weight, target, pool)? {
        return Ok(packed);
    }
    tensors(pack(weight, |weights, rows, cols| codec::pack_ecsq(weights, rows, cols, target, pool))?, pool)
}

pub fn int8(weight: &Tensor, pool: &dyn Pool) -> Result<Vec<Tensor>> {
    if let Some(packed) = gpu::pack_symmetric(weight, Symmetric::INT8, pool)? {
        return Ok(packed);
    }
    tensors(pack(weight, |weights, rows, cols| codec::pack_int8(weights, rows, cols, pool))?, pool)
}

pub fn int4(weight: &Tensor, group_size: i64, pool: &dyn Pool) -> Result<Vec<Tensor>> {
    let group = usize::try_from(group_size).unwrap_or(0);
    if let Some(packed) = gpu::pack_symmetric(weight, Symmetric::int4(group)?, pool)? {
        return Ok(packed);
    }
    tensors(pack(weight, |weights, rows, cols| codec::pack_int4(weights, rows, cols, group, pool))?, pool)
}

/// The same weight in another layout (its number): payload, directory and tables, on the device that they came from.
pub fn lay_out(
    payload: &Tensor,
    directory: &Tensor,
    tables: &Tensor,
    layout: i64,
    pool: &dyn Pool,
) -> Result<Vec<Tensor>> {
    if let Some(laid_out) = gpu::lay_out([payload, directory, tables], layout)? {
        return Ok(laid_out);
    }
    let place = payload.device();
    let on_cpu = |tensor: &Tensor, what, kind| contiguous(&tensor.f_to_device(Device::Cpu)?, what, kind);
    let payload = on_cpu(payload, "payload", Kind::Uint8)?;
    let directory = on_cpu(directory, "directory", Kind::Int)?;
    let tables = on_cpu(tables, "tables", Kind::Uint8)?;
    let laid_out = match device::lay_out([&payload, &directory, &tables], layout, pool)? {
        Some(laid_out) => laid_out,
        None => {
            let weight = PackedWeight::new(slice(&payload)?, slice(&directory)?, slice(&tables)?)?;
            without_scales(&in_layout(&weight, layout, pool)?, pool)?
        }
    };
    // Now rather than at the first forward, which may be recorded.
    device::load(place)?;
    laid_out.iter().map(|tensor| Ok(tensor.f_to_device(place)?)).collect()
}

/// A weight in one of the codec's layouts.
pub fn in_layout(weight: &PackedWeight, layout: i64, pool: &dyn Pool) -> Result<Packed> {
    let to = u8::try_from(layout).ok().and_then(Layout::from_byte);
    let to = to.ok_or_else(|| Error::argument("layout", "0 (compact), 1 (fast), or 2 to 7 for CUDA", layout))?;
    codec::lay_out(weight, to, pool)
}

/// payload, directory and tables.
pub fn without_scales(packed: &Packed, pool: &dyn Pool) -> Result<Vec<Tensor>> {
    Ok(vec![
        of_bytes(&packed.payload, pool)?,
        Tensor::f_from_slice(&packed.directory)?,
        Tensor::f_from_slice(&packed.tables)?,
    ])
}

/// The header's fields: version, codec, layout, ScalarType of the dense weight, rows, columns, quantiser, predictor, rows
/// and columns of the scales. With `verify`, every checksum is compared first, that of `scales` where they are given.
pub fn inspect(
    payload: &Tensor,
    directory: &Tensor,
    tables: &Tensor,
    scales: Option<&Tensor>,
    verify: bool,
) -> Result<Vec<i64>> {
    let payload = contiguous(payload, "payload", Kind::Uint8)?;
    let directory = contiguous(directory, "directory", Kind::Int)?;
    let tables = contiguous(tables, "tables", Kind::Uint8)?;
    if let Some(device) = Tables::parse(slice(&tables)?).transpose()? {
        return Ok(fields(&device.header, Codec::Raw as i64, device.kind as i64));
    }
    let weight = PackedWeight::new(slice(&payload)?, slice(&directory)?, slice(&tables)?)?;
    if verify {
        let scales = scales.map(|scales| contiguous(scales, "scales", Kind::Float)).transpose()?;
        weight.verify(scales.as_ref().map(slice).transpose()?)?;
    }
    Ok(fields(&weight.header, weight.header.codec() as i64, weight.header.layout as i64))
}

fn fields(header: &Header, codec: i64, layout: i64) -> Vec<i64> {
    let (scale_rows, scale_cols) = header.scale_grid.shape(header.geometry).unwrap_or((0, 0));
    let dtype = match header.dtype {
        Dtype::F16 => 5,
        Dtype::F32 => 6,
        Dtype::Bf16 => 15,
    };
    vec![
        i64::from(header.version),
        codec,
        layout,
        dtype,
        header.geometry.rows as i64,
        header.geometry.cols as i64,
        header.quantizer as i64,
        header.predictor as i64,
        scale_rows as i64,
        scale_cols as i64,
    ]
}

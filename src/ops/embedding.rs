//! fused_embedding and its gradient by the scales.

use tch::{Kind, Tensor};

use super::tensor::{contiguous, kind_of, slice, slice_mut};
use super::{Weight, compute_kind, device, float_kind, rows_of, with_float, with_real};
use crate::linear;
use crate::parallel::Pool;
use crate::{Error, Result};

/// Integer indices as int64.
fn integers(indices: &Tensor) -> Result<Tensor> {
    match indices.f_kind()? {
        Kind::Int64 | Kind::Int => Ok(indices.f_to_kind(Kind::Int64)?),
        other => Err(Error::argument("indices", "an int64 or int32 tensor", format!("{other:?}"))),
    }
}

/// [`integers`] that a slice can be made of.
fn as_int64(indices: &Tensor) -> Result<Tensor> {
    contiguous(&integers(indices)?, "indices", Kind::Int64)
}

/// W[indices], in dtype `dtype` (a ScalarType number).
pub fn forward(indices: &Tensor, weight: &Weight, dtype: i32, pool: &dyn Pool) -> Result<Tensor> {
    let kind = kind_of(dtype)?;
    let mut size = indices.size();
    size.push(weight.in_features);
    let mut out = Tensor::f_empty(size, (kind, weight.payload.device()))?;
    if device::is_cuda(&weight.payload) {
        device::unpack(weight, Some(&integers(indices)?.f_contiguous()?), &mut out)?;
        return Ok(out);
    }
    let indices = as_int64(indices)?;
    with_real!(kind, T => weight.open::<T, _>(|packed, scales| {
        with_float!(kind, O => {
            linear::embedding::<T, O>(packed, scales, slice(&indices)?, slice_mut(&mut out)?, pool)
        })
    }))?;
    Ok(out)
}

/// ds = Σ g·r(q) over the rows looked up, in the scales' shape, float64 if g is, else float32.
pub fn scale_gradient(
    gradient: &Tensor,
    indices: &Tensor,
    weight: &Weight,
    shape: &[i64],
    pool: &dyn Pool,
) -> Result<Tensor> {
    let compute = compute_kind(float_kind(gradient, "gradient")?);
    let rows = rows_of(gradient, "gradient", weight.in_features)?;
    if rows != indices.numel() {
        return Err(Error::argument("gradient", format!("{} rows", indices.numel()), rows));
    }
    if device::is_cuda(&weight.payload) {
        return device::embedding_scale_gradient(gradient, &integers(indices)?, weight, shape, compute);
    }
    let (gradient, indices) = (contiguous(gradient, "gradient", compute)?, as_int64(indices)?);
    weight.open_for_scale_gradient(shape, compute, |packed, out| {
        with_real!(compute, T => {
            let gradient = slice::<T>(&gradient)?;
            linear::embedding_scale_gradient::<T>(packed, gradient, slice(&indices)?, slice_mut(out)?, pool)
        })
    })
}

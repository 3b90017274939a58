//! pca_project and its adjoint, pca_reconstruct, on any device: the library's products on a few rows at a time, so that no
//! centred, converted or scaled copy of the data is made. pca_scatter, on the CPU: what a PCA is fitted from.

use tch::{Device, Kind, Tensor};

use super::tensor::{contiguous, slice, slice_mut};
use super::{compute_kind, float_kind, rows_of, with_last, with_real};
use crate::parallel::Pool;
use crate::spline::add_scatter;
use crate::{Error, Result};

/// Bytes of rows that are centred at a time: about a cache's worth, or enough to fill a GPU.
fn chunk_bytes(device: Device) -> usize {
    if device == Device::Cpu { 1 << 20 } else { 1 << 28 }
}

fn check(components: &Tensor, mean: Option<&Tensor>, scale: Option<&Tensor>) -> Result<(i64, i64)> {
    float_kind(components, "components")?;
    let [count, features] = components.size()[..] else {
        let got = format!("shape {:?}", components.size());
        return Err(Error::argument("components", "shape [components, features]", got));
    };
    for (what, vector, length) in [("mean", mean, features), ("scale", scale, count)] {
        if let Some(vector) = vector.filter(|vector| vector.size() != [length]) {
            return Err(Error::argument(what, format!("shape [{length}]"), format!("{:?}", vector.size())));
        }
    }
    Ok((count, features))
}

/// `tensor` in another kind and, as a vector that rows are combined with, on the data's device.
fn vector(tensor: Option<&Tensor>, kind: Kind, device: Device) -> Result<Option<Tensor>> {
    tensor.map(|tensor| Ok(tensor.f_to_device(device)?.f_to_kind(kind)?)).transpose()
}

/// Calls `body` with parts of `input`'s rows and of the rows of a new tensor of `width` columns.
fn by_rows(
    input: &Tensor,
    width: i64,
    kind: Kind,
    bytes: usize,
    body: impl Fn(&Tensor, &mut Tensor) -> Result<()>,
) -> Result<Tensor> {
    let (rows, columns) = (input.size()[0], input.size()[1]);
    let out = Tensor::f_empty([rows, width], (kind, input.device()))?;
    let step = (bytes / (columns.max(width).max(1) as usize * kind.elt_size_in_bytes())).max(64) as i64;
    for start in (0..rows).step_by(step as usize) {
        let length = step.min(rows - start);
        body(&input.f_narrow(0, start, length)?, &mut out.f_narrow(0, start, length)?)?;
    }
    Ok(out)
}

/// ((x − mean) · componentsᵀ) · scale, in the components' dtype. x is of any real dtype: bytes are converted a part at a time.
pub fn project(x: &Tensor, components: &Tensor, mean: Option<&Tensor>, scale: Option<&Tensor>) -> Result<Tensor> {
    let (count, features) = check(components, mean, scale)?;
    let rows = rows_of(x, "x", features)? as i64;
    let (kind, device) = (components.kind(), x.device());
    let (mean, scale) = (vector(mean, kind, device)?, vector(scale, kind, device)?);
    let transposed = components.f_transpose(0, 1)?;
    let flat = x.f_reshape([rows, features])?;
    let out = by_rows(&flat, count, kind, chunk_bytes(device), |part, out| {
        // Before the product: what x and its mean have in common would cost digits after it.
        let centred = match &mean {
            Some(mean) => part.f_to_kind(kind)?.f_sub(mean)?,
            None => part.f_to_kind(kind)?,
        };
        let _ = centred.f_mm_out(out, &transposed)?;
        if let Some(scale) = &scale {
            let _ = out.f_mul_(scale)?;
        }
        Ok(())
    })?;
    Ok(out.f_view(&with_last(x, count)[..])?)
}

/// (z · scale) · components + mean, in the components' dtype.
pub fn reconstruct(z: &Tensor, components: &Tensor, mean: Option<&Tensor>, scale: Option<&Tensor>) -> Result<Tensor> {
    let (count, features) = check(components, mean, scale)?;
    let rows = rows_of(z, "z", count)? as i64;
    let (kind, device) = (components.kind(), z.device());
    let (mean, scale) = (vector(mean, kind, device)?, vector(scale, kind, device)?);
    let flat = z.f_reshape([rows, count])?;
    let out = by_rows(&flat, features, kind, chunk_bytes(device), |part, out| {
        let part = part.f_to_kind(kind)?;
        let scaled = match &scale {
            Some(scale) => part.f_mul(scale)?,
            None => part,
        };
        let _ = scaled.f_mm_out(out, components)?;
        if let Some(mean) = &mean {
            let _ = out.f_add_(mean)?;
        }
        Ok(())
    })?;
    Ok(out.f_view(&with_last(z, features)[..])?)
}

/// Σ (xᵢ − shift)·(xᵢ − shift)ᵀ (d, d) and Σ (xᵢ − shift) (d) of rows (n, d), in float64.
pub fn scatter(x: &Tensor, shift: &Tensor, pool: &dyn Pool) -> Result<[Tensor; 2]> {
    let kind = float_kind(x, "x")?;
    let [_, features] = x.size()[..] else {
        return Err(Error::argument("x", "shape [samples, features]", format!("{:?}", x.size())));
    };
    if shift.size() != [features] {
        return Err(Error::argument("shift", format!("shape [{features}]"), format!("{:?}", shift.size())));
    }
    let compute = compute_kind(kind);
    let (x, shift) = (contiguous(x, "x", compute)?, contiguous(shift, "shift", compute)?);
    let mut products = Tensor::f_zeros([features, features], (Kind::Double, Device::Cpu))?;
    let mut sums = Tensor::f_zeros([features], (Kind::Double, Device::Cpu))?;
    with_real!(compute, T => {
        add_scatter::<T>(slice(&x)?, slice(&shift)?, slice_mut(&mut products)?, slice_mut(&mut sums)?, pool);
    });
    Ok([products, sums])
}

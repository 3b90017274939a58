//! fused_linear, dx and ds. With `exact` the weight is unpacked into a scratch that all layers share and the library's
//! own product runs on it: the bits of the dense layer, for the time of both.

use std::cell::RefCell;

use tch::{Kind, Tensor};

use super::tensor::{contiguous, slice, slice_mut};
use super::{Weight, compute_kind, float_kind, rows_of, with_float, with_last, with_real};
use crate::linear::{self, Input};
use crate::parallel::Pool;
use crate::{Error, Result};

thread_local! {
    /// The dense weight of the exact product that ran last on this thread.
    static SCRATCH: RefCell<Option<Tensor>> = const { RefCell::new(None) };
}

/// y = x·Wᵀ + b, in x's dtype.
pub fn forward(x: &Tensor, weight: &Weight, bias: Option<&Tensor>, exact: bool, pool: &dyn Pool) -> Result<Tensor> {
    let kind = float_kind(x, "x")?;
    let rows = rows_of(x, "x", weight.in_features)?;
    if let Some(bias) = bias.filter(|bias| bias.size() != [weight.out_features]) {
        return Err(Error::argument("bias", format!("shape [{}]", weight.out_features), format!("{:?}", bias.size())));
    }
    if exact {
        let bias = bias.map(|bias| bias.f_to_kind(kind)).transpose()?;
        return with_dense(weight, kind, pool, |dense| Ok(x.f_linear(dense, bias.as_ref())?));
    }
    let compute = compute_kind(kind);
    let input = contiguous(x, "x", compute)?;
    let bias = bias.map(|bias| contiguous(bias, "bias", compute)).transpose()?;
    let mut out = Tensor::f_empty(with_last(x, weight.out_features), (kind, x.device()))?;
    with_real!(kind, T => weight.open::<T, _>(|packed, scales| {
        let bias = bias.as_ref().map(slice::<T>).transpose()?;
        let input = Input { values: slice(&input)?, rows };
        with_float!(kind, O => linear::forward::<T, O>(packed, scales, input, bias, slice_mut(&mut out)?, pool))
    }))?;
    Ok(out)
}

/// dx = g·W, in g's dtype.
pub fn input_gradient(gradient: &Tensor, weight: &Weight, exact: bool, pool: &dyn Pool) -> Result<Tensor> {
    let kind = float_kind(gradient, "gradient")?;
    let rows = rows_of(gradient, "gradient", weight.out_features)?;
    if exact {
        return with_dense(weight, kind, pool, |dense| Ok(gradient.f_matmul(dense)?));
    }
    let input = contiguous(gradient, "gradient", compute_kind(kind))?;
    let mut out = Tensor::f_empty(with_last(gradient, weight.in_features), (kind, gradient.device()))?;
    with_real!(kind, T => weight.open::<T, _>(|packed, scales| {
        let input = Input { values: slice(&input)?, rows };
        with_float!(kind, O => linear::input_gradient::<T, O>(packed, scales, input, slice_mut(&mut out)?, pool))
    }))?;
    Ok(out)
}

/// ds = Σ (gᵀx)·r(q) over the elements that share a scale, in the scales' shape, float64 if g is, else float32.
pub fn scale_gradient(
    gradient: &Tensor,
    x: &Tensor,
    weight: &Weight,
    shape: &[i64],
    pool: &dyn Pool,
) -> Result<Tensor> {
    let compute = compute_kind(float_kind(gradient, "gradient")?);
    float_kind(x, "x")?;
    let rows = rows_of(gradient, "gradient", weight.out_features)?;
    if rows_of(x, "x", weight.in_features)? != rows {
        return Err(Error::argument("x", format!("{rows} rows, as in the gradient"), format!("shape {:?}", x.size())));
    }
    let (gradient, x) = (contiguous(gradient, "gradient", compute)?, contiguous(x, "x", compute)?);
    weight.open_for_scale_gradient(shape, compute, |packed, out| {
        with_real!(compute, T => {
            let (gradient, x) = (Input { values: slice::<T>(&gradient)?, rows }, Input { values: slice(&x)?, rows });
            linear::scale_gradient::<T>(packed, gradient, x, slice_mut(out)?, pool)
        })
    })
}

/// Calls `body` with the dense weight in `kind`, in this thread's scratch.
fn with_dense<R>(weight: &Weight, kind: Kind, pool: &dyn Pool, body: impl FnOnce(&Tensor) -> Result<R>) -> Result<R> {
    let elements = weight.out_features * weight.in_features;
    let kept = SCRATCH.with(|scratch| scratch.borrow_mut().take());
    let kept = kept.filter(|kept| kept.kind() == kind && kept.numel() as i64 >= elements);
    let buffer = match kept {
        Some(kept) => kept,
        None => Tensor::f_empty([elements], (kind, weight.payload.device()))?,
    };
    let mut dense = buffer.f_narrow(0, 0, elements)?.f_view([weight.out_features, weight.in_features])?;
    weight.unpack_into(&mut dense, pool)?;
    let result = body(&dense);
    SCRATCH.with(|scratch| *scratch.borrow_mut() = Some(buffer));
    result
}

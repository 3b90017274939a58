//! fused_linear, dx and ds. With `exact` the weight is unpacked into a scratch that all layers share and the library's
//! own product runs on it: the bits of the dense layer, for the time of both.

use tch::{Kind, Tensor};

use super::tensor::{Element, contiguous, slice, slice_mut};
use super::{Weight, check_bias, compute_kind, device, float_kind, rows_of, with_float, with_last, with_real};
use crate::linear::{self, Input};
use crate::parallel::Pool;
use crate::{Error, Result};

/// Opens `$weight` and calls `$body` with `$type` standing for the type that tensors of kind `$kind` are multiplied in, and
/// `$out` for their own.
macro_rules! with_operand {
    ($kind:expr, $weight:expr, $type:ident, $out:ident, |$packed:ident, $scales:ident| $body:expr) => {
        if $kind == Kind::BFloat16 {
            type $out = half::bf16;
            $weight.open::<f32, _>(|$packed, $scales| {
                if linear::keeps_bf16($packed) {
                    type $type = half::bf16;
                    $body
                } else {
                    type $type = f32;
                    $body
                }
            })
        } else {
            with_real!($kind, Real => $weight.open::<Real, _>(|$packed, $scales| {
                type $type = Real;
                with_float!($kind, Float => {
                    type $out = Float;
                    $body
                })
            }))
        }
    };
}

/// y = x·Wᵀ + b, in x's dtype.
pub fn forward(x: &Tensor, weight: &Weight, bias: Option<&Tensor>, exact: bool, pool: &dyn Pool) -> Result<Tensor> {
    let kind = float_kind(x, "x")?;
    let rows = rows_of(x, "x", weight.in_features)?;
    check_bias(bias, weight.out_features)?;
    let size = with_last(x, weight.out_features);
    let on_device = device::is_cuda(&weight.payload);
    if on_device
        && !exact
        && let Some(y) = device::linear(x, weight, bias, rows, &size)?
    {
        return Ok(y);
    }
    if exact || on_device {
        let bias = bias.map(|bias| bias.f_to_kind(kind)).transpose()?;
        return weight.with_dense(kind, pool, |dense| Ok(x.f_linear(dense, bias.as_ref())?));
    }
    let mut out = Tensor::f_empty(size, (kind, x.device()))?;
    let y = &mut out;
    with_operand!(kind, weight, T, O, |packed, scales| {
        let x = contiguous(x, "x", T::KIND)?;
        let bias = bias.map(|bias| contiguous(bias, "bias", compute_kind(kind))).transpose()?;
        let bias = bias.as_ref().map(slice).transpose()?;
        linear::forward::<T, O>(packed, scales, Input { values: slice(&x)?, rows }, bias, slice_mut(y)?, pool)
    })?;
    Ok(out)
}

/// dx = g·W, in g's dtype.
pub fn input_gradient(gradient: &Tensor, weight: &Weight, exact: bool, pool: &dyn Pool) -> Result<Tensor> {
    let kind = float_kind(gradient, "gradient")?;
    let rows = rows_of(gradient, "gradient", weight.out_features)?;
    let size = with_last(gradient, weight.in_features);
    let on_device = device::is_cuda(&weight.payload);
    if on_device
        && !exact
        && let Some(dx) = device::input_gradient(gradient, weight, rows, &size)?
    {
        return Ok(dx);
    }
    if exact || on_device {
        return weight.with_dense(kind, pool, |dense| Ok(gradient.f_matmul(dense)?));
    }
    let mut out = Tensor::f_empty(size, (kind, gradient.device()))?;
    let dx = &mut out;
    with_operand!(kind, weight, T, O, |packed, scales| {
        let input = contiguous(gradient, "gradient", T::KIND)?;
        linear::input_gradient::<T, O>(packed, scales, Input { values: slice(&input)?, rows }, slice_mut(dx)?, pool)
    })?;
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
    if device::is_cuda(&weight.payload) {
        return device::scale_gradient(gradient, x, weight, shape, compute);
    }
    let (gradient, x) = (contiguous(gradient, "gradient", compute)?, contiguous(x, "x", compute)?);
    weight.open_for_scale_gradient(shape, compute, |packed, out| {
        with_real!(compute, T => {
            let (gradient, x) = (Input { values: slice::<T>(&gradient)?, rows }, Input { values: slice(&x)?, rows });
            linear::scale_gradient::<T>(packed, gradient, x, slice_mut(out)?, pool)
        })
    })
}

//! fused_conv: the fused product where a convolution is one, else the library's convolution on a weight that is unpacked
//! into the scratch that all layers share.

use tch::Tensor;

use super::{Weight, check_bias, float_kind, linear};
use crate::bridge::Window;
use crate::parallel::Pool;
use crate::{Error, Result};

/// Up to so many pixels the fused product of a pointwise convolution is no slower than unpacking its weight.
const FUSED_PIXELS: usize = 128;

/// The convolution of x (batch, channels, 1 to 3 spatial dimensions), in x's dtype. W is (out_channels, channels / groups ·
/// kernel). With `exact`, and with any kernel but 1: the bits of the dense layer.
pub fn forward(
    x: &Tensor,
    weight: &Weight,
    bias: Option<&Tensor>,
    window: &Window,
    exact: bool,
    pool: &dyn Pool,
) -> Result<Tensor> {
    let kind = float_kind(x, "x")?;
    let (size, dimensions) = (x.size(), window.kernel_size.len());
    for (what, list, least) in [
        ("kernel_size", window.kernel_size, 1),
        ("stride", window.stride, 1),
        ("padding", window.padding, 0),
        ("dilation", window.dilation, 1),
    ] {
        if !(1..=3).contains(&dimensions) || list.len() != dimensions || list.iter().any(|&value| value < least) {
            let expected = format!("1 to 3 integers from {least}, as many as kernel_size has");
            return Err(Error::argument(what, expected, format!("{list:?}")));
        }
    }
    if size.len() != dimensions + 2 {
        return Err(Error::argument("x", format!("{} dimensions", dimensions + 2), format!("shape {size:?}")));
    }
    let (channels, groups) = (size[1], window.groups);
    let kernel = window.kernel_size.iter().try_fold(1i64, |product, &length| product.checked_mul(length));
    let divides = groups > 0 && channels % groups == 0 && weight.out_features % groups == 0;
    if !divides || kernel.and_then(|kernel| kernel.checked_mul(channels / groups)) != Some(weight.in_features) {
        let channels = (weight.in_features / kernel.unwrap_or(1)).saturating_mul(groups);
        let expected = format!("{channels} channels, for a weight of {} columns", weight.in_features);
        return Err(Error::argument("x", expected, format!("shape {size:?} in {groups} groups")));
    }
    check_bias(bias, weight.out_features)?;
    let is_pointwise = kernel == Some(1) && groups == 1 && window.padding.iter().all(|&padding| padding == 0);
    if is_pointwise && !exact {
        let mut pixels = x.shallow_clone();
        for (dimension, &step) in (2..).zip(window.stride) {
            pixels = pixels.f_slice(dimension, None, None, step)?;
        }
        if pixels.numel() <= FUSED_PIXELS * weight.in_features as usize {
            return Ok(linear::forward(&pixels.f_movedim_int(1, -1)?, weight, bias, false, pool)?.f_movedim_int(-1, 1)?);
        }
    }
    let bias = bias.map(|bias| bias.f_to_kind(kind)).transpose()?;
    let shape = [&[weight.out_features, channels / groups], window.kernel_size].concat();
    weight.with_dense(kind, pool, |dense| {
        let (dense, no_padding) = (dense.f_view(shape.as_slice())?, vec![0; dimensions]);
        let Window { stride, padding, dilation, .. } = *window;
        Ok(x.f_convolution(&dense, bias.as_ref(), stride, padding, dilation, false, no_padding, groups)?)
    })
}

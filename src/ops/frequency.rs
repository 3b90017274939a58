//! The block-circulant product and its companions, computed in float64 for float64, else in float32.

use tch::{Kind, Tensor};

use super::tensor::{contiguous, slice, slice_mut};
use super::{check_bias, compute_kind, device, float_kind, frequency_gpu, log8, rows_of, with_last, with_real};
use crate::codec::MAX_DIMENSION;
use crate::cuda::launch::Direction;
use crate::memory::AlignedVec;
use crate::parallel::Pool;
use crate::spectral::{self, Circulant};
use crate::{Error, Result};

/// Packed spectra as they are stored.
#[derive(Clone, Copy)]
pub enum Spectrum<'a> {
    Float(&'a Tensor),
    /// Decoded into a scratch.
    Log8 {
        codes: &'a Tensor,
        words: &'a Tensor,
    },
}

/// Blocks in each direction, and a block's size.
fn blocks(spectrum: &Tensor) -> Result<[i64; 3]> {
    match spectrum.size()[..] {
        [outputs, inputs, block] if block > 0 => Ok([outputs, inputs, block]),
        ref size => {
            let expected = "shape [output blocks, input blocks, block]";
            Err(Error::argument("spectrum", expected, format!("{size:?}")))
        }
    }
}

/// Checks that `count` blocks cover `features`, the last one at least in part.
fn check_features(features: i64, count: i64, block: i64, what: &'static str) -> Result<()> {
    if (0..MAX_DIMENSION as i64).contains(&features) && (features as u64).div_ceil(block as u64) == count as u64 {
        return Ok(());
    }
    let least = if count > 0 { (count - 1) * block + 1 } else { 0 };
    Err(Error::argument(what, format!("{least} to {} for the spectrum's blocks", count * block), features))
}

/// A tensor's last dimension.
pub(super) fn features_of(tensor: &Tensor, what: &'static str) -> Result<i64> {
    tensor.size().last().copied().ok_or_else(|| Error::argument(what, "at least one dimension", "a scalar"))
}

/// A result in the dtype of what it belongs to.
pub(super) fn in_kind(result: Tensor, kind: Kind) -> Result<Tensor> {
    Ok(if result.kind() == kind { result } else { result.f_to_kind(kind)? })
}

/// Checks that a gradient has x's leading dimensions.
pub(super) fn check_leading(gradient: &Tensor, x: &Tensor) -> Result<()> {
    if gradient.size().split_last().map(|(_, rows)| rows) == x.size().split_last().map(|(_, rows)| rows) {
        return Ok(());
    }
    let expected = format!("the leading dimensions of x, which has shape {:?}", x.size());
    Err(Error::argument("gradient", expected, format!("{:?}", gradient.size())))
}

/// y = x·Wᵀ + b, in x's dtype. W has the packed spectra `spectrum`.
pub fn forward(
    x: &Tensor,
    spectrum: Spectrum,
    bias: Option<&Tensor>,
    features: i64,
    pool: &dyn Pool,
) -> Result<Tensor> {
    let kind = float_kind(x, "x")?;
    let (Spectrum::Float(shaped) | Spectrum::Log8 { codes: shaped, .. }) = spectrum;
    let [outputs, inputs, block] = blocks(shaped)?;
    let in_features = features_of(x, "x")?;
    check_features(in_features, inputs, block, "x's last dimension")?;
    check_features(features, outputs, block, "out_features")?;
    check_bias(bias, features)?;
    let rows = rows_of(x, "x", in_features)?;
    if let Spectrum::Float(spectrum) = spectrum {
        float_kind(spectrum, "spectrum")?;
    }
    let compute = compute_kind(kind);
    if device::is_cuda(x) {
        return frequency_gpu::product(x, spectrum, bias, (rows, features), Direction::Forward);
    }
    let x_values = contiguous(x, "x", compute)?;
    let bias = bias.map(|bias| contiguous(bias, "bias", compute)).transpose()?;
    let mut out = Tensor::f_empty(with_last(x, features), (compute, x.device()))?;
    with_real!(compute, T => {
        let shape = Circulant::<T>::new(features as usize, in_features as usize, block as usize)?;
        let bias = bias.as_ref().map(slice).transpose()?;
        let (floats, mut scratch);
        let spectrum: &[T] = match spectrum {
            Spectrum::Float(spectrum) => {
                floats = contiguous(spectrum, "spectrum", compute)?;
                slice(&floats)?
            }
            Spectrum::Log8 { codes, words } => {
                scratch = AlignedVec::new(shape.len());
                log8::decode_into(codes, words, &mut scratch, pool)?;
                &scratch
            }
        };
        spectral::product(&shape, (slice(&x_values)?, rows), spectrum, bias, slice_mut(&mut out)?, pool);
    });
    in_kind(out, kind)
}

/// dx = g·W, in g's dtype.
pub fn input_gradient(gradient: &Tensor, spectrum: &Tensor, features: i64, pool: &dyn Pool) -> Result<Tensor> {
    let kind = float_kind(gradient, "gradient")?;
    let [outputs, inputs, block] = blocks(spectrum)?;
    let out_features = features_of(gradient, "gradient")?;
    check_features(out_features, outputs, block, "gradient's last dimension")?;
    check_features(features, inputs, block, "in_features")?;
    let rows = rows_of(gradient, "gradient", out_features)?;
    float_kind(spectrum, "spectrum")?;
    if device::is_cuda(gradient) {
        let spectrum = Spectrum::Float(spectrum);
        return frequency_gpu::product(gradient, spectrum, None, (rows, features), Direction::Backward);
    }
    let compute = compute_kind(kind);
    let (values, spectrum) = (contiguous(gradient, "gradient", compute)?, contiguous(spectrum, "spectrum", compute)?);
    let mut out = Tensor::f_empty(with_last(gradient, features), (compute, gradient.device()))?;
    with_real!(compute, T => {
        let shape = Circulant::<T>::new(out_features as usize, features as usize, block as usize)?;
        spectral::input_gradient(&shape, (slice(&values)?, rows), slice(&spectrum)?, slice_mut(&mut out)?, pool);
    });
    in_kind(out, kind)
}

/// The gradient by the packed spectra for blocks of `block`, float64 if g is, else float32.
pub fn spectrum_gradient(gradient: &Tensor, x: &Tensor, block: i64, pool: &dyn Pool) -> Result<Tensor> {
    let compute = compute_kind(float_kind(gradient, "gradient")?);
    float_kind(x, "x")?;
    let (out_features, in_features) = (features_of(gradient, "gradient")?, features_of(x, "x")?);
    let rows = rows_of(x, "x", in_features)?;
    check_leading(gradient, x)?;
    if !(1..MAX_DIMENSION as i64).contains(&block) {
        return Err(Error::argument("block", "a positive size", block));
    }
    if device::is_cuda(x) {
        return frequency_gpu::spectrum_gradient(gradient, x, block, compute);
    }
    let (gradient, x) = (contiguous(gradient, "gradient", compute)?, contiguous(x, "x", compute)?);
    let count = |features: i64| (features as u64).div_ceil(block as u64) as i64;
    let size = [count(out_features), count(in_features), block];
    let mut out = Tensor::f_empty(size, (compute, x.device()))?;
    with_real!(compute, T => {
        let shape = Circulant::<T>::new(out_features as usize, in_features as usize, block as usize)?;
        spectral::spectrum_gradient(&shape, slice(&gradient)?, slice(&x)?, rows, slice_mut(&mut out)?, pool);
    });
    Ok(out)
}

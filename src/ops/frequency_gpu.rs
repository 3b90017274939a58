//! The block-circulant product on CUDA: kernels where there are some, else PyTorch's transforms and batched products.

use std::ptr;

use tch::{Device, Kind, Tensor};

use super::device::{self, dtype_of, pointer};
use super::frequency::Spectrum;
use super::log8::{self, OnDevice};
use super::{compute_kind, with_last};
use crate::cuda::driver;
use crate::cuda::frequency::{self, Product};
use crate::cuda::launch::Direction;
use crate::cuda::params::{Circulant, Log8, Spectra};
use crate::{Error, Result};

/// y = x·Wᵀ + b of `features`, or dx = g·W with g as x. Shapes are checked.
pub fn product(
    x: &Tensor,
    spectrum: Spectrum,
    bias: Option<&Tensor>,
    (rows, features): (usize, i64),
    direction: Direction,
) -> Result<Tensor> {
    let kind = x.f_kind()?;
    let (Spectrum::Float(shaped) | Spectrum::Log8 { codes: shaped, .. }) = spectrum;
    let words = if let Spectrum::Log8 { words, .. } = spectrum { Some(words) } else { None };
    for (what, tensor) in [("spectrum", Some(shaped)), ("words", words), ("bias", bias)] {
        if let Some(tensor) = tensor.filter(|tensor| tensor.device() != x.device()) {
            return Err(Error::argument(
                what,
                format!("a tensor on {:?}", x.device()),
                format!("{:?}", tensor.device()),
            ));
        }
    }
    let (outputs, inputs, n) = shaped.size3()?;
    let (inputs, outputs) = if direction == Direction::Forward { (inputs, outputs) } else { (outputs, inputs) };
    let size = with_last(x, features);
    if rows == 0 || inputs * outputs == 0 {
        let y = Tensor::f_zeros(size, (kind, x.device()))?;
        return Ok(if let Some(bias) = bias { y.f_add(&bias.f_to_kind(kind)?)? } else { y });
    }
    let spectrum_dtype =
        if words.is_some() { Some(Spectra::Log8) } else { dtype_of(shaped.f_kind()?).map(Spectra::from) };
    let dtypes = dtype_of(kind).zip(spectrum_dtype);
    let product = match (dtypes, x.device()) {
        (Some((dtype, _)), Device::Cuda(device)) => {
            Product::of(n as usize, inputs as usize, rows, dtype, |name| driver::has(device, name))?
        }
        _ => Product::Composed,
    };
    let Some((dtype, spectrum_dtype)) = dtypes.filter(|_| product != Product::Composed) else {
        let decoded = words.map(|words| log8::decode_on_device(shaped, words, compute_kind(kind))).transpose()?;
        return composed(x, decoded.as_ref().unwrap_or(shaped), bias, features, direction);
    };
    let encoded = words.map(|words| OnDevice::new(shaped, words)).transpose()?;
    let y = Tensor::f_empty(size, (kind, x.device()))?;
    let (x, spectrum) = (x.f_contiguous()?, shaped.f_contiguous()?);
    let bias = bias.map(|bias| bias.f_to_kind(kind)?.f_contiguous()).transpose()?;
    let words = match product {
        Product::Many => frequency::tile_words(n as usize, inputs as usize, outputs as usize),
        _ => 0,
    };
    let tiles = Tensor::f_empty([words as i64], (Kind::Int, x.device()))?;
    let at = x.device();
    let (input_stride, output_stride) =
        if direction == Direction::Forward { (1, inputs as i32) } else { (outputs as i32, 1) };
    let parameters = Circulant {
        x: pointer(&x, "x", kind, at)?.cast_const().cast(),
        spectrum: pointer(&spectrum, "spectrum", spectrum.f_kind()?, at)?.cast_const().cast(),
        log8: encoded.as_ref().map_or(Ok(Log8::NONE), OnDevice::view)?,
        bias: match &bias {
            Some(bias) => pointer(bias, "bias", kind, at)?.cast_const().cast(),
            None => ptr::null(),
        },
        y: pointer(&y, "y", kind, at)?.cast(),
        tiles: pointer(&tiles, "tiles", Kind::Int, at)?.cast(),
        dtype,
        spectrum_dtype,
        batch: rows as i32,
        in_features: x.size().last().copied().unwrap_or_default() as i32,
        out_features: features as i32,
        n: n as i32,
        inputs: inputs as i32,
        outputs: outputs as i32,
        input_stride,
        output_stride,
        conjugate: (direction == Direction::Backward).into(),
        // Of many rows; the launch says these.
        input_steps: 0,
        outputs_each: 0,
    };
    if product == Product::Few {
        device::run_beside(&x, &frequency::few(parameters))?;
    } else {
        for launch in frequency::many(parameters) {
            device::run_beside(&x, &launch)?;
        }
    }
    Ok(y)
}

/// The half-spectra (rows, blocks, n / 2 + 1) of a tensor's last dimension, padded to whole blocks.
fn spectra(tensor: &Tensor, n: i64, kind: Kind) -> Result<Tensor> {
    let features = tensor.size().last().copied().unwrap_or_default();
    let blocks = (features as u64).div_ceil(n as u64) as i64;
    let rows = tensor.numel() as i64 / features.max(1);
    let values = tensor.f_to_kind(kind)?.f_reshape([rows, features])?;
    let padded = values.f_constant_pad_nd([0, blocks * n - features])?;
    Ok(padded.f_reshape([rows, blocks, n])?.f_fft_rfft(None, -1, "ortho")?)
}

/// What a packed spectrum's numbers are multiplied by: 1, or 1/√2 where they stand for a conjugate too.
fn scale(n: i64, like: &Tensor) -> Result<Tensor> {
    let scale = Tensor::f_full([n / 2 + 1], std::f64::consts::FRAC_1_SQRT_2, (like.f_kind()?, like.device()))?;
    let _ = scale.f_narrow(0, 0, 1)?.f_fill_(1.0)?;
    if n % 2 == 0 {
        let _ = scale.f_narrow(0, n / 2, 1)?.f_fill_(1.0)?;
    }
    Ok(scale)
}

/// The orthonormal half-spectra of packed ones.
fn unpacked(spectrum: &Tensor, kind: Kind) -> Result<Tensor> {
    let (_, _, n) = spectrum.size3()?;
    let spectrum = spectrum.f_to_kind(kind)?;
    let scale = scale(n, &spectrum)?;
    let real = spectrum.f_narrow(2, 0, n / 2 + 1)?.f_mul(&scale)?;
    let pairs = (n - 1) / 2;
    let imaginary = spectrum.f_narrow(2, n / 2 + 1, pairs)?.f_mul_scalar(std::f64::consts::FRAC_1_SQRT_2)?;
    let imaginary = imaginary.f_constant_pad_nd([1, n / 2 - pairs])?;
    Ok(Tensor::f_complex(&real, &imaginary)?)
}

/// The same by PyTorch's transforms, for any block and dtype.
fn composed(
    x: &Tensor,
    spectrum: &Tensor,
    bias: Option<&Tensor>,
    features: i64,
    direction: Direction,
) -> Result<Tensor> {
    let kind = x.f_kind()?;
    let compute = compute_kind(kind);
    let (_, _, n) = spectrum.size3()?;
    // (frequency, rows, inputs) by (frequency, inputs, outputs)
    let x_hat = spectra(x, n, compute)?.f_permute([2, 0, 1])?;
    let weights = unpacked(spectrum, compute)?;
    let weights = match direction {
        Direction::Forward => weights.f_permute([2, 1, 0])?,
        Direction::Backward => weights.f_permute([2, 0, 1])?.f_conj()?,
    };
    let y_hat = x_hat.f_bmm(&weights)?.f_permute([1, 2, 0])?;
    // An orthonormal transform of a convolution is √n times the product of two.
    let blocks = y_hat.f_fft_irfft(n, -1, "ortho")?.f_mul_scalar((n as f64).sqrt())?;
    let y = blocks.f_flatten(1, 2)?.f_narrow(1, 0, features)?.f_reshape(with_last(x, features))?;
    let y = if let Some(bias) = bias { y.f_add(&bias.f_to_kind(compute)?)? } else { y };
    Ok(y.f_to_kind(kind)?)
}

/// The gradient by the packed spectra.
pub fn spectrum_gradient(gradient: &Tensor, x: &Tensor, n: i64, compute: Kind) -> Result<Tensor> {
    if gradient.numel() == 0 || x.numel() == 0 {
        let blocks =
            |tensor: &Tensor| (tensor.size().last().copied().unwrap_or_default() as u64).div_ceil(n as u64) as i64;
        return Ok(Tensor::f_zeros([blocks(gradient), blocks(x), n], (compute, x.device()))?);
    }
    let g_hat = spectra(gradient, n, compute)?.f_permute([2, 1, 0])?;
    let x_hat = spectra(x, n, compute)?.f_permute([2, 0, 1])?.f_conj()?;
    let product = g_hat.f_bmm(&x_hat)?.f_permute([1, 2, 0])?;
    let (real, imaginary) = (product.f_real()?, product.f_imag()?);
    // Of a pair of frequencies both have their part.
    let scale = scale(n, &real)?.f_reciprocal()?.f_mul_scalar((n as f64).sqrt())?;
    let pairs = (n - 1) / 2;
    let imaginary = imaginary.f_narrow(2, 1, pairs)?.f_mul_scalar((2.0 * n as f64).sqrt())?;
    Ok(Tensor::f_cat(&[real.f_mul(&scale)?, imaginary], 2)?)
}

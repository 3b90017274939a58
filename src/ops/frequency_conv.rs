//! Convolution by spectra and its companions, computed in float64 for float64, else in float32.

use tch::{Kind, Tensor};

use super::tensor::{contiguous, slice, slice_mut};
use super::{check_bias, compute_kind, float_kind, with_real};
use crate::bridge::Window;
use crate::parallel::Pool;
use crate::spectral::conv::{self, Axis, Boundary, Convolution};
use crate::{Error, Result};

/// Numbers below it make no product of two of them that an integer cannot hold.
const LIMIT: i64 = 1 << 31;

/// A convolution's sizes: (batch, channels, …) and (out channels, channels / groups, …).
struct Sizes<'a> {
    batch: i64,
    in_channels: i64,
    out_channels: i64,
    inputs: &'a [i64],
}

impl Sizes<'_> {
    /// The convolution, and the size of its result beyond the channels.
    fn shape(&self, window: &Window, circular: bool) -> Result<(Convolution, Vec<i64>)> {
        let dimensions = window.kernel_size.len();
        for (what, list, count, least) in [
            ("x_size", self.inputs, dimensions, 0),
            ("kernel_size", window.kernel_size, dimensions, 1),
            ("stride", window.stride, dimensions, 1),
            ("padding", window.padding, window.padding.len().max(dimensions), 0),
            ("dilation", window.dilation, dimensions, 1),
        ] {
            let fits = list.len() == count && list.iter().all(|value| (least..LIMIT).contains(value));
            if !(1..=3).contains(&dimensions) || !fits {
                let expected = format!("{count} integers from {least} below {LIMIT}, for 1 to 3 dimensions");
                return Err(Error::argument(what, expected, format!("{list:?}")));
            }
        }
        // Before every dimension and, if there are so many, after every one.
        let (before, after) = match window.padding.len() {
            length if length == dimensions => (window.padding, window.padding),
            length if length == 2 * dimensions => window.padding.split_at(dimensions),
            length => return Err(Error::argument("padding", format!("{dimensions} or {}", 2 * dimensions), length)),
        };
        let axes: Vec<_> = (0..dimensions)
            .map(|axis| Axis {
                input: self.inputs[axis] as usize,
                kernel: window.kernel_size[axis] as usize,
                stride: window.stride[axis] as usize,
                dilation: window.dilation[axis] as usize,
                before: before[axis] as usize,
                after: after[axis] as usize,
            })
            .collect();
        let groups = usize::try_from(window.groups).unwrap_or(0);
        let boundary = if circular { Boundary::Circular } else { Boundary::Zeros };
        let [batch, ins, outs] = [self.batch, self.in_channels, self.out_channels].map(|size| size as usize);
        let shape = Convolution::new(batch, ins, outs, groups, &axes, boundary)?;
        Ok((shape, axes.iter().map(|axis| axis.output() as i64).collect()))
    }
}

/// The batch, the channels and the other dimensions of a tensor that has `dimensions` of these.
fn split<'a>(size: &'a [i64], dimensions: usize, what: &'static str) -> Result<(i64, i64, &'a [i64])> {
    match size {
        &[batch, channels, ref inner @ ..] if inner.len() == dimensions => Ok((batch, channels, inner)),
        _ => Err(Error::argument(what, format!("{} dimensions", dimensions + 2), format!("shape {size:?}"))),
    }
}

/// A weight's size: (out channels, channels of a group, kernel).
fn kernel_of(size: &[i64]) -> Result<(i64, i64, &[i64])> {
    match size {
        &[outs, ins, ref kernel @ ..] if (1..=3).contains(&kernel.len()) => Ok((outs, ins, kernel)),
        _ => Err(Error::argument("weight", "3 to 5 dimensions", format!("shape {size:?}"))),
    }
}

fn check_size(size: &[i64], expected: &[i64], what: &'static str) -> Result<()> {
    if size == expected {
        return Ok(());
    }
    Err(Error::argument(what, format!("shape {expected:?}"), format!("{size:?}")))
}

fn in_kind(result: Tensor, kind: Kind) -> Result<Tensor> {
    Ok(if result.kind() == kind { result } else { result.f_to_kind(kind)? })
}

/// y = x ⋆ w + b, in x's dtype. `window`'s kernel is the weight's.
pub fn forward(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    window: &Window,
    circular: bool,
    pool: &dyn Pool,
) -> Result<Tensor> {
    let kind = float_kind(x, "x")?;
    float_kind(weight, "weight")?;
    let (x_size, weight_size) = (x.size(), weight.size());
    let (out_channels, ins, kernel_size) = kernel_of(&weight_size)?;
    let (batch, in_channels, inputs) = split(&x_size, kernel_size.len(), "x")?;
    if ins.checked_mul(window.groups) != Some(in_channels) {
        let expected = format!("{} channels in {} groups", ins.saturating_mul(window.groups), window.groups);
        return Err(Error::argument("x", expected, in_channels));
    }
    check_bias(bias, out_channels)?;
    let window = Window { kernel_size, ..*window };
    let (shape, outputs) = Sizes { batch, in_channels, out_channels, inputs }.shape(&window, circular)?;
    let compute = compute_kind(kind);
    let (x, weight) = (contiguous(x, "x", compute)?, contiguous(weight, "weight", compute)?);
    let bias = bias.map(|bias| contiguous(bias, "bias", compute)).transpose()?;
    let mut out = Tensor::f_empty([&[batch, out_channels], &outputs[..]].concat(), (compute, x.device()))?;
    with_real!(compute, T => {
        let bias = bias.as_ref().map(slice::<T>).transpose()?;
        conv::forward(&shape, slice::<T>(&x)?, slice(&weight)?, bias, slice_mut(&mut out)?, pool);
    });
    in_kind(out, kind)
}

/// The gradient by an x of `inputs` beyond its channels, in g's dtype.
pub fn input_gradient(
    gradient: &Tensor,
    weight: &Tensor,
    inputs: &[i64],
    window: &Window,
    circular: bool,
    pool: &dyn Pool,
) -> Result<Tensor> {
    let kind = float_kind(gradient, "gradient")?;
    float_kind(weight, "weight")?;
    let (size, weight_size) = (gradient.size(), weight.size());
    let (out_channels, ins, kernel_size) = kernel_of(&weight_size)?;
    let (batch, ..) = split(&size, kernel_size.len(), "gradient")?;
    let in_channels = ins.checked_mul(window.groups).filter(|channels| (0..LIMIT).contains(channels));
    let in_channels = in_channels.ok_or_else(|| Error::argument("groups", "a positive integer", window.groups))?;
    let window = Window { kernel_size, ..*window };
    let (shape, outputs) = Sizes { batch, in_channels, out_channels, inputs }.shape(&window, circular)?;
    check_size(&size, &[&[batch, out_channels], &outputs[..]].concat(), "gradient")?;
    let compute = compute_kind(kind);
    let (gradient, weight) = (contiguous(gradient, "gradient", compute)?, contiguous(weight, "weight", compute)?);
    let mut out = Tensor::f_empty([&[batch, in_channels], inputs].concat(), (compute, gradient.device()))?;
    with_real!(compute, T => {
        conv::input_gradient(&shape, slice::<T>(&gradient)?, slice(&weight)?, slice_mut(&mut out)?, pool);
    });
    in_kind(out, kind)
}

/// The gradient by a weight of `window`'s kernel, float64 if g is, else float32.
pub fn weight_gradient(
    gradient: &Tensor,
    x: &Tensor,
    window: &Window,
    circular: bool,
    pool: &dyn Pool,
) -> Result<Tensor> {
    let compute = compute_kind(float_kind(gradient, "gradient")?);
    float_kind(x, "x")?;
    let (size, x_size) = (gradient.size(), x.size());
    let dimensions = window.kernel_size.len();
    let (_, out_channels, _) = split(&size, dimensions, "gradient")?;
    let (batch, in_channels, inputs) = split(&x_size, dimensions, "x")?;
    let (shape, outputs) = Sizes { batch, in_channels, out_channels, inputs }.shape(window, circular)?;
    check_size(&size, &[&[batch, out_channels], &outputs[..]].concat(), "gradient")?;
    let (gradient, x) = (contiguous(gradient, "gradient", compute)?, contiguous(x, "x", compute)?);
    let weight_size = [&[out_channels, in_channels / window.groups], window.kernel_size].concat();
    let mut out = Tensor::f_empty(weight_size, (compute, x.device()))?;
    with_real!(compute, T => {
        conv::weight_gradient(&shape, slice::<T>(&gradient)?, slice(&x)?, slice_mut(&mut out)?, pool);
    });
    Ok(out)
}

//! The only place that knows tensors. One file per operator family; each operator checks, allocates, runs.

pub mod conv;
mod device;
pub mod embedding;
pub mod frequency;
pub mod frequency_conv;
mod frequency_gpu;
mod gpu;
pub mod linear;
pub mod log8;
pub mod pack;
pub mod pca;
pub mod sparse_frequency;
pub mod spline;
mod tensor;
pub mod tier;

use std::cell::RefCell;

use tch::{Kind, Tensor};

use crate::codec::{MAX_DIMENSION, PackedWeight, Real, Scales};
use crate::parallel::Pool;
use crate::{Error, Result};
use tensor::{Element, contiguous, kind_of, slice, slice_mut};

thread_local! {
    /// The dense weight of the library's product that ran last on this thread.
    static SCRATCH: RefCell<Option<Tensor>> = const { RefCell::new(None) };
}

/// A packed weight's tensors and the integers that the operators' shapes depend on.
pub struct Weight {
    pub payload: Tensor,
    pub directory: Tensor,
    pub tables: Tensor,
    pub scales: Option<Tensor>,
    pub codec: i64,
    pub layout: i64,
    pub out_features: i64,
    pub in_features: i64,
}

/// Calls `$body` with `$type` standing for the Rust type of float kind `$kind`.
macro_rules! with_float {
    ($kind:expr, $type:ident => $body:expr) => {
        match $kind {
            Kind::Float => {
                type $type = f32;
                $body
            }
            Kind::Double => {
                type $type = f64;
                $body
            }
            Kind::Half => {
                type $type = half::f16;
                $body
            }
            Kind::BFloat16 => {
                type $type = half::bf16;
                $body
            }
            other => Err(Error::argument("dtype", "float32, float64, float16 or bfloat16", format!("{other:?}"))),
        }
    };
}
use with_float;

/// Calls `$body` with `$type` standing for the type that kernels sum in: f64 for float64, else f32.
macro_rules! with_real {
    ($kind:expr, $type:ident => $body:expr) => {
        if $kind == Kind::Double {
            type $type = f64;
            $body
        } else {
            type $type = f32;
            $body
        }
    };
}
use with_real;

/// The kind that kernels sum in for tensors of kind `kind`.
fn compute_kind(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}

impl Weight {
    /// Checks the integers that results are sized by, before anything is.
    pub fn check_features(&self) -> Result<()> {
        for (what, value) in [("out_features", self.out_features), ("in_features", self.in_features)] {
            if !(0..MAX_DIMENSION as i64).contains(&value) {
                return Err(Error::argument(what, format!("0 to {}", MAX_DIMENSION - 1), value));
            }
        }
        Ok(())
    }

    /// Opens the weight and calls `body` with it. The header must agree with the integers.
    fn open_without_scales<R>(&self, body: impl FnOnce(&PackedWeight) -> Result<R>) -> Result<R> {
        if crate::cuda::weight::Kind::from_number(self.layout).is_some() {
            return Err(Error::argument("layout", "0 (compact) or 1 (fast) on the CPU", self.layout));
        }
        let payload = contiguous(&self.payload, "payload", Kind::Uint8)?;
        let directory = contiguous(&self.directory, "directory", Kind::Int)?;
        let tables = contiguous(&self.tables, "tables", Kind::Uint8)?;
        let weight = PackedWeight::new(slice(&payload)?, slice(&directory)?, slice(&tables)?)?;
        let header = &weight.header;
        for (what, asked, stored) in [
            ("codec", self.codec, header.codec() as i64),
            ("layout", self.layout, header.layout as i64),
            ("out_features", self.out_features, header.geometry.rows as i64),
            ("in_features", self.in_features, header.geometry.cols as i64),
        ] {
            if asked != stored {
                return Err(Error::argument(what, format!("{stored}, as in the weight's header"), asked));
            }
        }
        body(&weight)
    }

    /// Opens the weight and calls `body` with it and its scales; lossless weights have none, or an empty tensor. Scales in
    /// bf16 are read in place, others converted to `T`.
    fn open<T: Real + Element, R>(&self, body: impl FnOnce(&PackedWeight, Scales<T>) -> Result<R>) -> Result<R> {
        let Some(scales) = &self.scales else {
            return self.open_without_scales(|weight| body(weight, Scales::Real(&[])));
        };
        if scales.f_kind()? == Kind::BFloat16 {
            let scales = contiguous(scales, "scales", Kind::BFloat16)?;
            return self.open_without_scales(|weight| body(weight, Scales::Bf16(slice(&scales)?)));
        }
        let scales = contiguous(scales, "scales", T::KIND)?;
        self.open_without_scales(|weight| body(weight, Scales::Real(slice(&scales)?)))
    }

    /// Opens the weight, checks that its scales have the shape that the caller expects, and calls `body` with a tensor of
    /// that shape for their gradient.
    fn open_for_scale_gradient(
        &self,
        shape: &[i64],
        kind: Kind,
        body: impl FnOnce(&PackedWeight, &mut Tensor) -> Result<()>,
    ) -> Result<Tensor> {
        self.open_without_scales(|weight| {
            let (rows, groups) = weight.header.scale_grid.shape(weight.geometry()).unwrap_or((0, 0));
            let expected = [rows as i64, groups as i64];
            if shape != expected {
                return Err(Error::argument("scale_shape", format!("{expected:?}"), format!("{shape:?}")));
            }
            let mut out = Tensor::f_empty(shape, (kind, self.payload.device()))?;
            body(weight, &mut out)?;
            Ok(out)
        })
    }

    /// Fills `out` (out_features by in_features) with the dense weight.
    fn unpack_into(&self, out: &mut Tensor, pool: &dyn Pool) -> Result<()> {
        if device::is_cuda(&self.payload) {
            return device::unpack(self, None, out);
        }
        let kind = out.kind();
        with_real!(kind, T => self.open::<T, _>(|weight, scales| {
            with_float!(kind, O => weight.unpack::<T, O>(scales, slice_mut(out)?, pool))
        }))
    }

    /// Calls `body` with the dense weight in `kind`, in this thread's scratch.
    fn with_dense<R>(&self, kind: Kind, pool: &dyn Pool, body: impl FnOnce(&Tensor) -> Result<R>) -> Result<R> {
        let elements = self.out_features * self.in_features;
        if device::is_cuda(&self.payload) {
            if let Some(dense) = device::raw(self)? {
                return body(&dense.f_to_kind(kind)?);
            }
            // PyTorch's allocator keeps it, for each stream.
            let mut dense = Tensor::f_empty([self.out_features, self.in_features], (kind, self.payload.device()))?;
            device::unpack(self, None, &mut dense)?;
            return body(&dense);
        }
        let kept = SCRATCH.with(|scratch| scratch.borrow_mut().take());
        let kept = kept.filter(|kept| kept.kind() == kind && kept.numel() as i64 >= elements);
        let buffer = match kept {
            Some(kept) => kept,
            None => Tensor::f_empty([elements], (kind, self.payload.device()))?,
        };
        let mut dense = buffer.f_narrow(0, 0, elements)?.f_view([self.out_features, self.in_features])?;
        self.unpack_into(&mut dense, pool)?;
        let result = body(&dense);
        SCRATCH.with(|scratch| *scratch.borrow_mut() = Some(buffer));
        result
    }
}

/// The dense weight in dtype `dtype` (a ScalarType number).
pub fn unpack(weight: &Weight, dtype: i32, pool: &dyn Pool) -> Result<Tensor> {
    let options = (kind_of(dtype)?, weight.payload.device());
    let mut out = Tensor::f_empty([weight.out_features, weight.in_features], options)?;
    weight.unpack_into(&mut out, pool)?;
    Ok(out)
}

fn check_bias(bias: Option<&Tensor>, out_features: i64) -> Result<()> {
    match bias {
        Some(bias) if bias.size() != [out_features] => {
            Err(Error::argument("bias", format!("shape [{out_features}]"), format!("{:?}", bias.size())))
        }
        _ => Ok(()),
    }
}

/// A tensor's float kind, or an error that names it.
fn float_kind(tensor: &Tensor, what: &'static str) -> Result<Kind> {
    match tensor.f_kind()? {
        kind @ (Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16) => Ok(kind),
        other => Err(Error::argument(what, "a float32, float64, float16 or bfloat16 tensor", format!("{other:?}"))),
    }
}

/// Checks a tensor's last dimension and returns the product of the others.
fn rows_of(tensor: &Tensor, what: &'static str, width: i64) -> Result<usize> {
    match tensor.size().split_last() {
        Some((&last, leading)) if last == width => Ok(leading.iter().product::<i64>() as usize),
        _ => Err(Error::argument(what, format!("a last dimension of {width}"), format!("shape {:?}", tensor.size()))),
    }
}

/// `tensor`'s shape with another last dimension.
fn with_last(tensor: &Tensor, last: i64) -> Vec<i64> {
    let mut size = tensor.size();
    if let Some(end) = size.last_mut() {
        *end = last;
    }
    size
}

//! Tensors as slices.
#![allow(unsafe_code)] // the one place that reads a tensor's memory

use half::{bf16, f16};
use tch::{Device, Kind, Tensor};

use crate::parallel::{DisjointSlice, Pool};
use crate::{Error, Result};

/// Bytes that a thread copies at a time.
const COPY_BYTES: usize = 1 << 20;

/// A Rust type that has a dtype.
pub trait Element: Copy {
    const KIND: Kind;
}

macro_rules! element {
    ($($type:ty => $kind:ident),*) => {
        $(impl Element for $type {
            const KIND: Kind = Kind::$kind;
        })*
    };
}
element!(u8 => Uint8, i16 => Int16, i32 => Int, i64 => Int64, f32 => Float, f64 => Double, f16 => Half, bf16 => BFloat16);

/// The dtype of a ScalarType number.
pub fn kind_of(scalar_type: i32) -> Result<Kind> {
    match scalar_type {
        5 => Ok(Kind::Half),
        6 => Ok(Kind::Float),
        7 => Ok(Kind::Double),
        15 => Ok(Kind::BFloat16),
        other => Err(Error::argument("dtype", "float32, float64, float16 or bfloat16", format!("ScalarType {other}"))),
    }
}

/// A CPU tensor of dtype `kind` without gaps, the same one where it is so already. Floats are converted to one another, other dtypes
/// refused.
pub fn contiguous(tensor: &Tensor, what: &'static str, kind: Kind) -> Result<Tensor> {
    if tensor.device() != Device::Cpu {
        return Err(Error::argument(what, "a CPU tensor", format!("one on {:?}", tensor.device())));
    }
    let found = tensor.f_kind()?;
    let is_float = |kind| matches!(kind, Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16);
    if found != kind && !(is_float(kind) && is_float(found)) {
        return Err(Error::argument(what, format!("dtype {kind:?}"), format!("{found:?}")));
    }
    // Each call of the library takes as long as a small part of a small product.
    let tensor = match (found == kind, tensor.is_contiguous()) {
        (true, true) => tensor.shallow_clone(),
        (true, false) => tensor.f_contiguous()?,
        (false, _) => tensor.f_to_kind(kind)?.f_contiguous()?,
    };
    // A view of a byte buffer may begin anywhere; a Rust slice may not.
    let aligned = (tensor.data_ptr() as usize).is_multiple_of(kind.elt_size_in_bytes());
    if aligned {
        return Ok(tensor);
    }
    let mut copy = tensor.f_empty_like()?;
    copy.f_copy_(&tensor)?;
    Ok(copy)
}

fn check<T: Element>(tensor: &Tensor) -> Result<usize> {
    let fits = tensor.kind() == T::KIND && tensor.device() == Device::Cpu && tensor.is_contiguous();
    if !fits {
        let got = format!("{:?} on {:?}", tensor.kind(), tensor.device());
        return Err(Error::argument("tensor", format!("contiguous {:?} on the CPU", T::KIND), got));
    }
    Ok(tensor.numel())
}

/// The elements of a contiguous CPU tensor.
pub fn slice<T: Element>(tensor: &Tensor) -> Result<&[T]> {
    let len = check::<T>(tensor)?;
    if len == 0 {
        return Ok(&[]);
    }
    // SAFETY: contiguous, `len` elements of T, in memory that the tensor keeps alive. PyTorch does not stop a user from
    // writing to an input while an operator reads it; that race gives wrong numbers, as in any operator.
    Ok(unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<T>(), len) })
}

/// The elements of a contiguous CPU tensor that nobody else holds: one that the operator has just made.
pub fn slice_mut<T: Element>(tensor: &mut Tensor) -> Result<&mut [T]> {
    let len = check::<T>(tensor)?;
    if len == 0 {
        return Ok(&mut []);
    }
    // SAFETY: as above, and exclusive by the caller's having made it.
    Ok(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<T>(), len) })
}

/// Bytes as a tensor of their own, copied by all threads: a payload is as large as a layer.
pub fn of_bytes(bytes: &[u8], pool: &dyn Pool) -> Result<Tensor> {
    let mut tensor = Tensor::f_empty([bytes.len() as i64], (Kind::Uint8, Device::Cpu))?;
    let out = DisjointSlice::new(slice_mut::<u8>(&mut tensor)?);
    pool.for_ranges(bytes.len().div_ceil(COPY_BYTES), &|range| {
        let range = range.start * COPY_BYTES..(range.end * COPY_BYTES).min(bytes.len());
        // SAFETY: a pool visits each part once.
        let out = unsafe { out.range_mut(range.clone()) };
        out.copy_from_slice(&bytes[range]);
    });
    Ok(tensor)
}

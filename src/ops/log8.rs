//! log8_*: a byte for each coefficient and a word for each block of 64.

use tch::{Device, Kind, Tensor};

use super::tensor::{contiguous, kind_of, slice, slice_mut};
use super::{float_kind, with_float};
use crate::parallel::Pool;
use crate::spectral::log8::{self, Number};
use crate::{Error, Result};

/// codes in x's shape, and words.
pub fn encode(x: &Tensor, pool: &dyn Pool) -> Result<Vec<Tensor>> {
    float_kind(x, "x")?;
    let values = contiguous(x, "x", Kind::Float)?;
    let values = slice::<f32>(&values)?;
    let mut codes = Tensor::f_empty(x.size(), (Kind::Uint8, Device::Cpu))?;
    let mut words = Tensor::f_empty([log8::words(values.len()) as i64], (Kind::Int16, Device::Cpu))?;
    log8::encode(values, slice_mut(&mut codes)?, slice_mut(&mut words)?, pool).map_err(|flat| {
        let index = unravel(flat, &x.size());
        Error::argument("x", "numbers that are finite in float32", format!("{} at {index:?}", values[flat]))
    })?;
    Ok(vec![codes, words])
}

/// The index in each dimension of a contiguous tensor's element.
fn unravel(mut flat: usize, size: &[i64]) -> Vec<usize> {
    let mut index: Vec<usize> = size
        .iter()
        .rev()
        .map(|&length| {
            let here = flat % length as usize;
            flat /= length as usize;
            here
        })
        .collect();
    index.reverse();
    index
}

/// The numbers in dtype `dtype` (a ScalarType number) and the codes' shape.
pub fn decode(codes: &Tensor, words: &Tensor, dtype: i32, pool: &dyn Pool) -> Result<Tensor> {
    let kind = kind_of(dtype)?;
    let mut out = Tensor::f_empty(codes.size(), (kind, Device::Cpu))?;
    with_float!(kind, T => decode_into::<T>(codes, words, slice_mut(&mut out)?, pool))?;
    Ok(out)
}

/// Fills `out`, which is as long as `codes`.
pub fn decode_into<T: Number>(codes: &Tensor, words: &Tensor, out: &mut [T], pool: &dyn Pool) -> Result<()> {
    let expected = log8::words(codes.numel());
    if words.size() != [expected as i64] {
        let expected = format!("shape [{expected}], one word for 64 codes");
        return Err(Error::argument("words", expected, format!("{:?}", words.size())));
    }
    let (codes, words) = (contiguous(codes, "codes", Kind::Uint8)?, contiguous(words, "words", Kind::Int16)?);
    log8::decode(slice(&codes)?, slice(&words)?, out, pool);
    Ok(())
}

//! log8_*: a byte for each coefficient and a word for each block of 64. On CUDA a kernel decodes; numbers are encoded on the
//! host.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Mutex;

use tch::{Device, Kind, Tensor};

use super::device::{self, dtype_of, pointer};
use super::tensor::{contiguous, kind_of, slice, slice_mut};
use super::{float_kind, with_float};
use crate::cuda::{frequency, params};
use crate::parallel::Pool;
use crate::spectral::log8::{self, Number};
use crate::{Error, Result};

/// codes in x's shape, and words.
pub fn encode(x: &Tensor, pool: &dyn Pool) -> Result<Vec<Tensor>> {
    float_kind(x, "x")?;
    if device::is_cuda(x) {
        let encoded = encode(&x.f_to_device(Device::Cpu)?, pool)?;
        return encoded.iter().map(|part| Ok(part.f_to_device(x.device())?)).collect();
    }
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
    if device::is_cuda(codes) {
        return decode_on_device(codes, words, kind);
    }
    let mut out = Tensor::f_empty(codes.size(), (kind, Device::Cpu))?;
    with_float!(kind, T => decode_into::<T>(codes, words, slice_mut(&mut out)?, pool))?;
    Ok(out)
}

/// The same on CUDA.
pub fn decode_on_device(codes: &Tensor, words: &Tensor, kind: Kind) -> Result<Tensor> {
    let Some(dtype) = dtype_of(kind) else {
        return Ok(decode_on_device(codes, words, Kind::Float)?.f_to_kind(kind)?);
    };
    let numbers = OnDevice::new(codes, words)?;
    let out = Tensor::f_empty(codes.size(), (kind, codes.device()))?;
    let target = pointer(&out, "out", kind, codes.device())?.cast();
    let parameters = params::Log8Decode { numbers: numbers.view()?, out: target, count: out.numel() as u64, dtype };
    device::run_beside(codes, &frequency::decode(parameters))?;
    Ok(out)
}

/// Numbers on a GPU, and the levels there.
pub struct OnDevice {
    codes: Tensor,
    words: Tensor,
    levels: Tensor,
}

impl OnDevice {
    /// The first call on a device copies the levels there: not while a CUDA graph is recorded.
    pub fn new(codes: &Tensor, words: &Tensor) -> Result<Self> {
        check_words(codes, words)?;
        static LEVELS: Mutex<Option<HashMap<usize, Tensor>>> = Mutex::new(None);
        let Device::Cuda(index) = codes.device() else {
            return Err(Error::argument("codes", "a tensor on CUDA", format!("{:?}", codes.device())));
        };
        let mut levels = LEVELS.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let levels = match levels.get_or_insert_default().entry(index) {
            Entry::Occupied(levels) => levels.into_mut(),
            Entry::Vacant(place) => {
                let values: Vec<f32> = log8::tables().into_iter().flatten().copied().collect();
                place.insert(Tensor::f_from_slice(&values)?.f_to_device(codes.device())?)
            }
        };
        let (codes, words) = (codes.f_contiguous()?, words.f_contiguous()?);
        Ok(Self { codes, words, levels: levels.shallow_clone() })
    }

    /// As the kernels know them, as long as this lives.
    pub fn view(&self) -> Result<params::Log8> {
        let device = self.codes.device();
        Ok(params::Log8 {
            codes: pointer(&self.codes, "codes", Kind::Uint8, device)?.cast_const().cast(),
            words: pointer(&self.words, "words", Kind::Int16, device)?,
            levels: pointer(&self.levels, "levels", Kind::Float, device)?.cast_const().cast(),
        })
    }
}

fn check_words(codes: &Tensor, words: &Tensor) -> Result<()> {
    let expected = log8::words(codes.numel());
    if words.size() != [expected as i64] {
        let expected = format!("shape [{expected}], one word for 64 codes");
        return Err(Error::argument("words", expected, format!("{:?}", words.size())));
    }
    Ok(())
}

/// Fills `out`, which is as long as `codes`.
pub fn decode_into<T: Number>(codes: &Tensor, words: &Tensor, out: &mut [T], pool: &dyn Pool) -> Result<()> {
    check_words(codes, words)?;
    let (codes, words) = (contiguous(codes, "codes", Kind::Uint8)?, contiguous(words, "words", Kind::Int16)?);
    log8::decode(slice(&codes)?, slice(&words)?, out, pool);
    Ok(())
}

//! PyTorch's memory on a GPU and its current stream, as laying weights out and packing there need them.
#![allow(unsafe_code)] // launches

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::pack::scales;
use super::tensor::{contiguous, slice};
use crate::Result;
use crate::bridge::current_stream;
use crate::codec::{Dtype, EcsqTarget, Geometry, Header, MAX_DIMENSION, Symmetric};
use crate::cuda::driver::{self, Stream};
use crate::cuda::launch::Launch;
use crate::cuda::lay_out::{self, Codes, Source};
use crate::cuda::pack::{self, Dense, Laid};
use crate::cuda::weight::{Family, Kind as DeviceKind, Tables};
use crate::parallel::Pool;

/// The GPU that a tensor is on.
pub struct Gpu {
    device: Device,
    stream: Stream,
}

impl Gpu {
    pub fn of(tensor: &Tensor) -> Option<Self> {
        let Device::Cuda(device) = tensor.device() else { return None };
        Some(Self { device: tensor.device(), stream: Stream { handle: current_stream(tensor), device } })
    }

    /// A tensor of a kind without gaps, whose memory begins where its elements may; None for one of another kind or device.
    fn own(&self, tensor: &Tensor, kind: Kind) -> Result<Option<Tensor>> {
        if (tensor.f_kind()?, tensor.device()) != (kind, self.device) {
            return Ok(None);
        }
        let tensor = tensor.f_contiguous()?;
        let is_aligned = tensor.data_ptr().addr().is_multiple_of(kind.elt_size_in_bytes());
        if is_aligned {
            return Ok(Some(tensor));
        }
        let mut copy = tensor.f_empty_like()?;
        copy.f_copy_(&tensor)?;
        Ok(Some(copy))
    }

    /// payload, directory and tables of a weight that is laid out.
    fn tensors(&self, payload: Tensor, tables: &[u8]) -> Result<Vec<Tensor>> {
        let directory = Tensor::f_empty([0], (Kind::Int, self.device))?;
        Ok(vec![payload, directory, Tensor::f_from_slice(tables)?.f_to_device(self.device)?])
    }

    /// The same and its scales.
    fn packed(&self, laid: Laid<Tensor>) -> Result<Vec<Tensor>> {
        let mut tensors = self.tensors(laid.payload, &laid.tables)?;
        tensors.push(scales(&laid.header, &laid.scales)?.f_to_device(self.device)?);
        Ok(tensors)
    }
}

impl lay_out::Device for Gpu {
    type Memory = Tensor;

    fn allocate(&self, bytes: usize) -> Result<Tensor> {
        Ok(Tensor::f_empty([bytes as i64], (Kind::Uint8, self.device))?)
    }

    fn address(&self, memory: &Tensor) -> *mut u8 {
        memory.data_ptr().cast()
    }

    fn write(&self, memory: &Tensor, at: usize, bytes: &[u8]) -> Result<()> {
        if !bytes.is_empty() {
            let mut place = memory.f_narrow(0, at as i64, bytes.len() as i64)?;
            place.f_copy_(&Tensor::f_from_slice(bytes)?)?;
        }
        Ok(())
    }

    fn read(&self, memory: &Tensor, bytes: Range<usize>) -> Result<Vec<u8>> {
        let part = memory.f_narrow(0, bytes.start as i64, bytes.len() as i64)?;
        Ok(slice(&part.f_to_device(Device::Cpu)?)?.to_vec())
    }

    unsafe fn launch<P>(&self, launch: Launch<P>) -> Result<()> {
        // SAFETY: the caller's promise; PyTorch keeps memory that is freed on its stream until what was launched there before
        // has run.
        unsafe { driver::launch(&launch, self.stream) }
    }
}

/// Lays a weight in its canonical form (payload, directory, tables) out on its own GPU; None where that is for the host to do,
/// or to say what is wrong.
pub fn lay_out([payload, directory, tables]: [&Tensor; 3], layout: i64) -> Result<Option<Vec<Tensor>>> {
    let is_of_fixed_width = DeviceKind::from_number(layout).is_some_and(|kind| kind.family() == Family::Fixed);
    let Some(gpu) = Gpu::of(payload).filter(|_| is_of_fixed_width) else { return Ok(None) };
    let on_cpu = contiguous(&tables.f_to_device(Device::Cpu)?, "tables", Kind::Uint8)?;
    if Tables::parse(slice(&on_cpu)?).is_some() {
        return Ok(None);
    }
    let header = Header::parse(slice(&on_cpu)?)?;
    let payload = gpu.own(payload, Kind::Uint8)?;
    let directory = gpu.own(&directory.f_to_device(gpu.device)?, Kind::Int)?;
    let (Some(payload), Some(directory)) = (payload, directory) else { return Ok(None) };
    if directory.numel() != 2 * header.geometry.tiles() {
        return Ok(None);
    }
    let source = Source {
        payload: payload.data_ptr().cast_const().cast(),
        payload_bytes: payload.numel(),
        directory: directory.data_ptr().cast_const().cast(),
    };
    // SAFETY: tensors on this device, of the sizes that were checked, which live until the results were read.
    let Some((payload, tables)) = (unsafe { lay_out::to_device(&gpu, source, &header) })? else { return Ok(None) };
    Ok(Some(gpu.tensors(payload, &tables)?))
}

/// Packs a dense weight without loss on its own GPU, into the layout that it has there: payload, directory, tables and scales.
/// None where that is for the host to do, or to say what is wrong.
pub fn pack_lossless(weight: &Tensor, pool: &dyn Pool) -> Result<Option<Vec<Tensor>>> {
    let (Some(gpu), Some((rows, cols))) = (Gpu::of(weight), shape(weight)) else { return Ok(None) };
    if weight.f_kind()? != Kind::BFloat16 {
        return Ok(None);
    }
    let codes = Codes { memory: bytes(weight)?, levels: false };
    let laid = pack::lossless(&gpu, &codes, Geometry::new(rows, cols), pool)?;
    laid.map(|laid| gpu.packed(laid)).transpose()
}

/// The same to int8 or int4.
pub fn pack_symmetric(weight: &Tensor, symmetric: Symmetric, pool: &dyn Pool) -> Result<Option<Vec<Tensor>>> {
    let Some(gpu) = Gpu::of(weight) else { return Ok(None) };
    let Some(dense) = dense(weight)? else { return Ok(None) };
    pack::symmetric(&gpu, &dense, symmetric, pool)?.map(|laid| gpu.packed(laid)).transpose()
}

/// The same by ECSQ.
pub fn pack_ecsq(weight: &Tensor, target: EcsqTarget, pool: &dyn Pool) -> Result<Option<Vec<Tensor>>> {
    let Some(gpu) = Gpu::of(weight) else { return Ok(None) };
    let Some(dense) = dense(weight)? else { return Ok(None) };
    pack::ecsq(&gpu, &dense, target, pool)?.map(|laid| gpu.packed(laid)).transpose()
}

/// A dense weight that can be quantised on its GPU.
fn dense(weight: &Tensor) -> Result<Option<Dense<Tensor>>> {
    let Some((rows, cols)) = shape(weight) else { return Ok(None) };
    let (memory, dtype) = match weight.f_kind()? {
        Kind::BFloat16 => (bytes(weight)?, Dtype::Bf16),
        Kind::Float => (bytes(weight)?, Dtype::F32),
        Kind::Half => (bytes(&weight.f_to_kind(Kind::Float)?)?, Dtype::F16),
        _ => return Ok(None),
    };
    Ok(Some(Dense { memory, dtype, rows, cols }))
}

/// The shape of a dense weight that can be packed on a GPU.
fn shape(weight: &Tensor) -> Option<(usize, usize)> {
    match weight.size()[..] {
        [rows, cols] if rows.min(cols) > 0 && rows.max(cols) < MAX_DIMENSION as i64 => {
            Some((rows as usize, cols as usize))
        }
        _ => None,
    }
}

/// A dense weight's memory, a row after the other.
fn bytes(weight: &Tensor) -> Result<Tensor> {
    Ok(weight.f_contiguous()?.f_view([-1])?.f_view_dtype(Kind::Uint8)?)
}

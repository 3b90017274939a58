//! Operators on CUDA tensors: a bfloat16 product of few rows is fused, anything else runs on the unpacked weight. Nothing
//! waits for the device, and only [`lay_out`] reads its memory.
#![allow(unsafe_code)] // launches

use tch::{Device, Kind, Tensor};

use super::Weight;
use crate::bridge::current_stream;
use crate::codec::{Layout, PackedWeight};
use crate::cuda::driver::{self, Stream};
use crate::cuda::launch::{self, Launch, MAX_FUSED_ROWS};
use crate::cuda::params::{WindowEmbedding, WindowLinear, WindowUnpack, WindowWeight};
use crate::cuda::weight::{self, Parts};
use crate::parallel::Pool;
use crate::{Error, Result};

use super::tensor::{of_bytes, slice};

/// Whether a tensor is on a GPU.
pub fn is_cuda(tensor: &Tensor) -> bool {
    matches!(tensor.device(), Device::Cuda(_))
}

/// A tensor's memory, checked to be on `device`, of a kind, and without gaps.
fn pointer(tensor: &Tensor, what: &'static str, kind: Kind, device: Device) -> Result<*mut u16> {
    let found = (tensor.f_kind()?, tensor.device());
    if found != (kind, device) || !tensor.is_contiguous() {
        return Err(Error::argument(what, format!("a contiguous {kind:?} on {device:?}"), format!("{found:?}")));
    }
    Ok(tensor.data_ptr().cast())
}

/// The kernels' view of a weight.
fn window(weight: &Weight) -> Result<WindowWeight> {
    if weight.layout != weight::LAYOUT {
        let expected = "2 (window) on CUDA: infold.prepare makes it of lossless bfloat16 weights";
        return Err(Error::argument("layout", expected, weight.layout));
    }
    let parts = Parts::new(weight.out_features as usize, weight.in_features as usize);
    let payload: *const u8 = pointer(&weight.payload, "payload", Kind::Uint8, weight.payload.device())?.cast();
    if weight.payload.numel() < parts.bytes() {
        return Err(Error::corrupt("payload", format!("at least {} bytes", parts.bytes()), weight.payload.numel()));
    }
    if !payload.addr().is_multiple_of(size_of::<u128>()) {
        return Err(Error::argument(
            "payload",
            "memory that begins at a multiple of 16 bytes",
            "a view of other memory",
        ));
    }
    Ok(parts.weight(payload))
}

/// Launches on PyTorch's current stream of the weight's device.
fn run<P>(weight: &Weight, launch: &Launch<P>) -> Result<()> {
    let stream = Stream(current_stream(&weight.payload));
    // SAFETY: tensors of the sizes that the parameters say, on this device; PyTorch keeps memory that is freed on its stream
    // until what was launched there before has run.
    unsafe { driver::launch(launch, stream) }
}

/// Whether the fused product is for `rows` rows of x of this kind.
pub fn fuses(kind: Kind, rows: usize) -> bool {
    kind == Kind::BFloat16 && rows <= MAX_FUSED_ROWS
}

/// y = x·Wᵀ + b into `y`, for what [`fuses`].
pub fn linear(x: &Tensor, weight: &Weight, bias: Option<&Tensor>, rows: usize, y: &Tensor) -> Result<()> {
    let device = weight.payload.device();
    let x = x.f_contiguous()?;
    let bias = bias.map(|bias| bias.f_to_kind(Kind::BFloat16)?.f_contiguous()).transpose()?;
    let bias = bias.as_ref().map(|bias| pointer(bias, "bias", Kind::BFloat16, device)).transpose()?;
    if rows == 0 {
        return Ok(());
    }
    let parameters = WindowLinear {
        weight: window(weight)?,
        x: pointer(&x, "x", Kind::BFloat16, device)?,
        bias: bias.unwrap_or(std::ptr::null_mut()),
        y: pointer(y, "y", Kind::BFloat16, device)?,
        batch: rows as i32,
    };
    run(weight, &launch::linear(parameters))
}

/// The dense weight in `out`'s dtype.
pub fn unpack(weight: &Weight, out: &mut Tensor) -> Result<()> {
    let device = weight.payload.device();
    if out.kind() != Kind::BFloat16 {
        let mut dense = Tensor::f_empty([weight.out_features, weight.in_features], (Kind::BFloat16, device))?;
        unpack(weight, &mut dense)?;
        out.f_copy_(&dense)?;
        return Ok(());
    }
    let out = pointer(out, "out", Kind::BFloat16, device)?;
    run(weight, &launch::unpack(WindowUnpack { weight: window(weight)?, out }))
}

/// W[indices] in `out`'s dtype; `indices` are int64.
pub fn embedding(indices: &Tensor, weight: &Weight, out: &mut Tensor) -> Result<()> {
    let device = weight.payload.device();
    if out.kind() != Kind::BFloat16 {
        let mut rows = Tensor::f_empty(out.size(), (Kind::BFloat16, device))?;
        embedding(indices, weight, &mut rows)?;
        out.f_copy_(&rows)?;
        return Ok(());
    }
    let count =
        u32::try_from(indices.numel()).map_err(|_| Error::argument("indices", "below 2^32", indices.numel()))?;
    let parameters = WindowEmbedding {
        weight: window(weight)?,
        indices: pointer(indices, "indices", Kind::Int64, device)?.cast(),
        out: pointer(out, "out", Kind::BFloat16, device)?,
    };
    run(weight, &launch::embedding(parameters, count))
}

/// Lays a weight out for its device, or takes a device's form back; `tensors` (payload, directory, tables) and the results
/// are on the CPU. None for any other change of layout.
pub fn lay_out(tensors: [&Tensor; 3], layout: i64, pool: &dyn Pool) -> Result<Option<Vec<Tensor>>> {
    let [payload, directory, tables] = tensors;
    match (weight::header(slice(tables)?), layout == weight::LAYOUT) {
        (Some(_), true) => Ok(Some(tensors.map(Tensor::shallow_clone).into())),
        (None, true) => {
            let weight = PackedWeight::new(slice(payload)?, slice(directory)?, slice(tables)?)?;
            let (payload, tables) = weight::to_window(&weight, pool)?;
            let directory = Tensor::f_empty([0], (Kind::Int, Device::Cpu))?;
            Ok(Some(vec![of_bytes(&payload, pool)?, directory, Tensor::f_from_slice(&tables)?]))
        }
        (Some(header), false) => {
            let compact = weight::from_window(slice(payload)?, header?, pool)?;
            if layout == Layout::Compact as i64 {
                return Ok(Some(super::pack::without_scales(&compact, pool)?));
            }
            let weight = PackedWeight::new(&compact.payload, &compact.directory, &compact.tables)?;
            Ok(Some(super::pack::without_scales(&super::pack::in_layout(&weight, layout, pool)?, pool)?))
        }
        (None, false) => Ok(None),
    }
}

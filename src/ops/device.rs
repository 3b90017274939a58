//! Operators on CUDA tensors: a bfloat16 product of few rows is fused, anything else runs on the unpacked weight. Nothing
//! here waits for the device or reads its memory.
#![allow(unsafe_code)] // launches

use tch::{Device, Kind, Tensor};

use super::Weight;
use super::tensor::{of_bytes, slice};
use crate::bridge::current_stream;
use crate::codec::{Layout, PackedWeight};
use crate::cuda::driver::{self, Stream};
use crate::cuda::launch::{self, Launch, MAX_FUSED_ROWS};
use crate::cuda::params::{self, Linear, Unpack};
use crate::cuda::weight::{self, Kind as DeviceKind, Parts, Tables};
use crate::parallel::Pool;
use crate::{Error, Result};

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

/// A weight's layout and the kernels' view of it. The scales are theirs as long as the second result lives.
fn open(weight: &Weight) -> Result<(DeviceKind, params::Weight, Option<Tensor>)> {
    let kind = DeviceKind::from_number(weight.layout);
    let kind =
        kind.ok_or_else(|| Error::argument("layout", "2 to 7 on CUDA, as infold.prepare makes it", weight.layout))?;
    let device = weight.payload.device();
    let parts = Parts::new(kind, weight.out_features as usize, weight.in_features as usize);
    let payload: *const u8 = pointer(&weight.payload, "payload", Kind::Uint8, device)?.cast();
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
    let mut view = parts.weight(payload);
    view.payload_bytes = weight.payload.numel() as u64;
    let Some(scales) = weight.scales.as_ref().filter(|scales| scales.numel() > 0) else {
        return Ok((kind, view, None));
    };
    let half = scales.f_kind()? == Kind::BFloat16;
    let scale_kind = if half { Kind::BFloat16 } else { Kind::Float };
    let scales = scales.f_to_kind(scale_kind)?.f_contiguous()?;
    let (rows, groups) = match scales.size()[..] {
        [rows, groups] if rows == 1 || rows == weight.out_features => (rows, groups),
        _ => {
            let expected = format!("1 or {} rows", weight.out_features);
            return Err(Error::argument("scales", expected, format!("shape {:?}", scales.size())));
        }
    };
    view.scales = pointer(&scales, "scales", scale_kind, device)?.cast();
    view.scales_are_bf16 = half.into();
    view.scale_stride = if rows > 1 { groups as i32 } else { 0 };
    Ok((kind, view, Some(scales)))
}

/// Launches on PyTorch's current stream of the weight's device.
fn run<P>(weight: &Weight, launch: &Launch<P>) -> Result<()> {
    let Device::Cuda(device) = weight.payload.device() else {
        return Err(Error::argument("payload", "a CUDA tensor", "another"));
    };
    let stream = Stream { handle: current_stream(&weight.payload), device };
    // SAFETY: tensors of the sizes that the parameters say, on this device; PyTorch keeps memory that is freed on its stream
    // until what was launched there before has run.
    unsafe { driver::launch(launch, stream) }
}

/// Loads the kernels on a weight's device.
pub fn load(device: Device) -> Result<()> {
    match device {
        Device::Cuda(device) => driver::load(device),
        _ => Ok(()),
    }
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
    let (layout, view, _scales) = open(weight)?;
    let parameters = Linear {
        weight: view,
        x: pointer(&x, "x", Kind::BFloat16, device)?,
        bias: bias.unwrap_or(std::ptr::null_mut()),
        y: pointer(y, "y", Kind::BFloat16, device)?,
        batch: rows as i32,
    };
    run(weight, &launch::linear(layout, parameters))
}

/// Rows of the dense weight in `out`'s dtype: those that `indices` (int64) name, or all of them.
pub fn unpack(weight: &Weight, indices: Option<&Tensor>, out: &mut Tensor) -> Result<()> {
    let (device, kind) = (weight.payload.device(), out.kind());
    if !matches!(kind, Kind::BFloat16 | Kind::Float) {
        let mut floats = Tensor::f_empty(out.size(), (Kind::Float, device))?;
        unpack(weight, indices, &mut floats)?;
        out.f_copy_(&floats)?;
        return Ok(());
    }
    let numel = indices.map(|indices| indices.numel());
    let count = numel.map(|count| u32::try_from(count).map_err(|_| Error::argument("indices", "below 2^32", count)));
    let indices = indices.map(|indices| pointer(indices, "indices", Kind::Int64, device)).transpose()?;
    let (layout, view, _scales) = open(weight)?;
    let parameters = Unpack {
        weight: view,
        indices: indices.map_or(std::ptr::null(), |indices| indices.cast_const().cast()),
        out: pointer(out, "out", kind, device)?.cast(),
        out_is_bf16: (kind == Kind::BFloat16).into(),
    };
    run(weight, &launch::unpack(layout, parameters, count.transpose()?))
}

/// Refuses the gradient of scales on CUDA.
pub fn refuse_scale_gradient(weight: &Weight) -> Result<()> {
    if is_cuda(&weight.payload) {
        return Err(Error::argument("weight", "one on the CPU, for scales do not train on CUDA", "one on CUDA"));
    }
    Ok(())
}

/// Lays a weight out for its device, or takes a device's form back; `tensors` (payload, directory, tables) and the results
/// are on the CPU. `layout` is that of a family: 2 of any, which are those of fixed width where the weight has one, 3 to 5
/// of these alone, 6 and 7 of pairs. None for a change between the codec's layouts.
pub fn lay_out(tensors: [&Tensor; 3], layout: i64, pool: &dyn Pool) -> Result<Option<Vec<Tensor>>> {
    let [payload, directory, tables] = tensors;
    match (Tables::parse(slice(tables)?).transpose()?, DeviceKind::from_number(layout)) {
        (Some(own), Some(kind)) if kind == DeviceKind::Window || own.kind.family() == kind.family() => {
            Ok(Some(tensors.map(Tensor::shallow_clone).into()))
        }
        (None, Some(kind)) => {
            let weight = PackedWeight::new(slice(payload)?, slice(directory)?, slice(tables)?)?;
            Ok(Some(for_device(&weight, kind, pool)?))
        }
        (Some(own), _) => {
            let compact = weight::from_device(slice(payload)?, &own, pool)?;
            if layout == Layout::Compact as i64 {
                return Ok(Some(super::pack::without_scales(&compact, pool)?));
            }
            let weight = PackedWeight::new(&compact.payload, &compact.directory, &compact.tables)?;
            if let Some(kind) = DeviceKind::from_number(layout) {
                return Ok(Some(for_device(&weight, kind, pool)?));
            }
            Ok(Some(super::pack::without_scales(&super::pack::in_layout(&weight, layout, pool)?, pool)?))
        }
        (None, None) => Ok(None),
    }
}

/// payload, directory and tables of a weight in a layout of this one's family.
fn for_device(weight: &PackedWeight, kind: DeviceKind, pool: &dyn Pool) -> Result<Vec<Tensor>> {
    let (payload, tables) = match kind {
        DeviceKind::Window => weight::to_device(weight, pool)?,
        _ => weight::to_device_in(kind.family(), weight, pool)?,
    };
    let directory = Tensor::f_empty([0], (Kind::Int, Device::Cpu))?;
    Ok(vec![of_bytes(&payload, pool)?, directory, Tensor::f_from_slice(&tables)?])
}

//! Operators on CUDA tensors: a product of few enough rows is fused, anything else runs on the unpacked weight. Nothing here
//! waits for the device or reads its memory.
#![allow(unsafe_code)] // launches

use std::ffi::c_void;

use tch::{Device, Kind, Tensor};

use super::Weight;
use super::tensor::{of_bytes, slice};
use crate::bridge::current_stream;
use crate::codec::{Layout, PackedWeight};
use crate::cuda::driver::{self, Stream};
use crate::cuda::launch::{self, Direction, Launch, Product, WidePlan};
use crate::cuda::params::{self, Dtype, Inputs, Linear, Order, Unpack, Wide};
use crate::cuda::weight::{self, Kind as DeviceKind, Parts, TILE_COLS, Tables};
use crate::parallel::Pool;
use crate::{Error, Result};

/// Whether a tensor is on a GPU.
pub fn is_cuda(tensor: &Tensor) -> bool {
    matches!(tensor.device(), Device::Cuda(_))
}

/// A tensor's memory, checked to be on `device`, of a kind, and without gaps.
pub fn pointer(tensor: &Tensor, what: &'static str, kind: Kind, device: Device) -> Result<*mut u16> {
    let found = (tensor.f_kind()?, tensor.device());
    if found != (kind, device) || !tensor.is_contiguous() {
        return Err(Error::argument(what, format!("a contiguous {kind:?} on {device:?}"), format!("{found:?}")));
    }
    Ok(tensor.data_ptr().cast())
}

/// A weight's layout, by the number that came with it.
fn layout_of(weight: &Weight) -> Result<DeviceKind> {
    let kind = DeviceKind::from_number(weight.layout);
    kind.ok_or_else(|| Error::argument("layout", "2 to 10 on CUDA, as infold.prepare makes it", weight.layout))
}

/// A weight's layout and the kernels' view of it. The scales are theirs as long as the second result lives.
fn open(weight: &Weight) -> Result<(DeviceKind, params::Weight, Option<Tensor>)> {
    let kind = layout_of(weight)?;
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
    run_beside(&weight.payload, launch)
}

/// The same of a tensor's device.
pub fn run_beside<P>(tensor: &Tensor, launch: &Launch<P>) -> Result<()> {
    let Device::Cuda(device) = tensor.device() else {
        return Err(Error::argument("tensor", "one on CUDA", format!("{:?}", tensor.device())));
    };
    let stream = Stream { handle: current_stream(tensor), device };
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

/// What kernels call a kind, if they know it.
pub fn dtype_of(kind: Kind) -> Option<Dtype> {
    match kind {
        Kind::BFloat16 => Some(Dtype::Bf16),
        Kind::Half => Some(Dtype::F16),
        Kind::Float => Some(Dtype::F32),
        _ => None,
    }
}

/// A product's input x, and what of it the kernels take.
struct Input {
    x: Tensor,
    kind: Kind,
    dtype: Dtype,
    rows: usize,
    width: usize,
    product: Product,
    /// The weight's.
    device: Device,
}

impl Input {
    /// None for what no kernel takes; `product` says which does, by rows, parts of a value, and whether this is Hopper.
    fn new(
        x: &Tensor,
        weight: &Weight,
        rows: usize,
        width: i64,
        product: impl FnOnce(DeviceKind, usize, usize, bool) -> Product,
    ) -> Result<Option<Self>> {
        let kind = x.f_kind()?;
        // The values of levels are rounded to bfloat16 there: too coarse for a float32 x.
        let layout = layout_of(weight)?;
        let is_coarse = kind == Kind::Float && !layout.is_lossless();
        let (Some(dtype), Device::Cuda(index), false) = (dtype_of(kind), weight.payload.device(), is_coarse) else {
            return Ok(None);
        };
        let product = product(layout, rows, dtype.parts(), driver::is_hopper(index)?);
        if product == Product::Unpacked {
            return Ok(None);
        }
        let (x, device) = (x.f_contiguous()?, weight.payload.device());
        Ok(Some(Self { x, kind, dtype, rows, width: width as usize, product, device }))
    }

    fn columns(&self) -> usize {
        self.rows * self.dtype.parts()
    }

    fn address(&self) -> Result<*mut u16> {
        pointer(&self.x, "x", self.kind, self.device)
    }

    fn scratch(&self, count: usize, kind: Kind) -> Result<Tensor> {
        Ok(Tensor::f_empty([count as i64], (kind, self.device))?)
    }

    fn laid_out(&self, out: &Tensor, columns: usize, order: Order) -> Result<Inputs> {
        Ok(Inputs {
            x: self.address()?.cast(),
            out: pointer(out, "x", Kind::BFloat16, self.device)?,
            dtype: self.dtype,
            batch: self.rows as i32,
            cols: self.width as i32,
            parts: self.dtype.parts() as i32,
            columns: columns as i32,
            order,
        })
    }

    /// The product of many columns, of `sums` results a row, into `out`.
    fn multiply_wide(
        &self,
        weight: &Weight,
        direction: Direction,
        sums: i64,
        bias: *const c_void,
        out: &Tensor,
    ) -> Result<()> {
        let (layout, view, _scales) = open(weight)?;
        let plan = WidePlan::new(sums as usize, self.width, self.columns());
        let tiles = launch::input_tiles_bytes(self.width, plan.columns) / size_of::<u16>();
        let (tiles, partial) = (self.scratch(tiles, Kind::BFloat16)?, self.scratch(plan.sums(), Kind::Float)?);
        let order = if direction == Direction::Forward { Order::Fragment } else { Order::Plain };
        let inputs = self.laid_out(&tiles, plan.columns, order)?;
        run(weight, &launch::input_tiles(inputs))?;
        let whole = Wide {
            weight: view,
            x: inputs.out,
            sums: pointer(&partial, "sums", Kind::Float, self.device)?.cast(),
            bias,
            y: pointer(out, "y", self.kind, self.device)?.cast(),
            dtype: self.dtype,
            batch: inputs.batch,
            parts: inputs.parts,
            // The plan says these.
            columns: 0,
            splits: 0,
            first_row: 0,
            row_count: 0,
        };
        for [product, finish] in plan.launches(layout, direction, whole) {
            run(weight, &product)?;
            run(weight, &finish)?;
        }
        Ok(())
    }

    /// The product of few columns.
    fn multiply_narrow(&self, weight: &Weight, bias: *const c_void, out: &Tensor) -> Result<()> {
        let (layout, view, _scales) = open(weight)?;
        let (dtype, batch, parts) = (self.dtype, self.rows as i32, self.dtype.parts() as i32);
        let y = pointer(out, "y", self.kind, self.device)?.cast();
        // A bfloat16 is its own and only part.
        let split = (parts > 1).then(|| self.scratch(self.columns() * self.width, Kind::BFloat16)).transpose()?;
        let mut x = self.address()?;
        if let Some(split) = &split {
            let inputs = self.laid_out(split, 0, Order::Plain)?;
            run(weight, &launch::input_rows(inputs))?;
            x = inputs.out;
        }
        let parameters = Linear { weight: view, x, bias, y, dtype, batch, parts };
        run(weight, &launch::linear(layout, parameters))
    }
}

/// y = x·Wᵀ + b of shape `size` in x's dtype where that is fused, and None where it is for the library.
pub fn linear(x: &Tensor, weight: &Weight, bias: Option<&Tensor>, rows: usize, size: &[i64]) -> Result<Option<Tensor>> {
    let device = weight.payload.device();
    let Some(input) = Input::new(x, weight, rows, weight.in_features, Product::of)? else {
        return Ok(None);
    };
    let bias = bias.map(|bias| bias.f_to_kind(input.kind)?.f_contiguous()).transpose()?;
    let bias = bias.as_ref().map(|bias| pointer(bias, "bias", input.kind, device)).transpose()?;
    let bias = bias.map_or(std::ptr::null(), |bias| bias.cast_const().cast());
    let out = Tensor::f_empty(size, (input.kind, device))?;
    match input.product {
        _ if rows == 0 => {}
        Product::Narrow => input.multiply_narrow(weight, bias, &out)?,
        _ => input.multiply_wide(weight, Direction::Forward, weight.out_features, bias, &out)?,
    }
    Ok(Some(out))
}

/// dx = g·W of shape `size` in g's dtype where that is fused, and None where it is for the library.
pub fn input_gradient(gradient: &Tensor, weight: &Weight, rows: usize, size: &[i64]) -> Result<Option<Tensor>> {
    let Some(input) = Input::new(gradient, weight, rows, weight.out_features, Product::of_gradient)? else {
        return Ok(None);
    };
    let out = Tensor::f_empty(size, (input.kind, weight.payload.device()))?;
    if rows > 0 {
        input.multiply_wide(weight, Direction::Backward, weight.in_features, std::ptr::null(), &out)?;
    }
    Ok(Some(out))
}

/// The dense weight where it lies as it is: a view of the payload.
pub fn raw(weight: &Weight) -> Result<Option<Tensor>> {
    let kind = match layout_of(weight)? {
        DeviceKind::RawBf16 => Kind::BFloat16,
        DeviceKind::RawF16 => Kind::Half,
        DeviceKind::RawF32 => Kind::Float,
        _ => return Ok(None),
    };
    let bytes = weight.out_features as usize * weight.in_features as usize * kind.elt_size_in_bytes();
    if weight.payload.numel() != bytes {
        return Err(Error::corrupt("payload", format!("{bytes} bytes"), weight.payload.numel()));
    }
    let dense = weight.payload.f_contiguous()?.f_view_dtype(kind)?;
    Ok(Some(dense.f_view([weight.out_features, weight.in_features])?))
}

/// Rows of the dense weight in `out`'s dtype: those that `indices` (int64) name, or all of them.
pub fn unpack(weight: &Weight, indices: Option<&Tensor>, out: &mut Tensor) -> Result<()> {
    let (device, kind) = (weight.payload.device(), out.kind());
    if let Some(dense) = raw(weight)? {
        let rows = indices.map(|indices| dense.f_index_select(0, &indices.f_flatten(0, -1)?)).transpose()?;
        out.f_copy_(&rows.unwrap_or(dense).f_view_as(out)?)?;
        return Ok(());
    }
    let Some(dtype) = dtype_of(kind) else {
        let mut floats = Tensor::f_empty(out.size(), (Kind::Float, device))?;
        unpack(weight, indices, &mut floats)?;
        out.f_copy_(&floats)?;
        return Ok(());
    };
    let numel = indices.map(|indices| indices.numel());
    let count = numel.map(|count| u32::try_from(count).map_err(|_| Error::argument("indices", "below 2^32", count)));
    let indices = indices.map(|indices| pointer(indices, "indices", Kind::Int64, device)).transpose()?;
    let (layout, view, _scales) = open(weight)?;
    let parameters = Unpack {
        weight: view,
        indices: indices.map_or(std::ptr::null(), |indices| indices.cast_const().cast()),
        out: pointer(out, "out", kind, device)?.cast(),
        dtype,
    };
    run(weight, &launch::unpack(layout, parameters, count.transpose()?))
}

/// W before its scales, in `kind`; all rows or those that `indices` name.
fn unscaled(weight: &Weight, indices: Option<&Tensor>, kind: Kind) -> Result<Tensor> {
    let rows = indices.map_or(weight.out_features, |indices| indices.numel() as i64);
    let mut out = Tensor::f_empty([rows, weight.in_features], (kind, weight.payload.device()))?;
    unpack(weight, indices, &mut out)?;
    Ok(out)
}

/// ds = Σ (gᵀx)·r(q) over the elements that share a scale, in `kind`; `weight` has no scales.
pub fn scale_gradient(gradient: &Tensor, x: &Tensor, weight: &Weight, shape: &[i64], kind: Kind) -> Result<Tensor> {
    let rows = |tensor: &Tensor, width: i64| tensor.f_to_kind(kind)?.f_reshape([-1, width]);
    let gradient = rows(gradient, weight.out_features)?.f_tr()?;
    let terms = gradient.f_matmul(&rows(x, weight.in_features)?)?.f_mul(&unscaled(weight, None, kind)?)?;
    by_scale(weight, &terms, shape)?.f_sum_to_size(shape).map_err(Error::from)
}

/// The same of rows looked up.
pub fn embedding_scale_gradient(
    gradient: &Tensor,
    indices: &Tensor,
    weight: &Weight,
    shape: &[i64],
    kind: Kind,
) -> Result<Tensor> {
    let indices = indices.f_flatten(0, -1)?.f_contiguous()?;
    let gradient = gradient.f_to_kind(kind)?.f_reshape([-1, weight.in_features])?;
    let terms = by_scale(weight, &gradient.f_mul(&unscaled(weight, Some(&indices), kind)?)?, shape)?;
    let [_, groups] = terms.size()[..] else { return Err(Error::argument("gradient", "two dimensions", "others")) };
    let each = Tensor::f_zeros([weight.out_features, groups], (kind, terms.device()))?;
    // In the order of the rows, so that results do not change from run to run, as atomic additions' would.
    each.f_index_put(&[Some(indices)], &terms, true)?.f_sum_to_size(shape).map_err(Error::from)
}

/// Sums of the terms of each row (rows by columns) that share a scale.
fn by_scale(weight: &Weight, terms: &Tensor, shape: &[i64]) -> Result<Tensor> {
    let (&[_, groups], [_, cols]) = (shape, &terms.size()[..]) else {
        return Err(Error::argument("scale_shape", "two dimensions", format!("{shape:?}")));
    };
    if groups == 1 {
        return Ok(terms.f_sum_dim_intlist(&[1i64][..], true, terms.kind())?);
    }
    // A scale is for whole tiles; how many, only the device knows.
    let tile = TILE_COLS as i64;
    let tiles = terms.f_constant_pad_nd([0, -cols & (tile - 1)])?.f_unflatten(1, [-1, tile])?;
    let tiles = tiles.f_sum_dim_intlist(&[2i64][..], false, terms.kind())?;
    let group_cols = weight.payload.f_narrow(0, 4, 4)?.f_view_dtype(Kind::Int)?;
    let options = (Kind::Int64, terms.device());
    let first_cols = Tensor::f_arange(tiles.size()[1], options)?.f_mul_scalar(tile)?;
    let group_of_tile = first_cols.f_divide_tensor_mode(&group_cols, "floor")?.f_unsqueeze(1)?;
    let members = group_of_tile.f_eq_tensor(&Tensor::f_arange(groups, options)?)?.f_to_kind(terms.kind())?;
    Ok(tiles.f_matmul(&members)?)
}

/// Lays a weight out for its device, or takes a device's form back; `tensors` (payload, directory, tables) and the results
/// are on the CPU. `layout` is that of a family: 2 of any, which are those of fixed width where the weight has one, 3 to 5
/// of these alone, 6 and 7 of pairs, 8 to 10 of weights as they are. None for a change between the codec's layouts.
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

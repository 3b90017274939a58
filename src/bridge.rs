//! The only place that knows C++. Catches panics, turns errors into a status that C++ rethrows.
#![allow(unsafe_code)] // foreign calls; each block says why it holds

use std::any::Any;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Mutex;

use crate::ops;
use crate::ops::frequency::Spectrum;
use crate::ops::sparse_frequency;
use crate::parallel::Pool;
use crate::{Error, Result, memory};

#[cxx::bridge(namespace = "infold")]
mod ffi {
    /// How a call ended: 0 well, 1 with a wrong argument (Python's ValueError), 2 otherwise.
    struct Status {
        kind: u8,
        message: String,
    }

    /// A packed weight as the operators take it. `scales` may be undefined.
    struct Weight<'a> {
        payload: &'a Tensor,
        directory: &'a Tensor,
        tables: &'a Tensor,
        scales: &'a Tensor,
        codec: i64,
        layout: i64,
        out_features: i64,
        in_features: i64,
    }

    /// Where a convolution looks, a number for each spatial dimension.
    struct Window<'a> {
        kernel_size: &'a [i64],
        stride: &'a [i64],
        padding: &'a [i64],
        dilation: &'a [i64],
        groups: i64,
    }

    unsafe extern "C++" {
        include!("infold/csrc/host.h");

        #[namespace = "at"]
        type Tensor;
        /// Where a call puts its results.
        type Outputs;

        fn push_output(outputs: Pin<&mut Outputs>, tensor: &Tensor);
        fn parallel_for(items: usize, body: &Body);
        /// PyTorch's current stream of a CUDA tensor's device, as the driver names it.
        fn current_stream(tensor: &Tensor) -> usize;
    }

    extern "Rust" {
        type Body<'a>;
        unsafe fn run_body<'a>(body: &Body<'a>, start: usize, end: usize);

        // bias and every tensor called optional may be undefined; dtypes are PyTorch's ScalarType numbers.
        fn fused_linear(x: &Tensor, weight: &Weight, bias: &Tensor, exact: bool, out: Pin<&mut Outputs>) -> Status;
        fn fused_linear_dx(gradient: &Tensor, weight: &Weight, exact: bool, out: Pin<&mut Outputs>) -> Status;
        fn fused_linear_ds(
            gradient: &Tensor,
            x: &Tensor,
            weight: &Weight,
            scale_shape: &[i64],
            out: Pin<&mut Outputs>,
        ) -> Status;
        fn fused_embedding(indices: &Tensor, weight: &Weight, dtype: i32, out: Pin<&mut Outputs>) -> Status;
        fn fused_embedding_ds(
            gradient: &Tensor,
            indices: &Tensor,
            weight: &Weight,
            scale_shape: &[i64],
            out: Pin<&mut Outputs>,
        ) -> Status;
        fn fused_conv(
            x: &Tensor,
            weight: &Weight,
            bias: &Tensor,
            window: &Window,
            exact: bool,
            out: Pin<&mut Outputs>,
        ) -> Status;
        fn unpack(weight: &Weight, dtype: i32, out: Pin<&mut Outputs>) -> Status;
        fn frequency_linear(
            x: &Tensor,
            spectrum: &Tensor,
            bias: &Tensor,
            out_features: i64,
            out: Pin<&mut Outputs>,
        ) -> Status;
        fn frequency_linear_dx(
            gradient: &Tensor,
            spectrum: &Tensor,
            in_features: i64,
            out: Pin<&mut Outputs>,
        ) -> Status;
        fn frequency_linear_dw(gradient: &Tensor, x: &Tensor, block: i64, out: Pin<&mut Outputs>) -> Status;
        fn frequency_linear_log8(
            x: &Tensor,
            codes: &Tensor,
            words: &Tensor,
            bias: &Tensor,
            out_features: i64,
            out: Pin<&mut Outputs>,
        ) -> Status;
        fn sparse_frequency_linear(
            x: &Tensor,
            coefficients: &Tensor,
            indices: &Tensor,
            bias: &Tensor,
            out_features: i64,
            scale: f64,
            out: Pin<&mut Outputs>,
        ) -> Status;
        fn sparse_frequency_linear_dx(
            gradient: &Tensor,
            coefficients: &Tensor,
            indices: &Tensor,
            in_features: i64,
            scale: f64,
            out: Pin<&mut Outputs>,
        ) -> Status;
        fn sparse_frequency_linear_dc(
            gradient: &Tensor,
            x: &Tensor,
            indices: &Tensor,
            scale: f64,
            out: Pin<&mut Outputs>,
        ) -> Status;
        fn log8_encode(x: &Tensor, out: Pin<&mut Outputs>) -> Status;
        fn log8_decode(codes: &Tensor, words: &Tensor, dtype: i32, out: Pin<&mut Outputs>) -> Status;
        fn pca_project(
            x: &Tensor,
            components: &Tensor,
            mean: &Tensor,
            scale: &Tensor,
            out: Pin<&mut Outputs>,
        ) -> Status;
        fn pca_reconstruct(
            z: &Tensor,
            components: &Tensor,
            mean: &Tensor,
            scale: &Tensor,
            out: Pin<&mut Outputs>,
        ) -> Status;
        fn pca_scatter(x: &Tensor, shift: &Tensor, out: Pin<&mut Outputs>) -> Status;
        fn bspline_basis(points: &Tensor, knots: &Tensor, derivative: i64, out: Pin<&mut Outputs>) -> Status;
        fn bspline_fit_matrix(points: &Tensor, knots: &Tensor, out: Pin<&mut Outputs>) -> Status;
        fn bspline_control(values: &Tensor, matrix: &Tensor, out: Pin<&mut Outputs>) -> Status;
        fn frequency_conv(
            x: &Tensor,
            weight: &Tensor,
            bias: &Tensor,
            window: &Window,
            circular: bool,
            out: Pin<&mut Outputs>,
        ) -> Status;
        fn frequency_conv_dx(
            gradient: &Tensor,
            weight: &Tensor,
            x_size: &[i64],
            window: &Window,
            circular: bool,
            out: Pin<&mut Outputs>,
        ) -> Status;
        fn frequency_conv_dw(
            gradient: &Tensor,
            x: &Tensor,
            window: &Window,
            circular: bool,
            out: Pin<&mut Outputs>,
        ) -> Status;
        fn pack_lossless(weight: &Tensor, out: Pin<&mut Outputs>) -> Status;
        /// A target that is not asked for is NaN.
        fn pack_ecsq(weight: &Tensor, bits: f64, max_error: f64, out: Pin<&mut Outputs>) -> Status;
        fn pack_int8(weight: &Tensor, out: Pin<&mut Outputs>) -> Status;
        fn pack_int4(weight: &Tensor, group_size: i64, out: Pin<&mut Outputs>) -> Status;
        fn lay_out(
            payload: &Tensor,
            directory: &Tensor,
            tables: &Tensor,
            layout: i64,
            out: Pin<&mut Outputs>,
        ) -> Status;
        fn inspect_packed(
            payload: &Tensor,
            directory: &Tensor,
            tables: &Tensor,
            scales: &Tensor,
            verify: bool,
            fields: &mut Vec<i64>,
        ) -> Status;
        fn tier_open(folder: &str, nbytes: i64, depth: i64, backend: &str, store: &mut i64) -> Status;
        fn tier_reserve(store: i64, nbytes: i64, offset: &mut i64) -> Status;
        fn tier_read(store: i64, offset: i64, out: &Tensor, ticket: &mut i64) -> Status;
        fn tier_write(store: i64, offset: i64, data: &Tensor, ticket: &mut i64) -> Status;
        fn tier_wait(store: i64, ticket: i64) -> Status;
        fn tier_done(store: i64, ticket: i64, done: &mut bool) -> Status;
        fn tier_stats(store: i64, fields: &mut Vec<i64>) -> Status;
        fn tier_close(store: i64) -> Status;
        fn build_info() -> String;
        fn allocated_bytes(reset_peak: bool) -> [i64; 2];
    }
}

pub use ffi::Window;
use ffi::{Outputs, Status, Tensor, Weight};

/// PyTorch's intra-op threads, so that `torch.set_num_threads` governs.
struct TorchPool;

/// A loop body on its way through C++, and the panic it may bring back.
pub struct Body<'a> {
    run: &'a (dyn Fn(Range<usize>) + Sync),
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Pool for TorchPool {
    fn for_ranges(&self, items: usize, body: &(dyn Fn(Range<usize>) + Sync)) {
        let body = Body { run: body, panic: Mutex::new(None) };
        ffi::parallel_for(items, &body);
        let panic = body.panic.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(panic) = panic {
            std::panic::resume_unwind(panic);
        }
    }
}

/// Called by C++ on each thread; a panic must not cross it.
fn run_body(body: &Body, start: usize, end: usize) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (body.run)(start..end))) {
        *body.panic.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(panic);
    }
}

/// Runs `body` and hands its tensors over.
fn call(out: Pin<&mut Outputs>, body: impl FnOnce(&TorchPool) -> Result<Vec<tch::Tensor>>) -> Status {
    let mut out = out;
    status(|| {
        for tensor in body(&TorchPool)? {
            // SAFETY: tch's pointer is to a C++ at::Tensor that lives until `tensor` is dropped, after the push.
            let tensor = unsafe { &*tensor.as_ptr().cast::<Tensor>() };
            ffi::push_output(out.as_mut(), tensor);
        }
        Ok(())
    })
}

/// PyTorch's current stream of a CUDA tensor's device, as the driver names it.
pub fn current_stream(tensor: &tch::Tensor) -> usize {
    // SAFETY: tch's pointer is to a C++ at::Tensor that lives as long as `tensor`.
    ffi::current_stream(unsafe { &*tensor.as_ptr().cast::<Tensor>() })
}

fn status(body: impl FnOnce() -> Result<()>) -> Status {
    let result = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        Err(Error::Panic(text.unwrap_or_else(|| "a panic without a message".into())))
    });
    match result {
        Ok(()) => Status { kind: 0, message: String::new() },
        Err(error) => Status { kind: if error.is_argument() { 1 } else { 2 }, message: error.to_string() },
    }
}

/// Runs `body` and puts its result in `place`.
fn assign<T>(place: &mut T, body: impl FnOnce() -> Result<T>) -> Status {
    status(|| {
        *place = body()?;
        Ok(())
    })
}

/// Shares a C++ tensor with Rust; None where it is undefined.
fn share(tensor: &Tensor) -> Option<tch::Tensor> {
    let pointer = std::ptr::from_ref(tensor).cast_mut().cast();
    // SAFETY: the pointer is to a live at::Tensor, and the call only copies its handle.
    let tensor = unsafe { tch::Tensor::clone_from_ptr(pointer) };
    tensor.defined().then_some(tensor)
}

fn need(tensor: &Tensor, what: &'static str) -> Result<tch::Tensor> {
    share(tensor).ok_or_else(|| Error::argument(what, "a tensor", "an undefined one"))
}

fn weight(weight: &Weight) -> Result<ops::Weight> {
    let weight = ops::Weight {
        payload: need(weight.payload, "payload")?,
        directory: need(weight.directory, "directory")?,
        tables: need(weight.tables, "tables")?,
        scales: share(weight.scales),
        codec: weight.codec,
        layout: weight.layout,
        out_features: weight.out_features,
        in_features: weight.in_features,
    };
    weight.check_features()?;
    Ok(weight)
}

fn fused_linear(x: &Tensor, w: &Weight, bias: &Tensor, exact: bool, out: Pin<&mut Outputs>) -> Status {
    call(out, |pool| {
        let y = ops::linear::forward(&need(x, "x")?, &weight(w)?, share(bias).as_ref(), exact, pool)?;
        Ok(vec![y])
    })
}

fn fused_linear_dx(gradient: &Tensor, w: &Weight, exact: bool, out: Pin<&mut Outputs>) -> Status {
    call(out, |pool| Ok(vec![ops::linear::input_gradient(&need(gradient, "gradient")?, &weight(w)?, exact, pool)?]))
}

fn fused_linear_ds(gradient: &Tensor, x: &Tensor, w: &Weight, shape: &[i64], out: Pin<&mut Outputs>) -> Status {
    call(out, |pool| {
        let ds = ops::linear::scale_gradient(&need(gradient, "gradient")?, &need(x, "x")?, &weight(w)?, shape, pool)?;
        Ok(vec![ds])
    })
}

fn fused_embedding(indices: &Tensor, w: &Weight, dtype: i32, out: Pin<&mut Outputs>) -> Status {
    call(out, |pool| Ok(vec![ops::embedding::forward(&need(indices, "indices")?, &weight(w)?, dtype, pool)?]))
}

fn fused_embedding_ds(
    gradient: &Tensor,
    indices: &Tensor,
    w: &Weight,
    shape: &[i64],
    out: Pin<&mut Outputs>,
) -> Status {
    call(out, |pool| {
        let (gradient, indices) = (need(gradient, "gradient")?, need(indices, "indices")?);
        Ok(vec![ops::embedding::scale_gradient(&gradient, &indices, &weight(w)?, shape, pool)?])
    })
}

fn fused_conv(x: &Tensor, w: &Weight, bias: &Tensor, window: &Window, exact: bool, out: Pin<&mut Outputs>) -> Status {
    call(out, |pool| {
        let y = ops::conv::forward(&need(x, "x")?, &weight(w)?, share(bias).as_ref(), window, exact, pool)?;
        Ok(vec![y])
    })
}

fn unpack(w: &Weight, dtype: i32, out: Pin<&mut Outputs>) -> Status {
    call(out, |pool| Ok(vec![ops::unpack(&weight(w)?, dtype, pool)?]))
}

fn frequency_linear(x: &Tensor, spectrum: &Tensor, bias: &Tensor, features: i64, out: Pin<&mut Outputs>) -> Status {
    call(out, |pool| {
        let (x, spectrum) = (need(x, "x")?, need(spectrum, "spectrum")?);
        let spectrum = Spectrum::Float(&spectrum);
        Ok(vec![ops::frequency::forward(&x, spectrum, share(bias).as_ref(), features, pool)?])
    })
}

fn frequency_linear_dx(gradient: &Tensor, spectrum: &Tensor, features: i64, out: Pin<&mut Outputs>) -> Status {
    call(out, |pool| {
        let (gradient, spectrum) = (need(gradient, "gradient")?, need(spectrum, "spectrum")?);
        Ok(vec![ops::frequency::input_gradient(&gradient, &spectrum, features, pool)?])
    })
}

fn frequency_linear_dw(gradient: &Tensor, x: &Tensor, block: i64, out: Pin<&mut Outputs>) -> Status {
    call(out, |pool| {
        Ok(vec![ops::frequency::spectrum_gradient(&need(gradient, "gradient")?, &need(x, "x")?, block, pool)?])
    })
}

fn frequency_linear_log8(
    x: &Tensor,
    codes: &Tensor,
    words: &Tensor,
    bias: &Tensor,
    features: i64,
    out: Pin<&mut Outputs>,
) -> Status {
    call(out, |pool| {
        let (x, codes, words) = (need(x, "x")?, need(codes, "codes")?, need(words, "words")?);
        let spectrum = Spectrum::Log8 { codes: &codes, words: &words };
        Ok(vec![ops::frequency::forward(&x, spectrum, share(bias).as_ref(), features, pool)?])
    })
}

fn sparse_frequency_linear(
    x: &Tensor,
    coefficients: &Tensor,
    indices: &Tensor,
    bias: &Tensor,
    features: i64,
    scale: f64,
    out: Pin<&mut Outputs>,
) -> Status {
    call(out, |pool| {
        let (x, coefficients, indices) =
            (need(x, "x")?, need(coefficients, "coefficients")?, need(indices, "indices")?);
        let bias = share(bias);
        Ok(vec![sparse_frequency::forward(&x, &coefficients, &indices, bias.as_ref(), features, scale, pool)?])
    })
}

fn sparse_frequency_linear_dx(
    gradient: &Tensor,
    coefficients: &Tensor,
    indices: &Tensor,
    features: i64,
    scale: f64,
    out: Pin<&mut Outputs>,
) -> Status {
    call(out, |pool| {
        let (gradient, coefficients, indices) =
            (need(gradient, "gradient")?, need(coefficients, "coefficients")?, need(indices, "indices")?);
        Ok(vec![sparse_frequency::input_gradient(&gradient, &coefficients, &indices, features, scale, pool)?])
    })
}

fn sparse_frequency_linear_dc(
    gradient: &Tensor,
    x: &Tensor,
    indices: &Tensor,
    scale: f64,
    out: Pin<&mut Outputs>,
) -> Status {
    call(out, |pool| {
        let (gradient, x, indices) = (need(gradient, "gradient")?, need(x, "x")?, need(indices, "indices")?);
        Ok(vec![sparse_frequency::coefficient_gradient(&gradient, &x, &indices, scale, pool)?])
    })
}

fn log8_encode(x: &Tensor, out: Pin<&mut Outputs>) -> Status {
    call(out, |pool| ops::log8::encode(&need(x, "x")?, pool))
}

fn log8_decode(codes: &Tensor, words: &Tensor, dtype: i32, out: Pin<&mut Outputs>) -> Status {
    call(out, |pool| Ok(vec![ops::log8::decode(&need(codes, "codes")?, &need(words, "words")?, dtype, pool)?]))
}

fn pca_project(x: &Tensor, components: &Tensor, mean: &Tensor, scale: &Tensor, out: Pin<&mut Outputs>) -> Status {
    call(out, |_| {
        let (x, components) = (need(x, "x")?, need(components, "components")?);
        Ok(vec![ops::pca::project(&x, &components, share(mean).as_ref(), share(scale).as_ref())?])
    })
}

fn pca_reconstruct(z: &Tensor, components: &Tensor, mean: &Tensor, scale: &Tensor, out: Pin<&mut Outputs>) -> Status {
    call(out, |_| {
        let (z, components) = (need(z, "z")?, need(components, "components")?);
        Ok(vec![ops::pca::reconstruct(&z, &components, share(mean).as_ref(), share(scale).as_ref())?])
    })
}

fn pca_scatter(x: &Tensor, shift: &Tensor, out: Pin<&mut Outputs>) -> Status {
    call(out, |pool| Ok(ops::pca::scatter(&need(x, "x")?, &need(shift, "shift")?, pool)?.into()))
}

fn bspline_basis(points: &Tensor, knots: &Tensor, derivative: i64, out: Pin<&mut Outputs>) -> Status {
    call(out, |_| Ok(vec![ops::spline::basis(&need(points, "points")?, &need(knots, "knots")?, derivative)?]))
}

fn bspline_fit_matrix(points: &Tensor, knots: &Tensor, out: Pin<&mut Outputs>) -> Status {
    call(out, |_| Ok(vec![ops::spline::fit_matrix(&need(points, "points")?, &need(knots, "knots")?)?]))
}

fn bspline_control(values: &Tensor, matrix: &Tensor, out: Pin<&mut Outputs>) -> Status {
    call(out, |pool| Ok(vec![ops::spline::control(&need(values, "values")?, &need(matrix, "matrix")?, pool)?]))
}

fn frequency_conv(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    window: &Window,
    circular: bool,
    out: Pin<&mut Outputs>,
) -> Status {
    call(out, |pool| {
        let (x, weight) = (need(x, "x")?, need(weight, "weight")?);
        Ok(vec![ops::frequency_conv::forward(&x, &weight, share(bias).as_ref(), window, circular, pool)?])
    })
}

fn frequency_conv_dx(
    gradient: &Tensor,
    weight: &Tensor,
    x_size: &[i64],
    window: &Window,
    circular: bool,
    out: Pin<&mut Outputs>,
) -> Status {
    call(out, |pool| {
        let (gradient, weight) = (need(gradient, "gradient")?, need(weight, "weight")?);
        Ok(vec![ops::frequency_conv::input_gradient(&gradient, &weight, x_size, window, circular, pool)?])
    })
}

fn frequency_conv_dw(gradient: &Tensor, x: &Tensor, window: &Window, circular: bool, out: Pin<&mut Outputs>) -> Status {
    call(out, |pool| {
        let (gradient, x) = (need(gradient, "gradient")?, need(x, "x")?);
        Ok(vec![ops::frequency_conv::weight_gradient(&gradient, &x, window, circular, pool)?])
    })
}

fn pack_lossless(dense: &Tensor, out: Pin<&mut Outputs>) -> Status {
    call(out, |pool| ops::pack::lossless(&need(dense, "weight")?, pool))
}

fn pack_ecsq(dense: &Tensor, bits: f64, max_error: f64, out: Pin<&mut Outputs>) -> Status {
    call(out, |pool| ops::pack::ecsq(&need(dense, "weight")?, bits, max_error, pool))
}

fn pack_int8(dense: &Tensor, out: Pin<&mut Outputs>) -> Status {
    call(out, |pool| ops::pack::int8(&need(dense, "weight")?, pool))
}

fn pack_int4(dense: &Tensor, group_size: i64, out: Pin<&mut Outputs>) -> Status {
    call(out, |pool| ops::pack::int4(&need(dense, "weight")?, group_size, pool))
}

fn lay_out(payload: &Tensor, directory: &Tensor, tables: &Tensor, layout: i64, out: Pin<&mut Outputs>) -> Status {
    call(out, |pool| {
        let (payload, directory, tables) =
            (need(payload, "payload")?, need(directory, "directory")?, need(tables, "tables")?);
        ops::pack::lay_out(&payload, &directory, &tables, layout, pool)
    })
}

fn inspect_packed(
    payload: &Tensor,
    directory: &Tensor,
    tables: &Tensor,
    scales: &Tensor,
    verify: bool,
    fields: &mut Vec<i64>,
) -> Status {
    status(|| {
        let (payload, directory, tables) =
            (need(payload, "payload")?, need(directory, "directory")?, need(tables, "tables")?);
        *fields = ops::pack::inspect(&payload, &directory, &tables, share(scales).as_ref(), verify)?;
        Ok(())
    })
}

fn tier_open(folder: &str, nbytes: i64, depth: i64, backend: &str, store: &mut i64) -> Status {
    assign(store, || ops::tier::open(folder, nbytes, depth, backend))
}

fn tier_reserve(store: i64, nbytes: i64, offset: &mut i64) -> Status {
    assign(offset, || ops::tier::reserve(store, nbytes))
}

fn tier_read(store: i64, offset: i64, out: &Tensor, ticket: &mut i64) -> Status {
    assign(ticket, || ops::tier::read(store, offset, need(out, "out")?))
}

fn tier_write(store: i64, offset: i64, data: &Tensor, ticket: &mut i64) -> Status {
    assign(ticket, || ops::tier::write(store, offset, need(data, "data")?))
}

fn tier_wait(store: i64, ticket: i64) -> Status {
    status(|| ops::tier::wait(store, ticket))
}

fn tier_done(store: i64, ticket: i64, done: &mut bool) -> Status {
    assign(done, || ops::tier::is_done(store, ticket))
}

fn tier_stats(store: i64, fields: &mut Vec<i64>) -> Status {
    assign(fields, || ops::tier::stats(store))
}

fn tier_close(store: i64) -> Status {
    status(|| ops::tier::close(store))
}

/// What this library was built with, as JSON.
fn build_info() -> String {
    let quoted = |names: &[&str]| names.iter().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", ");
    let kernels: Vec<&str> = crate::cuda::fatbins().iter().map(|fatbin| fatbin.name).collect();
    format!(
        r#"{{"version": {:?}, "format_version": {}, "cuda": {}, "cuda_architectures": [{}], "cuda_kernels": [{}], "cuda_bytes": {}, "cpu": {:?}}}"#,
        env!("CARGO_PKG_VERSION"),
        crate::codec::FORMAT_VERSION,
        !kernels.is_empty(),
        quoted(crate::cuda::architectures()),
        quoted(&kernels),
        crate::cuda::fatbins().iter().map(|fatbin| fatbin.bytes.len()).sum::<usize>(),
        crate::codec::Isa::get().name(),
    )
}

/// Bytes that this library holds outside tensors, and the most that it held since the last reset.
fn allocated_bytes(reset_peak: bool) -> [i64; 2] {
    let bytes = [memory::live() as i64, memory::peak() as i64];
    if reset_peak {
        memory::reset_peak();
    }
    bytes
}

//! The packed weight: what is stored, how it is made, how it is read. Specified in `docs/format.md`.
//!
//! ```text
//! weight ── element.rs / quantize.rs ──► one integer code per weight
//!        ── element.rs ──► planes of at most 256 symbols
//!        ── symbols.rs ──► per plane: one value, plain bits, rANS with a 12-bit model or over sixteen classes
//!        ── encode.rs, rans.rs, alias.rs, predict.rs ──► the bytes of each tile of rows
//! ```
//! `decode.rs` goes the other way, a block of 64 columns by 32 rows at a time: `stream.rs` turns a plane's bytes into symbols,
//! `points.rs` symbols into floats. Both have a portable form, the oracle, and one over `arch::Simd`; the files of `arch/` say
//! how an instruction set does that trait's few operations. Nothing trusts a byte that it reads: wrong bytes give wrong numbers
//! or an error.

mod alias;
mod arch;
mod decode;
mod element;
mod encode;
mod format;
mod geometry;
mod points;
mod predict;
mod quantize;
mod rans;
mod stream;
mod symbols;

#[cfg(target_arch = "x86_64")]
pub(crate) use arch::amx::Tiles;
pub use arch::{Chunks, Isa};
pub(crate) use arch::{TILE_HEIGHT, bf16_pair, per_isa};
pub use decode::{DenseBlock, PackedWeight, TileDecoder};
pub use element::{Dtype, Element, Real, Scalar, Scales, Weights};
pub(crate) use encode::{Codes, Description, encode_as, plan_header};
pub use encode::{Packed, lay_out, pack_lossless};
pub(crate) use format::Plane;
pub use format::{Codec, FORMAT_VERSION, Header, Layout, MAX_DIMENSION, Quantizer, ScaleGrid};
pub use geometry::{BLOCK, BlockShape, CHUNK, Geometry, LANES, MAX_TILE_ROWS};
pub(crate) use points::Assembly;
pub use predict::Predictor;
pub use quantize::{EcsqTarget, Measure, OnHost, Steps, Sums, Symmetric, pack_ecsq, pack_int4, pack_int8};
pub(crate) use quantize::{MAX_LEVEL, Search, WORTHWHILE, is_too_small, plan_levels};
pub(crate) use stream::Table;
pub(crate) use symbols::Coding;
pub use symbols::Histogram;

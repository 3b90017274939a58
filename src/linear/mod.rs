//! Decode-and-multiply on the CPU: a block of the weight is decoded into a scratch that fits in L1 and multiplied at once.
//!
//! With T(g, s, x) = Σ g·s·r(q)·x, the three products here are its partial derivatives, so each one's gradients are the
//! other two (`forward.rs`: y and ds; `backward.rs`: dx). `embedding.rs` looks rows up.

mod backward;
mod embedding;
mod forward;
mod kernel;
mod operand;

pub use backward::input_gradient;
pub use embedding::{embedding, embedding_scale_gradient};
pub use forward::{Input, forward, scale_gradient};
pub use operand::keeps_bf16;

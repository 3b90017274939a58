//! Cubic B-splines: the basis functions that evaluating and fitting are linear in.

mod basis;

pub use basis::{Knots, ORDER};

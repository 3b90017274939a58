//! Cubic B-splines: the basis functions that evaluating and fitting are linear in, and fits of many series.

mod basis;
mod fit;

pub use basis::{Knots, ORDER};
pub use fit::control_points;

//! Cubic B-splines: the basis functions that evaluating and fitting are linear in, and fits of many series. And the scatter
//! of samples that a PCA is made of.

mod basis;
mod fit;
mod scatter;

pub use basis::{Knots, ORDER};
pub use fit::control_points;
pub use scatter::add_scatter;

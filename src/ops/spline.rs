//! bspline_*: the basis functions' values, and the matrix of a least-squares fit. On the host, in float64: they depend on
//! places alone, and what they multiply may lie anywhere.

use tch::{Device, Kind, Tensor};

use super::tensor::{contiguous, slice, slice_mut};
use super::{compute_kind, float_kind, rows_of, with_last, with_real};
use crate::parallel::Pool;
use crate::spline::{Knots, ORDER, control_points};
use crate::{Error, Result};

fn vector(tensor: &Tensor, what: &'static str) -> Result<Tensor> {
    if tensor.dim() != 1 {
        return Err(Error::argument(what, "one dimension", format!("shape {:?}", tensor.size())));
    }
    contiguous(tensor, what, Kind::Double)
}

/// The functions' derivatives at `points`: float64 of shape [points, control points].
pub fn basis(points: &Tensor, knots: &Tensor, derivative: i64) -> Result<Tensor> {
    let order = usize::try_from(derivative)
        .map_err(|_| Error::argument("derivative", "an order of zero or more", derivative))?;
    let (points, knots) = (vector(points, "points")?, vector(knots, "knots")?);
    let (points, knots) = (slice::<f64>(&points)?, Knots::new(slice(&knots)?)?);
    if let Some(index) = points.iter().position(|point| !point.is_finite()) {
        return Err(Error::argument("points", "finite numbers", format!("{} at {index}", points[index])));
    }
    let count = knots.count();
    let mut out = Tensor::f_zeros([points.len() as i64, count as i64], (Kind::Double, Device::Cpu))?;
    for (&point, row) in points.iter().zip(slice_mut::<f64>(&mut out)?.chunks_exact_mut(count)) {
        let (first, values) = knots.at(point, order);
        row[first..first + ORDER].copy_from_slice(&values);
    }
    Ok(out)
}

/// What values at `points`, which ascend within the ends, are multiplied by: float64 of shape [control points, points].
pub fn fit_matrix(points: &Tensor, knots: &Tensor) -> Result<Tensor> {
    let (points, knots) = (vector(points, "points")?, vector(knots, "knots")?);
    let basis = basis(&points, &knots, 0)?;
    let (points, knots) = (slice::<f64>(&points)?, Knots::new(slice(&knots)?)?);
    let (start, end) = knots.ends();
    let wrong = (0..points.len()).find(|&i| points[i] < start || points[i] > end || i > 0 && points[i] < points[i - 1]);
    if let Some(index) = wrong {
        let expected = format!("ascending numbers from {start} to {end}");
        return Err(Error::argument("points", expected, format!("{} at {index}", points[index])));
    }
    if let Some(index) = knots.undetermined(points) {
        let expected = format!("a point of its own for each of {} control points", knots.count());
        return Err(Error::argument("points", expected, format!("none for control point {index}")));
    }
    let (q, r) = Tensor::f_linalg_qr(&basis, "reduced")?;
    Ok(r.f_linalg_solve_triangular(&q.f_transpose(0, 1)?, true, true, false)?)
}

/// The control points of `values`, in their dtype, by a fit's matrix. Half precision is too rough for sums of many terms.
pub fn control(values: &Tensor, matrix: &Tensor, pool: &dyn Pool) -> Result<Tensor> {
    let kind = float_kind(values, "values")?;
    let [count, points] = matrix.size()[..] else {
        return Err(Error::argument("matrix", "shape [control points, points]", format!("{:?}", matrix.size())));
    };
    let rows = rows_of(values, "values", points)? as i64;
    let (compute, device) = (compute_kind(kind), values.device());
    let out = if device == Device::Cpu {
        let (values, matrix) = (contiguous(values, "values", compute)?, contiguous(matrix, "matrix", compute)?);
        let mut out = Tensor::f_empty([rows, count], (compute, device))?;
        with_real!(compute, T => {
            control_points::<T>(slice(&values)?, slice(&matrix)?, points as usize, slice_mut(&mut out)?, pool);
        });
        out
    } else {
        let flat = values.f_reshape([rows, points])?.f_to_kind(compute)?;
        flat.f_mm(&matrix.f_to_device(device)?.f_to_kind(compute)?.f_transpose(0, 1)?)?
    };
    Ok(out.f_view(&with_last(values, count)[..])?.f_to_kind(kind)?)
}

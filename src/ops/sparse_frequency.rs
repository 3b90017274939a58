//! The product with a matrix of a sparse two-dimensional spectrum and its companions, computed in float64 for float64, else
//! in float32.

use tch::{Kind, Tensor};

use super::frequency::{check_leading, features_of, in_kind};
use super::tensor::{contiguous, slice, slice_mut};
use super::{check_bias, compute_kind, float_kind, rows_of, with_last, with_real};
use crate::codec::MAX_DIMENSION;
use crate::parallel::Pool;
use crate::spectral::Real;
use crate::spectral::sparse::Sparse;
use crate::{Error, Result};

/// A matrix's features and scale, and where its spectrum is not zero.
struct Shape<'a> {
    out_features: i64,
    in_features: i64,
    scale: f64,
    indices: &'a Tensor,
}

impl Shape<'_> {
    /// Coefficients.
    fn count(&self) -> Result<i64> {
        match self.indices.size()[..] {
            [2, count] => Ok(count),
            ref size => Err(Error::argument("indices", "shape [2, coefficients]", format!("{size:?}"))),
        }
    }

    /// Checks features, and every index.
    fn map<T: Real>(&self) -> Result<Sparse<T>> {
        for (what, value) in [("out_features", self.out_features), ("in_features", self.in_features)] {
            if !(0..MAX_DIMENSION as i64).contains(&value) {
                return Err(Error::argument(what, format!("0 to {}", MAX_DIMENSION - 1), value));
            }
        }
        let count = self.count()? as usize;
        let features = [self.out_features as usize, self.in_features as usize];
        match self.indices.f_kind()? {
            Kind::Int => {
                let indices = contiguous(self.indices, "indices", Kind::Int)?;
                let (u, v) = slice::<i32>(&indices)?.split_at(count);
                Sparse::new(features[0], features[1], self.scale, u, v)
            }
            Kind::Int64 => {
                let indices = contiguous(self.indices, "indices", Kind::Int64)?;
                let (u, v) = slice::<i64>(&indices)?.split_at(count);
                Sparse::new(features[0], features[1], self.scale, u, v)
            }
            other => Err(Error::argument("indices", "an int32 or int64 tensor", format!("{other:?}"))),
        }
    }

    /// The coefficients, a pair for each index.
    fn coefficients(&self, coefficients: &Tensor, kind: Kind) -> Result<Tensor> {
        float_kind(coefficients, "coefficients")?;
        let expected = [self.count()?, 2];
        if coefficients.size() != expected {
            let got = format!("{:?}", coefficients.size());
            return Err(Error::argument("coefficients", format!("shape {expected:?}"), got));
        }
        contiguous(coefficients, "coefficients", kind)
    }
}

/// y = x·Wᵀ + b, in x's dtype.
pub fn forward(
    x: &Tensor,
    coefficients: &Tensor,
    indices: &Tensor,
    bias: Option<&Tensor>,
    out_features: i64,
    scale: f64,
    pool: &dyn Pool,
) -> Result<Tensor> {
    let kind = float_kind(x, "x")?;
    let compute = compute_kind(kind);
    let in_features = features_of(x, "x")?;
    let shape = Shape { out_features, in_features, scale, indices };
    check_bias(bias, out_features)?;
    let rows = rows_of(x, "x", in_features)?;
    let (x, coefficients) = (contiguous(x, "x", compute)?, shape.coefficients(coefficients, compute)?);
    let bias = bias.map(|bias| contiguous(bias, "bias", compute)).transpose()?;
    let out = with_real!(compute, T => {
        let map = shape.map::<T>()?;
        let bias = bias.as_ref().map(slice).transpose()?;
        let mut out = Tensor::f_empty(with_last(&x, out_features), (compute, x.device()))?;
        map.product((slice(&x)?, rows), slice(&coefficients)?, bias, slice_mut(&mut out)?, pool);
        out
    });
    in_kind(out, kind)
}

/// dx = g·W, in g's dtype.
pub fn input_gradient(
    gradient: &Tensor,
    coefficients: &Tensor,
    indices: &Tensor,
    in_features: i64,
    scale: f64,
    pool: &dyn Pool,
) -> Result<Tensor> {
    let kind = float_kind(gradient, "gradient")?;
    let compute = compute_kind(kind);
    let out_features = features_of(gradient, "gradient")?;
    let shape = Shape { out_features, in_features, scale, indices };
    let rows = rows_of(gradient, "gradient", out_features)?;
    let (gradient, coefficients) =
        (contiguous(gradient, "gradient", compute)?, shape.coefficients(coefficients, compute)?);
    let out = with_real!(compute, T => {
        let map = shape.map::<T>()?;
        let mut out = Tensor::f_empty(with_last(&gradient, in_features), (compute, gradient.device()))?;
        map.input_gradient((slice(&gradient)?, rows), slice(&coefficients)?, slice_mut(&mut out)?, pool);
        out
    });
    in_kind(out, kind)
}

/// The gradient by the coefficients' pairs, float64 if g is, else float32.
pub fn coefficient_gradient(
    gradient: &Tensor,
    x: &Tensor,
    indices: &Tensor,
    scale: f64,
    pool: &dyn Pool,
) -> Result<Tensor> {
    let compute = compute_kind(float_kind(gradient, "gradient")?);
    float_kind(x, "x")?;
    let (out_features, in_features) = (features_of(gradient, "gradient")?, features_of(x, "x")?);
    let shape = Shape { out_features, in_features, scale, indices };
    let rows = rows_of(x, "x", in_features)?;
    check_leading(gradient, x)?;
    let (gradient, x) = (contiguous(gradient, "gradient", compute)?, contiguous(x, "x", compute)?);
    Ok(with_real!(compute, T => {
        let map = shape.map::<T>()?;
        let mut out = Tensor::f_empty([map.len() as i64, 2], (compute, x.device()))?;
        map.coefficient_gradient(slice(&gradient)?, slice(&x)?, rows, slice_mut(&mut out)?, pool);
        out
    }))
}

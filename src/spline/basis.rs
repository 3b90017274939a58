//! The basis functions of cubic B-splines and their derivatives, by the recursion of Cox and de Boor.
//!
//! At any place four functions are not zero. A derivative of order r begins with functions of degree 3 − r, and each step
//! up takes the differences N'ᵢ = q·(Nᵢ / (uᵢ₊q − uᵢ) − Nᵢ₊₁ / (uᵢ₊q₊₁ − uᵢ₊₁)) in place of the recursion's weights.

use crate::{Error, Result};

/// Coefficients that a place depends on: one more than the degree.
pub const ORDER: usize = 4;
const DEGREE: usize = ORDER - 1;

/// The knots of a spline: `count() + 4` of them, the first and last four beyond or at its ends.
pub struct Knots<'a>(&'a [f64]);

impl<'a> Knots<'a> {
    /// Knots must be finite and ascend, and the spline's ends must be apart.
    pub fn new(knots: &'a [f64]) -> Result<Self> {
        if knots.len() < 2 * ORDER {
            return Err(Error::argument("knots", "at least 8, four more than control points", knots.len()));
        }
        let wrong = (0..knots.len()).find(|&i| !knots[i].is_finite() || i > 0 && knots[i] < knots[i - 1]);
        if let Some(index) = wrong {
            let got = format!("{} at {index}", knots[index]);
            return Err(Error::argument("knots", "finite numbers in ascending order", got));
        }
        let knots = Self(knots);
        let (start, end) = knots.ends();
        if start >= end {
            return Err(Error::argument("knots", "ends that are apart", format!("{start} and {end}")));
        }
        Ok(knots)
    }

    /// How many control points, and basis functions, there are.
    pub fn count(&self) -> usize {
        self.0.len() - ORDER
    }

    /// Where the spline begins and ends.
    pub fn ends(&self) -> (f64, f64) {
        (self.0[DEGREE], self.0[self.count()])
    }

    /// The first of the four functions that are not zero at `t`, and the values of their derivative of order `derivative`.
    /// Beyond the ends the first and last polynomials go on.
    pub fn at(&self, t: f64, derivative: usize) -> (usize, [f64; ORDER]) {
        let (start, end) = self.ends();
        // The last knot that is not above t, and has a next one above it.
        let inside = t.clamp(start, end);
        let above = self.0.partition_point(|&knot| if inside < end { knot <= inside } else { knot < inside });
        let span = above - 1;
        let mut values = [0.0; ORDER];
        if derivative > DEGREE {
            return (span - DEGREE, values);
        }
        values[0] = 1.0;
        for degree in 1..ORDER {
            let lower = values;
            for (j, value) in values.iter_mut().enumerate().take(degree + 1) {
                let first = span + j - degree;
                let width = |from: usize| self.0[from + degree] - self.0[from];
                // Each width spans the interval of t, so none is zero.
                let left = if j > 0 { lower[j - 1] / width(first) } else { 0.0 };
                let right = if j < degree { lower[j] / width(first + 1) } else { 0.0 };
                *value = if degree > DEGREE - derivative {
                    degree as f64 * (left - right)
                } else {
                    left * (t - self.0[first]) + right * (self.0[first + degree + 1] - t)
                };
            }
        }
        (span - DEGREE, values)
    }

    /// The first control point that a least-squares fit at the ascending `points` leaves undetermined: each needs a point of
    /// its own at which its function is not zero (Schoenberg and Whitney 1953).
    pub fn undetermined(&self, points: &[f64]) -> Option<usize> {
        let mut points = points.iter().copied();
        let mut last = f64::NEG_INFINITY;
        (0..self.count()).find(|index| {
            let serves = |t: f64| {
                let (first, values) = self.at(t, 0);
                t > last && index.checked_sub(first).and_then(|j| values.get(j)).is_some_and(|&value| value > 0.0)
            };
            let own = points.find(|&t| serves(t));
            last = own.unwrap_or(last);
            own.is_none()
        })
    }
}

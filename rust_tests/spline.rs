//! Basis functions against their truncated powers' divided differences in the textbook form, and known values; fits against
//! plain sums, and scatters too.

use infold::parallel::{Serial, Threads};
use infold::spline::{Knots, add_scatter, control_points};

fn clamped(count: usize, end: f64) -> Vec<f64> {
    let inner = (0..=count - 3).map(|i| end * i as f64 / (count - 3) as f64);
    [0.0; 3].into_iter().chain(inner).chain([end; 3]).collect()
}

/// The textbook's recursion of one function, exponential in the degree.
fn textbook(knots: &[f64], index: usize, degree: usize, t: f64) -> f64 {
    if degree == 0 {
        return f64::from(u8::from(knots[index] <= t && t < knots[index + 1]));
    }
    let share = |a: f64, b: f64| if b == 0.0 { 0.0 } else { a / b };
    share(t - knots[index], knots[index + degree] - knots[index]) * textbook(knots, index, degree - 1, t)
        + share(knots[index + degree + 1] - t, knots[index + degree + 1] - knots[index + 1])
            * textbook(knots, index + 1, degree - 1, t)
}

fn all(knots: &Knots, t: f64, derivative: usize) -> Vec<f64> {
    let (first, values) = knots.at(t, derivative);
    (0..knots.count()).map(|i| i.checked_sub(first).and_then(|j| values.get(j)).copied().unwrap_or(0.0)).collect()
}

#[test]
fn functions_are_the_textbooks() {
    for list in [clamped(4, 1.0), clamped(9, 7.0), vec![0.0, 0.0, 0.5, 1.0, 1.0, 2.5, 2.5, 2.5, 3.0, 3.0, 4.0, 5.0]] {
        let knots = Knots::new(&list).unwrap();
        let (start, end) = knots.ends();
        for step in 0..100 {
            let t = start + (end - start) * f64::from(step) / 100.0;
            for (index, value) in all(&knots, t, 0).into_iter().enumerate() {
                assert!((value - textbook(&list, index, 3, t)).abs() < 1e-14, "{list:?} {t} {index}");
            }
        }
    }
}

#[test]
fn derivatives_are_the_limits_of_differences() {
    let list = clamped(9, 7.0);
    let knots = Knots::new(&list).unwrap();
    for order in 1..4 {
        for step in 0..50 {
            // No knot within a step of it, and beyond the ends.
            let (t, h) = (-0.9 + 0.173 * f64::from(step), 1e-5);
            let (before, after) = (all(&knots, t - h, order - 1), all(&knots, t + h, order - 1));
            for (index, value) in all(&knots, t, order).into_iter().enumerate() {
                let difference = (after[index] - before[index]) / (2.0 * h);
                assert!((value - difference).abs() < 1e-7, "{order} {t} {index}: {value} {difference}");
            }
        }
    }
    assert_eq!(all(&knots, 1.0, 4), vec![0.0; 9]);
}

#[test]
fn functions_sum_to_one_at_both_ends_and_beyond() {
    let list = clamped(6, 2.0);
    let knots = Knots::new(&list).unwrap();
    assert_eq!(all(&knots, 0.0, 0), [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    assert_eq!(all(&knots, 2.0, 0), [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]);
    for t in [-1.0, 0.3, 2.0, 3.0] {
        assert!((all(&knots, t, 0).iter().sum::<f64>() - 1.0).abs() < 1e-12);
    }
}

#[test]
fn control_points_without_a_point_of_their_own_are_named() {
    let list = clamped(6, 3.0);
    let knots = Knots::new(&list).unwrap();
    assert_eq!(knots.undetermined(&[0.0, 0.5, 1.0, 1.5, 2.5, 3.0]), None);
    assert_eq!(knots.undetermined(&[0.0, 0.0, 1.0, 1.5, 2.5, 3.0]), Some(4));
    // The last function is zero but in (2, 3].
    assert_eq!(knots.undetermined(&[0.0, 0.1, 0.2, 0.5, 1.0, 1.5, 2.0]), Some(5));
    assert_eq!(knots.undetermined(&[]), Some(0));
}

#[test]
fn wrong_knots_are_refused() {
    for knots in [vec![0.0; 8], vec![0.0; 7], vec![0.0, 0.0, 0.0, 0.0, 2.0, 1.0, 3.0, 3.0, 3.0], vec![f64::NAN; 9]] {
        assert!(Knots::new(&knots).is_err_and(|error| error.to_string().starts_with("knots: expected")));
    }
}

/// Numbers from −1 to 1 that depend on a seed and a place.
fn numbers(count: usize, seed: usize) -> Vec<f64> {
    (0..count).map(|i| ((i * 7919 + seed * 104_729) % 10_007) as f64 / 5003.0 - 1.0).collect()
}

#[test]
fn fits_are_sums_of_products_in_any_company() {
    // More and fewer than there are lanes, registers and numbers to a thread.
    for (series, points, rows) in [
        (1, 1, 1),
        (2, 9, 4),
        (7, 31, 5),
        (10, 64, 8),
        (11, 100, 9),
        (3, 1000, 17),
        (100, 1003, 8),
        (4, 0, 3),
        (0, 5, 3),
    ] {
        let (values, matrix) = (numbers(series * points, 1), numbers(rows * points, 2));
        let (mut out, mut single) = (vec![f64::NAN; series * rows], vec![f32::NAN; series * rows]);
        control_points(&values, &matrix, points, &mut out, &Threads(3));
        let narrow = |numbers: &[f64]| numbers.iter().map(|&x| x as f32).collect::<Vec<_>>();
        control_points(&narrow(&values), &narrow(&matrix), points, &mut single, &Serial);
        for index in 0..series * rows {
            let (i, j) = (index / rows, index % rows);
            let expected: f64 = (0..points).map(|k| values[i * points + k] * matrix[j * points + k]).sum();
            assert!((out[index] - expected).abs() <= 1e-15 * points as f64, "{series} {points} {rows}: {index}");
            assert!((f64::from(single[index]) - expected).abs() <= 2e-6 * points as f64, "{series} {points} {rows}");
        }
        for i in 0..series {
            let mut alone = vec![f64::NAN; rows];
            control_points(&values[i * points..(i + 1) * points], &matrix, points, &mut alone, &Serial);
            assert_eq!(alone, out[i * rows..(i + 1) * rows]);
        }
    }
}

/// Integers, whose sums are exact in any order.
#[test]
fn scatters_are_plain_sums() {
    for (rows, columns) in [(1, 1), (2, 3), (5, 16), (7, 33), (1023, 5), (1025, 31), (2500, 40)] {
        let number = |row: usize, column: usize| ((row * 31 + column * 17 + row * column) % 23) as f64 - 3.0;
        let shift = |column: usize| (column % 5) as f64;
        let mut expected = vec![0.0; columns * columns];
        let mut totals = vec![0.0; columns];
        for row in 0..rows {
            for i in 0..columns {
                let left = number(row, i) - shift(i);
                totals[i] += left;
                for j in 0..columns {
                    expected[i * columns + j] += left * (number(row, j) - shift(j));
                }
            }
        }
        let wide: Vec<f64> = (0..rows * columns).map(|at| number(at / columns, at % columns)).collect();
        let narrow: Vec<f32> = wide.iter().map(|&x| x as f32).collect();
        let shifts: Vec<f64> = (0..columns).map(shift).collect();
        let narrow_shifts: Vec<f32> = shifts.iter().map(|&x| x as f32).collect();
        for pool in [&Serial as &dyn infold::parallel::Pool, &Threads(3)] {
            let mut results = [(); 2].map(|()| (vec![0.0; columns * columns], vec![0.0; columns]));
            let [first, second] = &mut results;
            add_scatter(&wide, &shifts, &mut first.0, &mut first.1, pool);
            add_scatter(&narrow, &narrow_shifts, &mut second.0, &mut second.1, pool);
            for (products, sums) in &results {
                assert_eq!((products, sums), (&expected, &totals), "{rows} x {columns}");
            }
        }
    }
}

//! Student's t distribution.

use statrs::distribution::{Continuous, ContinuousCDF, StudentsT};

/// The chance of at least `t`.
pub fn upper_tail(t: f64, df: f64) -> f64 {
    StudentsT::new(0.0, 1.0, df).map_or(1.0, |student| student.sf(t))
}

/// The `t` that is exceeded with chance `p`.
pub fn critical(p: f64, df: f64) -> f64 {
    let Ok(student) = StudentsT::new(0.0, 1.0, df) else { return f64::INFINITY };
    // Two steps of Newton's method give the digits that the inverse by itself does not have.
    (0..2).fold(student.inverse_cdf(1.0 - p), |t, _| t + (student.sf(t) - p) / student.pdf(t))
}

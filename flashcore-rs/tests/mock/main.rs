//! Everything above the driver, on a driver that records, checks and computes.

mod support;

mod plan;

//! Everything above the driver, on a driver that records, checks and computes.

mod support;
#[path = "../shared/asynchrony.rs"]
mod scenarios;
#[path = "../shared/workload.rs"]
mod workload;

mod asynchrony;
mod plan;
mod programs;

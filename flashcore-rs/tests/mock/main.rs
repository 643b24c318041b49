//! Everything above the driver, on a driver that records, checks and computes.

#[path = "../shared/asynchrony.rs"]
mod scenarios;
mod support;
#[path = "../shared/workload.rs"]
mod workload;

mod asynchrony;
mod bundles;
mod plan;
mod programs;
mod properties;
mod refusals;

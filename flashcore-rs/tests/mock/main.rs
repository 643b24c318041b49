//! Everything above the driver, on a driver that records, checks and computes.

#[path = "../shared/fuzz.rs"]
mod fuzz;
#[path = "../shared/asynchrony.rs"]
mod scenarios;
mod support;
#[path = "../shared/workload.rs"]
mod workload;

mod asynchrony;
mod auto_traits;
mod bundles;
mod corpus;
mod pinned;
mod plan;
mod programs;
mod properties;
mod refusals;
mod repeats;

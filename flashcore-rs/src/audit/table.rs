//! Reports as text.

use super::findings::Kind;
use super::report::{Report, Verdict};

const KINDS: [Kind; 5] = [Kind::ControlFlow, Kind::Address, Kind::Guard, Kind::GuardedAlu, Kind::VariableLatency];

/// A Markdown table, one row per architecture, and all that is not a pass below it.
pub fn markdown(reports: &[Report]) -> String {
    let mut text = "| arch | cubins | pass | instructions | coverage | T1 | T2 | T3 | T4 | T5 |\n".to_owned();
    text += "|---|---|---|---|---|---|---|---|---|---|\n";
    let mut arches: Vec<&str> = reports.iter().map(|report| report.arch.as_str()).collect();
    arches.sort_unstable();
    arches.dedup();
    for arch in arches {
        let of_arch: Vec<&Report> = reports.iter().filter(|report| report.arch == arch).collect();
        let passed = of_arch.iter().filter(|report| report.verdict == Verdict::Pass).count();
        let instructions: u64 = of_arch.iter().map(|report| report.counts.instructions).sum();
        let coverage = of_arch.iter().map(|report| report.coverage()).fold(1.0, f64::min);
        let kinds = KINDS.map(|kind| of_arch.iter().map(|report| report.count(kind)).sum::<usize>().to_string());
        let start = format!("| {arch} | {} | {passed} | {instructions} | {:.1} %", of_arch.len(), 100.0 * coverage);
        text += &format!("{start} | {} |\n", kinds.join(" | "));
    }
    for report in reports.iter().filter(|report| report.verdict != Verdict::Pass) {
        text += &details(report);
    }
    text
}

/// A report that is not a pass: why, and its first leaks with their witnesses.
fn details(report: &Report) -> String {
    const SHOWN: usize = 3;
    let mut text =
        format!("\n{:?}: {} ({}, sha256 {})\n", report.verdict, report.names.join(", "), report.arch, report.sha256);
    if let Some(reason) = &report.reason {
        text += &format!("  {reason}\n");
    }
    let leaks: Vec<_> = report.findings.iter().filter(|finding| finding.kind.is_leak()).collect();
    for finding in leaks.iter().take(SHOWN) {
        text += &format!("  {} at {}: {}\n", finding.kind.describe(), finding.address, finding.text);
        for step in &finding.witness {
            let arrow = if step.carries.is_empty() { String::new() } else { format!("  -> {}", step.carries) };
            text += &format!("      {} {}{arrow}\n", step.address, step.text);
        }
    }
    if leaks.len() > SHOWN {
        text += &format!("  ... and {} more\n", leaks.len() - SHOWN);
    }
    text
}

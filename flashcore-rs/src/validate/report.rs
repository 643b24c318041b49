//! What is kept of a run as JSON, and what people and other programs read: tables, Markdown, JUnit.
//!
//! Everything is made from the JSON, so that a report of a file says what the run said.

use std::collections::BTreeMap;

use comfy_table::{CellAlignment, Table, presets};
use quick_junit::{NonSuccessKind, TestCase, TestCaseStatus, TestSuite};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::environment::Environment;
use super::measure::{ProcessReport, Protocol, Raw};

/// Format of the JSON.
const SCHEMA: &str = "flashcore.evidence/1";
/// Failures that are printed in full.
const SHOWN: usize = 20;

/// A run as JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evidence {
    /// Format of the JSON.
    pub schema: String,
    /// What the run is about.
    pub topic: String,
    /// Commit of the sources, as the caller says.
    pub commit: String,
    /// Where it ran.
    pub env: Environment,
    /// How it was measured and judged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    /// What was measured: one arm, or a baseline and a candidate.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub arms: Vec<String>,
    /// Where the samples are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub raw: Option<Raw>,
    /// What the processes that measured said.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub processes: Vec<ProcessReport>,
    /// One row per result; `kind` says which.
    pub rows: Vec<Value>,
}

impl Evidence {
    /// A run without rows yet.
    pub fn new(topic: &str, commit: &str, env: Environment) -> Self {
        Self {
            schema: SCHEMA.into(),
            topic: topic.into(),
            commit: commit.into(),
            env,
            protocol: None,
            arms: Vec::new(),
            raw: None,
            processes: Vec::new(),
            rows: Vec::new(),
        }
    }

    /// Adds a row of a kind.
    ///
    /// # Errors
    /// None for the rows of this crate: they are all maps with text keys.
    pub fn push(&mut self, kind: &str, row: &impl Serialize) -> serde_json::Result<()> {
        let mut value = serde_json::to_value(row)?;
        if let Value::Object(fields) = &mut value {
            fields.insert("kind".into(), kind.into());
        }
        self.rows.push(value);
        Ok(())
    }

    /// The rows of a kind.
    pub fn of_kind<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Value> + Clone {
        self.rows.iter().filter(move |row| row["kind"] == kind)
    }
}

/// A table with what it is about.
pub struct Section {
    /// A line or two.
    pub title: String,
    /// Its rows.
    pub table: Table,
}

/// Everything a document has tables for.
pub fn sections(evidence: &Evidence) -> Vec<Section> {
    type Make = fn(&Evidence) -> (String, Table);
    let all: [(&str, Make); 9] = [
        ("correct", correct_table),
        ("property", property_table),
        ("measure", measure_table),
        ("compare", |evidence| compare_table(evidence, "compare")),
        ("baseline", |evidence| compare_table(evidence, "baseline")),
        ("calibration", calibration_table),
        ("mutant", mutant_table),
        ("planted", planted_table),
        ("ct_time", ct_time_table),
    ];
    let present = all.into_iter().filter(|(kind, _)| evidence.of_kind(kind).next().is_some());
    present.map(|(_, make)| make(evidence)).map(|(title, table)| Section { title, table }).collect()
}

/// A document for people: the same tables, and every failure.
pub fn markdown(evidence: &Evidence) -> String {
    let mut text = format!("# {}\n\n{}, commit `{}`\n", evidence.topic, evidence.env.summary(), evidence.commit);
    for Section { title, table } in sections(evidence) {
        text += &format!("\n{title}\n\n{table}\n");
    }
    let failures = not_passed(evidence);
    if !failures.is_empty() {
        text += "\n## Not passed\n\n";
        failures.iter().for_each(|(name, why)| text += &format!("- {name}: {why}\n"));
    }
    text
}

/// One document for CI systems, of one or several runs.
///
/// # Errors
/// When the text cannot be written.
pub fn junit(documents: &[Evidence]) -> Result<String, quick_junit::SerializeError> {
    let topics: Vec<&str> = documents.iter().map(|evidence| evidence.topic.as_str()).collect();
    let mut report = quick_junit::Report::new(format!("flashcore-validate {}", topics.join(" ")));
    let mut suites: BTreeMap<String, TestSuite> = BTreeMap::new();
    for test in documents.iter().flat_map(outcomes) {
        let status = match test.failure {
            None => TestCaseStatus::success(),
            Some(why) => {
                let mut status = TestCaseStatus::non_success(NonSuccessKind::Failure);
                status.set_message(why);
                status
            }
        };
        let mut case = TestCase::new(test.name, status);
        if let Some(time) = test.seconds.and_then(|seconds| std::time::Duration::try_from_secs_f64(seconds).ok()) {
            case.set_time(time);
        }
        let suite = suites.entry(test.suite.clone()).or_insert_with(|| TestSuite::new(test.suite));
        suite.add_test_case(case);
    }
    report.add_test_suites(suites.into_values());
    report.to_string()
}

/// What was decided about one thing.
pub struct TestOutcome {
    /// The kind of row.
    pub suite: String,
    /// What it is about.
    pub name: String,
    /// Why it did not pass.
    pub failure: Option<String>,
    seconds: Option<f64>,
}

/// Everything that a document decides.
pub fn outcomes(evidence: &Evidence) -> Vec<TestOutcome> {
    let most = evidence.protocol.as_ref().map_or(1.0, |protocol| protocol.max_discarded);
    evidence.rows.iter().filter_map(|row| outcome(row, most)).collect()
}

fn outcome(row: &Value, most_discarded: f64) -> Option<TestOutcome> {
    let kind = row["kind"].as_str()?;
    let (name, failure) = match kind {
        "correct" | "repeat" | "variant" => {
            (text(&row["name"]), (row["correct"] != true).then(|| text(&row["reason"])))
        }
        "property" => (
            format!("{} of {}", text(&row["property"]), text(&row["case"])),
            (row["pass"] != true).then(|| text(&row["reason"])),
        ),
        "measure" => {
            let name = format!("{} {} {}", text(&row["name"]), text(&row["mode"]), text(&row["arm_name"]));
            let discarded = row["discarded"].as_f64().unwrap_or(0.0);
            let failure = format!("inconclusive: {} % of the samples discarded", percent(&row["discarded"]));
            (name, (discarded > most_discarded).then_some(failure))
        }
        "ct_time" if row["planted"] == false => {
            let outcome = text(&row["test"]["outcome"]);
            let name = format!("{} {} {}", text(&row["subject"]), text(&row["case"]), text(&row["class"]));
            // Where power limits the clock, what data make the card draw may show.
            let allowed = outcome == "same" || (outcome == "different" && row["regime"] == "power_limited");
            (name, (!allowed).then_some(outcome))
        }
        "compare" | "baseline" => {
            let name = format!("{} {}", text(&row["name"]), text(&row["mode"]));
            (name, (row["outcome"] != "pass").then(|| compared(row)))
        }
        "calibration" => {
            (calibrated(row), (row["met"] != true).then(|| format!("rate {}, not {}", row["rate"], row["bound"])))
        }
        "mutant" => (text(&row["name"]), (row["killed"] != true).then(|| "lives".to_owned())),
        "planted" => {
            let name =
                format!("{} {}, expected {}", text(&row["candidate"]), text(&row["mode"]), text(&row["expected"]));
            (name, (row["pass"] != true).then(|| format!("{} regressions", row["regressions"])))
        }
        "error" => ("the run".into(), Some(text(&row["reason"]))),
        _ => return None,
    };
    Some(TestOutcome { suite: kind.into(), name, failure, seconds: row["seconds"].as_f64() })
}

fn compared(row: &Value) -> String {
    let (comparison, judged) = (&row["comparison"], &row["judged"]);
    format!(
        "{}: {} is {} times {}, 95 % [{}, {}], p {}; would find {} %",
        text(&row["outcome"]),
        text(&row["arms"][1]),
        figure(&comparison["ratio"], 4),
        text(&row["arms"][0]),
        figure(&comparison["ci95"]["low"], 4),
        figure(&comparison["ci95"]["high"], 4),
        figure(&judged["p_holm"], 4),
        percent(&judged["mde"]),
    )
}

/// Names and reasons.
fn not_passed(evidence: &Evidence) -> Vec<(String, String)> {
    outcomes(evidence).into_iter().filter_map(|test| Some((test.name, test.failure?))).collect()
}

/// Failures for people, as many as a screen holds.
pub fn failures(evidence: &Evidence) -> Vec<String> {
    let failed = not_passed(evidence);
    let mut lines: Vec<String> =
        failed.iter().take(SHOWN).map(|(name, why)| format!("NOT PASSED {name}: {why}")).collect();
    if failed.len() > SHOWN {
        lines.push(format!("... and {} more", failed.len() - SHOWN));
    }
    lines
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn figure(value: &Value, digits: usize) -> String {
    value.as_f64().map_or_else(|| "-".into(), |x| format!("{x:.digits$}"))
}

fn percent(value: &Value) -> String {
    value.as_f64().map_or_else(|| "-".into(), |x| format!("{:.2}", x * 100.0))
}

fn us(value: &Value) -> String {
    value.as_f64().map_or_else(|| "-".into(), |ns| format!("{:.2}", ns * 1e-3))
}

/// Rows in order of a text field's first appearance, and all of them at the end.
fn grouped<'a>(
    rows: impl Iterator<Item = &'a Value>,
    name: impl Fn(&Value) -> String,
) -> Vec<(String, Vec<&'a Value>)> {
    let mut groups: Vec<(String, Vec<&Value>)> = Vec::new();
    let mut all = Vec::new();
    for row in rows {
        all.push(row);
        let name = name(row);
        match groups.iter_mut().find(|(known, _)| *known == name) {
            Some((_, rows)) => rows.push(row),
            None => groups.push((name, vec![row])),
        }
    }
    groups.push(("all".into(), all));
    groups
}

/// Whether the reference has an error to speak of: where scores saturate it has none, and a ratio to it says nothing.
fn decided(row: &Value) -> bool {
    row["e_ref"].as_f64().is_some_and(|e| e > 1e-6) && row["ratio"].as_f64().is_some_and(|ratio| ratio > 0.0)
}

fn correct_table(evidence: &Evidence) -> (String, Table) {
    let header =
        ["family", "cases", "pass", "worst error / bound", "geomean e / e_ref", "max ulp", "worst lse / bound", "s"];
    let mut table = new_table(&header);
    for (name, rows) in grouped(evidence.of_kind("correct"), |row| text(&row["case"]["family"])) {
        let worst = |figure: &dyn Fn(&Value) -> Option<f64>| {
            rows.iter().filter_map(|row| figure(row)).filter(|x| x.is_finite()).fold(0.0, f64::max)
        };
        let share = |row: &Value| Some(row["e"].as_f64()? / row["bound"].as_f64().filter(|bound| *bound > 0.0)?);
        let ratios: Vec<f64> = rows.iter().filter(|row| decided(row)).filter_map(|row| row["ratio"].as_f64()).collect();
        let geomean = (ratios.iter().map(|r| r.ln()).sum::<f64>() / ratios.len().max(1) as f64).exp();
        table.add_row([
            name,
            rows.len().to_string(),
            rows.iter().filter(|row| row["correct"] == true).count().to_string(),
            format!("{:.2}", worst(&share)),
            format!("{geomean:.2}"),
            format!("{:.1}", worst(&|row| row["max_ulp"].as_f64())),
            format!("{:.2}", worst(&|row| row["lse"]["ratio"].as_f64())),
            format!("{:.1}", rows.iter().filter_map(|row| row["seconds"].as_f64()).sum::<f64>()),
        ]);
    }
    let repeats: Vec<&Value> = evidence.of_kind("repeat").collect();
    let failed = |rows: &mut dyn Iterator<Item = &Value>| rows.filter(|row| row["correct"] != true).count();
    let title = format!(
        "Correctness against the fp64 oracle (e <= 1.5 e_ref + 1 ulp): {} problems, {} failed; pinned to each \
         variant that can compute them {}, {} failed; {} run {} times, {} not bit-identical.",
        evidence.of_kind("correct").count(),
        failed(&mut evidence.of_kind("correct")),
        evidence.of_kind("variant").count(),
        failed(&mut evidence.of_kind("variant")),
        repeats.len(),
        repeats.first().and_then(|row| row["repeats"].as_u64()).unwrap_or_default(),
        repeats.iter().filter(|row| row["irreproducible"] != 0).count(),
    );
    (title, table)
}

fn property_table(evidence: &Evidence) -> (String, Table) {
    let mut table = new_table(&["property", "problems", "pass", "largest difference / bound", "same bits"]);
    for (name, rows) in grouped(evidence.of_kind("property"), |row| text(&row["property"])) {
        let share = |row: &&Value| Some(row["error"].as_f64()? / row["bound"].as_f64().filter(|bound| *bound > 0.0)?);
        let bits: Vec<bool> = rows.iter().filter_map(|row| row["bitwise"].as_bool()).collect();
        table.add_row([
            name,
            rows.len().to_string(),
            rows.iter().filter(|row| row["pass"] == true).count().to_string(),
            format!("{:.2}", rows.iter().filter_map(share).fold(0.0, f64::max)),
            if bits.is_empty() {
                "-".into()
            } else {
                format!("{} of {}", bits.iter().filter(|x| **x).count(), bits.len())
            },
        ]);
    }
    ("Relations between results.".into(), table)
}

fn measure_table(evidence: &Evidence) -> (String, Table) {
    let header = ["mode", "case", "arm", "us", "95 %", "p90", "p99", "ess", "TFLOP/s", "floor us", "empty call us"];
    let mut table = new_table(&header);
    let mut rows: Vec<&Value> = evidence.of_kind("measure").collect();
    rows.sort_by_key(|row| super::measure::Mode::ALL.iter().position(|mode| row["mode"] == mode.name()));
    for row in rows {
        let stats = &row["stats"];
        let percentile = |p: f64| {
            let found = stats["percentiles"].as_array().and_then(|all| all.iter().find(|x| x["p"] == p));
            found.filter(|x| !x["ci"].is_null()).map_or_else(|| "-".into(), |x| us(&x["ns"]))
        };
        let floor = ["bytes_us", "flops_us"].iter().filter_map(|field| row["floor"][*field].as_f64());
        table.add_row([
            text(&row["mode"]),
            text(&row["name"]),
            text(&row["arm_name"]),
            us(&stats["median"]),
            format!("{}..{}", us(&stats["ci95"]["low"]), us(&stats["ci95"]["high"])),
            percentile(0.9),
            percentile(0.99),
            figure(&stats["ess"], 0),
            figure(&row["tflops"], 3),
            floor.reduce(f64::max).map_or_else(|| "-".into(), |us| format!("{us:.1}")),
            us(&row["timer"]["floor_ns"]),
        ]);
    }
    let protocol = evidence
        .protocol
        .as_ref()
        .map(|p| format!(" {} processes of {} blocks of {} samples.", p.processes, p.blocks, p.samples));
    let title = "Medians. call: whole calls with an empty queue, by the host's clock. cold, hot: one launch by events, the \
                 L2 cache flushed or warm. graph: one of the launches in a graph. floor: bytes or operations at the card's \
                 measured ceilings."
        .to_owned();
    (title + &protocol.unwrap_or_default(), table)
}

fn compare_table(evidence: &Evidence, kind: &str) -> (String, Table) {
    let header =
        ["mode", "case", "ratio", "95 %", "Hodges-Lehmann", "p (Holm)", "would find, %", "discarded, %", "verdict"];
    let mut table = new_table(&header);
    let mut arms = String::new();
    for row in evidence.of_kind(kind) {
        let (comparison, judged) = (&row["comparison"], &row["judged"]);
        arms = format!("{} / {}", text(&row["arms"][1]), text(&row["arms"][0]));
        table.add_row([
            text(&row["mode"]),
            text(&row["name"]),
            figure(&comparison["ratio"], 4),
            format!("{}..{}", figure(&comparison["ci95"]["low"], 4), figure(&comparison["ci95"]["high"], 4)),
            figure(&comparison["hodges_lehmann"], 4),
            figure(&judged["p_holm"], 4),
            percent(&judged["mde"]),
            percent(&row["discarded"]),
            text(&row["outcome"]),
        ]);
    }
    let margin = evidence.protocol.as_ref().map_or(0.0, |protocol| protocol.margin * 100.0);
    (format!("Times of {arms}. A regression is a ratio above {:.4}.", 1.0 + margin / 100.0), table)
}

fn calibrated(row: &Value) -> String {
    format!("{} at {} %", text(&row["question"]).replace('_', " "), percent(&row["planted"]))
}

fn bound(fields: &serde_json::Map<String, Value>) -> String {
    fields.iter().map(|(name, rate)| format!("{} {rate}", name.replace('_', " "))).collect()
}

fn calibration_table(evidence: &Evidence) -> (String, Table) {
    let mut table = new_table(&["what", "trials", "rate", "95 %", "must be", "holds"]);
    for row in evidence.of_kind("calibration") {
        table.add_row([
            calibrated(row),
            text(&row["trials"]),
            figure(&row["rate"], 4),
            format!("{}..{}", figure(&row["ci95"]["low"], 4), figure(&row["ci95"]["high"], 4)),
            row["bound"].as_object().map_or_else(|| "-".into(), bound),
            if row["met"] == true { "yes" } else { "NO" }.into(),
        ]);
    }
    ("How often the verdict is wrong: suites of samples with a known answer.".into(), table)
}

fn mutant_table(evidence: &Evidence) -> (String, Table) {
    let mut table = new_table(&["mutant", "what is wrong with it", "killed", "by"]);
    for row in evidence.of_kind("mutant") {
        table.add_row([
            text(&row["name"]),
            text(&row["description"]),
            if row["killed"] == true { "yes" } else { "NO" }.into(),
            row["case"].as_str().unwrap_or("-").to_owned(),
        ]);
    }
    let rows = evidence.of_kind("mutant");
    let killed = rows.clone().filter(|row| row["killed"] == true).count();
    (format!("Wrong kernels: {killed} of {} killed.", rows.count()), table)
}

fn planted_table(evidence: &Evidence) -> (String, Table) {
    let header = ["candidate", "mode", "ratios", "regression", "inconclusive", "pass", "expected", "as it should"];
    let mut table = new_table(&header);
    for row in evidence.of_kind("planted") {
        let ratio = |end: fn(f64, f64) -> f64| {
            let ratios = row["ratios"].as_array().into_iter().flatten().filter_map(Value::as_f64);
            ratios.reduce(end).map_or_else(|| "-".into(), |ratio| format!("{ratio:.4}"))
        };
        table.add_row([
            text(&row["candidate"]),
            text(&row["mode"]),
            format!("{}..{}", ratio(f64::min), ratio(f64::max)),
            text(&row["regressions"]),
            text(&row["inconclusive"]),
            text(&row["passes"]),
            text(&row["expected"]),
            if row["pass"] == true { "yes" } else { "NO" }.into(),
        ]);
    }
    ("Comparisons with a known answer: how many cases came to which verdict.".into(), table)
}

fn ct_time_table(evidence: &Evidence) -> (String, Table) {
    let header =
        ["kernel", "regime", "case", "class", "reference us", "us", "largest decile difference", "margin", "test"];
    let mut table = new_table(&header);
    for row in evidence.of_kind("ct_time") {
        let test = &row["test"];
        let deciles = test["deciles"].as_array().into_iter().flatten().filter_map(Value::as_f64);
        let largest = deciles.map(f64::abs).fold(0.0, f64::max);
        table.add_row([
            text(&row["subject"]),
            text(&row["regime"]),
            text(&row["case"]),
            text(&row["class"]),
            figure(&row["us"][0]["median"], 3),
            figure(&row["us"][1]["median"], 3),
            format!("{largest:.4} +- {}", figure(&test["band"], 4)),
            figure(&test["margin"], 4),
            text(&test["outcome"]),
        ]);
    }
    ("Times of classes of inputs beside the reference, in microseconds.".into(), table)
}

fn new_table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(header);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

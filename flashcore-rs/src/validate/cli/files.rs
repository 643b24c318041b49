//! `replay` and `report`: what files say.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::super::baseline::Document;
use super::super::report::{Evidence, markdown};
use super::{Exit, Options, Result, open, print, show};

/// Relative difference of two numbers that are the same: what JSON and another order of summation leave.
const SAME: f64 = 1e-9;

/// Makes the rows of a document again from its samples.
pub(super) fn replay(file: &Path, options: &Options) -> Result<Exit> {
    let document = Document::read(file)?;
    let mut again = document.evidence.clone();
    again.rows.retain(|row| row["kind"] != "measure" && row["kind"] != "compare");
    let rows = document.measured().measured();
    rows.iter().try_for_each(|row| again.push("measure", row))?;
    if document.evidence.of_kind("compare").next().is_some() {
        let rows = document.measured().compared();
        rows.iter().try_for_each(|row| again.push("compare", row))?;
    }
    let mut differences = Vec::new();
    for kind in ["measure", "compare"] {
        let rows = |evidence: &Evidence| evidence.of_kind(kind).cloned().collect::<Vec<_>>();
        differ(kind, &Value::Array(rows(&document.evidence)), &Value::Array(rows(&again)), &mut differences);
    }
    options.write(&again)?;
    show(&again);
    for difference in &differences {
        print(&format!("DIFFERENT: {difference}"));
    }
    let exit = if differences.is_empty() { Exit::Pass } else { Exit::Selftest };
    let elsewhere = again.of_kind("baseline").count();
    if elsewhere > 0 {
        print(&format!("{elsewhere} comparisons with another document are as they were: its samples are not here"));
    }
    print(&format!(
        "{} samples, {} differences from the file\n{}",
        document.samples.len(),
        differences.len(),
        exit.word()
    ));
    Ok(exit)
}

/// Lists where two values differ.
fn differ(at: &str, one: &Value, other: &Value, differences: &mut Vec<String>) {
    match (one, other) {
        (Value::Object(a), Value::Object(b)) if a.len() == b.len() => {
            for (name, value) in a {
                differ(&format!("{at}.{name}"), value, b.get(name).unwrap_or(&Value::Null), differences);
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (i, (a, b)) in a.iter().zip(b).enumerate() {
                differ(&format!("{at}[{i}]"), a, b, differences);
            }
        }
        _ if same(one, other) => {}
        _ => differences.push(format!("{at}: {one} in the file, {other} from its samples")),
    }
}

fn same(one: &Value, other: &Value) -> bool {
    match (one.as_f64(), other.as_f64()) {
        (Some(a), Some(b)) => (a - b).abs() <= SAME * a.abs().max(b.abs()),
        _ => one == other,
    }
}

/// Prints or writes the tables of documents.
pub(super) fn report(files: &[PathBuf], options: &Options) -> Result<Exit> {
    let documents = files.iter().map(|file| open::json(file)).collect::<Result<Vec<Evidence>>>()?;
    documents.iter().for_each(show);
    let all: Vec<String> = documents.iter().map(markdown).collect();
    super::write(options.markdown.as_deref(), || Ok(all.join("\n")))?;
    super::write(options.junit.as_deref(), || Ok(super::junit(&documents)?))?;
    Ok(Exit::Pass)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn differences_are_named_and_rounding_is_none() {
        let mut found = Vec::new();
        let file = json!([{"a": 1.0, "b": [1, 2.5], "c": "x"}]);
        differ("row", &file, &json!([{"a": 1.000_000_000_1, "b": [1, 2.5], "c": "x"}]), &mut found);
        assert_eq!(found, Vec::<String>::new());
        differ("row", &file, &json!([{"a": 1.0001, "b": [1, 2.5], "c": "y"}]), &mut found);
        differ("row", &file, &json!([{"a": 1.0, "b": [1], "c": "x"}]), &mut found);
        let places: Vec<&str> = found.iter().filter_map(|said| said.split(':').next()).collect();
        assert_eq!(places, ["row[0].a", "row[0].c", "row[0].b"]);
    }
}

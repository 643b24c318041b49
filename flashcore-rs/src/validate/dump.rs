//! A case with its inputs and outputs as a file, for other programs to run the same problem on the same bits.
//!
//! The format is safetensors. Each tensor is its whole memory, rim and padding included, in one dimension; the metadata
//! `case` is the case as JSON and `tensors` gives shape, strides and start of each, so that a reader can make the same
//! view, with the same alignment.

use std::io::{BufWriter, Write};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::case::Case;
use super::correct::Outcome;
use super::host::HostTensor;
use super::inputs::Inputs;
use super::subject::Subject;
use crate::dtype::DType;

/// Runs a case and writes it to `path`.
pub(super) fn dump(
    subject: &dyn Subject,
    case: &Case,
    seed: u64,
    path: &Path,
) -> Result<(), Box<dyn std::error::Error>> {
    let inputs = Inputs::draw(case, seed)?;
    let outcome = Outcome::new(subject, case, &inputs)?;
    let tensors = [
        ("query", Some(&inputs.query)),
        ("key", Some(&inputs.key)),
        ("value", Some(&inputs.value)),
        ("attn_mask", inputs.attn_mask.as_ref()),
        ("out", Some(&outcome.out)),
        ("lse", outcome.lse.as_ref()),
    ];
    let tensors: Vec<(&str, &HostTensor, Vec<u8>)> =
        tensors.into_iter().filter_map(|(name, tensor)| tensor.map(|t| (name, t, t.bytes()))).collect();
    let header = header(case, &outcome.ran.variant, &tensors)?;
    let mut file = BufWriter::new(std::fs::File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    for (.., bytes) in &tensors {
        file.write_all(bytes)?;
    }
    file.flush()?;
    Ok(())
}

/// The header, padded so that the tensors start at a multiple of 8 bytes.
fn header(case: &Case, variant: &str, tensors: &[(&str, &HostTensor, Vec<u8>)]) -> serde_json::Result<String> {
    let mut entries = Map::new();
    let mut views = Map::new();
    let mut end = 0;
    for (name, tensor, bytes) in tensors {
        let layout = tensor.layout();
        let start = end;
        end += bytes.len();
        let entry = json!({
            "dtype": safetensors_name(layout.dtype),
            "shape": [bytes.len() / layout.dtype.size()],
            "data_offsets": [start, end],
        });
        entries.insert((*name).into(), entry);
        let view = json!({ "shape": layout.shape, "strides": layout.strides, "start": tensor.start() });
        views.insert((*name).into(), view);
    }
    let metadata = json!({
        "name": case.to_string(),
        "variant": variant,
        "case": serde_json::to_string(case)?,
        "tensors": Value::Object(views).to_string(),
    });
    entries.insert("__metadata__".into(), metadata);
    let mut header = Value::Object(entries).to_string();
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    Ok(header)
}

fn safetensors_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "F16",
        DType::BF16 => "BF16",
        DType::F32 => "F32",
        DType::F64 => "F64",
        DType::Bool => "U8",
    }
}

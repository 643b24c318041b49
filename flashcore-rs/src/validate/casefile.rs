//! Cases and how to measure them, from a TOML file.
//!
//! ```toml
//! [protocol]              # optional; every field of `Protocol`
//! modes = ["call", "graph"]
//! margin = 0.02
//!
//! [[case]]                # one or more; what is not said is as here
//! batch = 2
//! num_heads_q = 8
//! num_heads_kv = 8        # as num_heads_q
//! seq_len_q = 512
//! seq_len_k = 512         # as seq_len_q
//! head_dim = 64
//! head_dim_v = 64         # as head_dim
//! dtype = "f16"
//! causal = false
//! bottom_right = false
//! window_left = 128       # unbounded
//! window_right = 0        # unbounded
//! scale = 0.125           # 1 / sqrt(head_dim)
//! lse = false             # measured without
//! ```

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::case::Case;
use super::correct::problem_of;
use super::inputs::Inputs;
use super::measure::Protocol;
use super::open::read;
use crate::attention::{CausalAlign, Window};
use crate::dtype::DType;

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// A case file.
#[derive(Clone, Debug, PartialEq)]
pub struct CaseFile {
    /// Where it is.
    pub path: PathBuf,
    /// The cases, in the file's order.
    pub cases: Vec<Case>,
    /// How to measure them, if the file says.
    pub protocol: Option<toml::Table>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    protocol: Option<toml::Table>,
    #[serde(default)]
    case: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    batch: Option<usize>,
    num_heads_q: usize,
    num_heads_kv: Option<usize>,
    seq_len_q: usize,
    seq_len_k: Option<usize>,
    head_dim: usize,
    head_dim_v: Option<usize>,
    dtype: Option<DType>,
    #[serde(default)]
    causal: bool,
    #[serde(default)]
    bottom_right: bool,
    window_left: Option<u32>,
    window_right: Option<u32>,
    scale: Option<f32>,
    #[serde(default)]
    lse: bool,
}

impl From<Entry> for Case {
    fn from(entry: Entry) -> Self {
        let heads = [entry.num_heads_q, entry.num_heads_kv.unwrap_or(entry.num_heads_q)];
        let seq_lens = [entry.seq_len_q, entry.seq_len_k.unwrap_or(entry.seq_len_q)];
        let mut case = Self::new("file", heads, seq_lens, entry.head_dim);
        case.batch = entry.batch.unwrap_or(case.batch);
        case.head_dim_v = entry.head_dim_v.unwrap_or(entry.head_dim);
        case.dtype = entry.dtype.unwrap_or(case.dtype);
        case.lse = entry.lse;
        case.options.causal = entry.causal;
        case.options.causal_align = if entry.bottom_right { CausalAlign::BottomRight } else { CausalAlign::TopLeft };
        let window = Window { left: entry.window_left, right: entry.window_right };
        case.options.window = (window != Window::default()).then_some(window);
        case.options.scale = entry.scale;
        case
    }
}

impl CaseFile {
    /// Reads a file.
    ///
    /// # Errors
    /// When it cannot be read, or says something else than the [module](self) documents; the error says where.
    pub fn read(path: &Path) -> Result<Self> {
        let text = String::from_utf8(read(path)?).map_err(|error| format!("{}: {error}", path.display()))?;
        Self::parse(path, &text).map_err(|error| format!("{}: {error}", path.display()).into())
    }

    fn parse(path: &Path, text: &str) -> Result<Self> {
        let File { protocol, case } = toml::from_str(text)?;
        if case.is_empty() {
            return Err("no [[case]]".into());
        }
        let cases: Vec<Case> = case.into_iter().map(Case::from).collect();
        for (i, case) in cases.iter().enumerate() {
            well_formed(case).map_err(|error| format!("case {}: {error}", i + 1))?;
        }
        Ok(Self { path: path.into(), cases, protocol })
    }

    /// A protocol with what the file says in place of what it has.
    ///
    /// # Errors
    /// When the file names a field that protocols do not have, or gives it what it cannot be.
    pub fn apply(&self, protocol: Protocol) -> Result<Protocol> {
        let Some(said) = &self.protocol else { return Ok(protocol) };
        let mut fields = serde_json::to_value(&protocol)?;
        for (name, value) in said {
            fields[name] = serde_json::to_value(value)?;
        }
        serde_json::from_value(fields).map_err(|error| format!("{}: {error}", self.path.display()).into())
    }
}

/// Refuses what no kernel could be asked, and what leaves nothing to compute.
fn well_formed(case: &Case) -> Result<()> {
    if case.shapes().iter().any(|shape| shape.contains(&0)) {
        return Err("a size of 0; accepted sizes of at least 1".into());
    }
    problem_of(&Inputs::undrawn(case)?, &Inputs::outputs(case)?.0, case.lse)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::measure::Mode;
    use super::*;

    #[test]
    fn cases_have_defaults_and_protocols_are_overlaid() -> Result<()> {
        let file = CaseFile::parse(
            Path::new("cases.toml"),
            "[protocol]\nmodes = [\"graph\"]\nmargin = 0.02\n\n\
             [[case]]\nnum_heads_q = 8\nnum_heads_kv = 2\nseq_len_q = 100\nhead_dim = 64\ncausal = true\nwindow_left = 7\n\
             [[case]]\nnum_heads_q = 1\nseq_len_q = 1\nseq_len_k = 33\nhead_dim = 128\ndtype = \"bf16\"\nbatch = 3\n",
        )?;
        let names: Vec<String> = file.cases.iter().map(Case::to_string).collect();
        assert_eq!(names, ["file/f16 b2 h8-2 s100 d64 causal window7,inf", "file/bf16 b3 h1 s1x33 d128"]);
        let protocol = file.apply(Protocol { blocks: 3, ..Protocol::default() })?;
        assert_eq!((protocol.modes.as_slice(), protocol.margin, protocol.blocks), (&[Mode::Graph][..], 0.02, 3));
        Ok(())
    }

    #[test]
    fn mistakes_are_named() {
        let case = "[[case]]\nnum_heads_q = 1\nseq_len_q = 1\nhead_dim = 8\n";
        for (text, word) in [
            (String::new(), "case"),
            (format!("{case}causual = true"), "causual"),
            (format!("{case}dtype = \"f8\""), "f8"),
            (format!("{case}num_heads_kv = 3"), "case 1"),
            (format!("{case}{case}head_dim_v = 0"), "case 2: a size of 0"),
            ("[[case]]\nhead_dim = 8".into(), "num_heads_q"),
            (format!("[protocol]\nblokcs = 3\n{case}"), "blokcs"),
        ] {
            let protocol = Protocol::default();
            let said =
                CaseFile::parse(Path::new("cases.toml"), &text).and_then(|file| file.apply(protocol)).map(|_| ());
            let said = said.err().map(|error| error.to_string()).unwrap_or_default();
            assert!(said.contains(word), "{text:?}: {said}");
        }
    }
}

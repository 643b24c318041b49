//! Raw samples, and the file that they are kept in: gzip'd CSV, in the order of time.

use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::path::Path;

use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use flate2::{Compression, GzBuilder};
use serde::{Deserialize, Serialize};

use super::spec::Mode;

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// One time that was taken.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Index of the case in the suite.
    pub case: u32,
    /// What it is the time of.
    pub mode: Mode,
    /// The process.
    pub process: u32,
    /// The block in the process.
    pub block: u32,
    /// The place in the block.
    pub position: u32,
    /// Index of the arm: with two, 0 is the baseline.
    pub arm: u32,
    /// Nanoseconds.
    pub ns: f64,
    /// The SM clock after it, MHz.
    pub sm_mhz: Option<f64>,
}

impl Sample {
    /// Whether it is a time, and of one of so many cases and arms and of these modes.
    pub(in crate::validate) fn fits(&self, cases: usize, arms: usize, modes: &[Mode]) -> bool {
        (self.case as usize) < cases
            && (self.arm as usize) < arms
            && modes.contains(&self.mode)
            && self.ns.is_finite()
            && self.ns > 0.0
    }
}

/// Columns of the file.
const COLUMNS: [&str; 8] = ["case", "mode", "process", "block", "position", "arm", "ns", "sm_mhz"];

/// Where raw samples are kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Raw {
    /// The file, beside the document that names it.
    pub path: String,
    /// Its hash.
    pub sha256: String,
    /// Its columns.
    pub columns: Vec<String>,
}

impl Raw {
    /// Writes samples beside a document: `x.json` has them in `x.samples.csv.gz`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(document: &Path, samples: &[Sample]) -> Result<Self> {
        let path = document.with_extension("samples.csv.gz");
        let bytes = compressed(samples)?;
        File::create(&path)
            .and_then(|mut file| file.write_all(&bytes))
            .map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self {
            path: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            sha256: crate::bundle::sha256_hex(&bytes),
            columns: COLUMNS.map(str::to_owned).to_vec(),
        })
    }

    /// Reads the samples of a document.
    ///
    /// # Errors
    /// When the file is not there, is not the one that was written, or is malformed.
    pub fn read(&self, document: &Path) -> Result<Vec<Sample>> {
        let path = document.with_file_name(&self.path);
        let mut bytes = Vec::new();
        File::open(&path)
            .and_then(|file| BufReader::new(file).read_to_end(&mut bytes))
            .map_err(|error| format!("{}: {error}", path.display()))?;
        let sha256 = crate::bundle::sha256_hex(&bytes);
        if sha256 != self.sha256 {
            return Err(format!("{}: sha256 {sha256}, {} was written", path.display(), self.sha256).into());
        }
        let mut reader = csv::Reader::from_reader(GzDecoder::new(bytes.as_slice()));
        Ok(reader.deserialize().collect::<csv::Result<_>>()?)
    }
}

fn compressed(samples: &[Sample]) -> Result<Vec<u8>> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    for sample in samples {
        writer.serialize(sample)?;
    }
    Ok(gzip(&writer.into_inner().map_err(|error| error.to_string())?)?)
}

/// Compresses; the same bytes for the same bytes, for there is no time and no name in them.
pub(in crate::validate) fn gzip(bytes: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut gzip: GzEncoder<Vec<u8>> = GzBuilder::new().mtime(0).write(Vec::new(), Compression::best());
    gzip.write_all(bytes)?;
    gzip.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> Vec<Sample> {
        let sample = |position: u32| Sample {
            case: 1,
            mode: Mode::Graph,
            process: 2,
            block: 3,
            position,
            arm: position % 2,
            ns: 5312.02 + f64::from(position),
            sm_mhz: (position > 0).then_some(1980.5),
        };
        (0..20).map(sample).collect()
    }

    #[test]
    fn samples_survive_their_file() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let document = folder.path().join("run.json");
        let raw = Raw::write(&document, &samples())?;
        assert_eq!(raw.path, "run.samples.csv.gz");
        assert_eq!(raw.read(&document)?, samples());
        assert_eq!(Raw::write(&document, &samples())?, raw, "the same bytes");
        Ok(())
    }

    #[test]
    fn another_file_is_refused() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let document = folder.path().join("run.json");
        let raw = Raw::write(&document, &samples())?;
        Raw::write(&document, &samples()[1..])?;
        let refused = raw.read(&document).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(refused.contains("was written"), "{refused}");
        std::fs::remove_file(folder.path().join(&raw.path))?;
        assert!(raw.read(&document).is_err());
        Ok(())
    }
}

//! The vendor's tools: the disassembler, and the assembler for what is shipped as PTX.

use std::ffi::OsStr;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A tool that is missing, or did not do its work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ToolError {
    /// It cannot be started.
    #[error(
        "cannot run {tool}: {detail}; install it (pip install -r kernels/requirements.txt) and name it with --{option} or ${variable}"
    )]
    Missing {
        /// Where it was looked for.
        tool: String,
        /// What the system said.
        detail: String,
        /// The command-line option that names it.
        option: &'static str,
        /// The environment variable that names it.
        variable: &'static str,
    },
    /// It refused its input.
    #[error("{tool}: {detail}")]
    Refused {
        /// Which.
        tool: &'static str,
        /// What it printed.
        detail: String,
    },
}

/// A tool and its version.
#[derive(Clone, Debug)]
pub struct Tool {
    name: &'static str,
    path: PathBuf,
    /// As it says itself: `13.5.37`.
    pub version: String,
}

impl Tool {
    /// `nvdisasm`: the given one, that of `$NVDISASM`, or the one on the path.
    ///
    /// # Errors
    /// [`ToolError`] if it does not run.
    pub fn disassembler(path: Option<&Path>) -> Result<Self, ToolError> {
        Self::find("nvdisasm", path, "NVDISASM")
    }

    /// `ptxas`: the given one, that of `$PTXAS`, or the one on the path.
    ///
    /// # Errors
    /// [`ToolError`] if it does not run.
    pub fn assembler(path: Option<&Path>) -> Result<Self, ToolError> {
        Self::find("ptxas", path, "PTXAS")
    }

    fn find(name: &'static str, path: Option<&Path>, variable: &'static str) -> Result<Self, ToolError> {
        let path = match path {
            Some(path) => path.to_owned(),
            None => std::env::var_os(variable).map_or_else(|| PathBuf::from(name), PathBuf::from),
        };
        let mut tool = Self { name, path, version: String::new() };
        let missing =
            |detail| ToolError::Missing { tool: tool.path.display().to_string(), detail, option: name, variable };
        let output = Command::new(&tool.path).arg("--version").output().map_err(|error| missing(error.to_string()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text.split_whitespace().find_map(|word| word.strip_prefix('V')).map(str::to_owned);
        tool.version = version.ok_or_else(|| missing("it does not say its version".into()))?;
        Ok(tool)
    }

    /// The listing of a cubin's code.
    ///
    /// # Errors
    /// [`ToolError::Refused`].
    pub fn disassemble(&self, cubin: &[u8]) -> Result<String, ToolError> {
        let file = self.write(cubin)?;
        let listing = self.run([OsStr::new("-c"), file.path().as_os_str()])?;
        String::from_utf8(listing).map_err(|_| self.refused("a listing that is not UTF-8"))
    }

    /// Assembles PTX for an architecture.
    ///
    /// # Errors
    /// [`ToolError::Refused`].
    pub fn assemble(&self, ptx: &[u8], arch: &str) -> Result<Vec<u8>, ToolError> {
        let text = self.write(ptx)?;
        let out = self.write(&[])?;
        let arch = format!("-arch={arch}");
        self.run([OsStr::new(&arch), text.path().as_os_str(), OsStr::new("-o"), out.path().as_os_str()])?;
        std::fs::read(out.path()).map_err(|error| self.refused(error))
    }

    fn write(&self, bytes: &[u8]) -> Result<tempfile::NamedTempFile, ToolError> {
        let mut file = tempfile::NamedTempFile::new().map_err(|error| self.refused(error))?;
        file.write_all(bytes).map_err(|error| self.refused(error))?;
        Ok(file)
    }

    fn run<const N: usize>(&self, arguments: [&OsStr; N]) -> Result<Vec<u8>, ToolError> {
        let output = Command::new(&self.path).args(arguments).output().map_err(|error| self.refused(error))?;
        if output.status.success() {
            Ok(output.stdout)
        } else {
            Err(self.refused(String::from_utf8_lossy(&output.stderr).trim()))
        }
    }

    fn refused(&self, detail: impl ToString) -> ToolError {
        ToolError::Refused { tool: self.name, detail: detail.to_string() }
    }
}

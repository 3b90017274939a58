//! The crate's one error type. Each variant says what was expected and what came.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Everything that can go wrong below the operators.
#[derive(Debug, Error)]
pub enum Error {
    /// An argument has a value or a shape that the callee cannot take.
    #[error("{what}: expected {expected}, got {got}")]
    Argument { what: &'static str, expected: String, got: String },
    /// An element of a tensor that must be finite is not.
    #[error("weight[{row}, {col}] is {value}: quantised formats need finite weights")]
    NotFinite { row: usize, col: usize, value: f32 },
    /// A packed weight whose bytes contradict each other or their checksums.
    #[error("infold/corrupt: field `{field}`: expected {expected}, got {got}")]
    Corrupt { field: &'static str, expected: String, got: String },
    /// A packed weight written by a newer library.
    #[error("infold/corrupt: field `version`: expected at most {supported}, got {found}")]
    Version { found: u16, supported: u16 },
    /// The system refused an action on a file, or ended it early.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io { action: String, path: PathBuf, source: io::Error },
    /// The GPU's driver refused a call, or is not there.
    #[error("CUDA: {0}")]
    Cuda(String),
    /// A worker panicked; the message is the panic's.
    #[error("internal error, please report it: {0}")]
    Panic(String),
    /// The tensor library refused a call.
    #[cfg(feature = "torch")]
    #[error("{}", without_trace(.0))]
    Tensor(#[from] tch::TchError),
}

/// What the tensor library said, without where in its own code.
#[cfg(feature = "torch")]
fn without_trace(error: &tch::TchError) -> String {
    let text = error.to_string();
    let said = text.split("\nException raised from").next().unwrap_or(&text);
    said.trim_start_matches("Internal torch error: ").to_owned()
}

impl Error {
    pub fn argument(what: &'static str, expected: impl ToString, got: impl ToString) -> Self {
        Self::Argument { what, expected: expected.to_string(), got: got.to_string() }
    }

    pub fn corrupt(field: &'static str, expected: impl ToString, got: impl ToString) -> Self {
        Self::Corrupt { field, expected: expected.to_string(), got: got.to_string() }
    }

    pub fn io(action: &str, path: &Path, source: io::Error) -> Self {
        Self::Io { action: action.to_owned(), path: path.to_owned(), source }
    }

    /// Whether the caller's argument is at fault (Python's `ValueError`), rather than the data or the library.
    pub fn is_argument(&self) -> bool {
        matches!(self, Self::Argument { .. } | Self::NotFinite { .. })
    }
}

pub type Result<T> = std::result::Result<T, Error>;

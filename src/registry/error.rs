//! Why a model could not be had, in words that say what to do.

use std::{
    io,
    path::{Path, PathBuf},
};

use thiserror::Error;

#[derive(Debug, Error)]
pub enum RegistryError {
    #[error(
        "no model {model:?}: give one of the known ids ({known}), a hub id such as org/name, or a \
         path to a model directory or .gguf file"
    )]
    Unknown { model: String, known: String },
    #[error("manifest {file}: {reason}")]
    Manifest { file: String, reason: String },
    #[error("{}: missing {}", dir.display(), missing.join(", "))]
    Missing { dir: PathBuf, missing: Vec<String> },
    #[error("{}: {reason}", path.display())]
    Invalid { path: PathBuf, reason: String },
    #[error("model {model}: no source worked:\n  {}", reasons.join("\n  "))]
    NoSource { model: String, reasons: Vec<String> },
    #[error("the disk is full while writing {}: free some space or choose another cache directory", .0.display())]
    DiskFull(PathBuf),
    #[error("cannot write {}: {source}; make it writable or choose another cache directory", path.display())]
    Unwritable { path: PathBuf, source: io::Error },
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

impl RegistryError {
    /// An I/O error at `path`, sorted by what the operator has to do.
    pub(super) fn io(path: &Path, source: io::Error) -> Self {
        let path = path.to_path_buf();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull(path),
            io::ErrorKind::PermissionDenied
            | io::ErrorKind::ReadOnlyFilesystem
            | io::ErrorKind::NotADirectory
            | io::ErrorKind::AlreadyExists => Self::Unwritable { path, source },
            _ => Self::Io { path, source },
        }
    }
}

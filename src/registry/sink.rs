//! Where a download goes: a temporary file that is hashed as it grows.

use std::{fmt::Write as _, io::Write as _, path::Path};

use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;

use super::{Progress, RegistryError, manifest::Manifest, store::PARTIAL_PREFIX};

pub(super) struct Sink<'a> {
    file: NamedTempFile,
    hash: Sha256,
    done_bytes: u64,
    manifest: &'a Manifest,
    progress: &'a dyn Progress,
    /// The disk's own error, kept apart from the source's: no other source would cure it.
    local_error: Option<RegistryError>,
}

impl<'a> Sink<'a> {
    pub fn create(
        dir: &Path,
        manifest: &'a Manifest,
        progress: &'a dyn Progress,
    ) -> Result<Self, RegistryError> {
        let file = tempfile::Builder::new()
            .prefix(PARTIAL_PREFIX)
            .tempfile_in(dir)
            .map_err(|e| RegistryError::io(dir, e))?;
        let hash = Sha256::new();
        Ok(Self { file, hash, done_bytes: 0, manifest, progress, local_error: None })
    }

    /// Appends; refuses to grow beyond the size that the manifest states.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.done_bytes += bytes.len() as u64;
        if self.done_bytes > self.manifest.size_bytes {
            return Err(format!("more than the stated {} bytes came", self.manifest.size_bytes));
        }
        if let Err(error) = self.file.write_all(bytes) {
            let error = RegistryError::io(self.file.path(), error);
            let reason = error.to_string();
            self.local_error = Some(error);
            return Err(reason);
        }
        self.hash.update(bytes);
        self.progress.advance(self.done_bytes);
        Ok(())
    }

    pub fn done_bytes(&self) -> u64 {
        self.done_bytes
    }

    /// What the manifest says.
    pub fn stated_bytes(&self) -> u64 {
        self.manifest.size_bytes
    }

    pub fn take_local_error(&mut self) -> Option<RegistryError> {
        self.local_error.take()
    }

    /// Checks size and sha256; the outer error is the disk's, the inner one the source's.
    pub fn finish(self, path: &Path) -> Result<Result<(), String>, RegistryError> {
        if self.done_bytes != self.manifest.size_bytes {
            let expected = self.manifest.size_bytes;
            return Ok(Err(format!("{} bytes came, {expected} were stated", self.done_bytes)));
        }
        let sha256 = hex(&self.hash.finalize());
        if sha256 != self.manifest.sha256 {
            let expected = &self.manifest.sha256;
            return Ok(Err(format!("sha256 is {sha256}, the manifest states {expected}")));
        }
        self.file.as_file().sync_all().map_err(|e| RegistryError::io(path, e))?;
        self.file.persist(path).map_err(|e| RegistryError::io(path, e.error))?;
        Ok(Ok(()))
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

//! A weight file mapped into memory, read only.

use std::{fs::File, io, ops::Deref, path::Path};

use memmap2::{Advice, Mmap};

/// The bytes of one weight file. Pages are read when they are touched.
#[derive(Debug)]
pub struct MappedFile(Mmap);

impl MappedFile {
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: the map is read only and lives in `self`. Another process that truncates the
        // file while it is mapped can end this process; weight files are not edited in place.
        let map = unsafe { Mmap::map(&file)? };
        Ok(Self(map))
    }

    /// Asks for all of its pages, so that the disk is read while others are copied. That a system does
    /// not take the advice costs time alone.
    pub fn read_ahead(&self) {
        let _ = self.0.advise(Advice::WillNeed);
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

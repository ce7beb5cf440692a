//! A read-only memory map, so that a model costs page cache instead of memory of our own.
#![expect(unsafe_code, reason = "mapping a file is unsafe by definition; this is the only place")]

use std::fs::File;
use std::ops::Deref;
use std::path::Path;

use crate::error::{Error, Result};

/// The bytes of a whole file.
#[derive(Debug)]
pub(crate) struct Mapped(memmap2::Mmap);

impl Mapped {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        // A directory or a pipe cannot be mapped; say so before the system says something less clear.
        if !file.metadata().map_err(Error::io(path))?.is_file() {
            return Err(Error::Argument(format!(
                "{} is not a regular file; expected a .gguf file",
                path.display()
            )));
        }
        // SAFETY: the map is read-only and private to this value. Rust's rule that nobody else writes
        // to the file cannot be enforced; as with every user of memory maps, changing a model file
        // while it is in use is not supported (models in our cache are only ever renamed into place).
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(Error::io(path))?;
        Ok(Self(map))
    }
}

impl Deref for Mapped {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

//! Safetensors files, read with bounded reads and written as a stream.
//!
//! Reads rather than maps: a tensor's data need not be aligned for its type in the file, and a
//! file that shrinks under a map kills the process. Each tensor is read straight into a vector of
//! its own type, and nothing is allocated that the file's size does not vouch for.

use crate::error::{Error, Result};
use crate::output::write_atomically;
use bytemuck::Pod;
use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// The format's own limit on the header.
const MAX_HEADER: u64 = 100_000_000;

/// An element type as it is stored.
pub(crate) trait Stored: Pod {
    /// Its name in the file.
    const DTYPE: Dtype;
}

macro_rules! stored {
    ($($t:ty => $dtype:ident),*) => { $(impl Stored for $t { const DTYPE: Dtype = Dtype::$dtype; })* };
}
stored!(f64 => F64, f32 => F32, f16 => F16, bf16 => BF16, i64 => I64, i32 => I32, u8 => U8);

/// A tensor in memory, row-major.
#[derive(Debug, Clone)]
pub(crate) struct Tensor<T> {
    pub(crate) data: Vec<T>,
    pub(crate) shape: Vec<usize>,
}

/// An open file whose header has been checked.
#[derive(Debug)]
pub(crate) struct Reader {
    path: PathBuf,
    file: File,
    metadata: Metadata,
    data_start: u64,
}

impl Reader {
    /// Opens a file and checks its header against its size.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let broken = |what: String| {
            Error::input(format!(
                "{} is not a valid safetensors file: {what}; write it again",
                path.display()
            ))
        };
        let cannot =
            |e: std::io::Error| Error::input(format!("cannot read {}: {e}", path.display()));
        // Not opened before it is known to be a file: opening a pipe waits for a writer.
        let meta = std::fs::metadata(path).map_err(cannot)?;
        if !meta.is_file() {
            return Err(Error::input(format!(
                "{} is not a regular file, expected a safetensors file",
                path.display()
            )));
        }
        let mut file = File::open(path).map_err(cannot)?;
        let len = meta.len();
        let mut prefix = [0; 8];
        if len < 8 {
            return Err(broken(format!("it has {len} bytes, expected at least 8")));
        }
        file.read_exact(&mut prefix).map_err(cannot)?;
        let header_len = u64::from_le_bytes(prefix);
        if header_len > MAX_HEADER || header_len > len - 8 {
            return Err(broken(format!(
                "the header claims {header_len} bytes, but the file has {len} (and a header at most {MAX_HEADER})"
            )));
        }
        let mut header = vec![0; header_len as usize];
        file.read_exact(&mut header).map_err(cannot)?;
        let metadata: Metadata =
            serde_json::from_slice(&header).map_err(|e| broken(format!("header: {e}")))?;
        let data_start = 8 + header_len;
        let expected = (metadata.data_len() as u64).checked_add(data_start);
        if expected != Some(len) {
            return Err(broken(format!(
                "the tensors end at byte {}, but the file has {len}",
                expected.map_or_else(|| "∞".into(), |e| e.to_string())
            )));
        }
        Ok(Self { path: path.to_owned(), file, metadata, data_start })
    }

    /// What the header says of a tensor.
    pub(crate) fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.metadata.info(name)
    }

    /// What the header says of a tensor that must be there.
    pub(crate) fn require(&self, name: &str) -> Result<&TensorInfo> {
        self.info(name).ok_or_else(|| {
            let mut names = self.metadata.offset_keys();
            names.truncate(8);
            let found = if names.is_empty() { "no tensors".into() } else { names.join(", ") };
            Error::input(format!(
                "{} has no tensor '{name}' (found {found}); expected q, k and v",
                self.path.display()
            ))
        })
    }

    /// Reads a tensor whose dtype is `T`'s.
    pub(crate) fn read<T: Stored>(&mut self, name: &str) -> Result<Tensor<T>> {
        let info = self.require(name)?;
        if info.dtype != T::DTYPE {
            return Err(Error::input(format!(
                "tensor '{name}' is {:?}, expected {:?}",
                info.dtype,
                T::DTYPE
            )));
        }
        let shape = info.shape.clone();
        let start = self.data_start + info.data_offsets.0 as u64;
        // Checked against the dtype and the shape when the header was parsed.
        let bytes = info.data_offsets.1 - info.data_offsets.0;
        let mut data = vec![T::zeroed(); bytes / size_of::<T>()];
        let target: &mut [u8] = bytemuck::cast_slice_mut(&mut data);
        self.file.seek(SeekFrom::Start(start)).and_then(|_| self.file.read_exact(target)).map_err(
            |e| Error::input(format!("cannot read '{name}' of {}: {e}", self.path.display())),
        )?;
        Ok(Tensor { data, shape })
    }

    /// Reads a tensor of bytes: u8 or bool.
    pub(crate) fn read_bytes(&mut self, name: &str) -> Result<Tensor<u8>> {
        let info = self.require(name)?;
        if !matches!(info.dtype, Dtype::U8 | Dtype::BOOL) {
            return Err(Error::input(format!(
                "tensor '{name}' is {:?}, expected U8 or BOOL (nonzero: may be attended)",
                info.dtype
            )));
        }
        let (shape, offsets) = (info.shape.clone(), info.data_offsets);
        let mut data = vec![0; offsets.1 - offsets.0];
        self.file
            .seek(SeekFrom::Start(self.data_start + offsets.0 as u64))
            .and_then(|_| self.file.read_exact(&mut data))
            .map_err(|e| {
                Error::input(format!("cannot read '{name}' of {}: {e}", self.path.display()))
            })?;
        Ok(Tensor { data, shape })
    }
}

/// A tensor to be written.
#[derive(Debug)]
pub(crate) struct Entry<'a> {
    name: &'static str,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: &'a [u8],
}

impl<'a> Entry<'a> {
    /// `data` in row-major order.
    pub(crate) fn new<T: Stored>(name: &'static str, data: &'a [T], shape: Vec<usize>) -> Self {
        Self { name, dtype: T::DTYPE, shape, bytes: bytemuck::cast_slice(data) }
    }
}

/// Writes a file that appears whole or not at all.
pub(crate) fn write(path: &Path, mut entries: Vec<Entry<'_>>) -> Result<()> {
    // Widest types first: with the header padded to 8 bytes every tensor is aligned.
    entries.sort_by_key(|e| std::cmp::Reverse(e.dtype));
    let mut end = 0;
    let infos = entries
        .iter()
        .map(|e| {
            let start = end;
            end += e.bytes.len();
            let info =
                TensorInfo { dtype: e.dtype, shape: e.shape.clone(), data_offsets: (start, end) };
            (e.name.to_owned(), info)
        })
        .collect();
    let header = Metadata::new(None, infos)
        .map_err(|e| e.to_string())
        .and_then(|m| serde_json::to_vec(&m).map_err(|e| e.to_string()))
        .map_err(|e| Error::failed(format!("cannot write {}: {e}", path.display())))?;
    let mut header = header;
    header.resize(header.len().next_multiple_of(8), b' ');
    write_atomically(path, |w| {
        w.write_all(&(header.len() as u64).to_le_bytes())?;
        w.write_all(&header)?;
        entries.iter().try_for_each(|e| w.write_all(e.bytes))
    })
}

//! A GGUF header reader that trusts nothing.
//!
//! The file is seen as one byte slice (usually a memory map). Every count in it is checked against
//! the bytes that are left *before* anything is allocated for it, so a hostile header costs at most
//! a small multiple of [`MAX_HEADER`]; every tensor is checked to lie inside the slice, so later code
//! may slice without looking again.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::error::{Error, Result};
use crate::quant::Format;

/// Largest header read, in bytes. A vocabulary of 262,144 tokens needs about 8 MiB.
pub const MAX_HEADER: usize = 64 << 20;

/// One metadata value. Integers of all widths become `Int`, floats `Float`.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Value {
    /// Any integer; a `u64` above `i64::MAX` is refused.
    Int(i64),
    /// `f32` or `f64`.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// UTF-8 text.
    Text(String),
    /// An array of integers or truth values.
    Ints(Vec<i64>),
    /// An array of floats.
    Floats(Vec<f64>),
    /// An array of texts.
    Texts(Vec<String>),
}

/// Where one tensor lies and how it is stored.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    /// Columns (the contiguous dimension).
    pub cols: usize,
    /// Product of all the other dimensions.
    pub rows: usize,
    /// Storage format.
    pub format: Format,
    /// Its bytes within the file.
    pub bytes: Range<usize>,
}

/// Metadata and tensor directory of a GGUF file.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// Metadata by key.
    pub metadata: BTreeMap<String, Value>,
    /// Tensors by name.
    pub tensors: BTreeMap<String, TensorInfo>,
}

impl Header {
    /// Reads and checks the header of the GGUF file `file` (the whole file's bytes).
    pub fn read(file: &[u8]) -> Result<Self> {
        let mut cur = Cursor { rest: &file[..file.len().min(MAX_HEADER)], len: file.len() };
        if cur.take(4)? != b"GGUF" {
            return Err(Error::gguf("it does not begin with the letters GGUF"));
        }
        let version = cur.u32()?;
        if !(2..=3).contains(&version) {
            return Err(Error::gguf(format!("version {version}")));
        }
        let num_tensors = cur.u64()?;
        let num_values = cur.u64()?;
        // The smallest entries: a tensor is 8+4+4+8 bytes and at least one dimension, a value 8+4+1.
        let tensor_bytes = num_tensors.checked_mul(32);
        let value_bytes = num_values.checked_mul(13);
        match tensor_bytes.zip(value_bytes).and_then(|(a, b)| a.checked_add(b)) {
            Some(least) if least <= cur.rest.len() as u64 => {}
            _ => {
                return Err(Error::gguf(format!(
                    "it declares {num_tensors} tensors and {num_values} values, more than its {} bytes hold",
                    file.len()
                )));
            }
        }

        let mut metadata = BTreeMap::new();
        for _ in 0..num_values {
            let key = cur.text()?;
            let kind = cur.u32()?;
            let value = cur.value(kind, &key)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(Error::gguf(format!("metadata key {key:?} occurs twice")));
            }
        }
        let mut entries = Vec::new();
        for _ in 0..num_tensors {
            entries.push(cur.tensor()?);
        }
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(Value::Int(a)) if (1..=1 << 20).contains(a) && (*a as u64).is_power_of_two() => {
                *a as usize
            }
            Some(other) => return Err(Error::gguf(format!("general.alignment is {other:?}"))),
        };
        let header_len = file.len().min(MAX_HEADER) - cur.rest.len();
        let data_start = header_len.next_multiple_of(alignment);

        let mut tensors = BTreeMap::new();
        for (name, cols, rows, format, offset) in entries {
            let outside = || {
                Error::gguf(format!(
                    "tensor {name:?} does not lie inside the file's {} bytes",
                    file.len()
                ))
            };
            let row_bytes = format.row_bytes(cols).ok_or_else(|| {
                Error::gguf(format!(
                    "tensor {name:?} has rows of {cols}, not a multiple of its block"
                ))
            })?;
            let start = data_start.checked_add(offset).ok_or_else(outside)?;
            let end = row_bytes
                .checked_mul(rows)
                .and_then(|n| start.checked_add(n))
                .ok_or_else(outside)?;
            if end > file.len() {
                return Err(outside());
            }
            let info = TensorInfo { cols, rows, format, bytes: start..end };
            if tensors.insert(name.clone(), info).is_some() {
                return Err(Error::gguf(format!("tensor {name:?} occurs twice")));
            }
        }
        Ok(Self { metadata, tensors })
    }

    /// A text value, if present.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.metadata.get(key) {
            Some(Value::Text(t)) => Some(t),
            _ => None,
        }
    }

    /// A non-negative integer value, if present.
    pub fn int(&self, key: &str) -> Option<usize> {
        match self.metadata.get(key) {
            Some(Value::Int(i)) => usize::try_from(*i).ok(),
            _ => None,
        }
    }

    /// A float value, if present.
    pub fn float(&self, key: &str) -> Option<f64> {
        match self.metadata.get(key) {
            Some(Value::Float(f)) => Some(*f),
            _ => None,
        }
    }

    /// A truth value, if present.
    pub fn bool(&self, key: &str) -> Option<bool> {
        match self.metadata.get(key) {
            Some(Value::Bool(b)) => Some(*b),
            _ => None,
        }
    }
}

/// What is left of the header, and the whole file's length for messages.
struct Cursor<'a> {
    rest: &'a [u8],
    len: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let Some((head, tail)) = self.rest.split_at_checked(n) else {
            return Err(Error::gguf(format!(
                "its header runs past its end or past {MAX_HEADER} bytes ({} bytes)",
                self.len
            )));
        };
        self.rest = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn size(&mut self) -> Result<usize> {
        let n = self.u64()?;
        usize::try_from(n).map_err(|_| Error::gguf(format!("a size of {n}")))
    }

    fn text(&mut self) -> Result<String> {
        let n = self.size()?;
        let bytes = self.take(n)?;
        // Byte-level vocabularies are valid UTF-8; some files carry broken descriptions, which are harmless.
        Ok(String::from_utf8_lossy(bytes).into_owned())
    }

    fn int(&mut self, kind: u32) -> Result<i64> {
        Ok(match kind {
            0 => i64::from(u8::from_le_bytes(self.array()?)),
            1 => i64::from(i8::from_le_bytes(self.array()?)),
            2 => i64::from(u16::from_le_bytes(self.array()?)),
            3 => i64::from(i16::from_le_bytes(self.array()?)),
            4 => i64::from(self.u32()?),
            5 => i64::from(i32::from_le_bytes(self.array()?)),
            7 => i64::from(self.array::<1>()?[0] != 0),
            10 => {
                let n = self.u64()?;
                i64::try_from(n).map_err(|_| Error::gguf(format!("an integer of {n}")))?
            }
            _ => i64::from_le_bytes(self.array()?),
        })
    }

    fn float(&mut self, kind: u32) -> Result<f64> {
        Ok(if kind == 6 {
            f64::from(f32::from_le_bytes(self.array()?))
        } else {
            f64::from_le_bytes(self.array()?)
        })
    }

    fn value(&mut self, kind: u32, key: &str) -> Result<Value> {
        Ok(match kind {
            0..=5 | 10 | 11 => Value::Int(self.int(kind)?),
            6 | 12 => Value::Float(self.float(kind)?),
            7 => Value::Bool(self.int(kind)? != 0),
            8 => Value::Text(self.text()?),
            9 => {
                let kind = self.u32()?;
                let count = self.size()?;
                let least = match kind {
                    0 | 1 | 7 => 1,
                    2 | 3 => 2,
                    4..=6 => 4,
                    8 | 10..=12 => 8,
                    _ => return Err(Error::gguf(format!("{key:?} is an array of type {kind}"))),
                };
                if count.checked_mul(least).is_none_or(|n| n > self.rest.len()) {
                    return Err(Error::gguf(format!(
                        "{key:?} declares {count} elements, more than the file holds"
                    )));
                }
                match kind {
                    8 => Value::Texts((0..count).map(|_| self.text()).collect::<Result<_>>()?),
                    6 | 12 => {
                        Value::Floats((0..count).map(|_| self.float(kind)).collect::<Result<_>>()?)
                    }
                    _ => Value::Ints((0..count).map(|_| self.int(kind)).collect::<Result<_>>()?),
                }
            }
            _ => return Err(Error::gguf(format!("{key:?} has type {kind}"))),
        })
    }

    /// Name, columns, rows, format, offset.
    fn tensor(&mut self) -> Result<(String, usize, usize, Format, usize)> {
        let name = self.text()?;
        let num_dims = self.u32()?;
        if !(1..=4).contains(&num_dims) {
            return Err(Error::gguf(format!("tensor {name:?} has {num_dims} dimensions")));
        }
        let cols = self.size()?;
        let mut rows = 1usize;
        for _ in 1..num_dims {
            rows = rows
                .checked_mul(self.size()?)
                .ok_or_else(|| Error::gguf(format!("tensor {name:?} is larger than memory")))?;
        }
        let kind = self.u32()?;
        let format = Format::from_ggml(kind).ok_or_else(|| Error::Unsupported {
            what: format!("ggml type {kind} of tensor {name:?}"),
            expected: "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K or Q6_K",
        })?;
        let offset = self.size()?;
        Ok((name, cols, rows, format, offset))
    }
}

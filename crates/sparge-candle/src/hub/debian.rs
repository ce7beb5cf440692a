//! The text of a novel out of the Debian package that carries it as R data.
//!
//! ```text
//! .deb (ar) → data.tar.xz → …/Rdata.rdb = blocks of (length, zlib) → R serialisation of a character vector
//! ```
//! Every step has a limit: the input was verified, but a decompressor deserves no more trust than needed.

use std::io::{Read, Write};

use crate::error::{Error, Result};

/// Limit of the package's and of the novel's unpacked bytes.
const MAX_UNPACKED: usize = 64 << 20;

fn broken(step: &str, e: impl std::fmt::Display) -> Error {
    Error::Fetch {
        what: "the novel Emma".into(),
        reason: format!("its package cannot be read ({step}: {e})"),
        advice: "Use a text file of your own".into(),
    }
}

/// The text of *Emma*: the first block of the package's data, lines joined by line feeds.
pub(super) fn emma(deb: &[u8]) -> Result<Vec<u8>> {
    let tar_xz = ar_member(deb, "data.tar.xz").ok_or_else(|| broken("ar", "no data.tar.xz"))?;
    let mut tar = Limited(Vec::new());
    lzma_rs::xz_decompress(&mut &tar_xz[..], &mut tar)
        .map_err(|e| broken("xz", format!("{e:?}")))?;
    let mut archive = tar::Archive::new(&tar.0[..]);
    for entry in archive.entries().map_err(|e| broken("tar", e))? {
        let mut entry = entry.map_err(|e| broken("tar", e))?;
        if entry.path_bytes().ends_with(b"janeaustenr/data/Rdata.rdb") {
            let mut data = Vec::new();
            entry.read_to_end(&mut data).map_err(|e| broken("tar", e))?;
            // Four bytes of length, then the first of the novels: E for Emma.
            let zlib = data.get(4..).ok_or_else(|| broken("R data", "it is empty"))?;
            let mut block = Vec::new();
            let mut reader = flate2::read::ZlibDecoder::new(zlib).take(MAX_UNPACKED as u64);
            reader.read_to_end(&mut block).map_err(|e| broken("zlib", e))?;
            return strings(&block).ok_or_else(|| broken("R data", "it is no character vector"));
        }
    }
    Err(broken("tar", "no Rdata.rdb"))
}

/// A buffer that refuses to grow without end.
struct Limited(Vec<u8>);

impl Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_UNPACKED {
            return Err(std::io::Error::other("more than 64 MiB"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A member of an ar archive: after `!<arch>\n`, 60-byte headers (name 16, …, size 10 at 48), data
/// padded to even lengths.
fn ar_member<'a>(archive: &'a [u8], name: &str) -> Option<&'a [u8]> {
    let mut rest = archive.strip_prefix(b"!<arch>\n")?;
    loop {
        let (header, data) = rest.split_at_checked(60)?;
        let field = |range: std::ops::Range<usize>| {
            std::str::from_utf8(&header[range]).ok().map(str::trim_end)
        };
        let size: usize = field(48..58)?.parse().ok()?;
        if field(0..16)?.trim_end_matches('/') == name {
            return data.get(..size);
        }
        rest = data.get(size.checked_next_multiple_of(2)?..)?;
    }
}

/// The strings of an R character vector in serialisation version 3 (XDR), joined by line feeds.
fn strings(block: &[u8]) -> Option<Vec<u8>> {
    let mut rest = block.strip_prefix(b"X\n")?;
    let mut take = |n: usize| -> Option<&[u8]> {
        let (head, tail) = rest.split_at_checked(n)?;
        rest = tail;
        Some(head)
    };
    fn int(bytes: &[u8]) -> Option<usize> {
        Some(u32::from_be_bytes(bytes.try_into().ok()?) as usize)
    }
    // Version, writer, minimal reader; then the name of the encoding.
    take(12)?;
    let encoding = int(take(4)?)?;
    take(encoding)?;
    // 16 is R's type number of character vectors; the upper bits are flags.
    if int(take(4)?)? & 0xff != 16 {
        return None;
    }
    let count = int(take(4)?)?;
    let mut text = Vec::new();
    for i in 0..count {
        take(4)?;
        let len = int(take(4)?)?;
        if i > 0 {
            text.push(b'\n');
        }
        text.extend_from_slice(take(len)?);
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broken_packages_are_errors() {
        for bytes in [&b""[..], b"!<arch>\n", b"!<arch>\nshort", &[b'x'; 200]] {
            assert!(emma(bytes).is_err());
        }
        let mut member =
            b"!<arch>\ndata.tar.xz     0           0     0     100644  99999999  `\n".to_vec();
        member.extend_from_slice(b"tiny");
        assert!(emma(&member).is_err());
    }

    #[test]
    fn a_character_vector() {
        let mut block =
            b"X\n\0\0\0\x03\0\0\0\0\0\0\0\0\0\0\0\x05UTF-8\0\0\0\x10\0\0\0\x02".to_vec();
        block.extend_from_slice(b"\0\x04\0\x09\0\0\0\x02Hi\0\x04\0\x09\0\0\0\0");
        assert_eq!(strings(&block).unwrap(), b"Hi\n");
        assert!(strings(&block[..block.len() - 1]).is_none());
    }
}

//! Compiled kernels on disk, keyed by everything that went into them: the cache that a process fills
//! as it compiles, and packs made ahead of time.

use super::{Compiled, Compiler};
use crate::error::{Error, Result};
use crate::spec::{HEADERS, KernelSpec};
use std::io::Write;
use std::path::{Path, PathBuf};

impl Compiler {
    /// [`Compiler::compile`] through `cache_dir`, whose trouble is never an error: a kernel that
    /// cannot be stored is compiled again next time.
    ///
    /// # Errors
    /// As [`Compiler::compile`].
    pub fn compile_cached(
        &self,
        spec: &KernelSpec,
        arch: &str,
        cache_dir: Option<&Path>,
    ) -> Result<Compiled> {
        let Some(dir) = cache_dir else { return self.compile(spec, arch) };
        let (major, minor) = self.version();
        let file = path(dir, spec, arch, &[major, minor]);
        if let Some(found) = read(&file) {
            return Ok(found);
        }
        let compiled = self.compile(spec, arch)?;
        // A failure to store is dropped here on purpose.
        let _ = store(dir, &file, &encode(&compiled));
        Ok(compiled)
    }

    /// Compiles a kernel into a pack: a directory that [`crate::Environment::pack_dir`] may name on
    /// a machine without NVRTC.
    ///
    /// # Errors
    /// As [`Compiler::compile`], and [`Error::Pack`] where it cannot be written.
    pub fn pack(&self, spec: &KernelSpec, arch: &str, dir: &Path) -> Result<()> {
        let file = path(dir, spec, arch, &[]);
        store(dir, &file, &encode(&self.compile(spec, arch)?))
            .map_err(|e| Error::Pack { file: file.display().to_string(), message: e.to_string() })
    }
}

/// A kernel from a pack, where it is there and from these very sources. Whichever compiler made it.
pub(crate) fn packed(dir: &Path, spec: &KernelSpec, arch: &str) -> Option<Compiled> {
    read(&path(dir, spec, arch, &[]))
}

fn read(file: &Path) -> Option<Compiled> {
    std::fs::read(file).ok().and_then(|bytes| decode(&bytes))
}

/// Named by sources, name, flags, architecture and, where given, the compiler.
fn path(dir: &Path, spec: &KernelSpec, arch: &str, compiler: &[i32]) -> PathBuf {
    let mut hash = blake3::Hasher::new();
    let mut field = |bytes: &[u8]| {
        hash.update(&(bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    for source in HEADERS.iter().chain([&spec.source()]) {
        field(source.name.as_bytes());
        field(source.text.as_bytes());
    }
    field(spec.name().as_bytes());
    for option in Compiler::options(arch) {
        field(option.as_bytes());
    }
    for number in compiler {
        field(&number.to_le_bytes());
    }
    dir.join(format!("{}.cubin", hash.finalize().to_hex()))
}

/// Writes beside the target, then renames: a reader sees all of it or nothing.
fn store(dir: &Path, file: &Path, bytes: &[u8]) -> std::io::Result<()> {
    std::fs::create_dir_all(dir)?;
    let thread = std::thread::current().id();
    let temporary = file.with_extension(format!("{}.{thread:?}.tmp", std::process::id()));
    std::fs::File::create(&temporary)?.write_all(bytes)?;
    std::fs::rename(&temporary, file)
}

/// Hash of the rest, length of the entry point's name, the name, the cubin.
fn encode(compiled: &Compiled) -> Vec<u8> {
    let mut body = (compiled.entry.len() as u64).to_le_bytes().to_vec();
    body.extend_from_slice(compiled.entry.as_bytes());
    body.extend_from_slice(&compiled.cubin);
    let mut bytes = blake3::hash(&body).as_bytes().to_vec();
    bytes.append(&mut body);
    bytes
}

fn decode(bytes: &[u8]) -> Option<Compiled> {
    let (hash, body) = bytes.split_at_checked(blake3::OUT_LEN)?;
    if blake3::hash(body).as_bytes() != hash {
        return None;
    }
    let (len, rest) = body.split_first_chunk::<8>()?;
    let (entry, cubin) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
    Some(Compiled {
        entry: String::from_utf8(entry.to_vec()).ok()?,
        cubin: cubin.to_vec(),
        log: String::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_survive_and_damage_is_noticed() {
        let compiled =
            Compiled { entry: "kernel".into(), cubin: vec![1, 2, 3], log: String::new() };
        let mut bytes = encode(&compiled);
        assert_eq!(decode(&bytes), Some(compiled));
        assert_eq!(decode(&bytes[..bytes.len() - 1]), None);
        bytes[40] ^= 1;
        assert_eq!(decode(&bytes), None);
        assert_eq!(decode(b""), None);
    }
}

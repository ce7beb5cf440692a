//! Files that appear whole or not at all.
//!
//! A file is written under a temporary name in its own directory and renamed when complete. The
//! temporary is removed on errors (by its guard) and on SIGINT and SIGTERM (by the handler, which
//! knows the names of those that exist).

use crate::error::{Error, Result};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Names of the temporaries that may exist right now.
static TEMPORARIES: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

fn temporaries() -> MutexGuard<'static, Vec<PathBuf>> {
    TEMPORARIES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes unfinished files when the process is interrupted, then exits with 130.
pub(crate) fn remove_temporaries_on_signals() -> Result<()> {
    ctrlc::set_handler(|| {
        // Held until the end: no new temporary can be created while the process goes.
        let names = temporaries();
        for name in names.iter() {
            let _ = std::fs::remove_file(name);
        }
        std::process::exit(130);
    })
    .map_err(|e| Error::failed(format!("cannot install the interrupt handler: {e}")))
}

/// Writes `path` through `write`, which gets a buffered writer to a temporary.
pub(crate) fn write_atomically(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<()> {
    let mut registered = None;
    let result = write_and_rename(path, write, &mut registered);
    if let Some(name) = registered {
        temporaries().retain(|other| *other != name);
    }
    result.map_err(|e| Error::failed(format!("cannot write {}: {e}", path.display())))
}

fn write_and_rename(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    registered: &mut Option<PathBuf>,
) -> io::Result<()> {
    if path.is_dir() {
        return Err(io::Error::new(io::ErrorKind::IsADirectory, "it is a directory"));
    }
    let directory = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    // Created with the user's umask, unlike tempfile's default of 0600.
    let temporary =
        tempfile::Builder::new().prefix(".sparge-").suffix(".part").make_in(directory, |name| {
            let mut names = temporaries();
            let file = File::create_new(name)?;
            names.push(name.to_owned());
            *registered = Some(name.to_owned());
            Ok(file)
        })?;
    let mut writer = BufWriter::with_capacity(1 << 20, temporary.as_file());
    write(&mut writer)?;
    writer.flush()?;
    drop(writer);
    temporary.persist(path).map_err(|e| e.error)?;
    Ok(())
}

/// Refuses an output path that cannot work before anything is computed.
pub(crate) fn check_writable(path: &Path) -> Result<()> {
    let parent = path.parent().filter(|p| *p != Path::new("")).unwrap_or(Path::new("."));
    if path.is_dir() {
        return Err(Error::input(format!(
            "the output {} is a directory, expected a file name",
            path.display()
        )));
    }
    if !parent.is_dir() {
        return Err(Error::input(format!(
            "the output's directory {} does not exist; create it first",
            parent.display()
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("out");
        write_atomically(&path, |w| w.write_all(b"old")).expect("written");
        let failed = write_atomically(&path, |w| {
            w.write_all(b"new")?;
            Err(io::Error::other("disk full"))
        });
        assert!(failed.is_err());
        assert_eq!(std::fs::read(&path).expect("still there"), b"old");
        assert_eq!(std::fs::read_dir(directory.path()).expect("readable").count(), 1);
        assert!(temporaries().is_empty());
    }
}

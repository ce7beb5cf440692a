//! What can go wrong between a file name and a generated token.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Each message says what was wrong, what was expected and, where there is something to do, what.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    // === Files ===
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The bytes are no well-formed GGUF file.
    #[error("broken GGUF file: {0}; expected GGUF version 2 or 3, complete. Fetch the file again")]
    Gguf(String),
    /// A well-formed file that needs something that is not implemented.
    #[error("{what} is not supported; expected {expected}")]
    Unsupported {
        /// What the file asks for.
        what: String,
        /// What is implemented.
        expected: &'static str,
    },

    // === Calls ===
    /// A caller's argument does not fit the model.
    #[error("{0}")]
    Argument(String),
    /// More tokens than the key/value cache was made for.
    #[error("{needed} tokens do not fit a cache of {capacity}; make the cache larger")]
    CacheFull {
        /// Tokens that would be in the cache.
        needed: usize,
        /// Tokens the cache holds.
        capacity: usize,
    },
    /// The attention implementation failed.
    #[error("attention in layer {layer}: {source}")]
    Attention {
        /// The layer, from 0.
        layer: usize,
        /// The implementation's reason.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A progress callback asked to stop.
    #[error("stopped on request")]
    Stopped,

    // === Text ===
    /// The tokenizer or the chat template failed.
    #[error("tokenizer: {0}")]
    Tokenizer(String),

    // === Fetching ===
    /// Nothing in the cache, and the download did not work.
    #[error("cannot fetch {what}: {reason}. {advice}")]
    Fetch {
        /// The model or text.
        what: String,
        /// What happened.
        reason: String,
        /// What the user can do.
        advice: String,
    },
    /// A fetched file is not the pinned one.
    #[error(
        "{what} has sha256 {got}, expected {expected}; it was discarded. Try again, or use a local file"
    )]
    Checksum {
        /// The file.
        what: String,
        /// Its sha256.
        got: String,
        /// The pinned sha256.
        expected: String,
    },
}

impl Error {
    /// For `map_err`: attaches the file name.
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    pub(crate) fn gguf(reason: impl Into<String>) -> Self {
        Self::Gguf(reason.into())
    }
}

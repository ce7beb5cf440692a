//! Errors as the user sees them: one line, and which exit code it means.

use sparge_candle::Error as Model;

/// Why the command stops.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// Bad usage or bad input: exit code 2.
    #[error("{0}")]
    Input(String),
    /// Anything else: exit code 1.
    #[error("{0}")]
    Failed(String),
    /// The operator refused the call, which only its inputs can make it do: exit code 2.
    #[error(transparent)]
    Operator(#[from] sparge::Error),
    /// The language model's side refused or failed.
    #[error(transparent)]
    Model(#[from] sparge_candle::Error),
    /// Nobody reads stdout any more (`sparge … | head`): no message, exit code 0.
    #[error("stdout is closed")]
    StdoutClosed,
}

/// Shorthand for results of this crate.
pub(crate) type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Bad usage or bad input.
    pub(crate) fn input(message: impl Into<String>) -> Self {
        Self::Input(message.into())
    }

    /// A failure that is not the input's fault.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self::Failed(message.into())
    }

    /// The process's exit code.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Input(_) | Self::Operator(_) => 2,
            Self::Model(e) => match e {
                Model::Gguf(_)
                | Model::Unsupported { .. }
                | Model::Argument(_)
                | Model::CacheFull { .. }
                | Model::Tokenizer(_) => 2,
                _ => 1,
            },
            Self::Failed(_) => 1,
            Self::StdoutClosed => 0,
        }
    }
}

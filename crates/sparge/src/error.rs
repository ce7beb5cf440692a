//! The one error type of the crate: what was wrong, what was expected, what to do.

use crate::cpu::Isa;

/// Why a call was refused. Nothing is computed and nothing is written when one is returned.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A dimension is zero, or larger than the operator accepts.
    #[error("{name} is {got}, expected {expected}")]
    Dimension {
        /// Which dimension.
        name: &'static str,
        /// Its value.
        got: usize,
        /// The accepted range, in words.
        expected: &'static str,
    },
    /// Two tensors disagree about a dimension.
    #[error("{name} differs: {a} has {got_a}, {b} has {got_b}; they must be equal")]
    Mismatch {
        /// Which dimension.
        name: &'static str,
        /// The first tensor.
        a: &'static str,
        /// Its value there.
        got_a: usize,
        /// The second tensor.
        b: &'static str,
        /// Its value there.
        got_b: usize,
    },
    /// `num_qo_heads` is not a multiple of `num_kv_heads`.
    #[error(
        "num_qo_heads is {num_qo_heads} and num_kv_heads is {num_kv_heads}; grouped-query attention needs num_qo_heads to be a multiple of num_kv_heads"
    )]
    Groups {
        /// Query heads.
        num_qo_heads: usize,
        /// Key/value heads.
        num_kv_heads: usize,
    },
    /// A buffer is too short for the shape and strides given with it.
    #[error(
        "{tensor} holds {got} elements but its shape and strides reach element {needed}; pass the whole buffer or correct the strides"
    )]
    BufferTooShort {
        /// Which tensor.
        tensor: &'static str,
        /// Elements present.
        got: usize,
        /// Elements needed.
        needed: usize,
    },
    /// A shape's element count does not fit in memory addressing.
    #[error("{tensor}'s shape and strides overflow the address space; check the dimensions")]
    Overflow {
        /// Which tensor.
        tensor: &'static str,
    },
    /// A setting is out of its range or not a number.
    #[error("{name} is {got}, expected {expected}")]
    Setting {
        /// Which setting.
        name: &'static str,
        /// Its value.
        got: f64,
        /// The accepted range, in words.
        expected: &'static str,
    },
    /// A per-head setting has the wrong number of entries.
    #[error("{name} has {got} entries, expected one per query head ({num_qo_heads})")]
    PerHead {
        /// Which setting.
        name: &'static str,
        /// Entries given.
        got: usize,
        /// Query heads.
        num_qo_heads: usize,
    },
    /// `cu_seqlens` or key lengths that do not describe the tensors.
    #[error("{name}: {reason}")]
    Sequences {
        /// Which argument.
        name: &'static str,
        /// What is wrong with it and what would be right.
        reason: String,
    },
    /// A mask whose shape does not fit the call.
    #[error(
        "{name} has shape {got:?}, expected {expected:?} (a 1 in the first two dimensions broadcasts)"
    )]
    MaskShape {
        /// Which mask.
        name: &'static str,
        /// Its shape.
        got: [usize; 4],
        /// The shape that fits.
        expected: [usize; 4],
    },
    /// Two options that have no joint meaning.
    #[error("{a} cannot be combined with {b}: {remedy}")]
    Conflict {
        /// The first option.
        a: &'static str,
        /// The second option.
        b: &'static str,
        /// What to do instead.
        remedy: &'static str,
    },
    /// The instruction set asked for does not exist on this processor.
    #[error(
        "this processor has no {isa:?} ({needs}); leave `isa` unset to use the best one available"
    )]
    Isa {
        /// What was asked for.
        isa: Isa,
        /// The processor features it needs.
        needs: &'static str,
    },
    /// A calibration that cannot be used: a file of another format, version or model, or data that
    /// nothing can be learned from.
    #[error("calibration: {0}")]
    Calibration(String),
    /// A compressed mask that is not well formed.
    #[error("csr mask: {0}")]
    Csr(String),
    /// A text that names no policy, or a setting that it does not have.
    #[error(
        "'{0}' is no policy; expected dense, window:TOKENS[,sinks=N], random:SHARE[,seed=N], \
         minference:v=N,s=N, a-shape:init=N,local=N, block-sparse:N, \
         flexprefill:GAMMA[,tau=T,min=TOKENS], xattention:THRESHOLD[,stride=N] or oracle:SHARE"
    )]
    Policy(String),
    /// A text that names no order of tokens.
    #[error(
        "'{0}' is no order; expected row-major, column-major, time-major, hilbert, random or random:SEED"
    )]
    Order(String),
}

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

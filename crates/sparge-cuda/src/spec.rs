//! Every kernel variant there is.

use crate::attention::DType;

/// How Q and K are pooled for the selection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Pool {
    /// Nothing is predicted.
    None,
    /// 16×16 sub-blocks.
    SubBlock,
    /// Whole blocks.
    Block,
}

/// A kernel and its template arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KernelSpec {
    /// Mean of K, largest |V|.
    Statistics {
        /// Head dimension.
        dim: usize,
        /// Element type.
        dtype: DType,
    },
    /// int8 Q and K, e4m3 V, pooled Q and K.
    Quantize {
        /// Head dimension.
        dim: usize,
        /// Element type.
        dtype: DType,
        /// What is pooled.
        pool: Pool,
    },
    /// Stage 1.
    Select {
        /// Head dimension.
        dim: usize,
        /// What was pooled.
        pool: Pool,
        /// Pooled queries of one thread block: 16, 32 or 64.
        rows: usize,
    },
    /// Attention over kept blocks.
    Attend {
        /// Head dimension.
        dim: usize,
        /// Element type.
        dtype: DType,
    },
}

/// One `.cu` file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Source {
    pub(crate) name: &'static str,
    pub(crate) text: &'static str,
}

macro_rules! source {
    ($name:literal) => {
        Source { name: $name, text: include_str!(concat!("../kernels/", $name)) }
    };
}

/// What the sources include.
pub(crate) const HEADERS: [Source; 5] = [
    source!("sparge/types.cuh"),
    source!("sparge/tiles.cuh"),
    source!("sparge/ptx/math.cuh"),
    source!("sparge/ptx/mbarrier.cuh"),
    source!("sparge/ptx/wgmma.cuh"),
];

/// Head dimensions with kernels.
pub(crate) const DIMS: [usize; 2] = [64, 128];
/// Row counts of `select`, preferred first.
pub(crate) const SELECT_ROWS: [usize; 3] = [64, 32, 16];
const DTYPES: [DType; 2] = [DType::F16, DType::Bf16];

impl KernelSpec {
    /// Every variant.
    #[must_use]
    pub fn all() -> Vec<Self> {
        let mut specs = Vec::new();
        for dim in DIMS {
            for dtype in DTYPES {
                specs.push(Self::Statistics { dim, dtype });
                specs.extend(
                    [Pool::None, Pool::SubBlock, Pool::Block].map(|pool| Self::Quantize {
                        dim,
                        dtype,
                        pool,
                    }),
                );
                specs.push(Self::Attend { dim, dtype });
            }
            for pool in [Pool::SubBlock, Pool::Block] {
                specs.extend(SELECT_ROWS.map(|rows| Self::Select { dim, pool, rows }));
            }
        }
        specs
    }

    /// Architectures the kernels are compiled for.
    #[must_use]
    pub fn architectures() -> &'static [&'static str] {
        &["sm_90a"]
    }

    /// The kernel's C++ name.
    #[must_use]
    pub fn name(&self) -> String {
        match *self {
            Self::Statistics { dim, dtype } => {
                format!("sparge::statistics<{dim}, {}>", dtype.cuda_name())
            }
            Self::Quantize { dim, dtype, pool } => {
                format!("sparge::quantize<{dim}, {}, {}>", dtype.cuda_name(), pool as usize)
            }
            Self::Select { dim, pool, rows } => {
                let (q, kv) = pool.subs();
                let (tiles, groups) =
                    (if rows == 16 { 1 } else { 2 }, if rows == 64 { 2 } else { 1 });
                format!("sparge::select<{dim}, {q}, {kv}, {tiles}, {groups}>")
            }
            Self::Attend { dim, dtype } => {
                format!("sparge::attend_sm90<{dim}, {}, {STAGES}>", dtype.cuda_name())
            }
        }
    }

    pub(crate) fn source(&self) -> Source {
        match self {
            Self::Statistics { .. } | Self::Quantize { .. } => source!("prepare.cu"),
            Self::Select { .. } => source!("select.cu"),
            Self::Attend { .. } => source!("attend_sm90.cu"),
        }
    }

    /// Most dynamic shared memory the kernel may be launched with, in bytes.
    pub(crate) fn most_shared_bytes(&self) -> usize {
        match *self {
            Self::Statistics { .. } | Self::Quantize { .. } => 0,
            Self::Select { .. } => SELECT_SHARED_BYTES,
            // Tiles of q, k and v; the last kilobyte holds scales, tile records and barriers.
            Self::Attend { dim, .. } => 2 * 128 * dim + STAGES * 128 * (2 * dim + 8) + 1024,
        }
    }
}

/// What an H100 has for a thread block, less `select`'s own kilobyte.
const SELECT_SHARED_BYTES: usize = 226 << 10;
/// Tiles in flight.
const STAGES: usize = 4;

impl Pool {
    /// Pooled rows per query block and per key block.
    pub(crate) fn subs(self) -> (usize, usize) {
        match self {
            Self::None => (0, 0),
            Self::SubBlock => (8, 4),
            Self::Block => (1, 1),
        }
    }
}

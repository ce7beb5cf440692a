//! Every kernel variant there is.

use crate::dtype::DType;

/// A GPU architecture with kernels. Each runs on later minor versions of its major one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Arch {
    /// Compute capability 8.0 to 8.8 (A100, RTX 30).
    Sm80,
    /// 8.9 (L4, L40, RTX 40).
    Sm89,
    /// 9.0 (H100, H200), with the fast path.
    Sm90a,
    /// 10.0, 10.3 (B200, B300).
    Sm100,
    /// 12.0, 12.1 (RTX 50).
    Sm120,
}

impl Arch {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Sm80, Self::Sm89, Self::Sm90a, Self::Sm100, Self::Sm120];

    /// What NVRTC calls it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Sm80 => "sm_80",
            Self::Sm89 => "sm_89",
            Self::Sm90a => "sm_90a",
            Self::Sm100 => "sm_100",
            Self::Sm120 => "sm_120",
        }
    }

    /// The one that runs on a GPU of this compute capability.
    #[must_use]
    pub fn of(major: i32, minor: i32) -> Option<Self> {
        match (major, minor) {
            (8, 9) => Some(Self::Sm89),
            (8, _) => Some(Self::Sm80),
            (9, 0) => Some(Self::Sm90a),
            (10, _) => Some(Self::Sm100),
            (12, _) => Some(Self::Sm120),
            _ => None,
        }
    }
}

/// Arithmetic of the general attention kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mma {
    /// Both products in the element type.
    Half,
    /// Q·Kᵀ in int8, P·V in the element type.
    Int8,
    /// Q·Kᵀ in int8, P·V in e4m3.
    Int8Fp8,
}

impl Mma {
    /// Largest head dimension with quantised kernels: above, registers do not suffice.
    pub(crate) const MOST_QUANTIZED: usize = 128;
    const DIMS: [usize; 5] = [64, 96, 128, 192, 256];

    /// The kernel's head dimension for one of at most 256.
    pub(crate) fn padded(dim: usize) -> usize {
        Self::DIMS.into_iter().find(|&d| dim <= d).unwrap_or(256)
    }
}

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
    /// Pooled scores.
    Score {
        /// Head dimension.
        dim: usize,
        /// What was pooled.
        pool: Pool,
    },
    /// Stage 1, from them.
    Select {
        /// Head dimension.
        dim: usize,
        /// What was pooled.
        pool: Pool,
    },
    /// Attention over kept blocks.
    Attend {
        /// Head dimension.
        dim: usize,
        /// Element type.
        dtype: DType,
    },
    /// General path: tables into the workspace.
    Upload,
    /// An f32 tensor in bf16.
    Cast {
        /// 0: q, 1: k, 2: v.
        which: usize,
    },
    /// int8 Q and K.
    QuantizeRows {
        /// Element type.
        dtype: DType,
    },
    /// Largest |v| of each channel.
    LargestV {
        /// Element type.
        dtype: DType,
    },
    /// e4m3 V.
    QuantizeV {
        /// Element type.
        dtype: DType,
    },
    /// Pooled rows of Q and K.
    PoolRows {
        /// Element type.
        dtype: DType,
    },
    /// Sums of K over each block.
    Sums {
        /// Element type.
        dtype: DType,
        /// Without what is not finite.
        clean: bool,
    },
    /// Means of K.
    Centres {
        /// Per block (the judge's), or per sequence (int8's).
        per_block: bool,
    },
    /// The judge's cosines.
    Judge {
        /// Element type.
        dtype: DType,
    },
    /// What the element mask lets through.
    Reach,
    /// The element mask, pooled.
    PoolMask,
    /// Statistics.
    Count,
    /// A mask and the caller's block mask, for the fast path.
    Intersect,
    /// Log-sum-exps of sampled queries' scores, for either path's selection.
    Sample {
        /// Element type.
        dtype: DType,
        /// With an element mask.
        has_mask: bool,
    },
    /// Selection.
    Choose {
        /// Made for 16×16 pooling; else for any.
        sub_block: bool,
    },
    /// Attention over kept blocks.
    AttendMma {
        /// Head dimension of the kernel.
        dim: usize,
        /// Element type.
        dtype: DType,
        /// Arithmetic.
        mma: Mma,
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
pub(crate) const HEADERS: [Source; 14] = [
    source!("sparge/types.cuh"),
    source!("sparge/tiles.cuh"),
    source!("sparge/part.cuh"),
    source!("sparge/call.cuh"),
    source!("sparge/rows.cuh"),
    source!("sparge/walk.cuh"),
    source!("sparge/choice.cuh"),
    source!("sparge/samples.cuh"),
    source!("sparge/slabs.cuh"),
    source!("sparge/row.cuh"),
    source!("sparge/ptx/mma.cuh"),
    source!("sparge/ptx/math.cuh"),
    source!("sparge/ptx/mbarrier.cuh"),
    source!("sparge/ptx/wgmma.cuh"),
];

/// Head dimensions with kernels.
pub(crate) const DIMS: [usize; 2] = [64, 128];
const HALVES: [DType; 2] = [DType::F16, DType::Bf16];

impl KernelSpec {
    /// Every variant, with every architecture it is made for.
    #[must_use]
    pub fn all() -> Vec<(Arch, Self)> {
        let mut specs = Vec::new();
        for arch in Arch::ALL {
            let of_arch = if arch == Arch::Sm90a { Self::hopper() } else { Vec::new() };
            let all = of_arch.into_iter().chain(Self::preparation()).chain(Self::attention(arch));
            specs.extend(all.map(|spec| (arch, spec)));
        }
        // sm_80 has no e4m3.
        specs.retain(|&(arch, spec)| {
            arch != Arch::Sm80 || !matches!(spec, Self::QuantizeV { .. } | Self::LargestV { .. })
        });
        specs
    }

    /// The fast path.
    fn hopper() -> Vec<Self> {
        let mut specs = Vec::new();
        for dim in DIMS {
            for dtype in HALVES {
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
                specs.extend([Self::Score { dim, pool }, Self::Select { dim, pool }]);
            }
        }
        specs
    }

    /// The general path up to the attention kernel.
    fn preparation() -> Vec<Self> {
        let mut specs =
            vec![Self::Upload, Self::Reach, Self::PoolMask, Self::Count, Self::Intersect];
        specs.extend([false, true].map(|sub_block| Self::Choose { sub_block }));
        specs.extend([0, 1, 2].map(|which| Self::Cast { which }));
        specs.extend([false, true].map(|per_block| Self::Centres { per_block }));
        for dtype in [DType::F16, DType::Bf16, DType::F32] {
            specs.extend([
                Self::QuantizeRows { dtype },
                Self::LargestV { dtype },
                Self::QuantizeV { dtype },
                Self::PoolRows { dtype },
                Self::Judge { dtype },
            ]);
            specs.extend([false, true].map(|clean| Self::Sums { dtype, clean }));
            specs.extend([false, true].map(|has_mask| Self::Sample { dtype, has_mask }));
        }
        specs
    }

    /// The general path's attention kernels.
    fn attention(arch: Arch) -> Vec<Self> {
        let mut specs = Vec::new();
        for dim in Mma::DIMS {
            specs.extend(HALVES.map(|dtype| Self::AttendMma { dim, dtype, mma: Mma::Half }));
            if dim > Mma::MOST_QUANTIZED {
                continue;
            }
            if arch == Arch::Sm80 {
                specs.extend(HALVES.map(|dtype| Self::AttendMma { dim, dtype, mma: Mma::Int8 }));
            } else {
                let dtype = DType::Bf16;
                specs.push(Self::AttendMma { dim, dtype, mma: Mma::Int8Fp8 });
            }
        }
        specs
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
            Self::Score { dim, pool } => {
                let (q, kv) = pool.subs();
                format!("sparge::score<{dim}, {q}, {kv}>")
            }
            Self::Select { dim, pool } => format!("sparge::select<{dim}, {}>", pool.subs().0),
            Self::Attend { dim, dtype } => {
                format!("sparge::attend_sm90<{dim}, {}, {STAGES}>", dtype.cuda_name())
            }
            Self::Upload => "sparge::upload<0>".into(),
            Self::Cast { which } => format!("sparge::cast<{which}>"),
            Self::QuantizeRows { dtype } => {
                format!("sparge::quantize_rows<{}>", dtype.cuda_name())
            }
            Self::LargestV { dtype } => format!("sparge::largest_v<{}>", dtype.cuda_name()),
            Self::QuantizeV { dtype } => format!("sparge::quantize_v<{}>", dtype.cuda_name()),
            Self::PoolRows { dtype } => format!("sparge::pool<{}>", dtype.cuda_name()),
            Self::Sums { dtype, clean } => format!("sparge::sums<{}, {clean}>", dtype.cuda_name()),
            Self::Centres { per_block } => format!("sparge::centres<{per_block}>"),
            Self::Judge { dtype } => format!("sparge::judge<{}>", dtype.cuda_name()),
            Self::Reach => "sparge::reach<0>".into(),
            Self::PoolMask => "sparge::pool_mask<0>".into(),
            Self::Count => "sparge::count<0>".into(),
            Self::Intersect => "sparge::intersect<0>".into(),
            Self::Sample { dtype, has_mask } => {
                format!("sparge::sample<{}, {has_mask}>", dtype.cuda_name())
            }
            Self::Choose { sub_block: false } => "sparge::choose<0, 0>".into(),
            Self::Choose { sub_block: true } => "sparge::choose<16, 16>".into(),
            Self::AttendMma { dim, dtype, mma } => {
                let (int8, fp8) = (mma != Mma::Half, mma == Mma::Int8Fp8);
                format!("sparge::attend_mma<{dim}, {}, {int8}, {fp8}>", dtype.cuda_name())
            }
        }
    }

    pub(crate) fn source(&self) -> Source {
        match self {
            Self::Statistics { .. } | Self::Quantize { .. } => source!("prepare.cu"),
            Self::Score { .. } => source!("score.cu"),
            Self::Select { .. } => source!("select.cu"),
            Self::Attend { .. } => source!("attend_sm90.cu"),
            Self::Upload
            | Self::Cast { .. }
            | Self::QuantizeRows { .. }
            | Self::LargestV { .. }
            | Self::QuantizeV { .. } => source!("convert.cu"),
            Self::PoolRows { .. }
            | Self::Sums { .. }
            | Self::Centres { .. }
            | Self::Judge { .. }
            | Self::Reach
            | Self::PoolMask
            | Self::Count
            | Self::Intersect => source!("pool.cu"),
            Self::Sample { .. } => source!("sample.cu"),
            Self::Choose { .. } => source!("choose.cu"),
            Self::AttendMma { .. } => source!("attend_mma.cu"),
        }
    }

    /// Most dynamic shared memory the kernel may be launched with, in bytes.
    pub(crate) fn most_shared_bytes(&self) -> usize {
        match *self {
            // 32 pooled queries of two 256-wide features and padding.
            Self::Choose { .. } => 32 * (512 + 16) * 4,
            Self::Sample { dtype, .. } => Self::sample_shared_bytes(256, dtype),
            // High and low part, in bf16.
            Self::Score { dim, .. } => Self::slab_bytes(4 * dim, 2),
            // Tiles of q, k and v, key scales, places of bad values: `Attend::BYTES`.
            Self::AttendMma { dim, mma, .. } => {
                let pitch = |row: usize| if row.is_multiple_of(128) { row } else { row + 16 };
                let qk = pitch(if mma == Mma::Half { 2 * dim } else { dim });
                let v = if mma == Mma::Int8Fp8 { dim * pitch(64) } else { 64 * pitch(2 * dim) };
                128 * qk + v + 64 * 4 + 8 * dim
            }
            Self::Select { .. } => SELECT_SHARED_BYTES,
            // Tiles of q, k and v; scales, tile records and barriers share the rest.
            Self::Attend { dim, .. } => 2 * 128 * dim + STAGES * 128 * (2 * dim + 8) + 3072,
            _ => 0,
        }
    }

    /// What `sample` needs of it.
    pub(crate) fn sample_shared_bytes(dim: usize, dtype: DType) -> usize {
        Self::slab_bytes(dim * dtype.bytes(), sample_halves(dtype))
    }

    /// Slabs (64 rows × 128 bytes) of queries (64 · `halves` rows of so many bytes) and of the keys in
    /// flight.
    fn slab_bytes(row: usize, halves: usize) -> usize {
        (halves * row.div_ceil(128) + SLAB_STAGES) * SLAB_ROWS * 128
    }
}

/// Keys that a thread block of `sample` or `score` loads together.
pub(crate) const SLAB_ROWS: usize = 64;
/// Slabs of keys in flight there.
const SLAB_STAGES: usize = 3;

/// Times 64 queries that a thread block of `sample` scores: an Ada GPU has no room for two of f32.
pub(crate) fn sample_halves(dtype: DType) -> usize {
    if dtype == DType::F32 { 1 } else { 2 }
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

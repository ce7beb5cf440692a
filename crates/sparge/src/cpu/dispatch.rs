//! Which kernels run: the only place that asks the processor what it can do.

use super::kernels::{Accumulator, PackedQ, PackedQ8, QuantizedRows, Rows, Running, Scores};
use super::scalar;
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use crate::error::{Error, Result};
use std::ops::Range;

/// An instruction set with kernels of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Plain Rust, any processor.
    Scalar,
    /// x86-64 with AVX2 and FMA (2013 on).
    Avx2,
    /// x86-64 with AVX-512 F, BW, VL and VNNI (2019 on).
    Avx512,
}

impl Isa {
    /// All of them, the slowest first.
    pub const ALL: [Self; 3] = [Self::Scalar, Self::Avx2, Self::Avx512];

    /// Whether this processor has it.
    #[must_use]
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 => false,
        }
    }

    /// The best one this processor has.
    #[must_use]
    pub fn detect() -> Self {
        Self::ALL.into_iter().rev().find(|isa| isa.is_available()).unwrap_or(Self::Scalar)
    }

    fn needs(self) -> &'static str {
        match self {
            Self::Scalar => "nothing",
            Self::Avx2 => "avx2, fma",
            Self::Avx512 => "avx512f, avx512bw, avx512vl, avx512vnni",
        }
    }
}

/// The tile kernels of one instruction set. Holding a reference is the proof that it exists.
#[derive(Debug)]
pub(crate) struct TileKernels {
    /// Which one this is.
    pub(crate) isa: Isa,
    /// Floats per vector.
    pub(crate) lanes: usize,
    /// Columns of a full query panel.
    pub(crate) panel: usize,
    pub(crate) qk: fn(&PackedQ, &Rows<'_>, &mut Scores<'_>),
    /// Q (offset to u8), K, what to add to each column, and the scores.
    pub(crate) qk_i8: fn(&PackedQ8, &QuantizedRows<'_>, &[f32], &mut Scores<'_>),
    pub(crate) softmax: fn(&mut Scores<'_>, &mut Running),
    pub(crate) pv: fn(&Scores<'_>, &[f32], &Rows<'_>, Range<usize>, &mut Accumulator<'_>),
}

/// The kernels of `isa`, or the best ones.
pub(crate) fn kernels(isa: Option<Isa>) -> Result<&'static TileKernels> {
    let isa = isa.unwrap_or_else(Isa::detect);
    if !isa.is_available() {
        return Err(Error::Isa { isa, needs: isa.needs() });
    }
    Ok(match isa {
        Isa::Scalar => &scalar::KERNELS,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => &avx2::KERNELS,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => &avx512::KERNELS,
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::Avx512 => return Err(Error::Isa { isa, needs: isa.needs() }),
    })
}

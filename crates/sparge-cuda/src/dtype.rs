//! Element types of device tensors.

/// Element type of q, k, v and o, or of an additive mask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// IEEE single precision. The products read it rounded to bf16 (e4m3 and int8 where they are
    /// quantised); the prediction reads it as it is; o is f32.
    F32,
}

impl DType {
    /// Bytes of an element.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }

    pub(crate) fn cuda_name(self) -> &'static str {
        match self {
            Self::F16 => "sparge::F16",
            Self::Bf16 => "sparge::Bf16",
            Self::F32 => "sparge::F32",
        }
    }

    /// `Kind` of kernels/sparge/call.cuh.
    pub(crate) fn kind(self) -> i32 {
        match self {
            Self::F32 => 2,
            Self::F16 => 3,
            Self::Bf16 => 4,
        }
    }
}

//! The argument structs of the kernels, and the calls that launch them.
#![expect(unsafe_code, reason = "launches are driver calls on the caller's device addresses")]

mod call;
mod forward;
mod general;

pub(crate) use call::Call;
pub(crate) use forward::Pass;

use crate::device::Stream;
use crate::error::{Result, driver};
use crate::jit::Kernel;
use crate::tensors::Tensor;
use cudarc::driver::{result, sys};
use std::mem::{offset_of, size_of};

/// Query heads that fit the argument struct.
pub(crate) const MAX_HEADS: usize = 128;

/// `Strides` of kernels/sparge/types.cuh.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Strides {
    pub(crate) batch: i64,
    pub(crate) head: i64,
    pub(crate) token: i64,
}

/// `Budget` of kernels/sparge/types.cuh.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Budget {
    pub(crate) cdf: f32,
    pub(crate) top_k: f32,
}

/// `Args` of kernels/sparge/types.cuh, which says what the fields are.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Args {
    pub(crate) q: u64,
    pub(crate) k: u64,
    pub(crate) v: u64,
    pub(crate) o: u64,
    pub(crate) lse: u64,
    pub(crate) q_strides: Strides,
    pub(crate) k_strides: Strides,
    pub(crate) v_strides: Strides,
    pub(crate) o_strides: Strides,
    pub(crate) q8: u64,
    pub(crate) q_scale: u64,
    pub(crate) q_shift: u64,
    pub(crate) k8: u64,
    pub(crate) k_scale: u64,
    pub(crate) v8: u64,
    pub(crate) partial: u64,
    pub(crate) k_mean: u64,
    pub(crate) v_amax: u64,
    pub(crate) k_norm: u64,
    pub(crate) q_norm: u64,
    pub(crate) q_pool: u64,
    pub(crate) k_pool: u64,
    pub(crate) mask: u64,
    pub(crate) counters: u64,
    pub(crate) samples: u64,
    pub(crate) scores: u64,
    pub(crate) sums: u64,
    pub(crate) batch: i32,
    pub(crate) heads: i32,
    pub(crate) kv_heads: i32,
    pub(crate) qo_len: i32,
    pub(crate) kv_len: i32,
    pub(crate) q_blocks: i32,
    pub(crate) kv_blocks: i32,
    pub(crate) mask_words: i32,
    pub(crate) chunk: i32,
    pub(crate) chunks: i32,
    pub(crate) causal: i32,
    pub(crate) diagonal: i32,
    pub(crate) keep_first: i32,
    pub(crate) keep_local: i32,
    pub(crate) scale_log2: f32,
    pub(crate) sampled_rows: i32,
    pub(crate) first_head: i32,
    pub(crate) score_chunk: i32,
    pub(crate) budget: [Budget; MAX_HEADS],
}

// The size is asserted in types.cuh too.
const _: () = assert!(size_of::<Args>() == 1376);
const _: () = assert!(offset_of!(Args, q8) == 136);
const _: () = assert!(offset_of!(Args, batch) == 280);
const _: () = assert!(offset_of!(Args, budget) == 352);

impl Default for Args {
    fn default() -> Self {
        Self {
            q: 0,
            k: 0,
            v: 0,
            o: 0,
            lse: 0,
            q_strides: Strides::default(),
            k_strides: Strides::default(),
            v_strides: Strides::default(),
            o_strides: Strides::default(),
            q8: 0,
            q_scale: 0,
            q_shift: 0,
            k8: 0,
            k_scale: 0,
            v8: 0,
            partial: 0,
            k_mean: 0,
            v_amax: 0,
            k_norm: 0,
            q_norm: 0,
            q_pool: 0,
            k_pool: 0,
            mask: 0,
            counters: 0,
            samples: 0,
            scores: 0,
            sums: 0,
            batch: 0,
            heads: 0,
            kv_heads: 0,
            qo_len: 0,
            kv_len: 0,
            q_blocks: 0,
            kv_blocks: 0,
            mask_words: 0,
            chunk: 0,
            chunks: 0,
            causal: 0,
            diagonal: 0,
            keep_first: 0,
            keep_local: 0,
            scale_log2: 0.0,
            sampled_rows: 0,
            first_head: 0,
            score_chunk: 0,
            budget: [Budget::default(); MAX_HEADS],
        }
    }
}

/// Whether libcuda can be loaded.
pub(crate) fn has_driver() -> bool {
    // SAFETY: only looks for the library.
    unsafe { cudarc::driver::sys::is_culib_present() }
}

/// A tensor's address and strides.
fn part(tensor: &Tensor) -> (u64, Strides) {
    let s = tensor.strides;
    let strides = Strides { batch: s.batch as i64, head: s.head as i64, token: s.token as i64 };
    (tensor.address, strides)
}

/// Launches a kernel whose one parameter is `args`, in the current context.
///
/// # Safety
/// As `cuLaunchKernel`: `A` is the kernel's parameter, and the addresses in it hold what the kernel
/// reads and writes.
unsafe fn enqueue<A>(
    kernel: &Kernel,
    [x, y]: [u32; 2],
    threads: u32,
    shared: usize,
    stream: Stream,
    args: &mut A,
) -> Result<()> {
    // Nothing to do: an empty grid is an error to the driver.
    if x == 0 || y == 0 {
        return Ok(());
    }
    let mut parameters = [std::ptr::from_mut(args).cast()];
    let (grid, block) = ((x, y, 1), (threads, 1, 1));
    let (function, stream) = (kernel.function(), stream.0.cast());
    // SAFETY: the kernel takes one parameter, which the driver copies before it returns.
    unsafe { result::launch_kernel(function, grid, block, shared as u32, stream, &mut parameters) }
        .map_err(driver("launching a kernel"))
}

/// The same on a grid that is not empty, but thread blocks may start before the kernel before it in the
/// stream has ended (programmatic dependent launch, compute capability 9.0): they wait for it
/// themselves.
///
/// # Safety
/// As `enqueue`; the kernel calls `wait_for_predecessor` before it touches device memory or exits.
unsafe fn enqueue_early<A>(
    kernel: &Kernel,
    [x, y]: [u32; 2],
    threads: u32,
    shared: usize,
    stream: Stream,
    args: &mut A,
) -> Result<()> {
    let mut parameters = [std::ptr::from_mut(args).cast()];
    let mut attribute = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    };
    let config = sys::CUlaunchConfig {
        gridDimX: x,
        gridDimY: y,
        gridDimZ: 1,
        blockDimX: threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: shared as u32,
        hStream: stream.0.cast(),
        attrs: &raw mut attribute,
        numAttrs: 1,
    };
    let (function, parameters) = (kernel.function(), parameters.as_mut_ptr());
    // SAFETY: as in `enqueue`; the driver copies the attribute too.
    unsafe { sys::cuLaunchKernelEx(&raw const config, function, parameters, std::ptr::null_mut()) }
        .result()
        .map_err(driver("launching a kernel"))
}

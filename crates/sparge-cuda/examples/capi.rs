//! A C interface over `sparge_cuda::Attention` for benchmarks/gpu, which drive it from Python.
#![expect(unsafe_code, reason = "a C interface")]

use sparge::{
    Alignment, AttentionOptions, AttentionShape, Dims, Layout, Pooling, Selection, SpargeConfig,
    Strides,
};
use sparge_cuda::{Attention, DType, Device, Environment, Inputs, Output, Stream, Tensor};
use std::ffi::c_void;

/// Sizes and settings of a call.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Call {
    batch: i32,
    num_qo_heads: i32,
    num_kv_heads: i32,
    qo_len: i32,
    kv_len: i32,
    head_dim: i32,
    /// 0: f16, 1: bf16.
    dtype: i32,
    /// 0: none, 1: top left, 2: bottom right.
    causal: i32,
    /// 0: all, 1: TopK, 2: TopCdf.
    selection: i32,
    /// 0: 16×16 means, 1: whole blocks, 2: the default, 16×16 means and two sampled queries.
    pooling: i32,
    /// 0: HND, 1: NHD, all tensors contiguous.
    layout: i32,
    amount: f32,
}

/// What [`sparge_new`] makes.
#[derive(Debug)]
pub struct Handle {
    attention: Attention,
    call: Call,
}

fn make(call: Call) -> Result<Handle, Box<dyn std::error::Error>> {
    let device = Device::new(0, &Environment::from_process())?;
    let shape = AttentionShape {
        batch: call.batch as usize,
        num_qo_heads: call.num_qo_heads as usize,
        num_kv_heads: call.num_kv_heads as usize,
        qo_len: call.qo_len as usize,
        kv_len: call.kv_len as usize,
        head_dim: call.head_dim as usize,
        head_dim_v: call.head_dim as usize,
    };
    let options = AttentionOptions {
        causal: [None, Some(Alignment::TopLeft), Some(Alignment::BottomRight)]
            [call.causal as usize],
        ..Default::default()
    };
    let amount = f64::from(call.amount);
    let selection = [Selection::All, Selection::TopK(amount), Selection::TopCdf(amount)];
    let config = SpargeConfig {
        selection: selection[call.selection as usize].into(),
        pooling: [Pooling::SUB_BLOCK, Pooling::BLOCK, Pooling::MIXED][call.pooling as usize],
        ..SpargeConfig::default()
    };
    let dtype = [DType::F16, DType::Bf16][call.dtype as usize];
    let attention = Attention::new(&device, shape, dtype, &options, &config)?;
    Ok(Handle { attention, call })
}

/// Prepares a call on GPU 0; null (and a message on stderr) where it cannot be.
#[unsafe(no_mangle)]
pub extern "C" fn sparge_new(call: &Call) -> *mut Handle {
    match make(*call) {
        Ok(handle) => Box::into_raw(Box::new(handle)),
        Err(error) => {
            #[expect(clippy::print_stderr, reason = "the caller has no other channel")]
            {
                eprintln!("sparge: {error}");
            }
            std::ptr::null_mut()
        }
    }
}

/// Frees a handle.
///
/// # Safety
/// `handle` came from [`sparge_new`] and is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sparge_free(handle: *mut Handle) {
    if !handle.is_null() {
        // SAFETY: the caller's promise.
        drop(unsafe { Box::from_raw(handle) });
    }
}

/// Bytes of workspace.
#[unsafe(no_mangle)]
pub extern "C" fn sparge_workspace_bytes(handle: &Handle) -> usize {
    handle.attention.workspace_bytes()
}

/// Offset of the mask in the workspace, and its 32-bit words per row.
#[unsafe(no_mangle)]
pub extern "C" fn sparge_mask(handle: &Handle, words: &mut usize) -> usize {
    *words = handle.attention.mask_shape()[3];
    handle.attention.mask_offset()
}

/// Runs parts of the call: 1 quantize, 2 predict, 4 attend (7: `forward`). 0 on success.
///
/// # Safety
/// As [`Attention::forward`]; `addresses` are q, k, v, o, lse (or 0) and the workspace.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sparge_run(
    handle: &Handle,
    parts: i32,
    addresses: &[u64; 6],
    stream: *mut c_void,
) -> i32 {
    let c = &handle.call;
    let layout = if c.layout == 0 { Layout::Hnd } else { Layout::Nhd };
    let tensor = |address: u64, heads: i32, len: i32| {
        let [batch, heads, len, dim] = [c.batch, heads, len, c.head_dim].map(|x| x as usize);
        Tensor { address, strides: Strides::contiguous(Dims { batch, heads, len, dim }, layout) }
    };
    let [q, k, v, o, lse, workspace] = *addresses;
    let inputs = Inputs::new(
        tensor(q, c.num_qo_heads, c.qo_len),
        tensor(k, c.num_kv_heads, c.kv_len),
        tensor(v, c.num_kv_heads, c.kv_len),
    );
    let output = Output {
        lse: (lse != 0).then_some(lse),
        ..Output::new(tensor(o, c.num_qo_heads, c.qo_len))
    };
    let (a, stream) = (&handle.attention, Stream(stream));
    let mask = a.predicts().then(|| workspace + a.mask_offset() as u64);
    // SAFETY: the caller's promise.
    let done = unsafe {
        match parts {
            1 => a.quantize(stream, &inputs, workspace),
            2 => a.predict(stream, &inputs, mask.unwrap_or(0), workspace),
            4 => a.attend(stream, &inputs, &output, mask, workspace),
            _ => a.forward(stream, &inputs, &output, workspace),
        }
    };
    i32::from(done.is_err())
}

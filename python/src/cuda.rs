//! The verbs on CUDA tensors: addresses, a stream, and memory that the caller has allocated.
#![expect(unsafe_code, reason = "device addresses come from the caller")]

use crate::errors::{SpargeError, cuda, refused};
use crate::settings::Settings;
use crate::tensor::{Four, Raw};
use pyo3::prelude::*;
use sparge::{AttentionOptions, AttentionShape, Dims, Layout, Lengths};
use sparge_cuda::{
    Attention, CudaOptions, DType, Device, DeviceBlockMask, ElementMask, Environment, Inputs,
    MaskKind, Output, Precision, Stream, Tensor,
};
use std::collections::HashMap;
use std::ffi::c_void;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

static DEVICES: Mutex<Option<HashMap<usize, Device>>> = Mutex::new(None);

/// GPU `ordinal`, opened once. `nvrtc_dirs` are looked at first, except for `SPARGE_NVRTC`.
fn device(ordinal: usize, nvrtc_dirs: Vec<PathBuf>) -> PyResult<Device> {
    let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
    let devices = devices.get_or_insert_with(HashMap::new);
    if let Some(device) = devices.get(&ordinal) {
        return Ok(device.clone());
    }
    let mut env = Environment::from_process();
    env.nvrtc_dirs.splice(0..0, nvrtc_dirs);
    let device = Device::new(ordinal, &env).map_err(cuda)?;
    devices.insert(ordinal, device.clone());
    Ok(device)
}

/// A kind of call on one GPU: made once (kernels are compiled, settings checked), called often.
#[pyclass(frozen, module = "sparge._sparge")]
pub(crate) struct CudaCall {
    attention: Attention,
    layout: Layout,
}

/// What a call reads, apart from q, k and v.
#[derive(Debug, Clone, FromPyObject)]
pub(crate) struct Masks {
    /// `[batch|1, heads|1, qo_len, kv_len]`, of the announced type.
    #[pyo3(item(0))]
    element: Option<Raw>,
    /// `[batch|1, heads|1, q_blocks, words]`, contiguous 32-bit words.
    #[pyo3(item(1))]
    blocks: Option<Raw>,
}

#[pymethods]
impl CudaCall {
    /// `element_mask` is the mask's type (`bool`, `f32`, `f16`, `bf16`) and whether it differs
    /// between heads; `precision` is `quantized` or `half`.
    #[new]
    #[expect(clippy::too_many_arguments, reason = "the arguments of a call, once per kind")]
    fn new(
        py: Python<'_>,
        ordinal: usize,
        nvrtc_dirs: Vec<PathBuf>,
        dtype: &str,
        shapes: (Four<usize>, Four<usize>, Four<usize>),
        settings: &Settings,
        precision: &str,
        kv_lens: Option<Vec<usize>>,
        element_mask: Option<(String, bool)>,
        block_mask: bool,
    ) -> PyResult<Self> {
        let layout = settings.layout;
        let options = CudaOptions {
            precision: match precision {
                "quantized" => Precision::Quantized,
                "half" => Precision::Half,
                _ => return Err(SpargeError::new_err(format!("no precision {precision:?}"))),
            },
            element_mask: match element_mask {
                None => None,
                Some((kind, per_head)) if kind == "bool" => {
                    Some(ElementMask { kind: MaskKind::Bool, per_head })
                }
                Some((kind, per_head)) => {
                    Some(ElementMask { kind: MaskKind::Additive(element(&kind)?), per_head })
                }
            },
            block_mask,
            ..CudaOptions::default()
        };
        let (dtype, shape) = (element(dtype)?, shape(layout, &shapes)?);
        py.detach(|| {
            let device = device(ordinal, nvrtc_dirs)?;
            let lengths = kv_lens.as_deref().map_or(Lengths::Full, Lengths::Keys);
            let call = AttentionOptions { lengths, ..settings.options() };
            let attention =
                Attention::with(&device, shape, dtype, &call, &settings.config, &options)
                    .map_err(cuda)?;
            Ok(Self { attention, layout })
        })
    }

    /// Bytes a call needs to work in.
    #[getter]
    fn workspace_bytes(&self) -> usize {
        self.attention.workspace_bytes()
    }

    /// `[batch, heads, q_blocks, words]` of a block mask in 32-bit words.
    #[getter]
    fn mask_shape(&self) -> [usize; 4] {
        self.attention.mask_shape()
    }

    /// Whether stage 1 runs.
    #[getter]
    fn predicts(&self) -> bool {
        self.attention.predicts()
    }

    /// Whether the kernels written for this very GPU attend.
    #[getter]
    fn is_fast(&self) -> bool {
        self.attention.is_fast()
    }

    /// Enqueues the whole operator. Addresses of 0 stand for what is not wanted.
    #[expect(clippy::too_many_arguments, reason = "positional integers are the fast way")]
    fn forward(
        &self,
        py: Python<'_>,
        stream: usize,
        q: Raw,
        k: Raw,
        v: Raw,
        out: Raw,
        lse: u64,
        stats: u64,
        masks: Option<Masks>,
        workspace: u64,
    ) -> PyResult<()> {
        let inputs = self.inputs(&q, &k, &v, masks.as_ref())?;
        let output = self.output(&out, lse, stats)?;
        // SAFETY: the Python side hands over live tensors of this call's shapes and types on this
        // device, a workspace of the size asked for, and the current stream.
        py.detach(|| unsafe {
            self.attention.forward(Stream(stream as *mut c_void), &inputs, &output, workspace)
        })
        .map_err(cuda)
    }

    /// Enqueues quantisation and stage 1; the blocks are written to `mask`.
    #[expect(clippy::too_many_arguments, reason = "positional integers are the fast way")]
    fn select(
        &self,
        py: Python<'_>,
        stream: usize,
        q: Raw,
        k: Raw,
        v: Raw,
        masks: Option<Masks>,
        mask: u64,
        workspace: u64,
    ) -> PyResult<()> {
        let inputs = self.inputs(&q, &k, &v, masks.as_ref())?;
        // SAFETY: as in `forward`; `mask` has `mask_shape` words.
        py.detach(|| unsafe {
            let stream = Stream(stream as *mut c_void);
            self.attention.quantize(stream, &inputs, workspace)?;
            self.attention.predict(stream, &inputs, mask, workspace)
        })
        .map_err(cuda)
    }

    /// Enqueues attention over the blocks of `mask`, after `select` on the same workspace.
    #[expect(clippy::too_many_arguments, reason = "positional integers are the fast way")]
    fn attend(
        &self,
        py: Python<'_>,
        stream: usize,
        q: Raw,
        k: Raw,
        v: Raw,
        out: Raw,
        lse: u64,
        stats: u64,
        masks: Option<Masks>,
        mask: u64,
        workspace: u64,
    ) -> PyResult<()> {
        let inputs = self.inputs(&q, &k, &v, masks.as_ref())?;
        let output = self.output(&out, lse, stats)?;
        // SAFETY: as in `forward`.
        py.detach(|| unsafe {
            let stream = Stream(stream as *mut c_void);
            self.attention.attend(stream, &inputs, &output, Some(mask), workspace)
        })
        .map_err(cuda)
    }
}

impl CudaCall {
    fn tensor(&self, name: &str, raw: &Raw) -> PyResult<Tensor> {
        let strides = raw.strides(name, self.layout)?;
        Ok(Tensor { address: raw.address() as u64, strides })
    }

    fn inputs(&self, q: &Raw, k: &Raw, v: &Raw, masks: Option<&Masks>) -> PyResult<Inputs> {
        let (q, k, v) =
            (self.tensor("query", q)?, self.tensor("key", k)?, self.tensor("value", v)?);
        let mut inputs = Inputs::new(q, k, v);
        let Some(masks) = masks else { return Ok(inputs) };
        if let Some(raw) = &masks.element {
            let dims = raw.dims(Layout::Hnd);
            let mut strides = raw.strides("attn_mask", Layout::Hnd)?;
            strides.batch = if dims.batch == 1 { 0 } else { strides.batch };
            strides.head = if dims.heads == 1 { 0 } else { strides.head };
            inputs.element_mask = Some(Tensor { address: raw.address() as u64, strides });
        }
        if let Some(raw) = &masks.blocks {
            let dims = raw.dims(Layout::Hnd);
            let head = dims.len * dims.dim;
            inputs.block_mask = Some(DeviceBlockMask {
                address: raw.address() as u64,
                sequence_stride: if dims.batch == 1 { 0 } else { dims.heads * head },
                head_stride: if dims.heads == 1 { 0 } else { head },
            });
        }
        Ok(inputs)
    }

    fn output(&self, out: &Raw, lse: u64, stats: u64) -> PyResult<Output> {
        let mut output = Output::new(self.tensor("out", out)?);
        output.lse = (lse != 0).then_some(lse);
        output.stats = (stats != 0).then_some(stats);
        Ok(output)
    }
}

fn shape(
    layout: Layout,
    (q, k, v): &(Four<usize>, Four<usize>, Four<usize>),
) -> PyResult<AttentionShape> {
    let dims = |&(batch, a, b, dim): &Four<usize>| {
        let (heads, len) = if layout == Layout::Hnd { (a, b) } else { (b, a) };
        Dims { batch, heads, len, dim }
    };
    AttentionShape::of_dims(dims(q), dims(k), dims(v)).map_err(refused)
}

fn element(dtype: &str) -> PyResult<DType> {
    match dtype {
        "f32" => Ok(DType::F32),
        "f16" => Ok(DType::F16),
        "bf16" => Ok(DType::Bf16),
        _ => Err(SpargeError::new_err(format!("dtype is {dtype:?}, expected f32, f16 or bf16"))),
    }
}

//! A call on a GPU beside the same call in the reference.
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "figures and skips are worth reading"
)]

mod numbers;

pub(crate) use numbers::*;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr};
use sparge::{
    Alignment, AttentionOptions, AttentionShape, BlockMask, Dims, Layout, Lengths, Plan,
    SpargeConfig, Strides, TensorView, Window, reference,
};
use sparge_cuda::{
    Attention, CudaOptions, DType, Device, DeviceBlockMask, ElementMask, Environment, Error,
    Inputs, MaskKind, Output, Stream, Tensor,
};
use std::sync::Arc;

pub(crate) struct Gpu {
    pub(crate) device: Device,
    pub(crate) context: Arc<CudaContext>,
}

/// The GPU, or `None` (a failure where `SPARGE_REQUIRE_GPU=1`).
pub(crate) fn gpu() -> Option<Gpu> {
    match Device::new(0, &Environment::from_process()) {
        Ok(device) => {
            let context = CudaContext::new(0).expect("the GPU opened a moment ago");
            Some(Gpu { device, context })
        }
        Err(error @ (Error::NoDriver | Error::NoNvrtc { .. } | Error::Gpu { .. })) => {
            assert!(std::env::var_os("SPARGE_REQUIRE_GPU").is_none_or(|v| v != "1"), "{error}");
            eprintln!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Ragged batches.
#[derive(Debug, Clone)]
pub(crate) enum Lens {
    Full,
    Keys(Vec<usize>),
    Packed(Vec<usize>, Vec<usize>),
}

/// An element mask `[sequences, heads, q, kv]`.
#[derive(Debug, Clone)]
pub(crate) enum Element {
    Bool(Dims, Vec<bool>),
    Bias(Dims, Vec<f32>),
}

/// A call.
#[derive(Debug, Clone)]
pub(crate) struct Problem {
    pub(crate) name: String,
    pub(crate) shape: AttentionShape,
    pub(crate) dtype: DType,
    pub(crate) layout: Layout,
    pub(crate) causal: Option<Alignment>,
    pub(crate) window: Option<Window>,
    pub(crate) sink_blocks: usize,
    pub(crate) lens: Lens,
    pub(crate) element: Option<Element>,
    pub(crate) block_mask: Option<BlockMask>,
    pub(crate) scale: Option<f64>,
    pub(crate) config: SpargeConfig,
    pub(crate) cuda: CudaOptions,
    pub(crate) q: Vec<f32>,
    pub(crate) k: Vec<f32>,
    pub(crate) v: Vec<f32>,
}

/// What a call left behind.
#[derive(Debug, Clone)]
pub(crate) struct Ran {
    pub(crate) o: Vec<f32>,
    pub(crate) bits: Vec<u8>,
    pub(crate) lse: Vec<f32>,
    /// Four a head.
    pub(crate) stats: Vec<u64>,
    pub(crate) mask: Option<BlockMask>,
    pub(crate) workspace: Vec<u8>,
}

impl Problem {
    /// `sizes`: batch, query heads, key heads, queries, keys, dim, dim of v.
    pub(crate) fn new(name: &str, sizes: [usize; 7], dtype: DType) -> Self {
        let [batch, num_qo_heads, num_kv_heads, qo_len, kv_len, head_dim, head_dim_v] = sizes;
        let shape = AttentionShape {
            batch,
            num_qo_heads,
            num_kv_heads,
            qo_len,
            kv_len,
            head_dim,
            head_dim_v,
        };
        let mut p = Self {
            name: format!("{name} {sizes:?} {dtype:?}"),
            shape,
            dtype,
            layout: Layout::Hnd,
            causal: None,
            window: None,
            sink_blocks: 0,
            lens: Lens::Full,
            element: None,
            block_mask: None,
            scale: None,
            config: SpargeConfig::dense(),
            cuda: CudaOptions::default(),
            q: Vec::new(),
            k: Vec::new(),
            v: Vec::new(),
        };
        p.fill(sizes.iter().fold(1, |a, &b| a * 31 + b as u64));
        p
    }

    /// Smooth along tokens (neighbours correlate); keys with a bias a channel.
    pub(crate) fn fill(&mut self, seed: u64) {
        let smooth = |dims: Dims, seed: u64, bias: f32| {
            let mut rng = Normal(seed);
            let strides = Strides::contiguous(dims, self.layout);
            let mut out = vec![0.0; dims.batch * dims.heads * dims.len * dims.dim];
            for b in 0..dims.batch {
                for h in 0..dims.heads {
                    let centre: Vec<f32> = (0..dims.dim).map(|_| bias * rng.next()).collect();
                    let mut x: Vec<f32> = (0..dims.dim).map(|_| rng.next()).collect();
                    for t in 0..dims.len {
                        for (d, x) in x.iter_mut().enumerate() {
                            *x = 0.9 * *x + 0.436 * rng.next();
                            let at = b * strides.batch + h * strides.head + t * strides.token + d;
                            out[at] = rounded(*x + centre[d] + 0.3 * rng.next(), self.dtype);
                        }
                    }
                }
            }
            out
        };
        let [q, k, v] = self.dims();
        (self.q, self.k, self.v) =
            (smooth(q, seed, 0.0), smooth(k, seed + 1, 1.5), smooth(v, seed + 2, 0.5));
    }

    /// The same call on other tensors' layout.
    pub(crate) fn nhd(mut self) -> Self {
        self.layout = Layout::Nhd;
        self.fill(7);
        self
    }

    pub(crate) fn dims(&self) -> [Dims; 3] {
        let s = &self.shape;
        let kv = Dims { batch: s.batch, heads: s.num_kv_heads, len: s.kv_len, dim: s.head_dim };
        let q = Dims { heads: s.num_qo_heads, len: s.qo_len, ..kv };
        [q, kv, Dims { dim: s.head_dim_v, ..kv }]
    }

    pub(crate) fn views(&self) -> [TensorView<'_, f32>; 3] {
        let [q, k, v] = self.dims();
        let view = |data, dims| TensorView::contiguous(data, dims, self.layout).expect("it fits");
        [view(&self.q, q), view(&self.k, k), view(&self.v, v)]
    }

    /// Options without masks, for the GPU.
    fn options(&self) -> AttentionOptions<'_> {
        AttentionOptions {
            softmax_scale: self.scale,
            causal: self.causal,
            window: self.window,
            sink_blocks: self.sink_blocks,
            lengths: match &self.lens {
                Lens::Full => Lengths::Full,
                Lens::Keys(lens) => Lengths::Keys(lens),
                Lens::Packed(q, k) => Lengths::Packed { cu_seqlens_q: q, cu_seqlens_k: k },
            },
            layout: self.layout,
            ..Default::default()
        }
    }

    /// The plan on the host, masks included.
    pub(crate) fn plan(&self) -> Plan<'_> {
        let contiguous = |dims| (dims, Layout::Hnd);
        let element_mask = self.element.as_ref().map(|element| match element {
            Element::Bool(dims, data) => {
                let (dims, layout) = contiguous(*dims);
                let view = TensorView::contiguous(data, dims, layout).expect("it fits");
                sparge::ElementMask::Bool(view)
            }
            Element::Bias(dims, data) => {
                let (dims, layout) = contiguous(*dims);
                let view = TensorView::contiguous(data, dims, layout).expect("it fits");
                sparge::ElementMask::Additive(view)
            }
        });
        let options = AttentionOptions {
            element_mask,
            block_mask: self.block_mask.as_ref(),
            ..self.options()
        };
        Plan::new(self.shape, &options, &self.config)
            .unwrap_or_else(|e| panic!("{}: {e}", self.name))
    }

    pub(crate) fn attention(&self, gpu: &Gpu) -> Attention {
        let element_mask = self.element.as_ref().map(|element| match element {
            Element::Bool(dims, _) => {
                ElementMask { kind: MaskKind::Bool, per_head: dims.heads > 1 }
            }
            Element::Bias(dims, _) => {
                ElementMask { kind: MaskKind::Additive(DType::F32), per_head: dims.heads > 1 }
            }
        });
        let cuda = CudaOptions { element_mask, block_mask: self.block_mask.is_some(), ..self.cuda };
        let options = self.options();
        Attention::with(&gpu.device, self.shape, self.dtype, &options, &self.config, &cuda)
            .unwrap_or_else(|e| panic!("{}: {e}", self.name))
    }

    /// Runs on poisoned outputs and a poisoned workspace.
    pub(crate) fn run(&self, gpu: &Gpu) -> Ran {
        let buffers = Buffers::new(self, gpu);
        // SAFETY: all buffers have the sizes of the shape and live past the synchronisation.
        unsafe {
            buffers.attention.forward(
                Stream(buffers.stream.cu_stream().cast()),
                &buffers.inputs,
                &buffers.output,
                buffers.workspace_address,
            )
        }
        .unwrap_or_else(|e| panic!("{}: {e}", self.name));
        buffers.read(self)
    }

    /// What the reference makes of the same call under `mask`.
    pub(crate) fn expected(&self, mask: Option<&BlockMask>) -> reference::Output {
        let [q, k, v] = self.views();
        reference::attend(&self.plan(), &q, &k, &v, mask)
    }
}

pub(crate) fn address<T>(slice: &CudaSlice<T>, stream: &CudaStream) -> u64 {
    slice.device_ptr(stream).0
}

/// A call's device memory.
pub(crate) struct Buffers {
    pub(crate) attention: Attention,
    pub(crate) stream: Arc<CudaStream>,
    pub(crate) inputs: Inputs,
    pub(crate) output: Output,
    pub(crate) workspace_address: u64,
    pub(crate) tensors: Vec<CudaSlice<u8>>,
    o: CudaSlice<u8>,
    lse: CudaSlice<u8>,
    stats: CudaSlice<u8>,
    workspace: CudaSlice<u8>,
}

impl Buffers {
    pub(crate) fn new(p: &Problem, gpu: &Gpu) -> Self {
        let attention = p.attention(gpu);
        let stream = gpu.context.new_stream().expect("a stream");
        let up = |x: &[u8]| stream.clone_htod(x).expect("upload");
        let [qd, kd, vd] = p.dims();
        let mut tensors: Vec<CudaSlice<u8>> =
            [&p.q, &p.k, &p.v].map(|x| up(&to_bytes(x, p.dtype))).into();
        let s = &p.shape;
        let rows = s.batch * s.num_qo_heads * s.qo_len;
        let o = up(&vec![0xff; rows * s.head_dim_v * p.dtype.bytes()]);
        let lse = up(&vec![0xff; rows * 4]);
        let [sequences, heads, q_blocks, words] = attention.mask_shape();
        let stats = up(&vec![0xff; sequences * heads * 32]);
        let workspace = up(&vec![0xff; attention.workspace_bytes().max(256)]);
        let tensor = |slice: &CudaSlice<u8>, dims| Tensor {
            address: address(slice, &stream),
            strides: Strides::contiguous(dims, p.layout),
        };
        let mut inputs =
            Inputs::new(tensor(&tensors[0], qd), tensor(&tensors[1], kd), tensor(&tensors[2], vd));
        if let Some(element) = &p.element {
            let (dims, bytes) = match element {
                Element::Bool(dims, data) => {
                    (*dims, data.iter().map(|&x| u8::from(x)).collect::<Vec<u8>>())
                }
                Element::Bias(dims, data) => (*dims, to_bytes(data, DType::F32)),
            };
            tensors.push(up(&bytes));
            let mut strides = Strides::contiguous(dims, Layout::Hnd);
            if dims.batch == 1 {
                strides.batch = 0;
            }
            let address = address(&tensors[3], &stream);
            inputs.element_mask = Some(Tensor { address, strides });
        }
        if let Some(mask) = &p.block_mask {
            let [s, h, _, _] = mask.shape();
            let mut words_of = vec![0u32; s * h * q_blocks * words];
            for row in 0..s * h * q_blocks {
                for j in mask.row(row / q_blocks / h, row / q_blocks % h, row % q_blocks) {
                    words_of[row * words + j / 32] |= 1 << (j % 32);
                }
            }
            tensors.push(up(&words_of.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>()));
            inputs.block_mask = Some(DeviceBlockMask {
                address: address(tensors.last().expect("pushed"), &stream),
                sequence_stride: if s == 1 { 0 } else { h * q_blocks * words },
                head_stride: if h == 1 { 0 } else { q_blocks * words },
            });
        }
        let output = Output {
            lse: Some(address(&lse, &stream)),
            stats: Some(address(&stats, &stream)),
            ..Output::new(tensor(&o, Dims { dim: s.head_dim_v, ..qd }))
        };
        let workspace_address = address(&workspace, &stream);
        Self {
            attention,
            stream,
            inputs,
            output,
            workspace_address,
            tensors,
            o,
            lse,
            stats,
            workspace,
        }
    }

    pub(crate) fn read(&self, p: &Problem) -> Ran {
        self.stream.synchronize().unwrap_or_else(|e| panic!("{}: {e}", p.name));
        let down = |x: &CudaSlice<u8>| self.stream.clone_dtoh(x).expect("download");
        let bits = down(&self.o);
        let workspace = down(&self.workspace);
        let mask = self.attention.predicts().then(|| {
            let [sequences, heads, q_blocks, words] = self.attention.mask_shape();
            let shape = p.plan().mask_shape();
            let mut mask = BlockMask::empty(shape).expect("small");
            let bytes = &workspace[self.attention.mask_offset()..];
            for row in 0..sequences * heads * q_blocks {
                for j in 0..words * 32 {
                    if bytes[(row * words + j / 32) * 4 + j % 32 / 8] >> (j % 8) & 1 == 1 {
                        mask.set(row / q_blocks / heads, row / q_blocks % heads, row % q_blocks, j);
                    }
                }
            }
            mask
        });
        let stats = down(&self.stats);
        Ran {
            o: from_bytes(&bits, p.dtype),
            bits,
            lse: from_bytes(&down(&self.lse), DType::F32),
            stats: stats
                .chunks_exact(8)
                .map(|b| u64::from_le_bytes(b.try_into().expect("eight")))
                .collect(),
            mask,
            workspace,
        }
    }
}

/// Compares a run with the reference; what is wrong goes to `failures`, so that one run shows all.
pub(crate) fn compare(
    p: &Problem,
    ran: &Ran,
    expected: &reference::Output,
    failures: &mut Vec<String>,
) {
    let (most, most_lse) = match (p.cuda.precision, p.dtype) {
        (sparge_cuda::Precision::Quantized, _) => (0.025, 0.1),
        (_, DType::F16) => (0.002, 0.002),
        _ => (0.008, if p.dtype == DType::F32 { 0.05 } else { 0.004 }),
    };
    let (error, lse) = (relative_l1(&ran.o, &expected.o), lse_error(&ran.lse, &expected.lse));
    let line = format!("{} {:?}: relative L1 {error:.5}, LSE {lse:.5}", p.name, p.cuda.precision);
    println!("{line}");
    if !(error < most && lse < most_lse) {
        failures.push(line);
    }
}

pub(crate) fn report(failures: &[String]) {
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

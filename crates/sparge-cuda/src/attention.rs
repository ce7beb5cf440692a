//! One kind of call, validated once; its verbs choose between the fast path and the general one.
#![expect(unsafe_code, reason = "device addresses come from the caller")]

use crate::device::{Device, Stream};
use crate::dtype::DType;
use crate::error::{Error, Result, driver};
use crate::general::{Duties, General};
use crate::hopper::{self, Hopper};
use crate::options::{CudaOptions, Path, Precision};
use crate::spec::{Arch, Pool};
use crate::tensors::{Inputs, MaskKind, Output, Tensor};
use sparge::{AttentionOptions, AttentionShape, Plan, SpargeConfig};

/// A kind of call on one device. Make it once, call it often, from any thread.
#[derive(Debug, Clone)]
pub struct Attention {
    device: Device,
    shape: AttentionShape,
    dtype: DType,
    cuda: CudaOptions,
    /// Where the fast path attends.
    hopper: Option<Hopper>,
    general: General,
    /// Where the general path's part of the workspace starts.
    general_at: usize,
    mask_shape: [usize; 4],
    predicts: bool,
}

impl Attention {
    /// [`Attention::with`] and the default [`CudaOptions`].
    ///
    /// # Errors
    /// As [`Attention::with`].
    pub fn new(
        device: &Device,
        shape: AttentionShape,
        dtype: DType,
        options: &AttentionOptions<'_>,
        config: &SpargeConfig,
    ) -> Result<Self> {
        Self::with(device, shape, dtype, options, config, &CudaOptions::default())
    }

    /// Validates the call and compiles what it needs (at the first use on this device).
    ///
    /// `options` and `config` mean what they mean in `sparge::Plan`, with these differences: masks
    /// are in device memory (`cuda` announces them, calls bring them), `return_lse`, `return_mask`
    /// and `layout` are not read (the output's own fields say it), `config.qk` and `config.isa` are
    /// the CPU's.
    ///
    /// # Errors
    /// [`Error::Plan`] for what is invalid anywhere, [`Error::Unsupported`] for what only the CPU
    /// backend does, and what compiling and loading may raise.
    pub fn with(
        device: &Device,
        shape: AttentionShape,
        dtype: DType,
        options: &AttentionOptions<'_>,
        config: &SpargeConfig,
        cuda: &CudaOptions,
    ) -> Result<Self> {
        let unsupported = |what: &str, remedy| Err(Error::Unsupported { what: what.into(), remedy });
        if options.block_mask.is_some() {
            return unsupported(
                "a block mask in host memory",
                "set CudaOptions::block_mask and pass it in device memory",
            );
        }
        if options.element_mask.is_some() {
            return unsupported(
                "an element mask in host memory",
                "set CudaOptions::element_mask and pass it in device memory",
            );
        }
        let mask_shape = Plan::new(shape, options, config)?.mask_shape();
        if [shape.head_dim, shape.head_dim_v].iter().any(|dim| dim % 8 != 0) {
            return unsupported(
                "a head_dim that is not a multiple of 8",
                "pad q, k and v with zeros (and set softmax_scale to 1/√head_dim)",
            );
        }
        let is_fast = cuda.path == Path::Auto
            && cuda.precision == Precision::Quantized
            && cuda.element_mask.is_none()
            && device.arch() == Arch::Sm90a
            && hopper::takes(&shape, dtype, options);
        let general = General::new(shape, dtype, options, config, cuda)?;
        // The fast path attends under one mask: the caller's, too, goes through the selection.
        let predicts = general.selects() || (is_fast && cuda.block_mask);
        let judges = config.theta.values().iter().any(|&theta| theta > 0.0);
        let hopper = if is_fast {
            let own = hopper::pool_of(config.pooling).filter(|_| !judges && !cuda.block_mask);
            let pool = if predicts { own.unwrap_or(Pool::None) } else { Pool::None };
            Some(Hopper::new(device, shape, dtype, options, config, pool)?)
        } else {
            None
        };
        let general_at = hopper.as_ref().map_or(0, |hopper| hopper.layout.bytes);
        let general = general.finish(
            device,
            Duties {
                attends: !is_fast,
                predicts: predicts && !hopper.as_ref().is_some_and(Hopper::selects),
                has_mask: predicts,
            },
        )?;
        Ok(Self {
            device: device.clone(),
            shape,
            dtype,
            cuda: *cuda,
            hopper,
            general,
            general_at,
            mask_shape,
            predicts,
        })
    }

    /// Bytes of device memory a call needs; 256-byte aligned, contents arbitrary.
    #[must_use]
    pub fn workspace_bytes(&self) -> usize {
        self.general_at + self.general.layout.bytes
    }

    /// Whether a call predicts a mask. Without, every reachable block is attended.
    #[must_use]
    pub fn predicts(&self) -> bool {
        self.predicts
    }

    /// Whether the fast path attends.
    #[must_use]
    pub fn is_fast(&self) -> bool {
        self.hopper.is_some()
    }

    /// `[sequences, num_qo_heads, q_blocks, words]`: a block mask in device memory is this many
    /// 32-bit words, a set bit is a key block to attend, the lowest bit of a word comes first. On a
    /// little-endian host these are the words of a `sparge::BlockMask`.
    #[must_use]
    pub fn mask_shape(&self) -> [usize; 4] {
        let [sequences, heads, q_blocks, kv_blocks] = self.mask_shape;
        [sequences, heads, q_blocks, kv_blocks.div_ceil(64) * 2]
    }

    /// Where in the workspace [`Attention::forward`] leaves the mask it predicts, in bytes.
    #[must_use]
    pub fn mask_offset(&self) -> usize {
        self.general_at + self.general.layout.mask
    }

    /// The whole operator: enqueues quantize, predict (where the config selects) and attend.
    ///
    /// # Safety
    /// On this device, until the work is done: `inputs` and `output` describe memory that holds
    /// the shape given to [`Attention::with`] in its element types, `workspace` is the address of
    /// [`Attention::workspace_bytes`] bytes that nothing else uses, and `stream` is live.
    ///
    /// # Errors
    /// [`Error::Tensor`] before anything is enqueued, [`Error::Driver`].
    pub unsafe fn forward(
        &self,
        stream: Stream,
        inputs: &Inputs,
        output: &Output,
        workspace: u64,
    ) -> Result<()> {
        self.check_output(output)?;
        // SAFETY: the caller's promise covers every part.
        unsafe {
            self.quantize(stream, inputs, workspace)?;
            let mask = self.predicts.then(|| workspace + self.mask_offset() as u64);
            if let Some(mask) = mask {
                self.predict(stream, inputs, mask, workspace)?;
            }
            self.attend(stream, inputs, output, mask, workspace)
        }
    }

    /// Writes what the attention reads instead of q, k and v into the workspace: quantised (and, on
    /// the fast path, pooled) tensors, f32 ones in bf16. Nothing, where both products read q, k
    /// and v themselves.
    ///
    /// # Safety
    /// As [`Attention::forward`].
    ///
    /// # Errors
    /// As [`Attention::forward`].
    pub unsafe fn quantize(&self, stream: Stream, inputs: &Inputs, workspace: u64) -> Result<()> {
        self.check_inputs(inputs, workspace)?;
        // SAFETY: the caller's promise.
        unsafe {
            match &self.hopper {
                Some(hopper) => hopper.quantize(stream, inputs, workspace),
                None => self.general.quantize(stream, inputs, workspace + self.general_at as u64),
            }
        }
    }

    /// Chooses blocks and writes the mask ([`Attention::mask_shape`]) to `mask`. Needs
    /// [`Attention::quantize`] before it on the same workspace. Does nothing where
    /// [`Attention::predicts`] is false.
    ///
    /// # Safety
    /// As [`Attention::forward`]; `mask` is writable.
    ///
    /// # Errors
    /// As [`Attention::forward`].
    pub unsafe fn predict(
        &self,
        stream: Stream,
        inputs: &Inputs,
        mask: u64,
        workspace: u64,
    ) -> Result<()> {
        self.check_inputs(inputs, workspace)?;
        if !self.predicts {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe {
            match &self.hopper {
                Some(hopper) if hopper.selects() => hopper.predict(stream, mask, workspace),
                _ => self.general.predict(stream, inputs, mask, workspace + self.general_at as u64),
            }
        }
    }

    /// Attention over the blocks of `mask` (all reachable ones for `None`) that the call's own masks
    /// allow, from what [`Attention::quantize`] left in the workspace. Once per quantize. Blocks
    /// that no row reaches may be set and are not attended.
    ///
    /// # Safety
    /// As [`Attention::forward`]; `mask` has [`Attention::mask_shape`].
    ///
    /// # Errors
    /// As [`Attention::forward`], and [`Error::Unsupported`] for `None` on the fast path where the
    /// call has a block mask.
    pub unsafe fn attend(
        &self,
        stream: Stream,
        inputs: &Inputs,
        output: &Output,
        mask: Option<u64>,
        workspace: u64,
    ) -> Result<()> {
        self.check_inputs(inputs, workspace)?;
        self.check_output(output)?;
        let general_at = workspace + self.general_at as u64;
        // SAFETY: the caller's promise.
        unsafe {
            let Some(hopper) = &self.hopper else {
                return self.general.attend(stream, inputs, output, mask, general_at);
            };
            if self.cuda.block_mask && mask.is_none() {
                return Err(Error::Unsupported {
                    what: "attending under a block mask alone".into(),
                    remedy: "pass that mask, or the one that `predict` wrote, as `mask`",
                });
            }
            if output.stats.is_some() {
                self.general.count(stream, inputs, output, mask, true, general_at)?;
            }
            hopper.attend(stream, output, mask, workspace)
        }
    }

    fn check_inputs(&self, inputs: &Inputs, workspace: u64) -> Result<()> {
        for (name, tensor) in [("q", &inputs.q), ("k", &inputs.k), ("v", &inputs.v)] {
            check(name, tensor, self.dtype)?;
        }
        let fail = |tensor, problem: String| Err(Error::Tensor { tensor, problem });
        if workspace == 0 || !workspace.is_multiple_of(256) {
            let problem = format!("its address {workspace:#x} is not a multiple of 256");
            return fail("workspace", problem);
        }
        match (self.cuda.element_mask, &inputs.element_mask) {
            (None, None) => {}
            (Some(_), None) => return fail("element_mask", "it is announced but missing".into()),
            (None, Some(_)) => {
                let problem = "announce it in CudaOptions::element_mask";
                return fail("element_mask", problem.into());
            }
            (Some(mask), Some(tensor)) => {
                let bytes = match mask.kind {
                    MaskKind::Bool => 1,
                    MaskKind::Additive(dtype) => dtype.bytes() as u64,
                };
                if tensor.address == 0 || !tensor.address.is_multiple_of(bytes) {
                    let problem = format!("its address is not a multiple of {bytes}");
                    return fail("element_mask", problem);
                }
            }
        }
        match (self.cuda.block_mask, inputs.block_mask) {
            (true, None) => fail("block_mask", "it is announced but missing".into()),
            (false, Some(_)) => fail("block_mask", "announce it in CudaOptions::block_mask".into()),
            (true, Some(mask)) if mask.address == 0 || mask.address % 4 != 0 => {
                fail("block_mask", "its address is not a multiple of 4".into())
            }
            _ => self.device.context().bind_to_thread().map_err(driver("making the context current")),
        }
    }

    fn check_output(&self, output: &Output) -> Result<()> {
        check("o", &output.o, self.dtype)?;
        for (tensor, address, bytes) in [("lse", output.lse, 4), ("stats", output.stats, 8)] {
            if address.is_some_and(|address| address == 0 || address % bytes != 0) {
                let problem = format!("its address is not a multiple of {bytes}");
                return Err(Error::Tensor { tensor, problem });
            }
        }
        Ok(())
    }

    /// The sizes of the call.
    #[must_use]
    pub fn shape(&self) -> &AttentionShape {
        &self.shape
    }
}

/// Kernels read and write 16 bytes at a time.
fn check(name: &'static str, tensor: &Tensor, dtype: DType) -> Result<()> {
    let fail = |problem| Err(Error::Tensor { tensor: name, problem });
    if tensor.address == 0 || !tensor.address.is_multiple_of(16) {
        return fail(format!("its address {:#x} is not a multiple of 16", tensor.address));
    }
    let (s, unit) = (tensor.strides, 16 / dtype.bytes());
    if [s.batch, s.head, s.token].iter().any(|stride| stride % unit != 0) {
        return fail(format!("{s:?} are not all multiples of {unit} elements; make it contiguous"));
    }
    Ok(())
}

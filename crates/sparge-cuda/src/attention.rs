//! One kind of call, validated once; its verbs choose between the fast path and the general one.
#![expect(unsafe_code, reason = "device addresses come from the caller")]

use crate::context::Restore;
use crate::device::{Device, Stream};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::general::{Duties, General};
use crate::hopper::{self, Hopper};
use crate::launch::Pass;
use crate::options::{CudaOptions, Path, Precision};
use crate::spec::{Arch, Pool};
use crate::tensors::{Inputs, MaskKind, Output, check, check_aligned};
use sparge::{AttentionOptions, AttentionShape, Dims, Plan, SpargeConfig};

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
        let unsupported =
            |what: &str, remedy| Err(Error::Unsupported { what: what.into(), remedy });
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
        let plan = Plan::new(shape, options, config)?;
        let mask_shape = plan.mask_shape();
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
        let general = General::new(&plan, dtype, options, config, cuda)?;
        // The fast path attends under one mask: the caller's, too, goes through the selection.
        let predicts = general.selects() || (is_fast && cuda.block_mask);
        let judges = config.theta.values().iter().any(|&theta| theta > 0.0);
        let hopper = if is_fast {
            let own = hopper::pool_of(config.pooling).filter(|_| !judges && !cuda.block_mask);
            let pool = if predicts { own.unwrap_or(Pool::None) } else { Pool::None };
            Some(Hopper::new(device, shape, dtype, options, config, pool, plan.is_short(0))?)
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
                head_scores: hopper.as_ref().filter(|h| h.selects()).map_or(0, Hopper::head_scores),
                intersects: is_fast && cuda.block_mask,
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
    /// [`Attention::workspace_bytes`] bytes that nothing else uses, and `stream` is live. This
    /// `Attention`, a clone or its [`Device`] lives as long: the last of them unloads the kernels. Where
    /// a graph captured the call, all of it holds until that graph is launched no more.
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
        let _restore = self.check_inputs(inputs, workspace)?;
        let mask = self.predicts.then(|| workspace + self.mask_offset() as u64);
        // SAFETY: the caller's promise covers every part.
        unsafe {
            // The fast path's own kernels do not read the tables.
            if self.hopper.is_none() || self.predicts_by_tables() || output.stats.is_some() {
                self.upload(stream, workspace)?;
            }
            self.start(stream, inputs, output.lse.is_some(), workspace)?;
            if let Some(mask) = mask {
                self.choose(stream, inputs, mask, workspace)?;
            }
            // A mask that `choose` wrote has no block that the caller's lacks.
            self.finish(stream, inputs, output, mask, workspace)
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
        let _restore = self.check_inputs(inputs, workspace)?;
        // SAFETY: the caller's promise.
        unsafe {
            if self.hopper.is_none() {
                self.upload(stream, workspace)?;
            }
            self.start(stream, inputs, true, workspace)
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
        let _restore = self.check_inputs(inputs, workspace)?;
        if !self.predicts {
            return Ok(());
        }
        check_aligned("mask", mask, 4)?;
        // SAFETY: the caller's promise.
        unsafe {
            if self.predicts_by_tables() {
                self.upload(stream, workspace)?;
            }
            self.choose(stream, inputs, mask, workspace)
        }
    }

    /// Attention over the blocks of `mask` (all reachable ones for `None`) that the call's own masks
    /// (`inputs.block_mask` too) allow, from what [`Attention::quantize`] left in the workspace. Once per quantize. Blocks
    /// that no row reaches may be set and are not attended.
    ///
    /// # Safety
    /// As [`Attention::forward`]; `mask` has [`Attention::mask_shape`].
    ///
    /// # Errors
    /// As [`Attention::forward`].
    pub unsafe fn attend(
        &self,
        stream: Stream,
        inputs: &Inputs,
        output: &Output,
        mask: Option<u64>,
        workspace: u64,
    ) -> Result<()> {
        let _restore = self.check_inputs(inputs, workspace)?;
        self.check_output(output)?;
        if let Some(mask) = mask {
            check_aligned("mask", mask, 4)?;
        }
        // SAFETY: the caller's promise.
        unsafe {
            if self.hopper.is_none() || output.stats.is_some() {
                self.upload(stream, workspace)?;
            }
            // The fast path attends under one mask.
            let at = workspace + self.general_at as u64;
            let mask = self.general.intersect(stream, inputs, mask, at)?;
            self.finish(stream, inputs, output, mask, workspace)
        }
    }

    /// Whether the prediction takes kernels that read the tables.
    fn predicts_by_tables(&self) -> bool {
        self.general.duties.predicts || self.general.kernels.sample.is_some()
    }

    /// The tables that the general path's kernels read, once for all of them.
    unsafe fn upload(&self, stream: Stream, workspace: u64) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.general.upload(stream, workspace + self.general_at as u64) }
    }

    /// `quantize` of checked inputs; on the fast path only `with_lse` serves an attention that returns it.
    unsafe fn start(
        &self,
        stream: Stream,
        inputs: &Inputs,
        with_lse: bool,
        workspace: u64,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe {
            match &self.hopper {
                Some(hopper) => hopper.quantize(stream, inputs, with_lse, workspace),
                None => self.general.quantize(stream, inputs, workspace + self.general_at as u64),
            }
        }
    }

    /// `predict` of checked inputs.
    unsafe fn choose(
        &self,
        stream: Stream,
        inputs: &Inputs,
        mask: u64,
        workspace: u64,
    ) -> Result<()> {
        let general_at = workspace + self.general_at as u64;
        // SAFETY: the caller's promise.
        unsafe {
            match &self.hopper {
                Some(hopper) if hopper.selects() => {
                    for heads in self.general.passes() {
                        self.general.sample(stream, inputs, heads.clone(), general_at)?;
                        let samples = self.general.samples(general_at);
                        let scores = self.general.scores(general_at);
                        let pass = Pass { heads, mask, samples, scores };
                        hopper.predict(stream, pass, workspace)?;
                    }
                    Ok(())
                }
                _ => self.general.predict(stream, inputs, mask, general_at),
            }
        }
    }

    /// `attend` of checked inputs, under a mask that is within the caller's on the fast path.
    unsafe fn finish(
        &self,
        stream: Stream,
        inputs: &Inputs,
        output: &Output,
        mask: Option<u64>,
        workspace: u64,
    ) -> Result<()> {
        let general_at = workspace + self.general_at as u64;
        // SAFETY: the caller's promise.
        unsafe {
            let Some(hopper) = &self.hopper else {
                return self.general.attend(stream, inputs, output, mask, general_at);
            };
            if output.stats.is_some() {
                self.general.count(stream, inputs, output, mask, true, general_at)?;
            }
            hopper.attend(stream, output, mask, workspace)
        }
    }

    /// Makes the context current until the guard is dropped, where the inputs are right.
    fn check_inputs(&self, inputs: &Inputs, workspace: u64) -> Result<Restore> {
        let s = &self.shape;
        let q = Dims { batch: s.batch, heads: s.num_qo_heads, len: s.qo_len, dim: s.head_dim };
        let k = Dims { heads: s.num_kv_heads, len: s.kv_len, ..q };
        let v = Dims { dim: s.head_dim_v, ..k };
        for (name, tensor, dims) in [("q", &inputs.q, q), ("k", &inputs.k, k), ("v", &inputs.v, v)]
        {
            check(name, tensor, dims, self.dtype)?;
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
                check_aligned("element_mask", tensor.address, bytes)?;
            }
        }
        match (self.cuda.block_mask, inputs.block_mask) {
            (true, None) => fail("block_mask", "it is announced but missing".into()),
            (false, Some(_)) => fail("block_mask", "announce it in CudaOptions::block_mask".into()),
            (true, Some(mask)) => {
                check_aligned("block_mask", mask.address, 4)?;
                self.device.context().enter()
            }
            (false, None) => self.device.context().enter(),
        }
    }

    fn check_output(&self, output: &Output) -> Result<()> {
        let s = &self.shape;
        let dims = Dims { batch: s.batch, heads: s.num_qo_heads, len: s.qo_len, dim: s.head_dim_v };
        check("o", &output.o, dims, self.dtype)?;
        for (name, address, bytes) in [("lse", output.lse, 4), ("stats", output.stats, 8)] {
            if let Some(address) = address {
                check_aligned(name, address, bytes)?;
            }
        }
        Ok(())
    }

    /// Where [`Attention::quantize`] leaves int8 Q and K in the workspace; `None` where it does not,
    /// or for the fast path's kernels alone.
    #[must_use]
    pub fn int8_offsets(&self) -> Option<Int8Offsets> {
        let layout = &self.general.layout;
        self.general.kernels.int8.is_some().then(|| Int8Offsets {
            q8: self.general_at + layout.q8,
            k8: self.general_at + layout.k8,
            k_mean: self.general_at + layout.k_mean,
            padded_dim: self.general.call.padded as usize,
        })
    }

    /// The sizes of the call.
    #[must_use]
    pub fn shape(&self) -> &AttentionShape {
        &self.shape
    }
}

/// Quantised queries and keys in the workspace, in bytes from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Int8Offsets {
    /// `[num_qo_heads, q blocks of all sequences, 128, padded_dim]`.
    pub q8: usize,
    /// `[num_kv_heads, key blocks of all sequences, 64, padded_dim]`.
    pub k8: usize,
    /// `[num_kv_heads, sequences, head_dim]` f32: what was taken off K.
    pub k_mean: usize,
    /// Bytes of a row.
    pub padded_dim: usize,
}

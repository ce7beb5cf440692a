//! The verbs: quantize, predict, attend, and forward, which is all three.
#![expect(unsafe_code, reason = "device addresses come from the caller; launches are driver calls")]

use super::{Args, Strides};
use crate::attention::{Attention, Inputs, Output, Tensor};
use crate::device::Stream;
use crate::error::{Error, Result, driver};
use crate::jit::Kernel;
use cudarc::driver::{result, sys};

const THREADS: u32 = 256;
const ATTEND_THREADS: u32 = 384;

impl Attention {
    /// The whole operator: enqueues quantize, predict (where the config selects) and attend.
    ///
    /// # Safety
    /// On this device, until the work is done: `inputs` and `output` describe memory that holds
    /// the shape given to [`Attention::new`] in its element type, `workspace` is the address of
    /// [`Attention::workspace_bytes`] bytes that nothing else uses, and `stream` is live.
    ///
    /// # Errors
    /// [`Error::Tensor`], [`Error::Driver`].
    pub unsafe fn forward(
        &self,
        stream: Stream,
        inputs: &Inputs,
        output: &Output,
        workspace: u64,
    ) -> Result<()> {
        check_output(output)?;
        // SAFETY: the caller's promise covers every part.
        unsafe {
            self.quantize(stream, inputs, workspace)?;
            let mask = if self.predicts() {
                let mask = workspace + self.layout.mask as u64;
                self.predict(stream, mask, workspace)?;
                Some(mask)
            } else {
                None
            };
            self.attend(stream, output, mask, workspace)
        }
    }

    /// Quantises and pools q, k and v into the workspace.
    ///
    /// # Safety
    /// As [`Attention::forward`].
    ///
    /// # Errors
    /// As [`Attention::forward`].
    pub unsafe fn quantize(&self, stream: Stream, inputs: &Inputs, workspace: u64) -> Result<()> {
        for (name, tensor) in [("q", &inputs.q), ("k", &inputs.k), ("v", &inputs.v)] {
            check(name, tensor)?;
        }
        let mut args = self.arguments(workspace)?;
        (args.q, args.q_strides) = part(&inputs.q);
        (args.k, args.k_strides) = part(&inputs.k);
        (args.v, args.v_strides) = part(&inputs.v);
        let pairs = self.shape.batch * self.shape.num_kv_heads;
        let q = self.shape.batch * self.shape.num_qo_heads * args.q_blocks as usize;
        let kv = pairs * args.kv_blocks as usize;
        // SAFETY: the zeroed part lies inside the workspace; grids match the kernels' contracts.
        unsafe {
            result::memset_d8_async(args.counters, 0, self.layout.zeroed_end, stream.0.cast())
                .map_err(driver("clearing counters"))?;
            let chunks = args.chunks as u32;
            let threads = THREADS;
            launch(
                &self.kernels.statistics,
                [chunks, pairs as u32],
                threads,
                0,
                stream,
                &mut args,
            )?;
            launch(&self.kernels.quantize, [(q + kv) as u32, 1], threads, 0, stream, &mut args)
        }
    }

    /// Chooses blocks and writes the mask ([`Attention::mask_shape`]) to `mask`. Needs
    /// [`Attention::quantize`] before it on the same workspace. Does nothing where the config
    /// selects everything.
    ///
    /// # Safety
    /// As [`Attention::forward`]; `mask` is writable.
    ///
    /// # Errors
    /// As [`Attention::forward`].
    pub unsafe fn predict(&self, stream: Stream, mask: u64, workspace: u64) -> Result<()> {
        let Some((kernel, rows, shared)) = &self.kernels.select else { return Ok(()) };
        let mut args = self.arguments(workspace)?;
        args.mask = mask;
        let tiles = (args.q_blocks as usize * self.pooled_per_block()).div_ceil(*rows);
        let heads = self.shape.batch * self.shape.num_qo_heads;
        // SAFETY: the grid and the shared memory match the kernel's contract.
        unsafe { launch(kernel, [tiles as u32, heads as u32], THREADS, *shared, stream, &mut args) }
    }

    /// Attention over the blocks of `mask` (all reachable ones for `None`), from what
    /// [`Attention::quantize`] left in the workspace. Once per quantize: it uses up the work
    /// counter. Blocks that no row reaches may be set and are not attended.
    ///
    /// # Safety
    /// As [`Attention::forward`]; `mask` has [`Attention::mask_shape`].
    ///
    /// # Errors
    /// As [`Attention::forward`].
    pub unsafe fn attend(
        &self,
        stream: Stream,
        output: &Output,
        mask: Option<u64>,
        workspace: u64,
    ) -> Result<()> {
        check_output(output)?;
        let mut args = self.arguments(workspace)?;
        (args.o, args.o_strides) = part(&output.o);
        args.lse = output.lse.unwrap_or(0);
        args.mask = mask.unwrap_or(0);
        let items = self.shape.batch * self.shape.num_qo_heads * args.q_blocks as usize;
        let blocks = items.min(self.device.multiprocessors()) as u32;
        let shared = self.kernels.attend_shared;
        // SAFETY: the kernel is persistent: any grid will do.
        unsafe {
            launch(&self.kernels.attend, [blocks, 1], ATTEND_THREADS, shared, stream, &mut args)
        }
    }

    /// The arguments of a call, with the context current.
    fn arguments(&self, workspace: u64) -> Result<Args> {
        if workspace == 0 || !workspace.is_multiple_of(256) {
            return Err(Error::Tensor {
                tensor: "workspace",
                problem: format!("its address {workspace:#x} is not a multiple of 256"),
            });
        }
        self.device.context().bind_to_thread().map_err(driver("making the context current"))?;
        let at = |offset: usize| workspace + offset as u64;
        let layout = &self.layout;
        Ok(Args {
            counters: at(layout.counters),
            v_amax: at(layout.v_amax),
            q8: at(layout.q8),
            q_scale: at(layout.q_scale),
            q_shift: at(layout.q_shift),
            k8: at(layout.k8),
            k_scale: at(layout.k_scale),
            v8: at(layout.v8),
            partial: at(layout.partial),
            k_mean: at(layout.k_mean),
            q_pool: at(layout.q_pool),
            k_pool: at(layout.k_pool),
            ..self.args
        })
    }
}

fn part(tensor: &Tensor) -> (u64, Strides) {
    let s = tensor.strides;
    let strides = Strides { batch: s.batch as i64, head: s.head as i64, token: s.token as i64 };
    (tensor.address, strides)
}

fn check_output(output: &Output) -> Result<()> {
    check("o", &output.o)?;
    if output.lse.is_some_and(|lse| lse == 0 || lse % 4 != 0) {
        return Err(Error::Tensor { tensor: "lse", problem: "its address is not aligned".into() });
    }
    Ok(())
}

/// Kernels read and write 16 bytes at a time.
fn check(name: &'static str, tensor: &Tensor) -> Result<()> {
    let fail = |problem| Err(Error::Tensor { tensor: name, problem });
    if tensor.address == 0 || !tensor.address.is_multiple_of(16) {
        return fail(format!("its address {:#x} is not a multiple of 16", tensor.address));
    }
    let s = tensor.strides;
    if [s.batch, s.head, s.token].iter().any(|stride| stride % 8 != 0) {
        return fail(format!("{s:?} are not all multiples of 8 elements; make it contiguous"));
    }
    Ok(())
}

/// # Safety
/// As `cuLaunchKernel`: the addresses in `args` hold what the kernel reads and writes.
unsafe fn launch(
    kernel: &Kernel,
    [x, y]: [u32; 2],
    threads: u32,
    shared: usize,
    stream: Stream,
    args: &mut Args,
) -> Result<()> {
    let mut parameters = [std::ptr::from_mut(args).cast()];
    let stream: sys::CUstream = stream.0.cast();
    let (grid, block) = ((x, y, 1), (threads, 1, 1));
    // SAFETY: the kernel takes one parameter, which the driver copies before it returns.
    unsafe {
        result::launch_kernel(
            kernel.function(),
            grid,
            block,
            shared as u32,
            stream,
            &mut parameters,
        )
    }
    .map_err(driver("launching a kernel"))
}

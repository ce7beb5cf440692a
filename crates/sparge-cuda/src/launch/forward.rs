//! The fast path's verbs: quantize, predict, attend.
#![expect(unsafe_code, reason = "device addresses come from the caller; launches are driver calls")]

use super::{Args, enqueue, enqueue_early, part};
use crate::device::Stream;
use crate::error::{Result, driver};
use crate::hopper::Hopper;
use crate::tensors::{Inputs, Output};
use cudarc::driver::result;
use std::ops::Range;

const THREADS: u32 = 256;
const ATTEND_THREADS: u32 = 384;

/// A selection for some heads.
#[derive(Debug, Clone)]
pub(crate) struct Pass {
    pub(crate) heads: Range<usize>,
    pub(crate) mask: u64,
    /// What `sample` left of these heads; 0: nothing.
    pub(crate) samples: u64,
    /// Room for their scores and sums (`Hopper::head_scores`).
    pub(crate) scores: u64,
}

impl Hopper {
    /// Quantises and pools q, k and v into the workspace; for `attend` without a log-sum-exp, unless
    /// `with_lse`.
    ///
    /// # Safety
    /// As `Attention::forward`.
    ///
    /// # Errors
    /// As `Attention::forward`.
    pub(crate) unsafe fn quantize(
        &self,
        stream: Stream,
        inputs: &Inputs,
        with_lse: bool,
        workspace: u64,
    ) -> Result<()> {
        let mut args = self.arguments(workspace);
        if !with_lse {
            args.q_shift = 0;
        }
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
            enqueue(
                &self.kernels.statistics,
                [chunks, pairs as u32],
                threads,
                0,
                stream,
                &mut args,
            )?;
            enqueue_early(
                &self.kernels.quantize,
                [(q + kv) as u32, 1],
                threads,
                0,
                stream,
                &mut args,
            )
        }
    }

    /// Chooses blocks for some heads and writes their part of the mask (`Attention::mask_shape`). Needs
    /// `quantize` before it on the same workspace. Does nothing where the config selects everything.
    ///
    /// # Safety
    /// As `Attention::forward`; `pass.mask` is writable.
    ///
    /// # Errors
    /// As `Attention::forward`.
    pub(crate) unsafe fn predict(&self, stream: Stream, pass: Pass, workspace: u64) -> Result<()> {
        let Some(select) = &self.kernels.select else { return Ok(()) };
        let mut args = self.arguments(workspace);
        (args.mask, args.samples, args.sums) = (pass.mask, pass.samples, pass.scores);
        args.scores = pass.scores + self.sums_bytes(pass.heads.len()) as u64;
        args.first_head = pass.heads.start as i32;
        let pairs = (self.shape.batch * pass.heads.len()) as u32;
        let groups = (args.q_blocks as usize).div_ceil(select.warps) as u32;
        let masses = 8 * select.warps * args.kv_blocks as usize;
        let threads = 32 * select.warps as u32;
        // SAFETY: grids and shared memory match the kernels' contracts.
        unsafe {
            let blocks = self.score_blocks() as u32;
            enqueue_early(
                &select.score,
                [blocks, pairs],
                128,
                select.score_shared,
                stream,
                &mut args,
            )?;
            enqueue_early(&select.select, [groups, pairs], threads, masses, stream, &mut args)
        }
    }

    /// Attention over the blocks of `mask` (all reachable ones for `None`), from what
    /// `quantize` left in the workspace. Once per quantize: it uses up the work
    /// counter. Blocks that no row reaches may be set and are not attended.
    ///
    /// # Safety
    /// As `Attention::forward`; `mask` has `Attention::mask_shape`.
    ///
    /// # Errors
    /// As `Attention::forward`.
    pub(crate) unsafe fn attend(
        &self,
        stream: Stream,
        output: &Output,
        mask: Option<u64>,
        workspace: u64,
    ) -> Result<()> {
        let mut args = self.arguments(workspace);
        (args.o, args.o_strides) = part(&output.o);
        args.lse = output.lse.unwrap_or(0);
        args.mask = mask.unwrap_or(0);
        let items = self.shape.batch * self.shape.num_qo_heads * args.q_blocks as usize;
        let blocks = items.min(self.device.multiprocessors()) as u32;
        let shared = self.kernels.attend_shared;
        // SAFETY: the kernel is persistent: any grid will do.
        unsafe {
            enqueue_early(
                &self.kernels.attend,
                [blocks, 1],
                ATTEND_THREADS,
                shared,
                stream,
                &mut args,
            )
        }
    }

    /// The arguments of a call.
    fn arguments(&self, workspace: u64) -> Args {
        let at = |offset: usize| workspace + offset as u64;
        let layout = &self.layout;
        Args {
            counters: at(layout.counters),
            v_amax: at(layout.v_amax),
            k_norm: at(layout.k_norm),
            q_norm: at(layout.q_norm),
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
        }
    }
}

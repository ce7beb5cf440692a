//! The general path's verbs: quantize, predict, attend, and the counts.
#![expect(unsafe_code, reason = "device addresses come from the caller; launches are driver calls")]

use super::call::{Masks, UPLOAD_WORDS, Upload};
use super::{Call, Strides, enqueue, enqueue_early, part};
use crate::device::Stream;
use crate::error::{Result, driver};
use crate::general::General;
use crate::spec::{KernelSpec, Mma};
use crate::tensors::{Inputs, Output};
use cudarc::driver::result;
use sparge::{Dims, Layout};
use std::ops::Range;

const THREADS: u32 = 256;

impl General {
    /// Quantises what the attention reads quantised, and casts what it reads of f32.
    ///
    /// # Safety
    /// As `Attention::forward`; `at` is this path's part of the workspace.
    ///
    /// # Errors
    /// As `Attention::forward`.
    pub(crate) unsafe fn quantize(&self, stream: Stream, inputs: &Inputs, at: u64) -> Result<()> {
        let mut call = self.call(inputs, at);
        let k = &self.kernels;
        let s = &self.shape;
        // SAFETY: addresses lie in the caller's tensors and the workspace; grids are the kernels'.
        unsafe {
            if let Some(int8) = &k.int8 {
                enqueue(&int8.sums, [self.kv_blocks(), 1], 128, 0, stream, &mut call)?;
                let pairs = self.tables.sequences.len() * s.num_kv_heads;
                enqueue(&int8.centres, [pairs as u32, 1], THREADS, 0, stream, &mut call)?;
                let blocks = self.q_blocks() + self.kv_blocks();
                enqueue(&int8.rows, [blocks, 1], THREADS, 0, stream, &mut call)?;
            }
            if let Some(fp8) = &k.fp8 {
                clear(call.v_amax, self.layout.v_amax_bytes, stream)?;
                enqueue(&fp8.largest, [self.kv_blocks(), 1], 128, 0, stream, &mut call)?;
                enqueue(&fp8.quantize, [self.kv_blocks(), 1], THREADS, 0, stream, &mut call)?;
            }
            if let Some(casts) = &k.casts {
                let rows = [s.num_qo_heads * s.qo_len, s.num_kv_heads * s.kv_len];
                for (which, kernel) in casts.iter().enumerate() {
                    // int8 Q and K come from f32 themselves.
                    if which < 2 && k.int8.is_some() {
                        continue;
                    }
                    call.cast = at + self.layout.casts[which] as u64;
                    let grid = [(s.batch * rows[which.min(1)]) as u32, 1];
                    enqueue(kernel, grid, 128, 0, stream, &mut call)?;
                }
            }
        }
        Ok(())
    }

    /// Chooses blocks and writes the mask.
    ///
    /// # Safety
    /// As `Attention::forward`; `mask` is writable.
    ///
    /// # Errors
    /// As `Attention::forward`.
    pub(crate) unsafe fn predict(
        &self,
        stream: Stream,
        inputs: &Inputs,
        mask: u64,
        at: u64,
    ) -> Result<()> {
        let mut call = self.call(inputs, at);
        call.mask = mask;
        let k = &self.kernels;
        // SAFETY: as in `quantize`.
        unsafe {
            self.reach(stream, &mut call)?;
            if let Some(kernel) = &k.pool_mask {
                let subs = call.q_blocks * (sparge::BLOCK_Q as i32 / call.q_rows);
                let grid = subs * call.n_sequences * call.element_heads;
                enqueue(kernel, [grid as u32, 1], THREADS, 0, stream, &mut call)?;
            }
            let blocks = self.q_blocks() + self.kv_blocks();
            if let Some(kernel) = &k.pool {
                enqueue(kernel, [blocks, 1], THREADS, 0, stream, &mut call)?;
            }
            if let Some(judge) = &k.judge {
                enqueue(&judge.sums, [self.kv_blocks(), 1], 128, 0, stream, &mut call)?;
                let grid = (call.n_sequences * call.kv_heads) as u32;
                enqueue(&judge.centres, [grid, 1], THREADS, 0, stream, &mut call)?;
                enqueue(&judge.judge, [blocks, 1], THREADS, 0, stream, &mut call)?;
            }
            let Some(kernel) = &k.choose else { return Ok(()) };
            let pitch = call.width + if call.width % 32 == 0 { 16 } else { 0 };
            let shared = 32 * pitch as usize * 4;
            for heads in self.passes() {
                (call.first_head, call.some_heads) = (heads.start as i32, heads.len() as i32);
                self.sample(stream, inputs, heads, at)?;
                enqueue(kernel, [self.choosers as u32, 1], THREADS, shared, stream, &mut call)?;
            }
        }
        Ok(())
    }

    /// The heads that are selected for together: what is kept of their sampled queries is quadratic in
    /// length.
    pub(crate) fn passes(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (heads, together) = (self.shape.num_qo_heads, self.heads_together);
        (0..heads).step_by(together).map(move |from| from..heads.min(from + together))
    }

    /// Scores sampled queries of some heads, where there are any, for the selection that follows.
    ///
    /// # Safety
    /// As `Attention::forward`.
    ///
    /// # Errors
    /// As `Attention::forward`.
    pub(crate) unsafe fn sample(
        &self,
        stream: Stream,
        inputs: &Inputs,
        heads: Range<usize>,
        at: u64,
    ) -> Result<()> {
        let Some(kernel) = &self.kernels.sample else { return Ok(()) };
        let mut call = self.call(inputs, at);
        (call.first_head, call.some_heads) = (heads.start as i32, heads.len() as i32);
        let chunks = (call.kv_blocks as usize).div_ceil(call.sample_chunk as usize);
        let grid = self.sample_groups() * heads.len() * self.tables.sequences.len() * chunks;
        let shared = KernelSpec::sample_shared_bytes(self.shape.head_dim, self.dtype);
        // SAFETY: as in `quantize`.
        unsafe {
            let grid = [grid as u32, 1];
            // The fast path's GPUs can.
            if self.duties.head_scores > 0 {
                enqueue_early(kernel, grid, 128, shared, stream, &mut call)
            } else {
                enqueue(kernel, grid, 128, shared, stream, &mut call)
            }
        }
    }

    /// Where `sample` leaves what it found; 0: nowhere.
    pub(crate) fn samples(&self, at: u64) -> u64 {
        if self.kernels.sample.is_some() { at + self.layout.samples as u64 } else { 0 }
    }

    /// Where the fast path's selection keeps its scores.
    pub(crate) fn scores(&self, at: u64) -> u64 {
        at + self.layout.scores as u64
    }

    /// Attention over the blocks of `mask` (all reachable ones for `None`).
    ///
    /// # Safety
    /// As `Attention::forward`.
    ///
    /// # Errors
    /// As `Attention::forward`.
    pub(crate) unsafe fn attend(
        &self,
        stream: Stream,
        inputs: &Inputs,
        output: &Output,
        mask: Option<u64>,
        at: u64,
    ) -> Result<()> {
        let Some(kernel) = &self.kernels.attend else { return Ok(()) };
        let mut call = self.call(inputs, at);
        self.read_casts(&mut call, at);
        (call.o, call.o_strides) = part(&output.o);
        call.lse = output.lse.unwrap_or(0);
        call.stats = output.stats.unwrap_or(0);
        call.mask = mask.unwrap_or(0);
        let items = call.n_sequences * call.heads * call.q_blocks * 2;
        let shared = self.attend_spec().most_shared_bytes();
        // SAFETY: as in `quantize`.
        unsafe {
            if output.stats.is_some() {
                self.count(stream, inputs, output, mask, false, at)?;
            }
            enqueue(kernel, [items as u32, 1], 128, shared, stream, &mut call)
        }
    }

    /// Fills `output.stats`; the products (the last count) only where asked to count them.
    ///
    /// # Safety
    /// As `Attention::forward`.
    ///
    /// # Errors
    /// As `Attention::forward`.
    pub(crate) unsafe fn count(
        &self,
        stream: Stream,
        inputs: &Inputs,
        output: &Output,
        mask: Option<u64>,
        products: bool,
        at: u64,
    ) -> Result<()> {
        let (Some(kernel), Some(stats)) = (&self.kernels.count, output.stats) else {
            return Ok(());
        };
        let mut call = self.call(inputs, at);
        (call.stats, call.mask) = (stats, mask.unwrap_or(0));
        call.counts_products = i32::from(products);
        let rows = (call.n_sequences * call.heads * call.q_blocks) as u32;
        let heads = (call.n_sequences * call.heads) as usize;
        // SAFETY: as in `quantize`.
        unsafe {
            self.reach(stream, &mut call)?;
            clear(stats, heads * 32, stream)?;
            enqueue(kernel, [rows.div_ceil(THREADS / 32), 1], THREADS, 0, stream, &mut call)
        }
    }

    /// What the element mask lets through, where there is one.
    unsafe fn reach(&self, stream: Stream, call: &mut Call) -> Result<()> {
        let Some(kernel) = &self.kernels.reach else { return Ok(()) };
        let grid = [(call.q_blocks * 8 * call.n_sequences * call.element_heads) as u32, 1];
        // SAFETY: as in `quantize`.
        unsafe {
            clear(call.groups, self.layout.groups_bytes, stream)?;
            enqueue(kernel, grid, THREADS, 0, stream, call)
        }
    }

    /// The blocks of `mask` (all for `None`) that the caller's block mask allows, where this path is
    /// there to say so; else `mask`.
    ///
    /// # Safety
    /// As `Attention::forward`.
    ///
    /// # Errors
    /// As `Attention::forward`.
    pub(crate) unsafe fn intersect(
        &self,
        stream: Stream,
        inputs: &Inputs,
        mask: Option<u64>,
        at: u64,
    ) -> Result<Option<u64>> {
        let (Some(kernel), Some(own)) = (&self.kernels.intersect, &inputs.block_mask) else {
            return Ok(mask);
        };
        let both = at + self.layout.both as u64;
        let head_words = i64::from(self.call.q_blocks) * i64::from(self.call.mask_words);
        let heads = i64::from(self.call.heads);
        let mut masks = Masks {
            mask: mask.unwrap_or(0),
            allowed: own.address,
            both,
            allowed_sequence: own.sequence_stride as i64,
            allowed_head: own.head_stride as i64,
            heads,
            head_words,
            words: i64::from(self.call.n_sequences) * heads * head_words,
        };
        let blocks = (masks.words as u64).div_ceil(u64::from(THREADS)).min(4096) as u32;
        // SAFETY: as in `quantize`; any grid will do.
        unsafe { enqueue(kernel, [blocks, 1], THREADS, 0, stream, &mut masks)? };
        Ok(Some(both))
    }

    /// Writes the tables, which every other verb reads, to the workspace.
    ///
    /// # Safety
    /// As `Attention::forward`.
    ///
    /// # Errors
    /// As `Attention::forward`.
    pub(crate) unsafe fn upload(&self, stream: Stream, at: u64) -> Result<()> {
        let Some(kernel) = &self.kernels.upload else { return Ok(()) };
        let mut to = at + self.layout.tables as u64;
        for part in self.words.chunks(UPLOAD_WORDS) {
            let mut words = [0; UPLOAD_WORDS];
            words[..part.len()].copy_from_slice(part);
            let mut upload = Upload { to, count: part.len() as i32, unused: 0, words };
            // SAFETY: the tables' part of the workspace has room for all words.
            unsafe { enqueue(kernel, [1, 1], THREADS, 0, stream, &mut upload)? };
            to += 4 * part.len() as u64;
        }
        Ok(())
    }

    /// Query blocks of all heads.
    fn q_blocks(&self) -> u32 {
        (self.shape.num_qo_heads * self.tables.all[0]) as u32
    }

    /// Key blocks of all heads.
    fn kv_blocks(&self) -> u32 {
        (self.shape.num_kv_heads * self.tables.all[1]) as u32
    }

    /// The attention reads bf16 copies of f32 tensors.
    fn read_casts(&self, call: &mut Call, at: u64) {
        if self.kernels.casts.is_none() {
            return;
        }
        let s = &self.shape;
        let strides = |heads, len, dim| {
            let dims = Dims { batch: s.batch, heads, len, dim };
            let s = sparge::Strides::contiguous(dims, Layout::Hnd);
            Strides { batch: s.batch as i64, head: s.head as i64, token: s.token as i64 }
        };
        let [q, k, v] = self.layout.casts.map(|offset| at + offset as u64);
        if self.mma == Mma::Half {
            (call.q, call.q_strides) = (q, strides(s.num_qo_heads, s.qo_len, s.head_dim));
            (call.k, call.k_strides) = (k, strides(s.num_kv_heads, s.kv_len, s.head_dim));
        }
        (call.v, call.v_strides) = (v, strides(s.num_kv_heads, s.kv_len, s.head_dim_v));
    }

    /// The arguments of a call.
    fn call(&self, inputs: &Inputs, workspace: u64) -> Call {
        let l = &self.layout;
        let at = |offset: usize| workspace + offset as u64;
        let mut call = Call {
            sequences: at(l.tables),
            head: at(l.tables + self.tables.sequence_bytes()),
            groups: at(l.groups),
            element_pool: at(l.element_pool),
            q_features: at(l.q_features),
            k_features: at(l.k_features),
            q_known: at(l.q_known),
            k_known: at(l.k_known),
            k_sums: at(l.k_sums),
            k_centre: at(l.k_centre),
            q_cosine: at(l.q_cosine),
            k_cosine: at(l.k_cosine),
            scratch: at(l.scratch),
            samples: self.samples(workspace),
            q8: at(l.q8),
            q_scale: at(l.q_scale),
            q_shift: at(l.q_shift),
            k8: at(l.k8),
            k_scale: at(l.k_scale),
            k_mean: at(l.k_mean),
            v8: at(l.v8),
            v_amax: at(l.v_amax),
            ..self.call
        };
        (call.q, call.q_strides) = part(&inputs.q);
        (call.k, call.k_strides) = part(&inputs.k);
        (call.v, call.v_strides) = part(&inputs.v);
        if let Some(mask) = &inputs.element_mask {
            (call.element, call.element_strides) = part(mask);
            if call.element_heads == 1 {
                call.element_strides.head = 0;
            }
        }
        if let Some(mask) = &inputs.block_mask {
            call.allowed = mask.address;
            call.allowed_sequence = mask.sequence_stride as i64;
            call.allowed_head = mask.head_stride as i64;
        }
        call
    }
}

/// # Safety
/// `address` is that of `bytes` bytes of device memory.
unsafe fn clear(address: u64, bytes: usize, stream: Stream) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { result::memset_d8_async(address, 0, bytes, stream.0.cast()) }
        .map_err(driver("clearing counters"))
}

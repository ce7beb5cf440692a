//! Cuts a call into query blocks and runs them on the current rayon pool, the longest first.

use super::kernels::STRIP;
use super::tile::{BlockJob, Call, Qkv, SKIP_ROWS, Worker};
use crate::geometry::Coverage;
use crate::mask::BlockMask;
use crate::plan::{HeadAt, Plan};
use crate::quant::Quantized;
use crate::stats::{HeadStats, Stats};
use crate::tensor::{Element, Layout};
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Computes attention over the blocks of `mask` (every reachable block for `None`) into `out`
/// (contiguous, the plan's layout) and `lse` (`[batch, heads, qo_len]`, or empty).
pub(crate) fn attend<T: Element>(
    plan: &Plan<'_>,
    x: &Qkv<'_, T>,
    quantized: Option<&Quantized>,
    mask: Option<&BlockMask>,
    out: &mut [T],
    lse: &mut [f32],
) -> Stats {
    let call = Call { x, quantized, mask };
    let mut stats = Stats::new(plan.mask_shape());
    let jobs = jobs(plan, mask, &mut stats);
    let slots = slots(plan, &jobs, out, lse);

    // Each thread takes the next job from one list, longest first: the tail of the run is made of
    // short jobs, so threads finish together however uneven the mask is.
    let mut order: Vec<usize> = (0..jobs.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(jobs[i].kv_blocks));
    let next = AtomicUsize::new(0);
    let work = || {
        let mut worker = Worker::default();
        while let Some(&i) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
            let mut slot = slots[i].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let Slot { rows, lse, groups } = &mut *slot;
            let lse = (!lse.is_empty()).then_some(&mut **lse);
            *groups = worker.attend(plan, &call, &jobs[i], rows, lse);
        }
    };
    let threads = rayon::current_num_threads().min(jobs.len());
    if threads <= 1 {
        work();
    } else {
        rayon::scope(|scope| (0..threads).for_each(|_| scope.spawn(|_| work())));
    }

    for (job, slot) in jobs.iter().zip(slots) {
        let slot = slot.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        stats.head_mut(job.at.sequence, job.at.head).pv_groups += slot.groups;
    }
    stats
}

/// One job per query block, and the counts of what is reachable and what is kept.
fn jobs(plan: &Plan<'_>, mask: Option<&BlockMask>, stats: &mut Stats) -> Vec<BlockJob> {
    let mut jobs = Vec::new();
    for (sequence, seq) in plan.sequences.iter().enumerate() {
        for head in 0..plan.shape.num_qo_heads {
            let at = HeadAt { sequence, head };
            let mut count = HeadStats::default();
            for q_block in 0..seq.q_blocks() {
                let rows = seq.q_block(q_block);
                let mut kv_blocks = 0;
                for block in plan.reachable(at, q_block) {
                    count.reachable_blocks += 1;
                    count.reachable_groups += reachable_groups(plan, at, &rows, block);
                    if mask.is_none_or(|mask| mask.get(sequence, head, q_block, block)) {
                        kv_blocks += 1;
                    }
                }
                count.qk_blocks += kv_blocks as u64;
                jobs.push(BlockJob { at, q_block, kv_blocks });
            }
            *stats.head_mut(sequence, head) = count;
        }
    }
    jobs
}

/// Groups of the strips that can reach `block`: the kernels pass over whole strips.
fn reachable_groups(plan: &Plan<'_>, at: HeadAt, rows: &Range<usize>, block: usize) -> u64 {
    let keys = plan.sequences[at.sequence].kv_block(block);
    let strips = rows.clone().step_by(STRIP).map(|start| start..(start + STRIP).min(rows.end));
    strips
        .filter(|strip| plan.tile_coverage(at, strip, &keys) != Coverage::Empty)
        .map(|strip| strip.len().div_ceil(SKIP_ROWS) as u64)
        .sum()
}

/// Where one job writes.
struct Slot<'o, T> {
    rows: Vec<&'o mut [T]>,
    lse: &'o mut [f32],
    groups: u64,
}

/// Splits the output into the rows of each job. `jobs` covers every output row exactly once, head
/// by head and token by token.
fn slots<'o, T: Element>(
    plan: &Plan<'_>,
    jobs: &[BlockJob],
    out: &'o mut [T],
    mut lse: &'o mut [f32],
) -> Vec<Mutex<Slot<'o, T>>> {
    let dims = plan.shape.output_dims();
    // Rows in [batch, head, token] order, whatever the layout.
    let mut rows: Vec<Option<&'o mut [T]>> =
        (0..dims.batch * dims.heads * dims.len).map(|_| None).collect();
    for (at, row) in out.chunks_exact_mut(dims.dim).enumerate() {
        let index = match plan.layout {
            Layout::Hnd => at,
            Layout::Nhd => {
                let (head, token) = (at % dims.heads, at / dims.heads % dims.len);
                (at / dims.heads / dims.len * dims.heads + head) * dims.len + token
            }
        };
        rows[index] = Some(row);
    }
    let keep_lse = !lse.is_empty();
    let mut slots: Vec<Option<Slot<'o, T>>> = jobs.iter().map(|_| None).collect();
    // Jobs sorted by their first row, so that the LSE can be cut off piece by piece.
    let first_row = |job: &BlockJob| {
        let seq = &plan.sequences[job.at.sequence];
        (seq.batch * dims.heads + job.at.head) * dims.len
            + seq.q_start
            + seq.q_block(job.q_block).start
    };
    let mut order: Vec<usize> = (0..jobs.len()).collect();
    order.sort_by_key(|&i| first_row(&jobs[i]));
    for i in order {
        let first = first_row(&jobs[i]);
        let count = plan.sequences[jobs[i].at.sequence].q_block(jobs[i].q_block).len();
        let part = if keep_lse {
            let (part, rest) = std::mem::take(&mut lse).split_at_mut(count);
            lse = rest;
            part
        } else {
            Default::default()
        };
        let rows = rows[first..first + count].iter_mut().filter_map(Option::take).collect();
        slots[i] = Some(Slot { rows, lse: part, groups: 0 });
    }
    slots.into_iter().flatten().map(Mutex::new).collect()
}

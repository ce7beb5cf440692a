//! One dense pass over a call, and what every candidate setting would have made of it.

use super::tally::{Cell, Grid, HeadTally, Ranking};
use crate::config::{AttentionOptions, Selection, SpargeConfig};
use crate::cpu::{Partials, Qkv, SKIP_ROWS};
use crate::error::{Error, Result};
use crate::geometry::{AttentionShape, BLOCK_Q};
use crate::plan::{Budget, HeadAt, Plan, budget};
use crate::predict::{BlockMasses, PooledKeys, RowScores, Scorer};
use crate::tensor::{Element, TensorView};
use rayon::prelude::*;

/// Tallies every setting of `grid` for each query head (batch entries and sequences added up) and
/// writes the dense output into `out`, in the layout of `options`.
///
/// Instruction set, `keep_first`, `keep_local` and masks are those of `options` and `config`; what else `config`
/// says is replaced by the grid's. Costs a few times dense attention; memory per thread is 2 MiB
/// per thousand keys (at 64 value dimensions).
///
/// # Errors
/// As [`crate::attention()`]; [`Error::Calibration`] for a grid that is not usable, or where the
/// output is not finite: nothing can be said of such data.
pub fn survey<T: Element>(
    q: &TensorView<'_, T>,
    k: &TensorView<'_, T>,
    v: &TensorView<'_, T>,
    options: &AttentionOptions<'_>,
    config: &SpargeConfig,
    grid: &Grid,
    out: &mut [T],
) -> Result<Vec<HeadTally>> {
    let shape = AttentionShape::of(q, k, v)?;
    let dense = SpargeConfig {
        keep_first: config.keep_first,
        keep_local: config.keep_local,
        isa: config.isa,
        ..SpargeConfig::dense()
    };
    let plan = Plan::new(shape, options, &dense)?;
    let needed = shape.batch * shape.num_qo_heads * shape.qo_len * shape.head_dim_v;
    if out.len() != needed {
        return Err(Error::BufferTooShort { tensor: "out", got: out.len(), needed });
    }
    let candidates = Candidates::new(&plan, options, &dense, grid)?;
    let x = Qkv { q: *q, k: *k, v: *v };
    let mut tallies = vec![grid.tally(); shape.num_qo_heads];
    let group = shape.num_qo_heads / shape.num_kv_heads;
    for (sequence, seq) in plan.sequences.iter().enumerate() {
        for kv_head in 0..shape.num_kv_heads {
            let pooled: Vec<Option<PooledKeys>> = candidates
                .plans
                .iter()
                .map(|p| p.as_ref().map(|p| PooledKeys::new(p, k, sequence, kv_head)))
                .collect();
            for head in kv_head * group..(kv_head + 1) * group {
                let at = HeadAt { sequence, head };
                let rows: Vec<(HeadTally, Vec<f32>)> = (0..seq.q_blocks())
                    .into_par_iter()
                    .map_init(Worker::default, |worker, q_block| {
                        worker.partials.compute(&plan, &x, at, q_block);
                        worker.tally(&candidates, &x, &pooled, at, q_block)
                    })
                    .collect();
                for (q_block, (tally, o)) in rows.iter().enumerate() {
                    if !tally.norm.is_finite() {
                        return Err(Error::Calibration(format!(
                            "the attention of head {head} is not finite; calibrate on other data"
                        )));
                    }
                    tallies[head] += tally;
                    let first = seq.q_start + seq.q_block(q_block).start;
                    for (i, row) in o.chunks(shape.head_dim_v).enumerate() {
                        T::narrow(row, output_row(&plan, out, seq.batch, head, first + i));
                    }
                }
            }
        }
    }
    Ok(tallies)
}

/// One row of a contiguous output.
fn output_row<'o, T>(
    plan: &Plan<'_>,
    out: &'o mut [T],
    batch: usize,
    head: usize,
    token: usize,
) -> &'o mut [T] {
    let dims = plan.shape.output_dims();
    let s = crate::tensor::Strides::contiguous(dims, plan.layout);
    &mut out[batch * s.batch + head * s.head + token * s.token..][..dims.dim]
}

/// The grid, validated.
struct Candidates<'a> {
    grid: &'a Grid,
    /// Without prediction.
    plan: &'a Plan<'a>,
    /// Per ranking, where stage 1 ranks.
    plans: Vec<Option<Plan<'a>>>,
    budgets: Vec<Budget>,
    /// Log2 units.
    lambdas: Vec<f32>,
}

impl<'a> Candidates<'a> {
    fn new(
        plan: &'a Plan<'a>,
        options: &AttentionOptions<'a>,
        dense: &SpargeConfig,
        grid: &'a Grid,
    ) -> Result<Self> {
        let bad = |what: &str| Err(Error::Calibration(what.into()));
        if grid.rankings.is_empty() || grid.selections.is_empty() {
            return bad("the grid has no ranking or no selection; give at least one of each");
        }
        let ascending = grid.lambdas.windows(2).all(|w| w[0] < w[1]);
        if !ascending || !grid.lambdas.iter().all(|l| l.is_finite() && *l > 0.0) {
            return bad("the grid's λ are not ascending positive numbers");
        }
        for &selection in &grid.selections {
            let config = SpargeConfig { selection: selection.into(), ..dense.clone() };
            Plan::new(plan.shape, options, &config)?;
        }
        let plans = grid.rankings.iter().map(|ranking| match *ranking {
            Ranking::Predicted { pooling, theta } => {
                let config = SpargeConfig {
                    selection: Selection::TopCdf(Selection::AUTO_CDF).into(),
                    theta: theta.into(),
                    pooling,
                    ..dense.clone()
                };
                Plan::new(plan.shape, options, &config).map(Some)
            }
            Ranking::Exact => Ok(None),
            Ranking::Given(ref masses) => {
                let [sequences, heads, ..] = plan.mask_shape();
                let fits = |(i, m): (usize, &BlockMasses)| {
                    let seq = &plan.sequences[i / heads];
                    (m.q_blocks, m.kv_blocks) == (seq.q_blocks(), seq.kv_blocks())
                        && m.values.len() == m.q_blocks * m.kv_blocks
                };
                if masses.len() != sequences * heads || !masses.iter().enumerate().all(fits) {
                    return Err(Error::Calibration(format!(
                        "given masses do not fit the call's {sequences} sequences of {heads} heads"
                    )));
                }
                Ok(None)
            }
        });
        Ok(Self {
            grid,
            plan,
            plans: plans.collect::<Result<_>>()?,
            budgets: grid.selections.iter().map(|&s| budget(s)).collect(),
            lambdas: grid.lambdas.iter().map(|l| (l * std::f64::consts::LOG2_E) as f32).collect(),
        })
    }
}

/// Scratch of one thread.
#[derive(Default)]
struct Worker {
    partials: Partials,
    scorer: Scorer,
    /// `[λ][16 rows][pitch]`.
    sums: Vec<f32>,
}

impl Worker {
    /// Tallies one query block whose partials are there; returns its dense output too.
    fn tally<T: Element>(
        &mut self,
        candidates: &Candidates<'_>,
        x: &Qkv<'_, T>,
        pooled: &[Option<PooledKeys>],
        at: HeadAt,
        q_block: usize,
    ) -> (HeadTally, Vec<f32>) {
        let Candidates { grid, plan, .. } = *candidates;
        let mut tally = grid.tally();
        let o = self.partials.dense(plan.shape.head_dim_v);
        tally.rows = self.partials.rows.len() as u64;
        tally.norm = o.iter().map(|x| f64::from(x.abs())).sum();
        tally.reachable_blocks = self.partials.blocks.len() as u64;

        let everything: Vec<usize> = (0..self.partials.blocks.len()).collect();
        let mut all = self.cell(&everything, &candidates.lambdas, &o);
        tally.reachable_groups = all.pv_groups.last().copied().unwrap_or(0);
        // By definition, whatever the rounding.
        all.l1.last_mut().iter_mut().for_each(|l1| **l1 = 0.0);
        for (i, ranking) in grid.rankings.iter().enumerate() {
            let row = match (ranking, &candidates.plans[i], &pooled[i]) {
                (Ranking::Predicted { .. }, Some(plan), Some(keys)) => {
                    self.scorer.sample(plan, &x.q, &x.k, at, q_block..q_block + 1);
                    std::mem::take(self.scorer.row(plan, &x.q, at, q_block, keys))
                }
                (Ranking::Given(masses), ..) => {
                    let masses = &masses[at.sequence * plan.shape.num_qo_heads + at.head];
                    let kv_blocks = masses.kv_blocks;
                    let line = &masses.values[q_block * kv_blocks..][..kv_blocks];
                    self.given(plan, at, |_, block| line[block])
                }
                _ => {
                    let masses = self.partials.masses();
                    self.given(plan, at, |b, _| masses[b])
                }
            };
            self.selections(
                candidates,
                row,
                &all,
                &o,
                &mut tally.cells[i * grid.selections.len()..],
            );
        }
        if let Some(last) = tally.cells.last_mut() {
            *last = all;
        }
        (tally, o)
    }

    /// Masses from elsewhere as stage 1 would hold them. `mass` gets the position among the
    /// reachable blocks and the block.
    fn given(&self, plan: &Plan<'_>, at: HeadAt, mass: impl Fn(usize, usize) -> f32) -> RowScores {
        let mut row = RowScores::default();
        let rows = &self.partials.rows;
        for (b, &block) in self.partials.blocks.iter().enumerate() {
            row.reachable.push(block);
            let mass = mass(b, block);
            if plan.is_forced(at, rows, block) {
                row.forced.push(block);
            } else if mass.is_nan() {
                row.dissimilar.push(block);
            }
            if !mass.is_nan() {
                row.masses.push((block, mass));
            }
        }
        row
    }

    /// Fills the cells of one ranking, one per selection.
    fn selections(
        &mut self,
        candidates: &Candidates<'_>,
        mut row: RowScores,
        all: &Cell,
        o: &[f32],
        cells: &mut [Cell],
    ) {
        let forced_mass = row.rank();
        let base: Vec<usize> = row.dissimilar.iter().chain(&row.forced).copied().collect();
        // Many selections keep as many blocks: each count is evaluated once.
        let mut known: Vec<(usize, Cell)> = Vec::new();
        for (budget, cell) in candidates.budgets.iter().zip(cells) {
            let taken = match *budget {
                Budget::Some { cdf, top_k } if !row.undecidable => {
                    row.taken(forced_mass, cdf, top_k)
                }
                _ => {
                    cell.clone_from(all);
                    continue;
                }
            };
            if let Some((_, same)) = known.iter().find(|(count, _)| *count == taken) {
                cell.clone_from(same);
                continue;
            }
            let mut kept: Vec<usize> = base
                .iter()
                .copied()
                .chain(row.masses[..taken].iter().map(|m| m.0))
                .filter_map(|block| self.partials.blocks.binary_search(&block).ok())
                .collect();
            kept.sort_unstable();
            kept.dedup();
            *cell = if kept.len() == self.partials.blocks.len() {
                all.clone()
            } else {
                self.cell(&kept, &candidates.lambdas, o)
            };
            known.push((taken, cell.clone()));
        }
    }

    /// What keeping the blocks at `kept` (ascending positions) does, for every λ.
    ///
    /// A 16-row group's P·V with a block is skipped where the block's scores all lie more than λ
    /// below the rows' running maxima over the kept blocks so far. So each block has a gap, and the
    /// numerator for λ is the sum of those with gaps up to λ.
    fn cell(&mut self, kept: &[usize], lambdas: &[f32], o: &[f32]) -> Cell {
        let Self { partials, sums, .. } = self;
        let (pitch, count, bins) = (partials.pitch, partials.rows.len(), lambdas.len() + 1);
        let dim = o.len() / count.max(1);
        let mut cell = Cell {
            qk_blocks: kept.len() as u64,
            lost_mass: 0.0,
            l1: vec![0.0; bins],
            pv_groups: vec![0; bins],
        };
        for start in (0..count).step_by(SKIP_ROWS) {
            let group = start..(start + SKIP_ROWS).min(count);
            let size = group.len() * pitch;
            sums.clear();
            sums.resize(bins * size, 0.0);
            let mut max = [f32::NEG_INFINITY; SKIP_ROWS];
            let mut total = [0.0f32; SKIP_ROWS];
            for &b in kept.iter().filter(|&&b| partials.strip_sees(b, start)) {
                let mut gap = f32::INFINITY;
                let lines = b * BLOCK_Q + group.start..b * BLOCK_Q + group.end;
                for (i, line) in lines.clone().enumerate() {
                    let own = partials.max[line];
                    max[i] = max[i].max(own);
                    if own != f32::NEG_INFINITY {
                        gap = gap.min(max[i] - own);
                    }
                    total[i] += partials.sum[line];
                }
                let bin = lambdas.iter().position(|&l| gap <= l).unwrap_or(bins - 1);
                cell.pv_groups[bin] += 1;
                let from = &partials.numerators[lines.start * pitch..lines.end * pitch];
                let to = &mut sums[bin * size..(bin + 1) * size];
                to.iter_mut().zip(from).for_each(|(a, b)| *a += b);
            }
            for (i, &kept_mass) in total[..group.len()].iter().enumerate() {
                let whole = partials.total(group.start + i);
                cell.lost_mass +=
                    if whole > 0.0 { 1.0 - f64::from(kept_mass) / f64::from(whole) } else { 0.0 };
                let inverse = if kept_mass == 0.0 { 0.0 } else { 1.0 / kept_mass };
                let exact = &o[(group.start + i) * dim..][..dim];
                for bin in 0..bins {
                    let (done, rest) = sums.split_at_mut(bin * size);
                    let line = &mut rest[i * pitch..][..dim];
                    if bin > 0 {
                        let before = &done[(bin - 1) * size + i * pitch..][..dim];
                        line.iter_mut().zip(before).for_each(|(a, b)| *a += b);
                    }
                    let error: f32 =
                        line.iter().zip(exact).map(|(n, o)| (n * inverse - o).abs()).sum();
                    cell.l1[bin] += f64::from(error);
                }
            }
        }
        for bin in 1..bins {
            cell.pv_groups[bin] += cell.pv_groups[bin - 1];
        }
        cell
    }
}

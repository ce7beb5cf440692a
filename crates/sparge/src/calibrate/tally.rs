//! What every candidate setting would have cost a head, and the choice among them.

use super::file::{Bounds, HeadSettings, Measured};
use crate::config::{Pooling, Selection};
use crate::predict::BlockMasses;
use serde::{Deserialize, Serialize};

/// Below this share of skipped blocks a head is left dense: prediction costs about as much as it
/// would save.
const MIN_SPARSITY: f64 = 0.03;
/// Stands for errors that are not numbers: too large to be chosen, and sums of it stay finite.
const BAD: f64 = 1e300;

/// How the key blocks of a query block are ranked, and which mass they are taken to have.
#[derive(Debug, Clone, PartialEq)]
pub enum Ranking {
    /// As stage 1 does it.
    Predicted {
        /// Granularity of the prediction.
        pooling: Pooling,
        /// The judge, 0 for none.
        theta: f64,
    },
    /// By their true mass: the best that any predictor could do.
    Exact,
    /// By masses made elsewhere, `[sequence][head]`, head fastest; NaN keeps a block that can be
    /// reached.
    Given(Vec<BlockMasses>),
}

/// The candidate settings: every ranking with every selection and every λ.
#[derive(Debug, Clone, PartialEq)]
pub struct Grid {
    /// How blocks are ranked.
    pub rankings: Vec<Ranking>,
    /// How many of them are kept.
    pub selections: Vec<Selection>,
    /// λ of stage 2, ascending, nats; stage 2 off is always a candidate too.
    pub lambdas: Vec<f64>,
}

impl Grid {
    /// What `sparge tune` tries: θ off, 0.3 and 0.6, 23 values of τ from 0.2 to 0.9999, λ from
    /// 1 to 8.
    #[must_use]
    pub fn tuning(pooling: Pooling) -> Self {
        const CDF: [f64; 23] = [
            0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.975,
            0.98, 0.985, 0.99, 0.9925, 0.995, 0.9975, 0.999, 0.9999,
        ];
        Self {
            rankings: [0.0, 0.3, 0.6].map(|theta| Ranking::Predicted { pooling, theta }).to_vec(),
            selections: CDF.map(Selection::TopCdf).to_vec(),
            lambdas: vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
        }
    }

    /// A tally of nothing.
    #[must_use]
    pub fn tally(&self) -> HeadTally {
        let cell = Cell {
            qk_blocks: 0,
            lost_mass: 0.0,
            l1: vec![0.0; self.lambdas.len() + 1],
            pv_groups: vec![0; self.lambdas.len() + 1],
        };
        HeadTally {
            cells: vec![cell; self.rankings.len() * self.selections.len() + 1],
            ..HeadTally::default()
        }
    }
}

/// One candidate selection of one ranking.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Cell {
    /// Blocks it computes.
    pub qk_blocks: u64,
    /// True attention mass outside the kept blocks, summed over rows.
    pub lost_mass: f64,
    /// Σ|O − O′| for each λ of the grid, and last with stage 2 off.
    pub l1: Vec<f64>,
    /// (16-row group, block) pairs whose P·V is computed, likewise.
    pub pv_groups: Vec<u64>,
}

/// What the candidates of a [`Grid`] do to one head. Tallies of several calls add up.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct HeadTally {
    /// Query rows.
    pub rows: u64,
    /// Σ|O| of dense attention.
    pub norm: f64,
    /// Blocks that the masks allow.
    pub reachable_blocks: u64,
    /// (16-row group, block) pairs likewise.
    pub reachable_groups: u64,
    /// `[ranking][selection]`, selection fastest; the last one keeps every block.
    pub cells: Vec<Cell>,
}

impl std::ops::AddAssign<&Self> for HeadTally {
    /// Adds a tally of the same grid.
    fn add_assign(&mut self, other: &Self) {
        self.rows += other.rows;
        self.norm = add(self.norm, other.norm);
        self.reachable_blocks += other.reachable_blocks;
        self.reachable_groups += other.reachable_groups;
        for (a, b) in self.cells.iter_mut().zip(&other.cells) {
            a.qk_blocks += b.qk_blocks;
            a.lost_mass += b.lost_mass;
            a.l1.iter_mut().zip(&b.l1).for_each(|(a, &b)| *a = add(*a, b));
            a.pv_groups.iter_mut().zip(&b.pv_groups).for_each(|(a, b)| *a += b);
        }
    }
}

/// The sum of two errors, never NaN.
fn add(a: f64, b: f64) -> f64 {
    let b = if b.is_finite() { b } else { BAD };
    (a + b).min(BAD)
}

impl HeadTally {
    /// Error and sparsity of a cell with λ number `lambda` of the grid (the last: stage 2 off).
    #[must_use]
    pub fn measured(&self, cell: &Cell, lambda: usize) -> Measured {
        let share = |done: u64, of: u64| if of == 0 { 0.0 } else { 1.0 - done as f64 / of as f64 };
        Measured {
            rel_l1: if cell.l1[lambda] == 0.0 { 0.0 } else { cell.l1[lambda] / self.norm },
            qk_sparsity: share(cell.qk_blocks, self.reachable_blocks),
            pv_sparsity: share(cell.pv_groups[lambda], self.reachable_groups),
        }
    }

    /// The setting that skips most: first, with stage 2 off, the fewest blocks within `bounds.l1`;
    /// then the smallest λ within `bounds.l2`. Where no selection skips 3% of the blocks within the
    /// bound, the head is dense. `measured` is what the grid's arithmetic says; run the setting
    /// ([`super::rerun`]) for what the operator does.
    #[must_use]
    pub fn choose(&self, grid: &Grid, bounds: Bounds) -> HeadSettings {
        let off = grid.lambdas.len();
        let mut chosen = HeadSettings {
            cdf: None,
            top_k: None,
            theta: 0.0,
            lambda: None,
            measured: Measured::default(),
        };
        let Some((all, candidates)) = self.cells.split_last() else {
            return chosen;
        };
        let mut best: (&Cell, Measured) = (all, self.measured(all, off));
        let per_ranking = grid.selections.len().max(1);
        for (i, cell) in candidates.iter().enumerate() {
            let Ranking::Predicted { theta, .. } = grid.rankings[i / per_ranking] else {
                continue;
            };
            let measured = self.measured(cell, off);
            let sparse = measured.qk_sparsity >= MIN_SPARSITY && measured.rel_l1 <= bounds.l1;
            let fewer = cell.qk_blocks < best.0.qk_blocks
                || (cell.qk_blocks == best.0.qk_blocks && measured.rel_l1 < best.1.rel_l1);
            if sparse && fewer {
                best = (cell, measured);
                chosen.theta = theta;
                (chosen.cdf, chosen.top_k) = match grid.selections[i % per_ranking] {
                    Selection::TopCdf(cdf) => (Some(cdf), None),
                    Selection::TopK(top_k) => (None, Some(top_k)),
                    Selection::Union { cdf, top_k } => (Some(cdf), Some(top_k)),
                    Selection::Auto => (Some(Selection::AUTO_CDF), None),
                    Selection::All => (None, None),
                };
            }
        }
        chosen.measured = best.1;
        for (i, &lambda) in grid.lambdas.iter().enumerate() {
            let measured = self.measured(best.0, i);
            if measured.rel_l1 <= bounds.l2 {
                chosen.lambda = Some(lambda);
                chosen.measured = measured;
                break;
            }
        }
        chosen
    }
}

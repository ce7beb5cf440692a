//! From predicted masses to kept blocks.

use crate::geometry::top_k_count;

/// One query block's view of the key blocks.
#[derive(Debug, Default)]
pub(super) struct RowScores {
    /// Reachable blocks.
    pub(super) reachable: Vec<usize>,
    /// Blocks kept whatever their mass.
    pub(super) forced: Vec<usize>,
    /// (block, predicted mass), ascending by block.
    pub(super) masses: Vec<(usize, f32)>,
    /// The masses could not be computed (a mean or a score is not finite): keep everything.
    pub(super) undecidable: bool,
}

/// Calls `keep` for every block to compute (some more than once): blocks in descending mass until
/// their sum reaches `cdf`, at least `top_k` of the reachable ones, and the forced ones.
pub(super) fn select(row: &mut RowScores, cdf: f64, top_k: f64, mut keep: impl FnMut(usize)) {
    if row.undecidable {
        row.reachable.iter().for_each(|&j| keep(j));
        return;
    }
    row.forced.iter().for_each(|&j| keep(j));
    row.masses.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let at_least =
        if top_k > 0.0 { top_k_count(top_k, row.reachable.len()).max(1) } else { 1 };
    let mut sum = 0.0;
    for (i, &(j, mass)) in row.masses.iter().enumerate() {
        if i >= at_least && sum >= cdf {
            break;
        }
        keep(j);
        sum += f64::from(mass);
    }
}

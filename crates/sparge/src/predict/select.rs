//! From predicted masses to kept blocks.

use crate::geometry::top_k_count;

/// One query block's view of the key blocks.
#[derive(Debug, Default)]
pub(super) struct RowScores {
    /// Reachable blocks.
    pub(super) reachable: Vec<usize>,
    /// Blocks kept whatever their mass, ascending; they count towards the budget.
    pub(super) forced: Vec<usize>,
    /// Blocks kept because nothing can be said of their mass; they do not.
    pub(super) dissimilar: Vec<usize>,
    /// (block, predicted mass), ascending by block.
    pub(super) masses: Vec<(usize, f32)>,
    /// The masses could not be computed (a mean or a score is not finite): keep everything.
    pub(super) undecidable: bool,
}

/// Calls `keep` for every block to compute (some more than once): the forced ones, then the others
/// in descending mass until the masses of all that are kept (those the judge added apart) reach
/// `cdf` and their number the `top_k` share of the reachable ones.
pub(super) fn select(row: &mut RowScores, cdf: f64, top_k: f64, mut keep: impl FnMut(usize)) {
    if row.undecidable {
        row.reachable.iter().for_each(|&j| keep(j));
        return;
    }
    row.dissimilar.iter().chain(&row.forced).for_each(|&j| keep(j));
    let at_least = if top_k > 0.0 { top_k_count(top_k, row.reachable.len()) } else { 1 };
    let mut count = row.forced.len();
    let mut sum = 0.0;
    // `forced` and `masses` are both ascending by block.
    let mut forced = row.forced.iter().peekable();
    row.masses.retain(|&(j, mass)| {
        while forced.next_if(|&&f| f < j).is_some() {}
        let is_forced = forced.peek() == Some(&&j);
        sum += if is_forced { f64::from(mass) } else { 0.0 };
        !is_forced
    });
    row.masses.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    for &(j, mass) in &row.masses {
        if count >= at_least && sum >= cdf {
            break;
        }
        keep(j);
        count += 1;
        sum += f64::from(mass);
    }
}

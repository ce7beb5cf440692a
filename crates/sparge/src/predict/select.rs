//! From predicted masses to kept blocks.

use crate::geometry::top_k_count;

/// One query block's view of the key blocks.
#[derive(Debug, Default)]
pub(crate) struct RowScores {
    /// Reachable blocks.
    pub(crate) reachable: Vec<usize>,
    /// Blocks kept whatever their mass, ascending; they count towards the budget.
    pub(crate) forced: Vec<usize>,
    /// Blocks kept because nothing can be said of their mass; they do not.
    pub(crate) dissimilar: Vec<usize>,
    /// (block, predicted mass), ascending by block.
    pub(crate) masses: Vec<(usize, f32)>,
    /// The masses could not be computed (a mean or a score is not finite): keep everything.
    pub(crate) undecidable: bool,
}

impl RowScores {
    /// Sorts `masses` into the order in which the budget takes them, without the forced blocks;
    /// returns the mass of those.
    pub(crate) fn rank(&mut self) -> f64 {
        let mut sum = 0.0;
        // `forced` and `masses` are both ascending by block.
        let mut forced = self.forced.iter().peekable();
        self.masses.retain(|&(j, mass)| {
            while forced.next_if(|&&f| f < j).is_some() {}
            let is_forced = forced.peek() == Some(&&j);
            sum += if is_forced { f64::from(mass) } else { 0.0 };
            !is_forced
        });
        self.masses.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        sum
    }

    /// How many of the ranked `masses` a budget takes: until the masses of all that are kept (those
    /// the judge added apart) reach `cdf`, and their number the `top_k` share of the reachable ones.
    pub(crate) fn taken(&self, forced_mass: f64, cdf: f64, top_k: f64) -> usize {
        let at_least = if top_k > 0.0 { top_k_count(top_k, self.reachable.len()) } else { 1 };
        let mut sum = forced_mass;
        for (i, &(_, mass)) in self.masses.iter().enumerate() {
            if self.forced.len() + i >= at_least && sum >= cdf {
                return i;
            }
            sum += f64::from(mass);
        }
        self.masses.len()
    }
}

/// Calls `keep` for every block to compute (some more than once): the forced ones, those the judge
/// added, and the others in descending mass as far as the budget goes.
pub(crate) fn select(row: &mut RowScores, cdf: f64, top_k: f64, mut keep: impl FnMut(usize)) {
    if row.undecidable {
        row.reachable.iter().for_each(|&j| keep(j));
        return;
    }
    row.dissimilar.iter().chain(&row.forced).for_each(|&j| keep(j));
    let forced_mass = row.rank();
    let taken = row.taken(forced_mass, cdf, top_k);
    row.masses[..taken].iter().for_each(|&(j, _)| keep(j));
}

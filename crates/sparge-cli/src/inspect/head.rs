//! One head's picture: block mask, pooled map, true block masses.

use crate::error::Result;
use crate::picture::{Axis, Figure, Panel, Scale};
use sparge::{
    AttentionOptions, AttentionShape, BLOCK_KV, BLOCK_Q, BlockMask, Element, PerHead, Plan,
    Selection, SpargeConfig, TensorView,
};
use std::path::Path;

/// Keys up to which the true masses are computed; beyond, they cost too much for a picture.
const EXACT_UP_TO: usize = 32 * 1024;
/// Widest value vector the operator takes.
const COLUMNS: usize = 256;

/// What the picture shows, in numbers.
#[derive(Debug)]
pub(super) struct Drawn {
    pub(super) qk_sparsity: f64,
    /// Share of the attention inside the kept blocks, averaged over query blocks.
    pub(super) mass_kept: Option<f64>,
}

/// Draws the head whose q and k have one batch entry and one head. `options` must be for such a
/// call, with nothing to return.
pub(super) fn draw<T: Element>(
    q: &TensorView<'_, T>,
    k: &TensorView<'_, T>,
    options: &AttentionOptions<'_>,
    config: &SpargeConfig,
    name: &str,
    path: &Path,
) -> Result<Drawn> {
    let shape = AttentionShape::of(q, k, k)?;
    let plan = Plan::new(shape, options, config)?;
    let mask = sparge::predict(&plan, q, k)?;
    let pooled = sparge::block_masses(&plan, q, k, 0, 0)?;
    let dense = SpargeConfig { isa: config.isa, ..SpargeConfig::dense() };
    let reachable = sparge::predict(&Plan::new(shape, options, &dense)?, q, k)?;

    let (q_blocks, kv_blocks) = (pooled.q_blocks, pooled.kv_blocks);
    let cells = || (0..q_blocks).flat_map(move |i| (0..kv_blocks).map(move |j| (i, j)));
    let shown: Vec<f32> = cells()
        .map(|(i, j)| match (reachable.get(0, 0, i, j), mask.get(0, 0, i, j)) {
            (false, _) => f32::NAN,
            (true, kept) => f32::from(u8::from(kept)),
        })
        .collect();
    let panel = |title: &str, values: Vec<f32>, scale: Scale| Panel {
        title: title.into(),
        rows: Axis { label: "query", step: BLOCK_Q, end: shape.qo_len },
        columns: Axis { label: "key", step: BLOCK_KV, end: shape.kv_len },
        values,
        scale,
        aspect: BLOCK_Q / BLOCK_KV,
    };
    let share = |label| Scale::Log { from: -4, label };
    let mut panels = vec![
        panel("Blocks computed", shown, Scale::Binary { one: "computed", zero: "skipped" }),
        panel(
            "Pooled map (predicted)",
            pooled.values,
            share("predicted share of the row's attention"),
        ),
    ];
    let mut mass_kept = None;
    if shape.kv_len <= EXACT_UP_TO {
        let mut exact = exact_masses(q, k, options, &dense)?;
        mass_kept = Some(kept(&exact, &mask, q_blocks, kv_blocks));
        for (value, (i, j)) in exact.iter_mut().zip(cells()) {
            if !reachable.get(0, 0, i, j) {
                *value = f32::NAN;
            }
        }
        panels.push(panel("True map", exact, share("true share of the row's attention")));
    }

    let of = reachable.count();
    let qk_sparsity = if of == 0 { 0.0 } else { 1.0 - mask.count() as f64 / of as f64 };
    let mut subtitle = format!(
        "{} queries × {} keys, blocks of {BLOCK_Q} × {BLOCK_KV}; {} of {of} blocks computed ({:.1}% skipped)",
        shape.qo_len,
        shape.kv_len,
        mask.count(),
        100.0 * qk_sparsity
    );
    if let Some(mass) = mass_kept {
        subtitle += &format!("; they hold {:.2}% of the attention", 100.0 * mass);
    }
    Figure { title: name.into(), subtitle, panels }.save(path)?;
    Ok(Drawn { qk_sparsity, mass_kept })
}

/// `[q_blocks, kv_blocks]`: each key block's share of its rows' attention.
///
/// Attention over values that say which block a key is in: the operator's output then is the mass
/// of every block, under all of its masks.
pub(crate) fn exact_masses<T: Element>(
    q: &TensorView<'_, T>,
    k: &TensorView<'_, T>,
    options: &AttentionOptions<'_>,
    dense: &SpargeConfig,
) -> Result<Vec<f32>> {
    let (q_len, kv_len) = (q.dims().len, k.dims().len);
    let (q_blocks, kv_blocks) = (q_len.div_ceil(BLOCK_Q), kv_len.div_ceil(BLOCK_KV));
    // f32 whatever the inputs: masses add up over thousands of keys.
    let [wide_q, wide_k] = [widened(q), widened(k)];
    let q = TensorView::hnd(&wide_q, [1, 1, q_len, q.dims().dim])?;
    let k = TensorView::hnd(&wide_k, [1, 1, kv_len, k.dims().dim])?;
    let mut masses = vec![0.0; q_blocks * kv_blocks];
    for first in (0..kv_blocks).step_by(COLUMNS) {
        let columns = COLUMNS.min(kv_blocks - first);
        let mut v = vec![0.0f32; kv_len * columns];
        for (key, row) in v.chunks_mut(columns).enumerate() {
            if let Some(is_in) = (key / BLOCK_KV).checked_sub(first).and_then(|j| row.get_mut(j)) {
                *is_in = 1.0;
            }
        }
        let v = TensorView::hnd(&v, [1, 1, kv_len, columns])?;
        let o = sparge::attention(&q, &k, &v, options, dense)?.o;
        for (i, row) in o.chunks(columns).enumerate() {
            let rows = (q_len - i / BLOCK_Q * BLOCK_Q).min(BLOCK_Q) as f32;
            let at = i / BLOCK_Q * kv_blocks + first;
            masses[at..at + columns].iter_mut().zip(row).for_each(|(m, x)| *m += x / rows);
        }
    }
    Ok(masses)
}

/// The rows of a tensor with one batch entry and one head, one after another, as f32.
fn widened<T: Element>(x: &TensorView<'_, T>) -> Vec<f32> {
    let mut wide = vec![0.0; x.dims().len * x.dims().dim];
    for (i, row) in wide.chunks_mut(x.dims().dim).enumerate() {
        T::widen(x.row(0, 0, i), row);
    }
    wide
}

/// The share of all attention inside the blocks of `mask`.
fn kept(masses: &[f32], mask: &BlockMask, q_blocks: usize, kv_blocks: usize) -> f64 {
    let (mut inside, mut all) = (0.0, 0.0);
    for i in 0..q_blocks {
        for j in 0..kv_blocks {
            let mass = f64::from(masses[i * kv_blocks + j]);
            all += mass;
            inside += if mask.get(0, 0, i, j) { mass } else { 0.0 };
        }
    }
    if all > 0.0 { inside / all } else { 1.0 }
}

/// What a configuration selects, in a few words.
pub(super) fn describe(config: &SpargeConfig) -> String {
    match config.selection.values() {
        [Selection::Auto] => "default selection".into(),
        [Selection::All] => "dense".into(),
        [Selection::TopCdf(cdf)] => format!("cdf {cdf}"),
        [Selection::TopK(top_k)] => format!("top-k {top_k}"),
        [Selection::Union { cdf, top_k }] => format!("cdf {cdf} or top-k {top_k}"),
        _ => "selection per head".into(),
    }
}

/// The configuration of a call of which only `head` is left.
pub(super) fn of_head(config: &SpargeConfig, head: usize) -> SpargeConfig {
    let one = |x: &PerHead<f64>| PerHead::All(*x.get(head));
    SpargeConfig {
        selection: PerHead::All(*config.selection.get(head)),
        theta: one(&config.theta),
        lambda: one(&config.lambda),
        ..config.clone()
    }
}

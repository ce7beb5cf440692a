//! `sparge eval order`: what the order of spatial tokens does to self-similarity and sparsity.

use crate::error::{Error, Result};
use crate::flags::{pooling, pooling_name};
use crate::input::Qkv;
use crate::inspect::exact_masses;
use crate::safetensor::Reader;
use crate::terminal::{self, Table, percent};
use crate::{Context, flags::LayoutArg};
use serde::Serialize;
use sparge::permute::{Grid, Order, Permutation, mean_distance, similarity};
use sparge::{
    AttentionOptions, AttentionShape, BLOCK_KV, BLOCK_Q, PerHead, Plan, Pooling, Selection,
    SpargeConfig, TensorView, metrics,
};
use std::path::PathBuf;
use std::str::FromStr;

/// Halvings of the search for τ.
const STEPS: usize = 12;

/// Orders of tokens that lie in a time × height × width box.
///
/// Reads q, k and v (F32, [batch, heads, tokens, dim]) of full attention from a safetensors file.
/// For every order: how far apart the tokens of a block are; the self-similarity of the blocks of q
/// and of k (k less its mean); the share of blocks that holds 95% of the attention (no predictor);
/// and, for every granularity of the prediction, the sparsity at the largest τ-selection whose
/// relative L1 error stays within a bound.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The tensors
    #[arg(value_name = "IN.safetensors")]
    input: PathBuf,
    /// The box: TIMExHEIGHTxWIDTH tokens, row-major
    #[arg(long, value_name = "TxHxW", value_parser = size)]
    grid: [usize; 3],
    /// Text tokens before the box, which stay
    #[arg(long, value_name = "N", default_value_t = 0)]
    prefix: usize,
    /// row-major, column-major, time-major, hilbert, random or random:SEED
    #[arg(long = "order", value_name = "ORDER", value_delimiter = ',', value_parser = Order::from_str,
          default_values = ["random", "row-major", "column-major", "time-major", "hilbert"])]
    orders: Vec<Order>,
    /// Granularities of the prediction, as in `sparge attend`
    #[arg(long = "pooling", value_name = "POOLING", value_delimiter = ',', value_parser = pooling,
          default_values = ["block", "16x16+2rows"])]
    poolings: Vec<Pooling>,
    /// Bound on the relative L1 error of each head's output
    #[arg(long, value_name = "L1", default_value_t = 0.05)]
    l1: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    input: String,
    grid: [usize; 3],
    prefix: usize,
    heads: usize,
    head_dim: usize,
    l1: f64,
    results: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    order: String,
    /// Mean distance of two tokens of a block of 64, in cells.
    distance: f64,
    similarity_q: f64,
    similarity_k: f64,
    /// Share of each row's blocks that holds 95% of its attention, mean over rows and heads.
    blocks_95: f64,
    at_bound: Vec<AtBound>,
}

#[derive(Debug, Serialize)]
struct AtBound {
    pooling: String,
    /// Mean over the heads; heads that no τ brings within the bound count as dense.
    qk_sparsity: f64,
    rel_l1: f64,
    tau: f64,
}

/// Runs the subcommand.
pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    let [time, height, width] = args.grid;
    let mut file = Reader::open(&args.input)?;
    let qkv = Qkv::<f32>::read(&mut file, LayoutArg::Hnd.layout())?;
    let views = qkv.views()?;
    let shape = AttentionShape::of(&views[0], &views[1], &views[2])?;
    if shape.num_qo_heads != shape.num_kv_heads || shape.qo_len != shape.kv_len {
        return Err(Error::input(
            "q, k and v differ in heads or tokens; expected self-attention with as many of each",
        ));
    }
    if !(args.l1 > 0.0 && args.l1.is_finite()) {
        return Err(Error::input(format!("--l1 is {}, expected above 0", args.l1)));
    }
    let box_and_prefix = time
        .checked_mul(height)
        .and_then(|x| x.checked_mul(width))
        .and_then(|x| x.checked_add(args.prefix));
    let suffix = box_and_prefix.and_then(|n| shape.qo_len.checked_sub(n)).ok_or_else(|| {
        Error::input(format!(
            "--grid and --prefix need more than the {} tokens there are",
            shape.qo_len
        ))
    })?;
    let grid = Grid { prefix: args.prefix, time, height, width, suffix };
    let heads = heads(&views, &shape);
    let results = args
        .orders
        .iter()
        .map(|order| one_order(*order, &grid, &heads, &shape, args, context))
        .collect::<Result<Vec<_>>>()?;
    let report = Report {
        input: args.input.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        grid: args.grid,
        prefix: args.prefix,
        heads: heads.len(),
        head_dim: shape.head_dim,
        l1: args.l1,
        results,
    };
    if context.json { terminal::print_json(&report) } else { terminal::print(&render(&report)) }
}

/// q, k and v of one head, contiguous.
type Head = [Vec<f32>; 3];

fn heads(views: &[TensorView<'_, f32>; 3], shape: &AttentionShape) -> Vec<Head> {
    let each = (0..shape.batch).flat_map(|b| (0..shape.num_qo_heads).map(move |h| (b, h)));
    each.map(|(b, h)| {
        [0, 1, 2].map(|i| (0..shape.qo_len).flat_map(|t| views[i].row(b, h, t)).copied().collect())
    })
    .collect()
}

fn one_order(
    order: Order,
    grid: &Grid,
    heads: &[Head],
    shape: &AttentionShape,
    args: &Args,
    context: &Context,
) -> Result<Row> {
    let permutation = Permutation::new(order, grid)?;
    let widths = [shape.head_dim, shape.head_dim, shape.head_dim_v];
    let count = heads.len().max(1) as f64;
    let mut row = Row {
        order: order.to_string(),
        distance: mean_distance(&permutation, grid, BLOCK_KV)?,
        similarity_q: 0.0,
        similarity_k: 0.0,
        blocks_95: 0.0,
        at_bound: Vec::new(),
    };
    let mut sums = vec![[0.0; 3]; args.poolings.len()];
    for head in heads {
        let mut x = Vec::with_capacity(3);
        for (x_i, width) in head.iter().zip(widths) {
            x.push(permutation.apply(x_i, width)?);
        }
        let view = |i: usize| TensorView::hnd(&x[i], [1, 1, shape.qo_len, widths[i]]);
        let views = [view(0)?, view(1)?, view(2)?];
        row.similarity_q += similarity(&x[0], widths[0], BLOCK_Q)? / count;
        row.similarity_k += similarity(&centred(&x[1], widths[1]), widths[1], BLOCK_KV)? / count;
        row.blocks_95 += blocks_holding(0.95, &views, context)? / count;
        for (sums, &pooling) in sums.iter_mut().zip(&args.poolings) {
            let found = sparsest(&views, pooling, args.l1, context)?;
            sums.iter_mut().zip(found).for_each(|(sum, x)| *sum += x / count);
        }
    }
    row.at_bound = args
        .poolings
        .iter()
        .zip(sums)
        .map(|(&p, [qk_sparsity, rel_l1, tau])| AtBound {
            pooling: pooling_name(p),
            qk_sparsity,
            rel_l1,
            tau,
        })
        .collect();
    Ok(row)
}

/// Rows less their mean.
fn centred(x: &[f32], width: usize) -> Vec<f32> {
    let mut mean = vec![0.0f64; width];
    x.chunks_exact(width)
        .for_each(|r| mean.iter_mut().zip(r).for_each(|(m, &x)| *m += f64::from(x)));
    let rows = (x.len() / width).max(1) as f64;
    x.iter().enumerate().map(|(i, &x)| x - (mean[i % width] / rows) as f32).collect()
}

/// Mean over the rows of the share of blocks that, largest first, hold `share` of the attention.
fn blocks_holding(
    share: f64,
    [q, k, _]: &[TensorView<'_, f32>; 3],
    context: &Context,
) -> Result<f64> {
    let dense = SpargeConfig { isa: context.isa, ..SpargeConfig::dense() };
    let masses = exact_masses(q, k, &AttentionOptions::default(), &dense)?;
    let kv_blocks = k.dims().len.div_ceil(BLOCK_KV);
    let needed = masses.chunks_exact(kv_blocks).map(|row| {
        let mut row = row.to_vec();
        row.sort_unstable_by(|a, b| b.total_cmp(a));
        let mut sum = 0.0;
        let count = row.iter().take_while(|&&m| {
            let more = sum < share;
            sum += f64::from(m);
            more
        });
        count.count() as f64 / kv_blocks as f64
    });
    Ok(needed.sum::<f64>() / (masses.len() / kv_blocks).max(1) as f64)
}

/// `[sparsity, relative L1, τ]` of the smallest τ found whose error is within `bound`.
fn sparsest(
    [q, k, v]: &[TensorView<'_, f32>; 3],
    pooling: Pooling,
    bound: f64,
    context: &Context,
) -> Result<[f64; 3]> {
    let options = AttentionOptions::default();
    let shape = AttentionShape::of(q, k, v)?;
    let mut out = vec![0.0; shape.qo_len * shape.head_dim_v];
    let dense = SpargeConfig { isa: context.isa, ..SpargeConfig::dense() };
    sparge::forward(&Plan::new(shape, &options, &dense)?, q, k, v, &mut out)?;
    let exact: Vec<f64> = out.iter().map(|&x| f64::from(x)).collect();
    let (mut low, mut high) = (0.0, 1.0);
    let mut best = [0.0, 0.0, 1.0];
    for _ in 0..STEPS {
        let tau = (low + high) / 2.0;
        // Nothing is forced: the order alone decides.
        let config = SpargeConfig {
            selection: PerHead::All(Selection::TopCdf(tau)),
            pooling,
            keep_first: 0,
            ..dense.clone()
        };
        let side = sparge::forward(&Plan::new(shape, &options, &config)?, q, k, v, &mut out)?;
        let got = out.iter().map(|&x| f64::from(x));
        let error = metrics::compare(got, exact.iter().copied()).rel_l1;
        if error <= bound {
            best = [side.stats.qk_sparsity(), error, tau];
            high = tau;
        } else {
            low = tau;
        }
    }
    Ok(best)
}

fn size(text: &str) -> std::result::Result<[usize; 3], String> {
    let parts: Vec<&str> = text.split('x').collect();
    let number = |s: &str| s.parse().ok().filter(|n| (1..=1 << 20).contains(n));
    match parts.as_slice() {
        [t, h, w] => Some([*t, *h, *w]),
        _ => None,
    }
    .and_then(|[t, h, w]| Some([number(t)?, number(h)?, number(w)?]))
    .ok_or_else(|| "expected TIMExHEIGHTxWIDTH, such as 1x64x64 or 8x32x32".into())
}

fn render(report: &Report) -> String {
    let [t, h, w] = report.grid;
    let mut text = format!(
        "{}: {} heads, {t}×{h}×{w} tokens; sparsity at relative L1 ≤ {}\n\n",
        report.input, report.heads, report.l1
    );
    let mut heads: Vec<String> =
        ["order", "distance", "similarity of q", "of k", "blocks for 95%"].map(Into::into).into();
    if let Some(row) = report.results.first() {
        heads.extend(row.at_bound.iter().map(|b| format!("skipped, {}", b.pooling)));
    }
    let mut table = Table::new(heads);
    for row in &report.results {
        let mut cells = vec![
            row.order.clone(),
            format!("{:.2}", row.distance),
            format!("{:.3}", row.similarity_q),
            format!("{:.3}", row.similarity_k),
            percent(row.blocks_95),
        ];
        cells.extend(row.at_bound.iter().map(|b| percent(b.qk_sparsity)));
        table.row(cells);
    }
    text += &table.render();
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(size("8x32x16"), Ok([8, 32, 16]));
        for bad in ["", "8", "8x8", "0x8x8", "8x8x8x8", "axbxc", "-1x2x3"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }
}

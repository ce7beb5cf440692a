//! `sparge attend`: one attention call on tensors from a file.

use crate::calibration::CalibrationArgs;
use crate::error::Result;
use crate::flags::{LayoutArg, SelectionArgs, VisibilityArgs};
use crate::input::{Extras, Qkv, element_type};
use crate::policy::Policy;
use crate::safetensor::{self, Entry, Reader, Stored};
use crate::terminal::{self, percent, seconds};
use crate::{Context, memory, output};
use half::{bf16, f16};
use safetensors::tensor::Dtype;
use serde::Serialize;
use sparge::reference::{self, Rules};
use sparge::{
    AttentionOptions, AttentionShape, BLOCK_KV, BLOCK_Q, BlockMask, Element, Plan, Selection,
    SpargeConfig, TensorView, metrics,
};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Instant;

/// Attention on tensors from a safetensors file.
///
/// Reads q [batch, num_qo_heads, qo_len, head_dim], k and v [batch, num_kv_heads, kv_len, ·] as
/// F32, F16 or BF16, and where present attn_mask (BOOL or U8: nonzero may be attended; float:
/// added to the scaled scores), block_mask (U8 or BOOL [batch|1, heads|1, ⌈qo_len/128⌉,
/// ⌈kv_len/64⌉]), cu_seqlens_q and cu_seqlens_k (I32 or I64) for packed sequences, and kv_lens for
/// padded keys. Writes o in q's type and layout.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The tensors
    #[arg(value_name = "IN.safetensors")]
    input: PathBuf,
    /// Where the result goes
    #[arg(short, long, value_name = "OUT.safetensors")]
    output: PathBuf,
    /// Order of heads and tokens in q, k, v and o
    #[arg(long, value_enum, default_value_t = LayoutArg::Hnd)]
    layout: LayoutArg,
    /// Factor on q·k [default: 1/√head_dim]
    #[arg(long, value_name = "S", allow_negative_numbers = true)]
    scale: Option<f64>,
    #[command(flatten)]
    visibility: VisibilityArgs,
    #[command(flatten)]
    selection: SelectionArgs,
    #[command(flatten)]
    calibration: CalibrationArgs,
    /// With --calibration: the layer whose settings to use
    #[arg(long, value_name = "L", requires = "calibration", default_value_t = 0)]
    layer: usize,
    /// Exact attention over everything the masks allow
    #[arg(long, conflicts_with_all = ["topk", "cdf", "theta", "lambda", "pooling", "keep_first", "qk", "calibration"])]
    dense: bool,
    /// Choose the blocks by a named policy instead, see `sparge eval --help`
    #[arg(long, value_name = "POLICY", value_parser = Policy::from_str,
          conflicts_with_all = ["dense", "reference", "topk", "cdf", "theta", "lambda", "pooling", "keep_first", "qk"])]
    policy: Option<Policy>,
    /// Compute with the plain f64 reference (slow; o and lse are then F64)
    #[arg(long, conflicts_with = "qk")]
    reference: bool,
    /// Compare the result with exact dense attention (without block_mask) and time that too
    #[arg(long)]
    compare: bool,
    /// Also write lse [batch, num_qo_heads, qo_len], the log-sum-exp of each row's scores
    #[arg(long)]
    lse: bool,
    /// Also write block_mask, the computed blocks, U8 [batch, num_qo_heads, ⌈qo_len/128⌉, ⌈kv_len/64⌉]
    #[arg(long)]
    write_mask: bool,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    shape: Shape,
    dtype: &'static str,
    causal: bool,
    backend: &'static str,
    isa: String,
    threads: usize,
    /// Share of reachable blocks whose Q·Kᵀ was skipped.
    qk_sparsity: f64,
    /// The same for P·V; null from the reference, which does not count it.
    pv_sparsity: Option<f64>,
    predict_s: f64,
    attend_s: f64,
    #[serde(flatten)]
    compared: Option<Compared>,
    output: String,
}

#[derive(Debug, Serialize)]
struct Shape {
    batch: usize,
    num_qo_heads: usize,
    num_kv_heads: usize,
    qo_len: usize,
    kv_len: usize,
    head_dim: usize,
    head_dim_v: usize,
}

#[derive(Debug, Serialize)]
struct Compared {
    rel_l1: f64,
    cosine: f64,
    rmse: f64,
    max_abs: f64,
    dense_s: f64,
}

/// Runs the subcommand.
pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    output::check_writable(&args.output)?;
    let mut file = Reader::open(&args.input)?;
    let report = match element_type(&file, "")? {
        Dtype::F16 => attend::<f16>(args, context, &mut file),
        Dtype::BF16 => attend::<bf16>(args, context, &mut file),
        _ => attend::<f32>(args, context, &mut file),
    }?;
    if context.json { terminal::print_json(&report) } else { terminal::print(&render(&report)) }
}

fn attend<T: Stored + Element>(
    args: &Args,
    context: &Context,
    file: &mut Reader,
) -> Result<Report> {
    let layout = args.layout.layout();
    let qkv = Qkv::<T>::read(file, layout)?;
    let extras = Extras::read(file)?;
    let [q, k, v] = qkv.views()?;
    let shape = AttentionShape::of(&q, &k, &v)?;
    let lengths = extras.sequence_lengths(shape.qo_len, shape.kv_len);
    let longest_q = lengths.iter().map(|l| l.0).max().unwrap_or(0);
    let longest_kv = lengths.iter().map(|l| l.1).max().unwrap_or(0);
    let options = AttentionOptions {
        softmax_scale: args.scale,
        causal: args.visibility.alignment(lengths.iter().copied())?,
        window: args.visibility.window(),
        sink_blocks: args.visibility.sink_blocks,
        block_mask: extras.block_mask.as_ref(),
        element_mask: extras.element_mask(longest_q)?,
        lengths: extras.lengths(),
        return_lse: args.lse,
        return_mask: args.write_mask,
        layout,
    };
    let config = if args.dense {
        SpargeConfig { isa: context.isa, ..SpargeConfig::dense() }
    } else if let Some(config) = args.calibration.layer(&shape, args.layer, context.isa)? {
        config
    } else {
        match &args.policy {
            Some(policy) => policy.config(context.isa),
            None => args.selection.config(context.isa)?,
        }
    };
    let sequences = lengths.len().max(shape.batch);
    check_memory(args, &shape, sequences, [longest_q, longest_kv], size_of::<T>())?;
    let plan = Plan::new(shape, &options, &config)?;

    let views = [q, k, v];
    let result = if args.reference {
        by_reference(&plan, &options, &views, args)?
    } else {
        by_operator(&plan, &views, args.policy.as_ref())?
    };
    let compared = args.compare.then(|| compare(&result, &options, &views, context)).transpose()?;

    let mut entries = Vec::new();
    match &result.o {
        Values::Stored(o) => entries.push(Entry::new("o", o, qkv.output_shape())),
        Values::F64(o) => entries.push(Entry::new("o", o, qkv.output_shape())),
    }
    let lse_shape = vec![shape.batch, shape.num_qo_heads, shape.qo_len];
    match &result.lse {
        Some(Values::Stored(lse)) => entries.push(Entry::new("lse", lse, lse_shape)),
        Some(Values::F64(lse)) => entries.push(Entry::new("lse", lse, lse_shape)),
        None => {}
    }
    let mask = result.block_mask.as_ref().map(|mask| (mask.to_bytes(), mask.shape().to_vec()));
    if let Some((bytes, shape)) = &mask {
        entries.push(Entry::new("block_mask", bytes, shape.clone()));
    }
    safetensor::write(&args.output, entries)?;

    Ok(Report {
        shape: Shape {
            batch: shape.batch,
            num_qo_heads: shape.num_qo_heads,
            num_kv_heads: shape.num_kv_heads,
            qo_len: shape.qo_len,
            kv_len: shape.kv_len,
            head_dim: shape.head_dim,
            head_dim_v: shape.head_dim_v,
        },
        dtype: T::NAME,
        causal: args.visibility.causal,
        backend: if args.reference { "reference" } else { "cpu" },
        isa: format!("{:?}", plan.isa()).to_lowercase(),
        threads: rayon::current_num_threads(),
        qk_sparsity: result.qk_sparsity,
        pv_sparsity: result.pv_sparsity,
        predict_s: result.predict_s,
        attend_s: result.attend_s,
        compared,
        output: args.output.display().to_string(),
    })
}

/// A tensor in the inputs' type (or f32 for the log-sum-exp), or the reference's f64.
enum Values<T> {
    Stored(Vec<T>),
    F64(Vec<f64>),
}

struct Computed<T> {
    o: Values<T>,
    lse: Option<Values<f32>>,
    block_mask: Option<BlockMask>,
    qk_sparsity: f64,
    pv_sparsity: Option<f64>,
    predict_s: f64,
    attend_s: f64,
}

fn by_operator<T: Element>(
    plan: &Plan<'_>,
    views: &[TensorView<'_, T>; 3],
    policy: Option<&Policy>,
) -> Result<Computed<T>> {
    let shape = plan.shape();
    let mut o =
        vec![T::default(); shape.batch * shape.num_qo_heads * shape.qo_len * shape.head_dim_v];
    let [q, k, v] = views;
    let side = match policy {
        Some(policy) => policy.forward(plan, views, &mut o)?,
        None => sparge::forward(plan, q, k, v, &mut o)?,
    };
    Ok(Computed {
        o: Values::Stored(o),
        lse: side.lse.map(Values::Stored),
        block_mask: side.block_mask,
        qk_sparsity: side.stats.qk_sparsity(),
        pv_sparsity: Some(side.stats.pv_sparsity()),
        predict_s: side.stats.predict.as_secs_f64(),
        attend_s: side.stats.attend.as_secs_f64(),
    })
}

fn by_reference<T: Element>(
    plan: &Plan<'_>,
    options: &AttentionOptions<'_>,
    [q, k, v]: &[TensorView<'_, T>; 3],
    args: &Args,
) -> Result<Computed<T>> {
    let start = Instant::now();
    let mask = reference::predict(plan, q, k, &Rules::OURS).mask;
    let predict_s = if args.dense { 0.0 } else { start.elapsed().as_secs_f64() };
    let start = Instant::now();
    let output = if args.dense {
        reference::dense(plan, q, k, v)
    } else {
        reference::sparge(plan, q, k, v, &Rules::OURS)
    };
    // The sparse reference predicts once more by itself.
    let attend_s = (start.elapsed().as_secs_f64() - predict_s).max(0.0);
    // A plan that keeps everything predicts every reachable block.
    let everything = SpargeConfig { selection: Selection::All.into(), ..SpargeConfig::dense() };
    let reachable = sparge::predict(&Plan::new(*plan.shape(), options, &everything)?, q, k)?;
    let share = mask.count() as f64 / reachable.count().max(1) as f64;
    Ok(Computed {
        o: Values::F64(output.o),
        lse: args.lse.then_some(Values::F64(output.lse)),
        block_mask: args.write_mask.then_some(mask),
        qk_sparsity: if reachable.count() == 0 { 0.0 } else { 1.0 - share },
        pv_sparsity: None,
        predict_s,
        attend_s,
    })
}

/// Exact dense attention under the same masks, save the block mask, which is a choice of sparsity.
fn compare<T: Element>(
    result: &Computed<T>,
    options: &AttentionOptions<'_>,
    [q, k, v]: &[TensorView<'_, T>; 3],
    context: &Context,
) -> Result<Compared> {
    let options =
        AttentionOptions { block_mask: None, return_lse: false, return_mask: false, ..*options };
    let config = SpargeConfig { isa: context.isa, ..SpargeConfig::dense() };
    let dense = sparge::attention(q, k, v, &options, &config)?;
    let exact = dense.o.iter().map(|x| f64::from(x.to_f32()));
    let error = match &result.o {
        Values::Stored(o) => metrics::compare(o.iter().map(|x| f64::from(x.to_f32())), exact),
        Values::F64(o) => metrics::compare(o.iter().copied(), exact),
    };
    Ok(Compared {
        rel_l1: error.rel_l1,
        cosine: error.cosine,
        rmse: error.rmse,
        max_abs: error.max_abs,
        dense_s: dense.stats.attend.as_secs_f64(),
    })
}

fn check_memory(
    args: &Args,
    shape: &AttentionShape,
    sequences: usize,
    [longest_q, longest_kv]: [usize; 2],
    element: usize,
) -> Result<()> {
    let product = |xs: &[usize]| xs.iter().fold(1u128, |a, &x| a.saturating_mul(x as u128));
    let element = if args.reference { 8 } else { element };
    let rows = product(&[shape.batch, shape.num_qo_heads, shape.qo_len]);
    let outputs = if args.compare { 2 } else { 1 };
    let mut bytes = product(&[
        shape.batch,
        shape.num_qo_heads,
        shape.qo_len,
        shape.head_dim_v,
        element,
        outputs,
    ])
    .saturating_add(rows.saturating_mul(8));
    let mask_rows = product(&[sequences, shape.num_qo_heads, longest_q.div_ceil(BLOCK_Q)]);
    let kv_blocks = longest_kv.div_ceil(BLOCK_KV);
    bytes = bytes.saturating_add(mask_rows.saturating_mul(product(&[kv_blocks.div_ceil(64), 8])));
    if args.write_mask {
        bytes = bytes.saturating_add(mask_rows.saturating_mul(kv_blocks as u128));
    }
    if args.reference {
        // The reference holds one head's scores and its keys as f64.
        bytes = bytes.saturating_add(product(&[longest_q, longest_kv, 2, 8]));
    }
    memory::check(bytes, "this call")
}

fn render(report: &Report) -> String {
    let s = &report.shape;
    let causal = if report.causal { ", causal" } else { "" };
    let mut text = format!(
        "q [{}, {}, {}, {}], kv [{}, {}, {}, {}], {}{causal}; {} {}, {} threads\n",
        s.batch,
        s.num_qo_heads,
        s.qo_len,
        s.head_dim,
        s.batch,
        s.num_kv_heads,
        s.kv_len,
        s.head_dim_v,
        report.dtype,
        report.backend,
        report.isa,
        report.threads,
    );
    let mut line = |name: &str, value: String| text += &format!("  {name:<13}{value}\n");
    line("QK skipped", percent(report.qk_sparsity));
    line("PV skipped", report.pv_sparsity.map_or("not counted".into(), percent));
    line("predict", seconds(report.predict_s));
    line("attend", seconds(report.attend_s));
    if let Some(c) = &report.compared {
        let ratio = c.dense_s / (report.predict_s + report.attend_s);
        line("dense", format!("{} ({ratio:.2}× the time)", seconds(c.dense_s)));
        line("relative L1", format!("{:.3e}", c.rel_l1));
        line("cosine", format!("{:.6}", c.cosine));
        line("RMSE", format!("{:.3e}", c.rmse));
    }
    line("wrote", report.output.clone());
    text
}

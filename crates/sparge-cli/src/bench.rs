//! `sparge bench`: times the operator over shapes and policies on structured inputs.

use crate::error::{Error, Result};
use crate::generate;
use crate::policy::{self, Policies, Policy};
use crate::terminal::{self, Table, percent, seconds};
use crate::{Context, memory};
use clap::ValueEnum;
use half::{bf16, f16};
use serde::{Deserialize, Serialize};
use sparge::{Alignment, AttentionOptions, AttentionShape, Element, Isa, Plan, Stats, TensorView};
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Instant;

/// Time the operator over shapes and policies.
///
/// Inputs are random walks along the tokens with a fixed seed, so that the attention map has
/// structure as in a trained model. Policies are timed in turn within every repetition, so that a
/// busy moment hits them alike; medians are reported. GFLOP/s count 4·head_dim per visible
/// (query, key) pair and head; "of dense" divides the dense count by the time, "done" counts only
/// what was computed.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// HEADSxTOKENSxDIM or Q_HEADS/KV_HEADSxTOKENSxDIM, with :causal where causal; repeatable
    #[arg(long = "shape", value_name = "SHAPE", value_parser = Shape::from_str,
          default_values = ["9x8192x64:causal", "8x4096x128"])]
    shapes: Vec<Shape>,
    /// Policies, see `sparge eval --help`; repeatable, or separated by commas
    #[arg(long = "policy", value_name = "POLICY", value_parser = Policies::from_str,
          default_value = "dense,default,topk:0.5,topk:0.15,cdf:0.9")]
    policies: Vec<Policies>,
    /// Timed repetitions
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    reps: u32,
    /// Repetitions before those
    #[arg(long, value_name = "N", default_value_t = 1)]
    warmup: u32,
    /// Type of q, k, v and the output
    #[arg(long, value_enum, default_value_t = DtypeArg::F32)]
    dtype: DtypeArg,
    /// Seed of the inputs
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Peers' times to compare with: JSON lines with peer, shape and median_s
    #[arg(long, value_name = "FILE")]
    peer_json: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DtypeArg {
    F32,
    F16,
    Bf16,
}

/// A self-attention problem of batch 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    num_qo_heads: usize,
    num_kv_heads: usize,
    len: usize,
    dim: usize,
    causal: bool,
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        const EXPECTED: &str = "expected HEADSxTOKENSxDIM or Q_HEADS/KV_HEADSxTOKENSxDIM, with \
                                :causal where causal, such as 9/3x4096x64:causal";
        let (size, causal) = match text.split_once(':') {
            None => (text, false),
            Some((size, "causal")) => (size, true),
            Some(_) => return Err(EXPECTED.into()),
        };
        let parts: Vec<&str> = size.split('x').collect();
        let [heads, len, dim] = parts.as_slice() else { return Err(EXPECTED.into()) };
        let (qo, kv) = heads.split_once('/').unwrap_or((heads, heads));
        let number = |s: &str| s.parse().ok().filter(|n| (1..=1 << 24).contains(n)).ok_or(EXPECTED);
        Ok(Self {
            num_qo_heads: number(qo)?,
            num_kv_heads: number(kv)?,
            len: number(len)?,
            dim: number(dim)?,
            causal,
        })
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.num_qo_heads)?;
        if self.num_kv_heads != self.num_qo_heads {
            write!(f, "/{}", self.num_kv_heads)?;
        }
        write!(f, "x{}x{}{}", self.len, self.dim, if self.causal { ":causal" } else { "" })
    }
}

impl Shape {
    fn attention_shape(&self) -> AttentionShape {
        AttentionShape {
            batch: 1,
            num_qo_heads: self.num_qo_heads,
            num_kv_heads: self.num_kv_heads,
            qo_len: self.len,
            kv_len: self.len,
            head_dim: self.dim,
            head_dim_v: self.dim,
        }
    }

    /// Multiplications and additions of Q·Kᵀ and P·V over the visible pairs.
    fn flops(&self) -> f64 {
        let n = self.len as f64;
        let pairs = if self.causal { n * (n + 1.0) / 2.0 } else { n * n };
        4.0 * self.num_qo_heads as f64 * self.dim as f64 * pairs
    }
}

#[derive(Debug, Serialize)]
struct Report {
    isa: String,
    threads: usize,
    dtype: &'static str,
    reps: u32,
    seed: u64,
    results: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    shape: String,
    policy: Policy,
    median_s: f64,
    min_s: f64,
    max_s: f64,
    predict_s: f64,
    /// Of this policy's own time.
    predict_share: f64,
    qk_sparsity: f64,
    pv_sparsity: f64,
    gflops_dense_equivalent: f64,
    gflops_computed: f64,
    /// Dense time over this time, where dense was among the policies.
    speedup: Option<f64>,
    /// Prediction time over dense time, likewise.
    predict_of_dense: Option<f64>,
    /// Peer's time over this time.
    peer_ratio: BTreeMap<String, f64>,
}

/// Runs the subcommand.
pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    let peers = args.peer_json.as_deref().map(read_peers).transpose()?.unwrap_or_default();
    let results = match args.dtype {
        DtypeArg::F32 => all_shapes::<f32>(args, context, &peers),
        DtypeArg::F16 => all_shapes::<f16>(args, context, &peers),
        DtypeArg::Bf16 => all_shapes::<bf16>(args, context, &peers),
    }?;
    let report = Report {
        isa: format!("{:?}", context.isa.unwrap_or_else(Isa::detect)).to_lowercase(),
        threads: rayon::current_num_threads(),
        dtype: match args.dtype {
            DtypeArg::F32 => f32::NAME,
            DtypeArg::F16 => f16::NAME,
            DtypeArg::Bf16 => bf16::NAME,
        },
        reps: args.reps,
        seed: args.seed,
        results,
    };
    if context.json { terminal::print_json(&report) } else { terminal::print(&render(&report)) }
}

fn all_shapes<T: Element>(args: &Args, context: &Context, peers: &[Peer]) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for shape in &args.shapes {
        // f32 inputs, their copies in T, the output.
        let elements = (shape.num_qo_heads + 2 * shape.num_kv_heads) as u128
            * (shape.len as u128 * shape.dim as u128);
        memory::check(elements * (4 + 2 * size_of::<T>() as u128), &format!("shape {shape}"))?;
        rows.extend(one_shape::<T>(args, context, peers, shape)?);
    }
    Ok(rows)
}

/// Times of one policy.
#[derive(Debug, Default)]
struct Samples {
    total: Vec<f64>,
    predict: Vec<f64>,
    stats: Stats,
}

fn one_shape<T: Element>(
    args: &Args,
    context: &Context,
    peers: &[Peer],
    shape: &Shape,
) -> Result<Vec<Row>> {
    let options = AttentionOptions {
        causal: shape.causal.then_some(Alignment::TopLeft),
        ..AttentionOptions::default()
    };
    let policies = policy::flatten(&args.policies);
    let plans = policies
        .iter()
        .map(|policy| Plan::new(shape.attention_shape(), &options, &policy.config(context.isa)))
        .collect::<sparge::Result<Vec<_>>>()?;
    let Shape { num_qo_heads, num_kv_heads, len, dim, .. } = *shape;
    let inputs = generate::inputs(num_qo_heads, num_kv_heads, len, dim, args.seed);
    let [q, k, v] = [inputs.q, inputs.k, inputs.v].map(|x| convert::<T>(&x));
    let q = TensorView::hnd(&q, [1, num_qo_heads, len, dim])?;
    let k = TensorView::hnd(&k, [1, num_kv_heads, len, dim])?;
    let v = TensorView::hnd(&v, [1, num_kv_heads, len, dim])?;
    let mut out = vec![T::default(); num_qo_heads * len * dim];

    let mut samples: Vec<Samples> = plans.iter().map(|_| Samples::default()).collect();
    for rep in 0..args.warmup.saturating_add(args.reps) {
        for ((policy, plan), samples) in policies.iter().zip(&plans).zip(&mut samples) {
            let start = Instant::now();
            let side = policy.forward(plan, &[q, k, v], &mut out)?;
            let total = start.elapsed().as_secs_f64();
            if rep >= args.warmup {
                samples.total.push(total);
                samples.predict.push(side.stats.predict.as_secs_f64());
                samples.stats = side.stats;
            }
        }
    }

    let dense = policies.iter().position(|p| *p == Policy::DENSE);
    let dense_s = dense.map(|i| median(&samples[i].total));
    let name = shape.to_string();
    Ok(policies
        .iter()
        .zip(&samples)
        .map(|(&policy, samples)| {
            let median_s = median(&samples.total);
            let predict_s = median(&samples.predict);
            let (qk, pv) = (samples.stats.qk_sparsity(), samples.stats.pv_sparsity());
            let gflops = shape.flops() / median_s / 1e9;
            let of_peer = peers.iter().filter(|p| p.shape == name);
            Row {
                shape: name.clone(),
                policy,
                median_s,
                min_s: samples.total.iter().copied().fold(f64::INFINITY, f64::min),
                max_s: samples.total.iter().copied().fold(0.0, f64::max),
                predict_s,
                predict_share: predict_s / median_s,
                qk_sparsity: qk,
                pv_sparsity: pv,
                gflops_dense_equivalent: gflops,
                gflops_computed: gflops * (1.0 - (qk + pv) / 2.0),
                speedup: dense_s.map(|dense| dense / median_s),
                predict_of_dense: dense_s.map(|dense| predict_s / dense),
                peer_ratio: of_peer.map(|p| (p.peer.clone(), p.median_s / median_s)).collect(),
            }
        })
        .collect())
}

fn convert<T: Element>(x: &[f32]) -> Vec<T> {
    let mut converted = vec![T::default(); x.len()];
    T::narrow(x, &mut converted);
    converted
}

fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

/// A peer's time for a shape.
#[derive(Debug, Deserialize)]
struct Peer {
    peer: String,
    shape: String,
    median_s: f64,
}

fn read_peers(path: &Path) -> Result<Vec<Peer>> {
    const MOST: u64 = 16 << 20;
    let cannot = |e| Error::input(format!("cannot read {}: {e}", path.display()));
    let mut text = String::new();
    File::open(path).and_then(|file| file.take(MOST).read_to_string(&mut text)).map_err(cannot)?;
    text.lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(i, line)| {
            serde_json::from_str(line).map_err(|e| {
                Error::input(format!(
                    "line {} of {} is no peer result: {e}; expected {{\"peer\": …, \"shape\": …, \
                     \"median_s\": …}}",
                    i + 1,
                    path.display()
                ))
            })
        })
        .collect()
}

fn render(report: &Report) -> String {
    let mut text = format!(
        "{}, {} threads, {}, median of {}; seed {}\n\n",
        report.isa, report.threads, report.dtype, report.reps, report.seed
    );
    let names = |row: &Row| row.peer_ratio.keys().cloned().collect::<Vec<_>>();
    let mut peers: Vec<String> = report.results.iter().flat_map(names).collect();
    peers.sort();
    peers.dedup();
    let mut shape = "";
    let mut tables: Vec<(&str, Table)> = Vec::new();
    for row in &report.results {
        if row.shape != shape {
            shape = &row.shape;
            let mut heads = vec![
                "policy".to_owned(),
                "time".into(),
                "× dense".into(),
                "QK skipped".into(),
                "PV skipped".into(),
                "predict".into(),
                "of total".into(),
                "GFLOP/s of dense".into(),
                "done".into(),
            ];
            heads.extend(peers.iter().map(|p| format!("× {p}")));
            tables.push((shape, Table::new(heads)));
        }
        let times = |x: Option<f64>| x.map_or("–".to_owned(), |x| format!("{x:.2}"));
        let mut cells = vec![
            row.policy.to_string(),
            seconds(row.median_s),
            times(row.speedup),
            percent(row.qk_sparsity),
            percent(row.pv_sparsity),
            seconds(row.predict_s),
            percent(row.predict_share),
            format!("{:.1}", row.gflops_dense_equivalent),
            format!("{:.1}", row.gflops_computed),
        ];
        cells.extend(peers.iter().map(|p| times(row.peer_ratio.get(p).copied())));
        if let Some((_, table)) = tables.last_mut() {
            table.row(cells);
        }
    }
    let tables: Vec<String> =
        tables.iter().map(|(shape, table)| format!("{shape}\n{}", table.render())).collect();
    text += &tables.join("\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_round_trip() {
        for name in ["9x8192x64:causal", "8x4096x128", "9/3x4096x64:causal"] {
            assert_eq!(name.parse::<Shape>().map(|s| s.to_string()), Ok(name.into()));
        }
        for bad in ["", "9x8192", "9x8192x64:full", "0x8x8", "-1x8x8", "9/x8x8", "9x8x8x8"] {
            assert!(bad.parse::<Shape>().is_err(), "{bad}");
        }
    }

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }
}

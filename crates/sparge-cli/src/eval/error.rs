//! `sparge eval error`: relative L1 of every layer's attention, many policies in one reading.

use crate::Context;
use crate::error::Result;
use crate::language::{Language, ModelArgs, Prompt, TextArgs, TokenBar};
use crate::policy::{self, Policies, Policy};
use crate::terminal::{self, Table, percent, seconds};
use serde::Serialize;
use sparge::metrics;
use sparge_candle::SpargeAttention;
use sparge_candle::attention::{Attention, AttentionCall, HeadsViewMut};
use std::str::FromStr;

/// Error of the attention under several policies, given exact inputs.
///
/// The model reads the text once, in one piece, with dense attention; in every layer each policy is
/// run on the same q, k and v and compared with the dense output: relative L1, Σ|o−o′|/Σ|o′| over all
/// heads, averaged over the layers. Errors of earlier layers do not reach later ones, as they do in
/// `eval ppl`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    text: TextArgs,
    /// Context lengths in tokens; repeatable, or separated by commas
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [2048])]
    context: Vec<usize>,
    /// Policies, see `sparge eval --help`; repeatable, or separated by commas
    #[arg(long = "policy", value_name = "POLICY", value_parser = Policies::from_str,
          default_value = "default,topk:0.5,minference,flexprefill,xattention,random:0.5")]
    policies: Vec<Policies>,
    /// Compare in every N-th layer only
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    every: u32,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    text: String,
    threads: usize,
    results: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    context: usize,
    policy: Policy,
    /// Mean over the layers compared.
    rel_l1: f64,
    rel_l1_worst: f64,
    qk_sparsity: f64,
    pv_sparsity: f64,
    predict_s: f64,
    attend_s: f64,
    /// Dense attention's time in the same layers.
    dense_s: f64,
    /// Of each layer compared.
    layers: Vec<f64>,
}

/// Runs the subcommand.
pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    let text = args.text.load(context)?;
    let language = Language::open(&args.model, context)?;
    let policies = policy::flatten(&args.policies);
    for policy in &policies {
        language.check_config(&policy.config(context.isa))?;
    }
    for &length in &args.context {
        language.check_context(length)?;
    }
    let longest = args.context.iter().copied().max().unwrap_or(0);
    let tokens = language.first_tokens(&text, longest)?;
    let bar = TokenBar::new(args.context.iter().sum());
    let mut results = Vec::new();
    for &length in &args.context {
        bar.say(format!("{length} tokens"));
        let mut compare = Compare {
            dense: Policy::DENSE.attention(context.isa),
            under: policies
                .iter()
                .map(|policy| Under::new(policy.attention(context.isa)))
                .collect(),
            every: args.every as usize,
            exact: Vec::new(),
            scratch: Vec::new(),
        };
        let read = Prompt { tokens: &tokens[..length], room: 0, chunk: length, score: false };
        language.prefill(&read, &mut compare, &bar)?;
        let dense_s = compare.dense.times().1.as_secs_f64();
        let layers = language.model.config().num_layers;
        let compared = layers.div_ceil(args.every as usize) as f64 / layers.max(1) as f64;
        for (&policy, under) in policies.iter().zip(&compare.under) {
            let stats = under.attention.total();
            let (predict, attend) = under.attention.times();
            results.push(Row {
                context: length,
                policy,
                rel_l1: under.layers.iter().sum::<f64>() / under.layers.len().max(1) as f64,
                rel_l1_worst: under.layers.iter().copied().fold(0.0, f64::max),
                qk_sparsity: stats.qk_sparsity(),
                pv_sparsity: stats.pv_sparsity(),
                predict_s: predict.as_secs_f64(),
                attend_s: attend.as_secs_f64(),
                dense_s: dense_s * compared,
                layers: under.layers.clone(),
            });
        }
    }
    drop(bar);
    let threads = rayon::current_num_threads();
    let report = Report { model: language.name, text: text.name, threads, results };
    if context.json { terminal::print_json(&report) } else { terminal::print(&render(&report)) }
}

/// Dense attention that also runs every policy on what comes by.
struct Compare {
    dense: SpargeAttention,
    under: Vec<Under>,
    every: usize,
    exact: Vec<f32>,
    scratch: Vec<f32>,
}

/// A policy, and its error in every layer compared.
struct Under {
    attention: SpargeAttention,
    layers: Vec<f64>,
}

impl Under {
    fn new(attention: SpargeAttention) -> Self {
        Self { attention, layers: Vec::new() }
    }
}

impl Attention for Compare {
    fn attend(
        &mut self,
        mut call: AttentionCall<'_>,
    ) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let AttentionCall { layer, q, k, v, softmax_scale, .. } = call;
        let (shape, strides) = (call.out.shape(), call.out.strides());
        let size = shape.iter().product();
        self.exact.resize(size, 0.0);
        self.scratch.resize(size, 0.0);
        let into = |attention: &mut SpargeAttention, out: &mut [f32]| {
            let out = HeadsViewMut::new(out, shape, strides)?;
            attention.attend(AttentionCall { layer, q, k, v, out, softmax_scale })
        };
        into(&mut self.dense, &mut self.exact)?;
        call.out.data()[..size].copy_from_slice(&self.exact);
        if layer % self.every != 0 {
            return Ok(());
        }
        for under in &mut self.under {
            into(&mut under.attention, &mut self.scratch)?;
            let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
            under.layers.push(metrics::compare(wide(&self.scratch), wide(&self.exact)).rel_l1);
        }
        Ok(())
    }
}

fn render(report: &Report) -> String {
    let mut table = Table::new([
        "context",
        "policy",
        "relative L1",
        "worst layer",
        "QK skipped",
        "PV skipped",
        "predict",
        "attend",
        "dense",
    ]);
    for row in &report.results {
        table.row([
            row.context.to_string(),
            row.policy.to_string(),
            format!("{:.4}", row.rel_l1),
            format!("{:.4}", row.rel_l1_worst),
            percent(row.qk_sparsity),
            percent(row.pv_sparsity),
            seconds(row.predict_s),
            seconds(row.attend_s),
            seconds(row.dense_s),
        ]);
    }
    let head = format!("{} on {}, {} threads\n\n", report.model, report.text, report.threads);
    head + &table.render()
}

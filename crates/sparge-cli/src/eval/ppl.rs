//! `sparge eval ppl`: perplexity and time by context length and policy.

use crate::Context;
use crate::calibration::{Contender, TunedArgs};
use crate::error::{Error, Result};
use crate::language::{Language, ModelArgs, TextArgs, TokenBar};
use crate::policy::{self, Policies};
use crate::terminal::{self, Table, percent, seconds};
use serde::Serialize;
use sparge::HeadStats;
use std::str::FromStr;

/// Perplexity of a text under several policies and context lengths.
///
/// Each window of the text is read from its start with an empty cache; the perplexity is that of
/// all tokens but each window's first.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    text: TextArgs,
    /// Context lengths in tokens; repeatable, or separated by commas
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [1024, 2048, 4096])]
    context: Vec<usize>,
    /// Consecutive windows of the text to read at each length
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    windows: u32,
    /// Policies, see `sparge eval --help`; repeatable, or separated by commas
    #[arg(long = "policy", value_name = "POLICY", value_parser = Policies::from_str,
          default_value = "dense,default,topk:0.5")]
    policies: Vec<Policies>,
    #[command(flatten)]
    tuned: TunedArgs,
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
    policy: String,
    windows: u32,
    ppl: f64,
    /// ppl over dense ppl − 1, where dense was among the policies.
    ppl_change: Option<f64>,
    /// Mean over the windows.
    ttft_s: f64,
    attention_s: f64,
    predict_s: f64,
    qk_sparsity: f64,
    pv_sparsity: f64,
    speedup: Option<f64>,
}

/// Runs the subcommand.
pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    let text = args.text.load(context)?;
    let language = Language::open(&args.model, context)?;
    let policies = policy::flatten(&args.policies);
    let policies = args.tuned.contenders(&policies, &language, context.isa)?;
    for &length in &args.context {
        language.check_context(length)?;
        if length < 2 {
            return Err(Error::input(format!("a context of {length} tokens; expected at least 2")));
        }
    }
    let windows = args.windows as usize;
    let most = args.context.iter().copied().max().unwrap_or(0).saturating_mul(windows);
    let tokens = language.first_tokens(&text, most)?;
    let all = args.context.iter().sum::<usize>() * windows * policies.len();
    let bar = TokenBar::new(all);
    bar.say("loading");
    language.warm_up()?;
    let mut results = Vec::new();
    for &length in &args.context {
        let mut rows = Vec::new();
        for policy in &policies {
            bar.say(format!("{} at {length}", policy.0));
            rows.push(measure(&language, &tokens, length, args.windows, policy, &bar)?);
        }
        let dense = rows.iter().find(|r| r.policy == "dense").map(|r| (r.ppl, r.ttft_s));
        for row in &mut rows {
            row.ppl_change = dense.map(|(ppl, _)| row.ppl / ppl - 1.0);
            row.speedup = dense.map(|(_, ttft)| ttft / row.ttft_s);
        }
        results.append(&mut rows);
    }
    drop(bar);
    let report = Report {
        model: language.name,
        text: text.name,
        threads: rayon::current_num_threads(),
        results,
    };
    if context.json { terminal::print_json(&report) } else { terminal::print(&render(&report)) }
}

fn measure(
    language: &Language,
    tokens: &[u32],
    length: usize,
    windows: u32,
    (policy, attention): &Contender,
    bar: &TokenBar,
) -> Result<Row> {
    let (mut nll, mut count) = (0.0, 0);
    let (mut ttft, mut attend, mut predict) = (0.0, 0.0, 0.0);
    let mut stats = HeadStats::default();
    for window in tokens.chunks_exact(length).take(windows as usize) {
        let reading = language.read_as(window, 0, attention.clone(), bar, true)?;
        nll += reading.prefill.nll.iter().map(|&x| f64::from(x)).sum::<f64>();
        count += reading.prefill.nll.len();
        ttft += reading.ttft_s();
        attend += reading.attention_s();
        predict += reading.attention.times().0.as_secs_f64();
        stats = stats + reading.attention.total();
    }
    let n = f64::from(windows);
    Ok(Row {
        context: length,
        policy: policy.clone(),
        windows,
        ppl: (nll / count as f64).exp(),
        ppl_change: None,
        ttft_s: ttft / n,
        attention_s: attend / n,
        predict_s: predict / n,
        qk_sparsity: stats.qk_sparsity(),
        pv_sparsity: stats.pv_sparsity(),
        speedup: None,
    })
}

fn render(report: &Report) -> String {
    let mut table = Table::new([
        "context",
        "policy",
        "perplexity",
        "change",
        "first token",
        "× dense",
        "attention",
        "predict",
        "QK skipped",
        "PV skipped",
    ]);
    for row in &report.results {
        table.row([
            row.context.to_string(),
            row.policy.clone(),
            format!("{:.3}", row.ppl),
            row.ppl_change.map_or("–".into(), |x| format!("{:+.2}%", 100.0 * x)),
            seconds(row.ttft_s),
            row.speedup.map_or("–".into(), |x| format!("{x:.2}")),
            seconds(row.attention_s),
            seconds(row.predict_s),
            percent(row.qk_sparsity),
            percent(row.pv_sparsity),
        ]);
    }
    let head = format!("{} on {}, {} threads\n\n", report.model, report.text, report.threads);
    head + &table.render()
}

//! `sparge run`: a language model reads a long prompt through sparse attention.

use crate::Context;
use crate::calibration::CalibrationArgs;
use crate::error::{Error, Result};
use crate::flags::SelectionArgs;
use crate::language::{Language, Layer, ModelArgs, Reading, TextArgs, TokenBar, layer_chart};
use crate::policy::Policy;
use crate::terminal::{self, Table, percent, seconds};
use serde::Serialize;
use sparge::SpargeConfig;
use sparge_candle::{GenerateOptions, Sampler, SpargeAttention, generate};
use std::ops::ControlFlow;
use std::str::FromStr;

/// Read a long prompt through sparse attention, and go on writing.
///
/// Prints the time to the first token and the perplexity of the prompt, sparse and dense, the
/// share of the attention that was skipped in every layer, and the text that the model writes.
/// Without arguments: SmolLM2-135M on the first 4096 tokens of Emma.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    text: TextArgs,
    /// Tokens of the text to read; all of it where it is shorter
    #[arg(long, value_name = "N", default_value_t = 4096)]
    context: usize,
    /// Tokens to write
    #[arg(long, value_name = "N", default_value_t = 48)]
    max_new_tokens: usize,
    /// Attention of the reading that the text is written after: sparge (as the selection flags say),
    /// or a policy, see `sparge eval --help`
    #[arg(long, value_name = "POLICY", value_parser = PolicyArg::from_str, default_value = "sparge")]
    policy: PolicyArg,
    /// Do not read the prompt a second time for the comparison with dense attention
    #[arg(long)]
    no_compare: bool,
    /// Randomness of the text; 0, the default, takes the likeliest token
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// With a temperature: draw from the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 0.95, requires = "temperature")]
    top_p: f32,
    /// With a temperature: the seed
    #[arg(long, value_name = "N", default_value_t = 0, requires = "temperature")]
    seed: u64,
    #[command(flatten)]
    selection: SelectionArgs,
    #[command(flatten)]
    calibration: CalibrationArgs,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum PolicyArg {
    /// Sparse, as the selection flags say.
    Flags,
    Named(Policy),
}

impl FromStr for PolicyArg {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        if text == "sparge" { Ok(Self::Flags) } else { text.parse().map(Self::Named) }
    }
}

/// What `--json` prints; null for what was not asked for.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    /// Tokens read.
    context: usize,
    prompt: String,
    threads: usize,
    ttft_sparse_s: Option<f64>,
    ttft_dense_s: Option<f64>,
    attention_sparse_s: Option<f64>,
    attention_dense_s: Option<f64>,
    predict_s: Option<f64>,
    ppl_sparse: Option<f64>,
    ppl_dense: Option<f64>,
    qk_sparsity: Option<f64>,
    pv_sparsity: Option<f64>,
    layers: Vec<Layer>,
    new_tokens: usize,
    decode_tokens_per_s: Option<f64>,
    text: String,
}

/// Runs the subcommand.
pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    let dense = SpargeConfig { isa: context.isa, ..SpargeConfig::dense() };
    // The attention and the configuration that the model has to allow.
    let sparse = match args.policy {
        PolicyArg::Flags => {
            let config = args.selection.config(context.isa)?;
            Some((SpargeAttention::new(config.clone()), config))
        }
        PolicyArg::Named(_) if !args.selection.is_empty() || args.calibration.path().is_some() => {
            return Err(Error::input(
                "a named --policy leaves nothing to select; drop the selection flags and \
                 --calibration, or use --policy sparge",
            ));
        }
        PolicyArg::Named(Policy::DENSE) => None,
        PolicyArg::Named(policy) => {
            Some((policy.attention(context.isa), policy.config(context.isa)))
        }
    };
    let mut sampler = Sampler::new(args.temperature.unwrap_or(0.0), args.top_p, args.seed)?;
    let text = args.text.load(context)?;
    let language = Language::open(&args.model, context)?;
    language.check_config(sparse.as_ref().map_or(&dense, |(_, config)| config))?;
    let tuned = args.calibration.load(language.shape(), || language.sha256())?;
    let tokens = language.tokens(&text.text, args.context)?;
    language.check_context(tokens.len() + args.max_new_tokens)?;

    let compare = sparse.is_some() && !args.no_compare;
    let bar = TokenBar::new(tokens.len() * if compare { 2 } else { 1 });
    bar.say("loading");
    language.warm_up()?;
    let dense_reading = if compare || sparse.is_none() {
        bar.say("dense");
        Some(language.read(&tokens, args.max_new_tokens, &dense, &bar, true)?)
    } else {
        None
    };
    let sparse_reading = sparse
        .map(|(attention, _)| {
            bar.say("sparse");
            let attention = match &tuned {
                Some(calibration) => SpargeAttention::calibrated(calibration, context.isa)?,
                None => attention,
            };
            language.read_as(&tokens, args.max_new_tokens, attention, &bar, true)
        })
        .transpose()?;
    drop(bar);

    let sparse = sparse_reading.as_ref();
    let dense = dense_reading.as_ref();
    let of = |reading: Option<&Reading>, f: fn(&Reading) -> f64| reading.map(f);
    let mut report = Report {
        model: language.name.clone(),
        context: tokens.len(),
        prompt: text.name,
        threads: rayon::current_num_threads(),
        ttft_sparse_s: of(sparse, Reading::ttft_s),
        ttft_dense_s: of(dense, Reading::ttft_s),
        attention_sparse_s: of(sparse, Reading::attention_s),
        attention_dense_s: of(dense, Reading::attention_s),
        predict_s: of(sparse, |r| r.attention.times().0.as_secs_f64()),
        ppl_sparse: of(sparse, |r| r.prefill.perplexity()),
        ppl_dense: of(dense, |r| r.prefill.perplexity()),
        qk_sparsity: of(sparse, |r| r.attention.total().qk_sparsity()),
        pv_sparsity: of(sparse, |r| r.attention.total().pv_sparsity()),
        layers: sparse.map(Reading::layers).unwrap_or_default(),
        new_tokens: 0,
        decode_tokens_per_s: None,
        text: String::new(),
    };
    if !context.json {
        terminal::print(&render(&report))?;
    }
    let Some(reading) = sparse_reading.or(dense_reading) else {
        return Err(Error::failed("the prompt was not read"));
    };
    write(&language, reading, args.max_new_tokens, &mut sampler, context, &mut report)?;
    if context.json {
        return terminal::print_json(&report);
    }
    let rate = report.decode_tokens_per_s;
    let rate = rate.map_or(String::new(), |rate| format!(", {rate:.1} tokens/s"));
    terminal::print(&format!("\n\n{} tokens{rate}\n", report.new_tokens))
}

/// Writes on after the prompt: to the terminal as it comes, and into the report.
fn write(
    language: &Language,
    mut reading: Reading,
    max_new_tokens: usize,
    sampler: &mut Sampler,
    context: &Context,
    report: &mut Report,
) -> Result<()> {
    let mut stream = language.tokenizer.stream();
    let mut outcome = Ok(());
    let mut on_token = |token| {
        let piece = stream(token).map_err(Error::from).map(Option::unwrap_or_default);
        outcome =
            piece.and_then(|piece| if context.json { Ok(()) } else { terminal::print(&piece) });
        if outcome.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    };
    let new = generate(
        &language.model,
        std::mem::take(&mut reading.prefill.logits),
        &mut reading.cache,
        &mut reading.attention,
        GenerateOptions {
            sampler,
            max_new_tokens,
            is_end: &|token| language.tokenizer.is_end(token),
            on_token: &mut on_token,
        },
    )?;
    outcome?;
    report.text = language.tokenizer.decode(&new.tokens)?;
    report.new_tokens = new.tokens.len();
    // The first token needs no step: it comes from the prompt's logits.
    let steps = new.tokens.len().saturating_sub(1) as f64;
    let seconds = new.timings.total().as_secs_f64();
    report.decode_tokens_per_s = (steps > 0.0 && seconds > 0.0).then_some(steps / seconds);
    Ok(())
}

fn render(report: &Report) -> String {
    let mut text = format!(
        "{} reads {} tokens of {} on {} threads\n\n",
        report.model, report.context, report.prompt, report.threads
    );
    let mut table = Table::new(["", "sparse", "dense", ""]);
    let cell = |x: Option<f64>, f: fn(f64) -> String| x.map_or("–".into(), f);
    let times = |a: Option<f64>, b: Option<f64>| match (a, b) {
        (Some(sparse), Some(dense)) => format!("{:.2}× faster", dense / sparse),
        _ => String::new(),
    };
    let row = |name: &str, a: Option<f64>, b: Option<f64>| {
        [name.to_owned(), cell(a, seconds), cell(b, seconds), times(a, b)]
    };
    table.row(row("time to first token", report.ttft_sparse_s, report.ttft_dense_s));
    table.row(row("  of it attention", report.attention_sparse_s, report.attention_dense_s));
    table.row([
        "  of it prediction".into(),
        cell(report.predict_s, seconds),
        String::new(),
        String::new(),
    ]);
    let worse = match (report.ppl_sparse, report.ppl_dense) {
        (Some(sparse), Some(dense)) => format!("{:+.2}%", 100.0 * (sparse / dense - 1.0)),
        _ => String::new(),
    };
    let ppl = |x: Option<f64>| cell(x, |x| format!("{x:.3}"));
    table.row(["perplexity".into(), ppl(report.ppl_sparse), ppl(report.ppl_dense), worse]);
    text += &table.render();
    if let (Some(qk), Some(pv)) = (report.qk_sparsity, report.pv_sparsity) {
        text += &format!(
            "\nskipped: {} of Q·Kᵀ, {} of P·V; Q·Kᵀ by layer:\n",
            percent(qk),
            percent(pv)
        );
        text += &layer_chart(&report.layers);
    }
    text + "\nThe text goes on:\n\n"
}

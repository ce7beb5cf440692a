//! `sparge eval needle`: does the model still find one sentence in a long text?

use super::haystack::{Hay, Task};
use crate::Context;
use crate::calibration::{Contender, TunedArgs};
use crate::error::{Error, Result};
use crate::language::{Language, ModelArgs, TextArgs, TokenBar};
use crate::policy::{self, Policies};
use crate::terminal::{self, Table, percent};
use serde::Serialize;
use sparge::HeadStats;
use sparge_candle::{GenerateOptions, Sampler, generate};
use std::ops::ControlFlow;
use std::str::FromStr;

/// Tokens of an answer. The number comes in the first dozen or not at all.
const ANSWER: usize = 32;

/// Finding "The special magic number for CITY is NNNNN" in a long text.
///
/// The sentence is hidden at several depths of texts of several lengths; the question comes at the
/// end, in the model's chat template; decoding is greedy. An answer counts where it holds the
/// number. With --keys the text holds more such sentences, each about another thing, and one is
/// asked for (RULER's multi-key retrieval); with --haystack needles it holds nothing else.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    text: TextArgs,
    /// Context lengths in tokens; repeatable, or separated by commas
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [1024, 2048])]
    context: Vec<usize>,
    /// Where the sentence is hidden: 0 the start, 1 the end
    #[arg(long, value_name = "D", value_delimiter = ',', default_values_t = [0.1, 0.5, 0.9])]
    depth: Vec<f64>,
    /// Policies, see `sparge eval --help`; repeatable, or separated by commas
    #[arg(long = "policy", value_name = "POLICY", value_parser = Policies::from_str,
          default_value = "dense,default,topk:0.5")]
    policies: Vec<Policies>,
    #[command(flatten)]
    tuned: TunedArgs,
    /// Sentences hidden, of which one is asked for
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    keys: u32,
    /// What the sentences are hidden in
    #[arg(long, value_enum, default_value_t = Hay::Text)]
    haystack: Hay,
    /// Keys and numbers per cell
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    trials: u32,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    text: String,
    keys: u32,
    /// Share found, of all cells of a policy.
    accuracy: Vec<Accuracy>,
    results: Vec<Cell>,
}

#[derive(Debug, Serialize)]
struct Accuracy {
    policy: String,
    accuracy: f64,
}

#[derive(Debug, Serialize)]
struct Cell {
    policy: String,
    context: usize,
    depth: f64,
    correct: u32,
    trials: u32,
    qk_sparsity: f64,
    /// The last trial's.
    answer: String,
}

/// Runs the subcommand.
pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    for &depth in &args.depth {
        if !(0.0..=1.0).contains(&depth) {
            return Err(Error::input(format!("--depth is {depth}, expected 0 to 1")));
        }
    }
    let text = args.text.load(context)?;
    let language = Language::open(&args.model, context)?;
    if !language.tokenizer.has_chat_template() {
        return Err(Error::input(format!(
            "{} has no chat template, expected an instruct model",
            language.name
        )));
    }
    let policies = policy::flatten(&args.policies);
    let policies = args.tuned.contenders(&policies, &language, context.isa)?;
    let longest = args.context.iter().copied().max().unwrap_or(0);
    language.check_context(longest.saturating_add(ANSWER))?;
    let tokens = match args.haystack {
        Hay::Text => language.first_tokens(&text, longest)?,
        Hay::Needles => Vec::new(),
    };

    let per_policy = args.context.iter().sum::<usize>() * args.depth.len() * args.trials as usize;
    let bar = TokenBar::new(per_policy * policies.len());
    let mut results = Vec::new();
    for contender in &policies {
        for &length in &args.context {
            for (i, &depth) in args.depth.iter().enumerate() {
                bar.say(format!("{} at {length}, depth {depth}", contender.0));
                let mut cell = Cell {
                    policy: contender.0.clone(),
                    context: length,
                    depth,
                    correct: 0,
                    trials: args.trials,
                    qk_sparsity: 0.0,
                    answer: String::new(),
                };
                let mut stats = HeadStats::default();
                for trial in 0..args.trials {
                    // The same needles for every policy, others in every cell.
                    let index = i + args.depth.len() * trial as usize;
                    let task = Task::new(index, args.keys as usize, args.haystack);
                    let prompt = task.prompt(&language.tokenizer, &tokens, length, depth)?;
                    let (answer, counts) = ask(&language, &prompt, contender, &bar)?;
                    cell.correct += u32::from(answer.contains(task.number()));
                    cell.answer = answer;
                    stats = stats + counts;
                }
                cell.qk_sparsity = stats.qk_sparsity();
                results.push(cell);
            }
        }
    }
    drop(bar);
    let accuracy = policies
        .iter()
        .map(|(policy, _)| {
            let of = || results.iter().filter(|c| c.policy == *policy);
            let trials: u32 = of().map(|c| c.trials).sum();
            let correct: u32 = of().map(|c| c.correct).sum();
            Accuracy {
                policy: policy.clone(),
                accuracy: f64::from(correct) / f64::from(trials.max(1)),
            }
        })
        .collect();
    let text = match args.haystack {
        Hay::Text => text.name,
        Hay::Needles => "nothing but such sentences".into(),
    };
    let report = Report { model: language.name, text, keys: args.keys, accuracy, results };
    if context.json {
        terminal::print_json(&report)
    } else {
        terminal::print(&render(&report, args))
    }
}

/// The model's answer, and what was skipped while it read.
fn ask(
    language: &Language,
    prompt: &[u32],
    (_, attention): &Contender,
    bar: &TokenBar,
) -> Result<(String, HeadStats)> {
    let mut reading = language.read_as(prompt, ANSWER, attention.clone(), bar, false)?;
    let new = generate(
        &language.model,
        std::mem::take(&mut reading.prefill.logits),
        &mut reading.cache,
        &mut reading.attention,
        GenerateOptions {
            sampler: &mut Sampler::greedy(),
            max_new_tokens: ANSWER,
            is_end: &|token| language.tokenizer.is_end(token),
            on_token: &mut |_| ControlFlow::Continue(()),
        },
    )?;
    Ok((language.tokenizer.decode(&new.tokens)?, reading.attention.total()))
}

fn render(report: &Report, args: &Args) -> String {
    let mut text =
        format!("{} looks for one of {} sentences in {}\n", report.model, report.keys, report.text);
    for accuracy in &report.accuracy {
        let policy = &accuracy.policy;
        text += &format!("\n{policy}: {} found\n", percent(accuracy.accuracy));
        let heads = args.context.iter().map(|c| format!("{c} tokens"));
        let mut table = Table::new(std::iter::once("depth".to_owned()).chain(heads));
        let cells = |depth: f64| {
            report.results.iter().filter(move |c| c.policy == *policy && c.depth == depth)
        };
        for &depth in &args.depth {
            let row = cells(depth).map(|c| format!("{}/{}", c.correct, c.trials));
            table.row(std::iter::once(depth.to_string()).chain(row));
        }
        let skipped = args.context.iter().map(|&length| {
            let of =
                || report.results.iter().filter(|c| c.policy == *policy && c.context == length);
            percent(of().map(|c| c.qk_sparsity).sum::<f64>() / of().count().max(1) as f64)
        });
        table.row(std::iter::once("QK skipped".to_owned()).chain(skipped));
        text += &table.render();
    }
    text
}

//! `sparge eval needle`: does the model still find one sentence in a long text?

use crate::Context;
use crate::calibration::{Contender, TunedArgs};
use crate::error::{Error, Result};
use crate::language::{Language, ModelArgs, TextArgs, TokenBar};
use crate::policy::Policy;
use crate::terminal::{self, Table, percent};
use serde::Serialize;
use sparge::HeadStats;
use sparge_candle::{GenerateOptions, Message, Sampler, generate};
use std::ops::ControlFlow;
use std::str::FromStr;

const CITIES: [&str; 8] =
    ["Lisbon", "Nairobi", "Kyoto", "Bogota", "Tallinn", "Perth", "Montreal", "Jaipur"];
/// Tokens of an answer. The number comes in the first dozen or not at all.
const ANSWER: usize = 32;

/// Finding "The special magic number for CITY is NNNNN" in a long text.
///
/// The sentence is hidden at several depths of texts of several lengths; the question comes at the
/// end, in the model's chat template; decoding is greedy. An answer counts where it holds the
/// number.
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
    /// dense, default, topk:F, cdf:T or cdf:T+topk:F; repeatable, or separated by commas
    #[arg(long = "policy", value_name = "POLICY", value_delimiter = ',', value_parser = Policy::from_str,
          default_values = ["dense", "default", "topk:0.5"])]
    policies: Vec<Policy>,
    #[command(flatten)]
    tuned: TunedArgs,
    /// Cities and numbers per cell
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    trials: u32,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    text: String,
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

/// A sentence to hide, and what to ask.
struct Needle {
    sentence: String,
    question: String,
    number: String,
}

impl Needle {
    /// The same one for the same `index`.
    fn new(index: usize) -> Self {
        let city = CITIES[index % CITIES.len()];
        let number = (10_000 + (index as u64 + 1).wrapping_mul(48_271) % 90_000).to_string();
        Self {
            sentence: format!(" The special magic number for {city} is {number}. "),
            question: format!(
                "What is the special magic number for {city}? Answer with the number."
            ),
            number,
        }
    }

    /// A conversation of about `length` tokens, and never more.
    fn prompt(
        &self,
        language: &Language,
        text: &[u32],
        length: usize,
        depth: f64,
    ) -> Result<Vec<u32>> {
        let tokenizer = &language.tokenizer;
        let ask = |hay: &str| -> Result<Vec<u32>> {
            let content = format!("{hay}\n\n{}", self.question);
            let messages = [Message { role: "user".into(), content }];
            Ok(tokenizer.encode(&tokenizer.chat(&messages)?)?)
        };
        // Tokens merge differently where texts meet: leave a little room.
        let around = ask(&self.sentence)?.len() + 8;
        let room = length.checked_sub(around).filter(|&room| room > 0).ok_or_else(|| {
            Error::input(format!(
                "a context of {length} tokens has no room beside the question ({around}); use a \
                 longer one"
            ))
        })?;
        let hay = tokenizer.decode(&text[..room.min(text.len())])?;
        let at = sentence_end(&hay, (hay.len() as f64 * depth) as usize);
        let tokens = ask(&format!("{}{}{}", &hay[..at], self.sentence, &hay[at..]))?;
        if tokens.len() > length {
            return Err(Error::failed(format!(
                "the prompt came out at {} tokens, expected at most {length}",
                tokens.len()
            )));
        }
        Ok(tokens)
    }
}

/// The end of the sentence nearest before byte `at`, or the start of the text.
fn sentence_end(text: &str, at: usize) -> usize {
    let head = &text[..text.floor_char_boundary(at)];
    if head.len() == text.len() {
        return text.len();
    }
    head.rfind(['.', '!', '?']).map_or(0, |i| i + 1)
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
    let policies = args.tuned.contenders(&args.policies, &language, context.isa)?;
    let longest = args.context.iter().copied().max().unwrap_or(0);
    language.check_context(longest.saturating_add(ANSWER))?;
    let tokens = language.tokens(&text.text, longest)?;

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
                    let needle = Needle::new(i + args.depth.len() * trial as usize);
                    let prompt = needle.prompt(&language, &tokens, length, depth)?;
                    let (answer, counts) = ask(&language, &prompt, contender, &bar)?;
                    cell.correct += u32::from(answer.contains(&needle.number));
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
    let report = Report { model: language.name, text: text.name, accuracy, results };
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
    let mut text = format!("{} looks for a sentence in {}\n", report.model, report.text);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn needles_differ() {
        let numbers: std::collections::HashSet<String> =
            (0..200).map(|i| Needle::new(i).number).collect();
        assert_eq!(numbers.len(), 200);
        assert!(numbers.iter().all(|n| n.len() == 5));
    }

    #[test]
    fn needles_go_between_sentences() {
        let text = "One é. Two! Three";
        assert_eq!(sentence_end(text, 0), 0);
        assert_eq!(sentence_end(text, 5), 0);
        assert_eq!(&text[..sentence_end(text, 13)], "One é. Two!");
        assert_eq!(sentence_end(text, text.len()), text.len());
    }
}

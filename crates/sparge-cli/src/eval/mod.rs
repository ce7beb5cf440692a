//! `sparge eval`: what sparse attention does to a language model's answers, and to tensors.

mod error;
mod haystack;
mod needle;
mod order;
mod ppl;
mod predictor;

use crate::Context;
use crate::error::Result;
use clap::Subcommand;

/// Measure sparse attention against dense attention.
///
/// A policy is one of: dense; default; topk:F (that share of each row's blocks); cdf:T (blocks until
/// their predicted mass reaches T); cdf:T+topk:F (the union), each followed by any of ,pool=block or
/// QxK or QxK+var (granularity of the prediction) ,theta=T (the judge) ,lambda=L (stage 2; inf turns
/// it off) ,first=N and ,local=N (blocks
/// always kept at the start and before the diagonal). Or a method the paper compares with, its authors' defaults
/// where nothing is given: minference:v=1000,s=6096; a-shape:init=1024,local=4096; block-sparse:100;
/// flexprefill:0.95,tau=0.1,min=1024; xattention:0.9,stride=8; window:1024,sinks=4 (tokens);
/// random:0.5,seed=0 (the control); oracle:0.95 (the other: cdf by true masses, also with ,first=N and
/// ,local=N), each also with ,lambda=L. These have no stage 2 unless asked, and
/// minference and flexprefill, which look at the last queries first, read the prompt in one piece.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Ppl(ppl::Args),
    Needle(needle::Args),
    Error(error::Args),
    Order(order::Args),
    Predictor(predictor::Args),
    Compensation(predictor::compensate::Args),
}

/// Runs the subcommand.
pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    match &args.command {
        Command::Ppl(args) => ppl::run(args, context),
        Command::Needle(args) => needle::run(args, context),
        Command::Error(args) => error::run(args, context),
        Command::Order(args) => order::run(args, context),
        Command::Predictor(args) => predictor::run(args, context),
        Command::Compensation(args) => predictor::compensate::run(args, context),
    }
}

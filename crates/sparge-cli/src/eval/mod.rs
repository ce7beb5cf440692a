//! `sparge eval`: what sparse attention does to a language model's answers.

mod needle;
mod ppl;

use crate::Context;
use crate::error::Result;
use clap::Subcommand;

/// Measure a language model under sparse attention.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Ppl(ppl::Args),
    Needle(needle::Args),
}

/// Runs the subcommand.
pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    match &args.command {
        Command::Ppl(args) => ppl::run(args, context),
        Command::Needle(args) => needle::run(args, context),
    }
}

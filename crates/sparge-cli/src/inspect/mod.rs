//! `sparge inspect`: pictures of what is computed and what is skipped.

mod calibration;
mod head;
mod html;
mod model;
mod tensors;

pub(crate) use head::exact_masses;

use crate::Context;
use crate::error::{Error, Result};
use crate::flags::{LayoutArg, SelectionArgs, VisibilityArgs};
use crate::language::{ModelArgs, TextArgs};
use std::path::PathBuf;

/// Draw what is computed and what is skipped.
///
/// With IN.safetensors (as for `sparge attend`): the block mask of one head, the
/// pooled map it was selected from, and the true block masses. With --model: the skipped share of
/// every layer and head while the model reads a text, or with --layer the maps of one head. With
/// --calibration: what sparge tune found, as a picture (.png) or a page (.html).
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Tensors q, k and v
    #[arg(value_name = "IN.safetensors", conflicts_with = "model")]
    input: Option<PathBuf>,
    /// The picture, or with --calibration also a page
    #[arg(short, long, value_name = "OUT.png")]
    output: PathBuf,
    /// Instead of tensors: smollm2-135m, another model's name, Hugging Face id, or .gguf file
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// Instead of tensors: a file that sparge tune wrote
    #[arg(long, value_name = "FILE", conflicts_with_all = ["input", "model", "topk", "cdf", "theta", "lambda", "pooling", "keep_first", "qk", "causal", "window", "head"])]
    calibration: Option<PathBuf>,
    /// Which .gguf file of a Hugging Face id
    #[arg(long, value_name = "FILE", requires = "model")]
    model_file: Option<String>,
    /// With --model: tokens to read [default: 4096]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// With --model: draw the maps of --head in this layer
    #[arg(long, value_name = "L", requires = "model")]
    layer: Option<usize>,
    #[command(flatten)]
    text: TextArgs,
    /// Query head to draw [default: 0]
    #[arg(long, value_name = "H")]
    head: Option<usize>,
    /// Sequence (batch entry) to draw
    #[arg(long, value_name = "B", default_value_t = 0, conflicts_with = "model")]
    sequence: usize,
    /// Order of heads and tokens in q, k and v
    #[arg(long, value_enum, default_value_t = LayoutArg::Hnd, conflicts_with = "model")]
    layout: LayoutArg,
    /// Factor on q·k [default: 1/√head_dim]
    #[arg(long, value_name = "S", allow_negative_numbers = true, conflicts_with = "model")]
    scale: Option<f64>,
    #[command(flatten)]
    visibility: VisibilityArgs,
    #[command(flatten)]
    selection: SelectionArgs,
}

/// Runs the subcommand.
pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    crate::output::check_writable(&args.output)?;
    if let Some(calibration) = &args.calibration {
        return calibration::run(args, calibration, context);
    }
    match (&args.input, &args.model) {
        (None, None) => Err(Error::input(
            "nothing to draw; give a safetensors file with q, k and v, --model or --calibration",
        )),
        (Some(_), _) if args.text.prompt_file.is_some() || args.context.is_some() => Err(
            Error::input("--prompt-file and --context are for --model; drop them, or use --model"),
        ),
        (Some(input), _) => tensors::run(args, input, context),
        (None, Some(_)) if args.visibility.is_set() => Err(Error::input(
            "the model decides which tokens see which; drop --causal, --window and --sink-blocks",
        )),
        (None, Some(_)) if args.head.is_some() && args.layer.is_none() => {
            Err(Error::input("--head needs --layer; without both, all heads are drawn"))
        }
        (None, Some(_)) => model::run(args, context),
    }
}

impl Args {
    fn model(&self) -> ModelArgs {
        ModelArgs {
            model: self.model.clone().unwrap_or_default(),
            model_file: self.model_file.clone(),
        }
    }
}

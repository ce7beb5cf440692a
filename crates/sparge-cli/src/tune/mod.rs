//! `sparge tune`: what every head of a model may skip, into a calibration file.

mod model;
mod progress;
mod recorded;

use crate::Context;
use crate::error::{Error, Result};
use crate::flags::{LayoutArg, VisibilityArgs};
use crate::language::{ModelArgs, TextArgs};
use crate::output::{self, write_atomically};
use crate::terminal::{self, Table, percent};
use serde::Serialize;
use sparge::calibrate::{
    Bounds, CalibratedModel, Calibration, CalibrationData, Grid, HeadRun, HeadSettings, HeadTally,
    LayerSettings, Measured, Shared,
};
use sparge::{Pooling, Selection, SpargeConfig};
use std::path::PathBuf;

/// Find what every head may skip within an error bound, and write it to a file.
///
/// Reads samples densely, and from that one pass works out what every setting would do to every
/// head; then runs the chosen settings and reports their errors. The file is for --calibration of
/// run, eval and attend, and for the libraries. What has been read survives an interruption: the
/// same command goes on where it stopped. The samples are taken from the end of the text, so that
/// what eval reads from its start is not what was tuned on.
///
/// Instead of a model, recorded tensors: safetensors files with q, k and v as for sparge attend
/// (batch entries are samples), or with layers.0.q, layers.0.k, layers.0.v, layers.1.q and so on.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    text: TextArgs,
    /// Recorded tensors instead of a model; repeatable, each file a sample
    #[arg(long, value_name = "FILE.safetensors", conflicts_with_all = ["model", "model_file", "prompt_file", "samples", "context"])]
    input: Vec<PathBuf>,
    /// Relative L1 error a head may have from skipped blocks
    #[arg(long, value_name = "E", default_value_t = 0.05, value_parser = bound)]
    l1: f64,
    /// The same with P·V skipped too; not below --l1 [default: 1.2 times --l1]
    #[arg(long, value_name = "E", value_parser = bound)]
    l2: Option<f64>,
    /// Pieces of the text to read
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    samples: u32,
    /// Tokens of each
    #[arg(long, value_name = "N", default_value_t = 4096)]
    context: usize,
    /// Granularity of the prediction, as for sparge attend [default: 16x16+2rows]
    #[arg(long, value_name = "POOLING", value_parser = crate::flags::pooling)]
    pooling: Option<Pooling>,
    /// Blocks of 64 keys at the start that are always kept
    #[arg(long, value_name = "N", default_value_t = 1)]
    keep_first: usize,
    /// Blocks of 64 keys before the diagonal that are always kept
    #[arg(long, value_name = "N", default_value_t = 2)]
    keep_local: usize,
    /// Choose a fixed share of the blocks per head (top-k) instead of a share of the mass
    #[arg(long)]
    topk: bool,
    /// With recorded tensors: which pairs may be attended
    #[command(flatten)]
    visibility: VisibilityArgs,
    /// With recorded tensors: order of heads and tokens
    #[arg(long, value_enum, default_value_t = LayoutArg::Hnd)]
    layout: LayoutArg,
    /// With recorded tensors: factor on q·k [default: 1/√head_dim]
    #[arg(long, value_name = "S", allow_negative_numbers = true)]
    scale: Option<f64>,
    /// Begin again where an interrupted run left its progress
    #[arg(long)]
    restart: bool,
    /// The calibration file
    #[arg(short, long, value_name = "OUT.json")]
    output: PathBuf,
}

fn bound(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x > 0.0 && x < 1.0 => Ok(x),
        _ => Err("expected a relative error above 0 and below 1, such as 0.05".into()),
    }
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report<'a> {
    output: String,
    survey_s: f64,
    rerun_s: f64,
    #[serde(flatten)]
    calibration: &'a Calibration,
}

/// Seconds of this run (not of one it continues).
#[derive(Debug, Default)]
struct Times {
    survey_s: f64,
    rerun_s: f64,
}

/// Runs the subcommand.
pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    output::check_writable(&args.output)?;
    let bounds = args.bounds()?;
    if args.input.is_empty() && (args.visibility.is_set() || args.scale.is_some()) {
        return Err(Error::input(
            "the model decides which tokens see which; drop --causal, --window, --sink-blocks and --scale",
        ));
    }
    let (calibration, times) = if args.input.is_empty() {
        model::tune(args, bounds, context)
    } else {
        recorded::tune(args, bounds, context)
    }?;
    write_atomically(&args.output, |w| w.write_all(calibration.to_json().as_bytes()))?;
    progress::remove(&args.output)?;
    if context.json {
        return terminal::print_json(&Report {
            output: args.output.display().to_string(),
            survey_s: times.survey_s,
            rerun_s: times.rerun_s,
            calibration: &calibration,
        });
    }
    terminal::print(&render(args, &calibration, &times))
}

impl Args {
    fn bounds(&self) -> Result<Bounds> {
        let l2 = self.l2.unwrap_or((1.2 * self.l1).min(0.999));
        if l2 < self.l1 {
            return Err(Error::input(format!(
                "--l2 is {l2}, below --l1 ({}); the second stage can only add to the error",
                self.l1
            )));
        }
        Ok(Bounds { l1: self.l1, l2 })
    }

    fn grid(&self) -> Grid {
        let mut grid = Grid::tuning(self.pooling());
        if self.topk {
            grid.selections = (1..20).map(|i| Selection::TopK(f64::from(i) / 20.0)).collect();
        }
        grid
    }

    fn pooling(&self) -> Pooling {
        self.pooling.unwrap_or_default()
    }

    fn shared(&self, min_kv_len: usize) -> Shared {
        Shared {
            pooling: self.pooling(),
            keep_first: self.keep_first,
            keep_local: self.keep_local,
            min_kv_len,
        }
    }

    /// What is not chosen per head.
    fn config(&self, context: &Context) -> SpargeConfig {
        SpargeConfig {
            keep_first: self.keep_first,
            keep_local: self.keep_local,
            pooling: self.pooling(),
            isa: context.isa,
            ..SpargeConfig::default()
        }
    }
}

/// The file with the settings that `tallies` lead to; what they measure comes from [`measured`].
fn chosen(
    model: CalibratedModel,
    data: CalibrationData,
    settings: Shared,
    bounds: Bounds,
    grid: &Grid,
    tallies: &[Vec<HeadTally>],
) -> Calibration {
    let (format, version) = Calibration::header();
    let heads = |heads: &Vec<HeadTally>| heads.iter().map(|t| t.choose(grid, bounds)).collect();
    Calibration {
        format,
        version,
        made_by: concat!("sparge ", env!("CARGO_PKG_VERSION")).into(),
        model,
        data,
        bounds,
        settings,
        measured: Default::default(),
        layers: tallies.iter().map(|layer| LayerSettings { heads: heads(layer) }).collect(),
    }
}

/// Replaces what the tallies said by what running the settings gave.
fn measured(calibration: &mut Calibration, runs: &[Vec<HeadRun>]) {
    let mut total = HeadRun::default();
    for (layer, runs) in calibration.layers.iter_mut().zip(runs) {
        for (head, run) in layer.heads.iter_mut().zip(runs) {
            head.measured = rounded(run.measured());
            total += run;
        }
    }
    calibration.measured = rounded(total.measured());
}

/// Digits that mean something, so that the file stays short.
fn rounded(m: Measured) -> Measured {
    let round = |x: f64| (x * 1e5).round() / 1e5;
    Measured {
        rel_l1: round(m.rel_l1),
        qk_sparsity: round(m.qk_sparsity),
        pv_sparsity: round(m.pv_sparsity),
    }
}

fn render(args: &Args, calibration: &Calibration, times: &Times) -> String {
    let heads = || calibration.layers.iter().flat_map(|l| &l.heads);
    let count = |f: fn(&HeadSettings) -> bool| heads().filter(|h| f(h)).count();
    let mut table = Table::new(["layer", "QK skipped", "PV skipped", "worst head", "dense heads"]);
    for (i, layer) in calibration.layers.iter().enumerate() {
        let n = layer.heads.len().max(1) as f64;
        let mean = |f: fn(&HeadSettings) -> f64| layer.heads.iter().map(f).sum::<f64>() / n;
        let worst = layer.heads.iter().map(|h| h.measured.rel_l1).fold(0.0, f64::max);
        table.row([
            i.to_string(),
            percent(mean(|h| h.measured.qk_sparsity)),
            percent(mean(|h| h.measured.pv_sparsity)),
            format!("{worst:.4}"),
            layer.heads.iter().filter(|h| h.is_dense()).count().to_string(),
        ]);
    }
    let m = &calibration.measured;
    format!(
        "{} on {}, {} samples of {} tokens, relative L1 within {} and {}\n\n{}\n{} of Q·Kᵀ and {} of \
         P·V skipped at relative L1 {:.4}; {} of {} heads dense, {} without stage 2\nread in {}, \
         the settings run in {}\nwrote {}\n",
        calibration.model.id,
        calibration.data.source,
        calibration.data.samples,
        calibration.data.tokens,
        calibration.bounds.l1,
        calibration.bounds.l2,
        table.render(),
        percent(m.qk_sparsity),
        percent(m.pv_sparsity),
        m.rel_l1,
        count(HeadSettings::is_dense),
        heads().count(),
        count(|h| h.lambda.is_none()),
        terminal::seconds(times.survey_s),
        terminal::seconds(times.rerun_s),
        args.output.display(),
    )
}

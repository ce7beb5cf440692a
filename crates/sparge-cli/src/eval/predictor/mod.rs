//! `sparge eval predictor`: how near a prediction is to the true block masses, and what it costs.

pub(super) mod compensate;
mod estimate;
mod record;
mod scatter;

use crate::Context;
use crate::error::{Error, Result};
use crate::flags;
use crate::language::{Language, ModelArgs, TextArgs, TokenBar};
use crate::terminal::{self, Table, percent, seconds};
use estimate::{Estimator, Rows};
use rayon::prelude::*;
use record::{Layer, Recorder};
use serde::Serialize;
use sparge::calibrate::{Grid, HeadTally, Ranking, survey};
use sparge::{
    Alignment, AttentionOptions, AttentionShape, BlockMasses, Plan, Pooling, Selection,
    SpargeConfig,
};
use std::time::Instant;

/// Compare ways to predict the block masses with the true ones, on a model's own q, k and v.
///
/// Records a few layers while the model reads a text densely, and works out, for every predictor
/// and budget, the share of the blocks skipped and the relative L1 error. The oracle ranks blocks by
/// their true mass. Times are those of the operator's prediction as a share of dense attention on
/// the same tensors; predictors that the operator does not have are not timed. Afterwards, for the
/// default prediction, how well the lost mass it estimates tells the true error of a query block.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    text: TextArgs,
    /// Tokens to read
    #[arg(long, value_name = "N", default_value_t = 4096)]
    context: usize,
    /// Layers to record; repeatable, or separated by commas [default: six, evenly spaced]
    #[arg(long, value_name = "L", value_delimiter = ',')]
    layer: Vec<usize>,
    /// Poolings to compare, as for sparge attend; repeatable, or separated by commas
    #[arg(long, value_name = "POOLING", value_delimiter = ',', value_parser = flags::pooling,
          default_values = ["block", "128x64+var", "64x64+var", "32x32+var", "16x64+var", "64x16+var",
                            "16x16", "16x16+var", "8x16+var", "16x8+var", "8x8+var", "16x4+var", "64x8+var",
                            "16x1", "128x64+2rows", "16x64+var+2rows", "16x32+var+2rows", "16x16+2rows",
                            "16x16+var+1rows", "16x16+var+2rows", "16x16+var+4rows", "16x8+var+2rows"])]
    pooling: Vec<Pooling>,
    /// Values of the judge's θ to try with block and with the default
    #[arg(long, value_name = "COS", value_delimiter = ',', default_values_t = [0.3, 0.6])]
    theta: Vec<f64>,
    /// Time every prediction this often and take the median; 0 does not time
    #[arg(long, value_name = "N", default_value_t = 0)]
    reps: usize,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    text: String,
    context: usize,
    layers: Vec<usize>,
    threads: usize,
    isa: String,
    /// Of dense attention, mean over the layers; null where not timed.
    dense_s: Option<f64>,
    curves: Vec<Curve>,
    estimate: scatter::Report,
}

/// One predictor.
#[derive(Debug, Serialize)]
struct Curve {
    predictor: String,
    /// Time over that of dense attention, median, mean over the layers.
    cost: Option<f64>,
    /// One τ or top-k for all heads.
    points: Vec<Point>,
    /// τ of its own for every head, the sparsest whose error is within a bound.
    tuned: Vec<Tuned>,
}

/// One bound.
#[derive(Debug, Clone, Serialize)]
struct Tuned {
    bound: f64,
    qk_sparsity: f64,
    /// Mean over the heads.
    rel_l1: f64,
}

/// One budget.
#[derive(Debug, Serialize)]
struct Point {
    selection: String,
    qk_sparsity: f64,
    /// Mean over the layers of Σ|O − O′|/Σ|O|.
    rel_l1: f64,
    /// Mean share of the true attention that was skipped.
    lost_mass: f64,
}

const CDF: [f64; 16] = [
    0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.995, 0.9975, 0.999,
];
/// Bounds of the tuned curve.
const BOUNDS: [f64; 7] = [0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15];
const TOP_K: [f64; 7] = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8];

/// Runs the subcommand.
pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    let text = args.text.load(context)?;
    let language = Language::open(&args.model, context)?;
    language.check_context(args.context)?;
    let layers = chosen_layers(&args.layer, language.model.config().num_layers)?;
    for &pooling in &args.pooling {
        language.check_config(&SpargeConfig { pooling, ..SpargeConfig::default() })?;
    }
    let tokens = language.tokens(&text.text, args.context)?;
    let bar = TokenBar::new(tokens.len() * (1 + layers.len()));
    bar.say("reading");
    let mut recorder = Recorder::new(&layers, context.isa);
    language.read_with(&tokens, 0, &mut recorder, &bar, false)?;

    let mut study = Study::new(args, context);
    let mut points = scatter::Points::default();
    for (&layer, tensors) in layers.iter().zip(recorder.into_layers()) {
        bar.say(format!("layer {layer}"));
        study.layer(&tensors)?;
        points.layer(&tensors, layer, context.isa)?;
        bar.skip(tokens.len());
    }
    drop(bar);
    let report = Report {
        model: language.name.clone(),
        text: text.name,
        context: tokens.len(),
        layers,
        threads: rayon::current_num_threads(),
        isa: format!("{:?}", context.isa.unwrap_or_else(sparge::Isa::detect)).to_lowercase(),
        dense_s: study.dense_s(),
        curves: study.curves(),
        estimate: points.report(),
    };
    if context.json { terminal::print_json(&report) } else { terminal::print(&render(&report)) }
}

/// The layers asked for, or six, of a model with `count`.
fn chosen_layers(asked: &[usize], count: usize) -> Result<Vec<usize>> {
    if let Some(layer) = asked.iter().find(|l| **l >= count) {
        return Err(Error::input(format!(
            "--layer is {layer}, but the model has {count}; expected 0 to {}",
            count - 1
        )));
    }
    let six = || (0..6).map(|i| i * (count - 1) / 5).collect();
    Ok(if asked.is_empty() { six() } else { asked.to_vec() })
}

/// A predictor: the operator's, or one of this command's.
enum Predictor {
    Ours(Ranking, SpargeConfig),
    Plain(Estimator),
    Oracle,
}

struct Study {
    predictors: Vec<(String, Predictor)>,
    selections: Vec<Selection>,
    isa: Option<sparge::Isa>,
    reps: usize,
    /// Per layer and head.
    heads: Vec<Vec<HeadTally>>,
    /// Per layer: the sums over its heads.
    tallies: Vec<HeadTally>,
    /// Per predictor and layer.
    times: Vec<Vec<f64>>,
    dense_times: Vec<f64>,
}

impl Study {
    fn new(args: &Args, context: &Context) -> Self {
        let ours = |pooling: Pooling, theta: f64| {
            let config = SpargeConfig {
                selection: Selection::TopCdf(0.95).into(),
                theta: theta.into(),
                pooling,
                isa: context.isa,
                ..SpargeConfig::default()
            };
            let judge = if theta > 0.0 { format!(", θ = {theta}") } else { String::new() };
            let name = format!("{}{judge}", flags::pooling_name(pooling));
            (name, Predictor::Ours(Ranking::Predicted { pooling, theta }, config))
        };
        let mut predictors: Vec<_> = args.pooling.iter().map(|&p| ours(p, 0.0)).collect();
        for &theta in &args.theta {
            predictors.extend([Pooling::BLOCK, Pooling::default()].map(|p| ours(p, theta)));
        }
        let plain = [
            Estimator::Sampled { rows: 4, kv_rows: 1 },
            Estimator::Sampled { rows: 8, kv_rows: 1 },
            Estimator::Sampled { rows: 16, kv_rows: 1 },
            Estimator::Sampled { rows: 8, kv_rows: 16 },
            Estimator::Moments { q_rows: 16, kv_rows: 16, both: false },
            Estimator::Moments { q_rows: 16, kv_rows: 16, both: true },
            Estimator::Moments { q_rows: 16, kv_rows: 8, both: false },
            Estimator::Moments { q_rows: 16, kv_rows: 8, both: true },
            Estimator::Antidiagonal { stride: 8 },
            Estimator::Antidiagonal { stride: 16 },
        ];
        predictors.extend(plain.map(|e| (e.to_string(), Predictor::Plain(e))));
        predictors.push(("oracle".into(), Predictor::Oracle));
        let union = CDF[5..].iter().map(|&cdf| Selection::Union { cdf, top_k: 0.3 });
        let selections = CDF.map(Selection::TopCdf).into_iter().chain(TOP_K.map(Selection::TopK));
        Self {
            times: vec![Vec::new(); predictors.len()],
            predictors,
            selections: selections.chain(union).collect(),
            isa: context.isa,
            reps: args.reps,
            heads: Vec::new(),
            tallies: Vec::new(),
            dense_times: Vec::new(),
        }
    }

    fn layer(&mut self, tensors: &Layer) -> Result<()> {
        let [q, k, v] = tensors.views()?;
        let options = options(tensors.scale);
        let rankings: Vec<Ranking> = self
            .predictors
            .iter()
            .map(|(_, predictor)| match predictor {
                Predictor::Ours(ranking, _) => ranking.clone(),
                Predictor::Plain(estimator) => {
                    Ranking::Given(given(*estimator, tensors, q.dims().heads))
                }
                Predictor::Oracle => Ranking::Exact,
            })
            .collect();
        let grid = Grid { rankings, selections: self.selections.clone(), lambdas: Vec::new() };
        let base = SpargeConfig { isa: self.isa, ..SpargeConfig::default() };
        let mut out = vec![0.0; q.dims().heads * q.dims().len * v.dims().dim];
        let mut sum = grid.tally();
        let heads = survey(&q, &k, &v, &options, &base, &grid, &mut out)?;
        heads.iter().for_each(|tally| sum += tally);
        self.tallies.push(sum);
        self.heads.push(heads);
        if self.reps > 0 {
            self.time(tensors)?;
        }
        Ok(())
    }

    fn time(&mut self, tensors: &Layer) -> Result<()> {
        let [q, k, v] = tensors.views()?;
        let shape = AttentionShape::of(&q, &k, &v)?;
        let options = options(tensors.scale);
        let dense = SpargeConfig { isa: self.isa, ..SpargeConfig::dense() };
        let plan = Plan::new(shape, &options, &dense)?;
        let mut out = vec![0.0; shape.num_qo_heads * shape.qo_len * shape.head_dim_v];
        let mut attend = || -> Result<f64> {
            let start = Instant::now();
            sparge::forward(&plan, &q, &k, &v, &mut out)?;
            Ok(start.elapsed().as_secs_f64())
        };
        self.dense_times.push(median(self.reps, &mut attend)?);
        for ((_, predictor), times) in self.predictors.iter().zip(&mut self.times) {
            if let Predictor::Ours(_, config) = predictor {
                let plan = Plan::new(shape, &options, config)?;
                times.push(median(self.reps, &mut || {
                    let start = Instant::now();
                    sparge::predict(&plan, &q, &k)?;
                    Ok(start.elapsed().as_secs_f64())
                })?);
            }
        }
        Ok(())
    }

    /// Predictor number `p` with a τ per head.
    fn tuned(&self, p: usize, bound: f64) -> Tuned {
        let cells = p * self.selections.len()..p * self.selections.len() + CDF.len();
        let (mut kept, mut reachable, mut error, mut count) = (0, 0, 0.0, 0.0);
        for tally in self.heads.iter().flatten() {
            let within = tally.cells[cells.clone()]
                .iter()
                .map(|cell| (cell.qk_blocks, tally.measured(cell, 0).rel_l1))
                .filter(|(_, error)| *error <= bound)
                .min_by_key(|(blocks, _)| *blocks);
            let (blocks, l1) = within.unwrap_or((tally.reachable_blocks, 0.0));
            kept += blocks;
            reachable += tally.reachable_blocks;
            error += l1;
            count += 1.0;
        }
        let share = kept as f64 / reachable.max(1) as f64;
        Tuned { bound, qk_sparsity: 1.0 - share, rel_l1: error / count }
    }

    fn dense_s(&self) -> Option<f64> {
        let n = self.dense_times.len();
        (n > 0).then(|| self.dense_times.iter().sum::<f64>() / n as f64)
    }

    fn curves(&self) -> Vec<Curve> {
        let n = self.tallies.len() as f64;
        let per = self.selections.len();
        let named = self.predictors.iter().zip(&self.times).enumerate();
        named
            .map(|(p, ((name, _), times))| Curve {
                predictor: name.clone(),
                cost: self.dense_s().filter(|_| !times.is_empty()).map(|_| {
                    let shares = times.iter().zip(&self.dense_times).map(|(t, d)| t / d);
                    shares.sum::<f64>() / n
                }),
                points: (0..per)
                    .map(|s| {
                        let mean = |f: &dyn Fn(&HeadTally) -> f64| {
                            self.tallies.iter().map(f).sum::<f64>() / n
                        };
                        let at = p * per + s;
                        Point {
                            selection: describe(self.selections[s]),
                            qk_sparsity: mean(&|t| t.measured(&t.cells[at], 0).qk_sparsity),
                            rel_l1: mean(&|t| t.measured(&t.cells[at], 0).rel_l1),
                            lost_mass: mean(&|t| t.cells[at].lost_mass / t.rows as f64),
                        }
                    })
                    .collect(),
                tuned: BOUNDS.map(|bound| self.tuned(p, bound)).to_vec(),
            })
            .collect()
    }
}

fn describe(selection: Selection) -> String {
    match selection {
        Selection::TopCdf(cdf) => format!("cdf:{cdf}"),
        Selection::TopK(top_k) => format!("topk:{top_k}"),
        Selection::Union { cdf, top_k } => format!("cdf:{cdf}+topk:{top_k}"),
        Selection::Auto => "default".into(),
        Selection::All => "dense".into(),
    }
}

fn options(scale: f64) -> AttentionOptions<'static> {
    AttentionOptions {
        softmax_scale: Some(scale),
        causal: Some(Alignment::TopLeft),
        ..AttentionOptions::default()
    }
}

/// The masses an estimator guesses, per query head.
fn given(estimator: Estimator, tensors: &Layer, heads: usize) -> Vec<BlockMasses> {
    let dim = tensors.dim();
    (0..heads)
        .into_par_iter()
        .map(|head| {
            let [q, k, _] = tensors.head(head);
            let (q, k) = (Rows { data: q, dim }, Rows { data: k, dim });
            estimate::masses(estimator, q, k, tensors.scale as f32)
        })
        .collect()
}

fn median(reps: usize, run: &mut dyn FnMut() -> Result<f64>) -> Result<f64> {
    let mut times = (0..reps).map(|_| run()).collect::<Result<Vec<f64>>>()?;
    times.sort_by(f64::total_cmp);
    Ok(times[reps / 2])
}

fn render(report: &Report) -> String {
    let mut table =
        Table::new(["predictor", "cost", "τ", "QK skipped", "relative L1", "mass lost"]);
    for curve in &report.curves {
        for point in
            curve.points.iter().filter(|p| ["cdf:0.95", "cdf:0.99"].contains(&&*p.selection))
        {
            table.row([
                curve.predictor.clone(),
                curve.cost.map_or("–".into(), percent),
                point.selection.clone(),
                percent(point.qk_sparsity),
                format!("{:.4}", point.rel_l1),
                format!("{:.4}", point.lost_mass),
            ]);
        }
    }
    let dense =
        report.dense_s.map_or(String::new(), |s| format!("; dense attention {}", seconds(s)));
    format!(
        "{} on {} tokens of {}, layers {:?}{dense}\n\n{}\n{}",
        report.model,
        report.context,
        report.text,
        report.layers,
        table.render(),
        report.estimate.render()
    )
}

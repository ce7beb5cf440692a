//! `sparge eval compensation`: would an estimate of the skipped blocks make up for them?

use super::estimate::{Rows, dot, moments};
use super::record::{Layer, Recorder};
use super::{chosen_layers, options};
use crate::Context;
use crate::error::Result;
use crate::language::{Language, ModelArgs, TextArgs, TokenBar};
use crate::terminal::{self, Table, percent};
use rayon::prelude::*;
use serde::Serialize;
use sparge::{
    AttentionOptions, AttentionShape, BLOCK_KV, BLOCK_Q, BlockMasses, Plan, Selection,
    SpargeConfig, block_masses, predict,
};

/// Let something cheap stand for the blocks that the default prediction skips, on a model's own q, k and v.
///
/// Records a few layers while the model reads a text densely. For every budget (stage 2 off) it
/// reports the relative L1 error of attention as it is, and with each stand-in: a mass for every
/// skipped block, times the mean of the block's values, or added to the denominator alone.
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
}

const CDF: [f64; 7] = [0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99];

/// Where the mass of a skipped block comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Mass {
    /// Nowhere: skipped is skipped.
    None,
    /// Stage 1's estimate, one share for all rows of the query block.
    Predicted,
    /// Each row's product with the mean of the block's keys, counted 64 times.
    MeanKey,
    /// Each row's products with the means of the block's four lots of 16 keys.
    Means16,
    /// What the row truly gives to the block: a bound, it cannot be had.
    True,
}

/// A stand-in for the skipped blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Form {
    mass: Mass,
    /// Times the mean of the values; otherwise it enlarges the denominator only.
    values: bool,
}

const FORMS: [Form; 9] = [
    Form { mass: Mass::None, values: false },
    Form { mass: Mass::Predicted, values: false },
    Form { mass: Mass::Predicted, values: true },
    Form { mass: Mass::MeanKey, values: false },
    Form { mass: Mass::MeanKey, values: true },
    Form { mass: Mass::Means16, values: false },
    Form { mass: Mass::Means16, values: true },
    Form { mass: Mass::True, values: false },
    Form { mass: Mass::True, values: true },
];

impl Form {
    /// Multiplications per element of a token, where `skipped` blocks of 128×64 are stood in for and
    /// there are `len` queries (of all heads) and as many keys.
    fn multiplications(self, skipped: f64, len: f64) -> f64 {
        let values = if self.values { 1.0 } else { 0.0 };
        let rows = BLOCK_Q as f64;
        match self.mass {
            Mass::None | Mass::True => 0.0,
            // One vector for the query block, which each of its rows adds to what it has.
            Mass::Predicted => values * (skipped + 2.0 * len) + len,
            Mass::MeanKey => (1.0 + values) * (rows * skipped + len),
            Mass::Means16 => (1.0 + values) * (4.0 * rows * skipped + len),
        }
    }
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    text: String,
    context: usize,
    layers: Vec<usize>,
    budgets: Vec<Budget>,
}

/// One budget, the same blocks for all forms.
#[derive(Debug, Serialize)]
struct Budget {
    cdf: f64,
    qk_sparsity: f64,
    forms: Vec<Tried>,
}

#[derive(Debug, Serialize)]
struct Tried {
    #[serde(flatten)]
    form: Form,
    /// Mean over the layers of Σ|O − O′|/Σ|O|.
    rel_l1: f64,
    /// Multiplications as a share of dense attention's; null where it cannot be had.
    cost: Option<f64>,
}

/// Runs the subcommand.
pub(crate) fn run(args: &Args, context: &Context) -> Result<()> {
    let text = args.text.load(context)?;
    let language = Language::open(&args.model, context)?;
    language.check_context(args.context)?;
    let layers = chosen_layers(&args.layer, language.model.config().num_layers)?;
    let tokens = language.tokens(&text.text, args.context)?;
    let bar = TokenBar::new(tokens.len() * (1 + layers.len()));
    bar.say("reading");
    let mut recorder = Recorder::new(&layers, context.isa);
    language.read_with(&tokens, 0, &mut recorder, &bar, false)?;

    let mut sums = vec![Sums::default(); CDF.len()];
    for (&layer, tensors) in layers.iter().zip(recorder.into_layers()) {
        bar.say(format!("layer {layer}"));
        for (sum, cdf) in sums.iter_mut().zip(CDF) {
            sum.layer(&tensors, cdf, context.isa)?;
        }
        bar.skip(tokens.len());
    }
    drop(bar);
    let n = layers.len() as f64;
    let budgets = CDF.iter().zip(&sums).map(|(&cdf, sum)| Budget {
        cdf,
        qk_sparsity: sum.sparsity / n,
        forms: (FORMS.iter().enumerate())
            .map(|(i, &form)| Tried {
                form,
                rel_l1: sum.errors[i] / n,
                cost: (form.mass != Mass::True).then(|| sum.costs[i] / n),
            })
            .collect(),
    });
    let report = Report {
        budgets: budgets.collect(),
        model: language.name.clone(),
        text: text.name,
        context: tokens.len(),
        layers,
    };
    if context.json { terminal::print_json(&report) } else { terminal::print(&render(&report)) }
}

/// One budget, summed over the layers.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    sparsity: f64,
    errors: [f64; FORMS.len()],
    costs: [f64; FORMS.len()],
}

impl Sums {
    fn layer(&mut self, tensors: &Layer, cdf: f64, isa: Option<sparge::Isa>) -> Result<()> {
        let [q, k, v] = tensors.views()?;
        let options = AttentionOptions { return_lse: true, ..options(tensors.scale) };
        let exact = sparge::attention(
            &q,
            &k,
            &v,
            &options,
            &SpargeConfig { isa, ..SpargeConfig::dense() },
        )?;
        let config = SpargeConfig {
            selection: Selection::TopCdf(cdf).into(),
            lambda: f64::INFINITY.into(),
            isa,
            ..SpargeConfig::default()
        };
        let shape = AttentionShape::of(&q, &k, &v)?;
        let plan = Plan::new(shape, &options, &config)?;
        let mask = predict(&plan, &q, &k)?;
        let mut kept = vec![0.0; exact.o.len()];
        let side = sparge::attend(&plan, &q, &k, &v, Some(&mask), &mut kept)?;
        let masses = (0..shape.num_qo_heads)
            .map(|head| block_masses(&plan, &q, &k, 0, head))
            .collect::<sparge::Result<Vec<_>>>()?;
        let kept_lse = side.lse.unwrap_or_default();
        let (len, dim) = (shape.qo_len, shape.head_dim_v);
        let heads: Vec<Outcome> = masses
            .par_iter()
            .enumerate()
            .map(|(h, masses)| {
                let rows = h * len..(h + 1) * len;
                let of = rows.start * dim..rows.end * dim;
                let [q, k, v] = tensors.head(h).map(|data| Rows { data, dim });
                Head {
                    q,
                    k,
                    v,
                    scale: tensors.scale as f32,
                    exact: &exact.o[of.clone()],
                    kept: (&kept[of], &kept_lse[rows]),
                }
                .outcome(masses, |i, j| mask.get(0, h, i, j))
            })
            .collect();
        let sum = |f: &dyn Fn(&Outcome) -> f64| heads.iter().map(f).sum::<f64>();
        let (norm, skipped) = (sum(&|o| o.norm), sum(&|o| o.skipped));
        let reachable = sum(&|o| o.reachable);
        self.sparsity += skipped / reachable;
        let dense = reachable * (2 * BLOCK_Q * BLOCK_KV * dim) as f64;
        let all = (len * shape.num_qo_heads) as f64;
        for (i, form) in FORMS.iter().enumerate() {
            self.errors[i] += sum(&|o| o.errors[i]) / norm;
            self.costs[i] += form.multiplications(skipped, all) * dim as f64 / dense;
        }
        Ok(())
    }
}

/// One query head: its tensors, the dense output, and the sparse one with the logarithms of its
/// denominators.
struct Head<'a> {
    q: Rows<'a>,
    k: Rows<'a>,
    v: Rows<'a>,
    scale: f32,
    exact: &'a [f32],
    kept: (&'a [f32], &'a [f32]),
}

/// Sums over a head.
struct Outcome {
    /// Σ|O|.
    norm: f64,
    skipped: f64,
    reachable: f64,
    /// Σ|O − O″| of every form.
    errors: [f64; FORMS.len()],
}

impl Head<'_> {
    /// Every form, where `keeps` tells the blocks that are computed. Those that are not lie before
    /// the diagonal, so all rows see all their keys.
    fn outcome(&self, masses: &BlockMasses, keeps: impl Fn(usize, usize) -> bool) -> Outcome {
        let dim = self.q.dim;
        let len = self.q.data.len() / dim;
        let means = |x: &Rows<'_>, size: usize| -> Vec<Vec<f32>> {
            x.data.chunks(size * dim).map(|part| moments(part, dim).0).collect()
        };
        let (k64, v64) = (means(&self.k, BLOCK_KV), means(&self.v, BLOCK_KV));
        let (k16, v16) = (means(&self.k, 16), means(&self.v, 16));
        let mut outcome =
            Outcome { norm: 0.0, skipped: 0.0, reachable: 0.0, errors: [0.0; FORMS.len()] };
        for i in 0..len.div_ceil(BLOCK_Q) {
            let rows = i * BLOCK_Q..((i + 1) * BLOCK_Q).min(len);
            let reachable = rows.end.div_ceil(BLOCK_KV);
            let skipped: Vec<usize> = (0..reachable).filter(|&j| !keeps(i, j)).collect();
            outcome.reachable += reachable as f64;
            outcome.skipped += skipped.len() as f64;
            for row in rows {
                let q = self.q.range(&(row..row + 1));
                let exact = &self.exact[row * dim..][..dim];
                let kept = &self.kept.0[row * dim..][..dim];
                let kept_lse = self.kept.1[row];
                outcome.norm += exact.iter().map(|x| f64::from(x.abs())).sum::<f64>();
                // What a score adds, relative to what the kept blocks' scores add up to.
                let weight = |key: &[f32]| (self.scale * dot(q, key) - kept_lse).exp();
                for (form, error) in FORMS.iter().zip(&mut outcome.errors) {
                    let mut tokens: Vec<(f32, &[f32])> = Vec::new();
                    for &j in &skipped {
                        match form.mass {
                            Mass::None => {}
                            Mass::Predicted => {
                                let mass = masses.values[i * masses.kv_blocks + j];
                                tokens.push((mass, &v64[j]));
                            }
                            Mass::MeanKey => {
                                tokens.push((BLOCK_KV as f32 * weight(&k64[j]), &v64[j]));
                            }
                            Mass::Means16 => {
                                let lots = j * 4..((j + 1) * 4).min(k16.len());
                                tokens.extend(lots.map(|l| (16.0 * weight(&k16[l]), &v16[l][..])));
                            }
                            Mass::True => {
                                let keys = j * BLOCK_KV..(j + 1) * BLOCK_KV;
                                let mass = keys.map(|j| weight(self.k.range(&(j..j + 1)))).sum();
                                tokens.push((mass, &v64[j]));
                            }
                        }
                    }
                    let stand: f32 = tokens.iter().map(|t| t.0).sum();
                    // Stage 1's masses are shares of all, the others of what is kept.
                    let whole = if form.mass == Mass::Predicted { 1.0 } else { 1.0 + stand };
                    let own = if form.mass == Mass::Predicted { 1.0 - stand } else { 1.0 };
                    let mut o: Vec<f32> = kept.iter().map(|x| own * x).collect();
                    for (mass, value) in tokens.iter().filter(|_| form.values) {
                        o.iter_mut().zip(*value).for_each(|(o, v)| *o += mass * v);
                    }
                    let off = o.iter().zip(exact).map(|(o, x)| f64::from((o / whole - x).abs()));
                    *error += off.sum::<f64>();
                }
            }
        }
        outcome
    }
}

fn render(report: &Report) -> String {
    let mut table = Table::new(["τ", "QK skipped", "mass", "values", "relative L1", "cost"]);
    for budget in &report.budgets {
        for tried in &budget.forms {
            table.row([
                budget.cdf.to_string(),
                percent(budget.qk_sparsity),
                format!("{:?}", tried.form.mass),
                if tried.form.values { "mean" } else { "–" }.into(),
                format!("{:.4}", tried.rel_l1),
                tried.cost.map_or("–".into(), percent),
            ]);
        }
    }
    format!(
        "{} on {} tokens of {}, layers {:?}\n\n{}",
        report.model,
        report.context,
        report.text,
        report.layers,
        table.render()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks whose keys are all the same, and whose values are: the mean says everything.
    #[test]
    fn blocks_of_equal_keys_are_made_up_for() {
        let (len, dim, scale) = (512, 8, 0.5);
        let wave = |i: usize| (i as f32 * 0.7).sin();
        let q: Vec<f32> = (0..len * dim).map(wave).collect();
        let flat =
            |x: f32| (0..len * dim).map(move |i| wave(i / (BLOCK_KV * dim) * 31 + i % dim) * x);
        let (k, v): (Vec<f32>, Vec<f32>) = (flat(1.0).collect(), flat(-2.0).collect());
        // Rows of the last query block, whose second and third key blocks are left out.
        let keeps = |i: usize, j: usize| i != 3 || ![1, 2].contains(&j);
        let attend = |keep: &dyn Fn(usize, usize) -> bool| {
            let (mut o, mut lse) = (vec![0.0; len * dim], vec![0.0; len]);
            for i in 0..len {
                let mut sum = 0.0;
                for j in (0..=i).filter(|j| keep(i / BLOCK_Q, j / BLOCK_KV)) {
                    let p = (dot(&q[i * dim..][..dim], &k[j * dim..][..dim]) * scale).exp();
                    sum += p;
                    (0..dim).for_each(|d| o[i * dim + d] += p * v[j * dim + d]);
                }
                o[i * dim..][..dim].iter_mut().for_each(|x| *x /= sum);
                lse[i] = sum.ln();
            }
            (o, lse)
        };
        let (exact, kept) = (attend(&|_, _| true), attend(&keeps));
        let rows = |data| Rows { data, dim };
        let head = Head {
            q: rows(&q),
            k: rows(&k),
            v: rows(&v),
            scale,
            exact: &exact.0,
            kept: (&kept.0, &kept.1),
        };
        let masses = BlockMasses { q_blocks: 4, kv_blocks: 8, values: vec![0.0; 32] };
        let got = head.outcome(&masses, keeps);
        assert_eq!((got.skipped, got.reachable), (2.0, 20.0));
        for (form, error) in FORMS.iter().zip(got.errors) {
            let made_up = form.values && form.mass != Mass::Predicted;
            assert_eq!(error / got.norm < 1e-5, made_up, "{form:?}: {error}");
        }
        // A predicted mass of nothing changes nothing.
        assert_eq!(got.errors[0], got.errors[2]);
    }
}

//! How well the estimated lost mass tells the true error of a query block.

use super::{Layer, options};
use crate::error::Result;
use crate::terminal::Table;
use serde::Serialize;
use sparge::{AttentionShape, BLOCK_Q, Isa, Plan, Selection, SpargeConfig, block_masses, predict};

/// Values of τ whose skipped blocks are looked at.
const CDF: [f64; 4] = [0.9, 0.95, 0.98, 0.99];
/// Points that the report holds, so that its file stays small.
const SHOWN: usize = 3000;

/// One query block of one head under one τ.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Point {
    layer: usize,
    cdf: f64,
    /// 1 − the sum of P̂ over the kept blocks.
    estimated: f64,
    /// Σ|O − O′|/Σ|O| over the block's rows.
    error: f64,
}

/// Every query block that skips anything.
#[derive(Debug, Default)]
pub(super) struct Points(Vec<Point>);

/// What `--json` prints.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Of estimated lost mass and true error over all points.
    spearman: f64,
    groups: Vec<Group>,
    /// `[estimated lost mass, true error]` of evenly drawn points.
    points: Vec<[f64; 2]>,
}

/// The points of one layer or of one τ.
#[derive(Debug, Serialize)]
struct Group {
    name: String,
    count: usize,
    spearman: f64,
    /// Median and 90th percentile of error ÷ estimated lost mass.
    ratio_median: f64,
    ratio_p90: f64,
}

impl Points {
    /// Adds a layer's.
    pub(super) fn layer(&mut self, tensors: &Layer, layer: usize, isa: Option<Isa>) -> Result<()> {
        let [q, k, v] = tensors.views()?;
        let options = options(tensors.scale);
        let shape = AttentionShape::of(&q, &k, &v)?;
        let dense = SpargeConfig { isa, ..SpargeConfig::dense() };
        let exact = sparge::attention(&q, &k, &v, &options, &dense)?.o;
        let masses = {
            let plan =
                Plan::new(shape, &options, &SpargeConfig { isa, ..SpargeConfig::default() })?;
            let heads = 0..shape.num_qo_heads;
            heads.map(|h| block_masses(&plan, &q, &k, 0, h)).collect::<sparge::Result<Vec<_>>>()?
        };
        for cdf in CDF {
            let config = SpargeConfig {
                selection: Selection::TopCdf(cdf).into(),
                lambda: f64::INFINITY.into(),
                isa,
                ..SpargeConfig::default()
            };
            let plan = Plan::new(shape, &options, &config)?;
            let mask = predict(&plan, &q, &k)?;
            let mut sparse = vec![0.0; exact.len()];
            sparge::attend(&plan, &q, &k, &v, Some(&mask), &mut sparse)?;
            let block = BLOCK_Q * shape.head_dim_v;
            let per_head = shape.qo_len * shape.head_dim_v;
            for (head, masses) in masses.iter().enumerate() {
                let of = |x: &'_ [f32]| x[head * per_head..(head + 1) * per_head].to_vec();
                let (exact, sparse) = (of(&exact), of(&sparse));
                for (i, (a, b)) in exact.chunks(block).zip(sparse.chunks(block)).enumerate() {
                    let line = &masses.values[i * masses.kv_blocks..][..masses.kv_blocks];
                    let skipped: f64 = line
                        .iter()
                        .enumerate()
                        .filter(|(j, mass)| !mass.is_nan() && !mask.get(0, head, i, *j))
                        .map(|(_, &mass)| f64::from(mass))
                        .sum();
                    if skipped > 0.0 {
                        let error = a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs()));
                        let norm = a.iter().map(|a| f64::from(a.abs())).sum::<f64>();
                        let error = error.sum::<f64>() / norm;
                        self.0.push(Point { layer, cdf, estimated: skipped, error });
                    }
                }
            }
        }
        Ok(())
    }

    /// The correlations.
    pub(super) fn report(&self) -> Report {
        let group = |name: String, keep: &dyn Fn(&Point) -> bool| {
            let points: Vec<Point> = self.0.iter().copied().filter(keep).collect();
            let mut ratios: Vec<f64> = points.iter().map(|p| p.error / p.estimated).collect();
            ratios.sort_by(f64::total_cmp);
            let at = |share: f64| {
                ratios.get((share * ratios.len() as f64) as usize).copied().unwrap_or(f64::NAN)
            };
            Group {
                name,
                count: points.len(),
                spearman: spearman(&points),
                ratio_median: at(0.5),
                ratio_p90: at(0.9),
            }
        };
        let mut layers: Vec<usize> = self.0.iter().map(|p| p.layer).collect();
        layers.dedup();
        layers.sort_unstable();
        layers.dedup();
        let by_cdf = CDF.map(|cdf| group(format!("τ = {cdf}"), &|p| p.cdf == cdf));
        let by_layer = layers.iter().map(|&l| group(format!("layer {l}"), &|p| p.layer == l));
        let step = self.0.len().div_ceil(SHOWN).max(1);
        Report {
            spearman: spearman(&self.0),
            groups: by_cdf.into_iter().chain(by_layer).collect(),
            points: self
                .0
                .iter()
                .step_by(step)
                .map(|p| [short(p.estimated), short(p.error)])
                .collect(),
        }
    }
}

/// Four digits are enough to draw.
fn short(x: f64) -> f64 {
    let unit = 10f64.powi(3 - x.abs().log10().floor().clamp(-9.0, 9.0) as i32);
    (x * unit).round() / unit
}

/// Correlation of the ranks.
fn spearman(points: &[Point]) -> f64 {
    let a = ranks(&points.iter().map(|p| p.estimated).collect::<Vec<_>>());
    let b = ranks(&points.iter().map(|p| p.error).collect::<Vec<_>>());
    let mean = (points.len() as f64 - 1.0) / 2.0;
    let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for (a, b) in a.iter().zip(&b) {
        ab += (a - mean) * (b - mean);
        aa += (a - mean) * (a - mean);
        bb += (b - mean) * (b - mean);
    }
    ab / (aa * bb).sqrt()
}

/// The rank of every value, equal ones sharing their mean rank.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&i, &j| values[i].total_cmp(&values[j]));
    let mut ranks = vec![0.0; values.len()];
    let mut start = 0;
    while start < order.len() {
        let same = order[start..].iter().take_while(|&&i| values[i] == values[order[start]]);
        let end = start + same.count();
        order[start..end].iter().for_each(|&i| ranks[i] = (start + end - 1) as f64 / 2.0);
        start = end;
    }
    ranks
}

impl Report {
    pub(super) fn render(&self) -> String {
        let mut table = Table::new(["", "query blocks", "rank correlation", "error ÷ mass", "90%"]);
        for g in &self.groups {
            table.row([
                g.name.clone(),
                g.count.to_string(),
                format!("{:.3}", g.spearman),
                format!("{:.2}", g.ratio_median),
                format!("{:.2}", g.ratio_p90),
            ]);
        }
        format!(
            "estimated lost mass against the true error of a query block: rank correlation {:.3}\n\n{}",
            self.spearman,
            table.render()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rank_correlation() {
        let points = |pairs: &[(f64, f64)]| {
            let point = |&(estimated, error): &_| Point { layer: 0, cdf: 0.9, estimated, error };
            pairs.iter().map(point).collect::<Vec<_>>()
        };
        assert_eq!(spearman(&points(&[(1.0, 10.0), (2.0, 20.0), (3.0, 400.0)])), 1.0);
        assert_eq!(spearman(&points(&[(1.0, 3.0), (2.0, 2.0), (9.0, 1.0)])), -1.0);
        assert_eq!(ranks(&[5.0, 1.0, 5.0, 0.0]), [2.5, 1.0, 2.5, 0.0]);
    }
}

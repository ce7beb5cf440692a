//! The operator's options as flags, shared by the subcommands that call it.

use crate::error::{Error, Result};
use clap::{Args, ValueEnum};
use sparge::{
    Alignment, Isa, Layout, PerHead, Pooling, QkPrecision, Selection, SpargeConfig, Window,
};

/// `--isa`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum IsaArg {
    /// The best this processor has
    Auto,
    /// Plain Rust
    Scalar,
    /// AVX2 and FMA
    Avx2,
    /// AVX-512 with VNNI
    Avx512,
}

impl IsaArg {
    /// `None` for the best one.
    pub(crate) fn resolve(self) -> Option<Isa> {
        match self {
            Self::Auto => None,
            Self::Scalar => Some(Isa::Scalar),
            Self::Avx2 => Some(Isa::Avx2),
            Self::Avx512 => Some(Isa::Avx512),
        }
    }
}

/// `--layout`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LayoutArg {
    /// [batch, heads, tokens, head_dim]
    Hnd,
    /// [batch, tokens, heads, head_dim]
    Nhd,
}

impl LayoutArg {
    /// The operator's name for it.
    pub(crate) fn layout(self) -> Layout {
        match self {
            Self::Hnd => Layout::Hnd,
            Self::Nhd => Layout::Nhd,
        }
    }
}

/// `--causal-align`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum AlignArg {
    /// Query i sees keys 0..=i
    TopLeft,
    /// The last query sees the last key
    BottomRight,
}

/// `--qk`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum QkArg {
    /// f32 throughout
    F32,
    /// int8 with a scale per token
    Int8,
}

/// Which pairs may be attended.
#[derive(Debug, Clone, Args)]
pub(crate) struct VisibilityArgs {
    /// Causal attention
    #[arg(long)]
    pub(crate) causal: bool,
    /// Where the diagonal starts or ends; needed where q and k differ in length
    #[arg(long, value_enum, requires = "causal")]
    pub(crate) causal_align: Option<AlignArg>,
    /// Sliding window: a query sees the W keys up to its own, and without --causal the W−1 after
    /// it too (there the last query is aligned with the last key)
    #[arg(long, value_name = "W", value_parser = positive)]
    pub(crate) window: Option<usize>,
    /// Blocks of 64 keys at the start that stay visible outside the window and are always kept
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) sink_blocks: usize,
}

impl VisibilityArgs {
    /// Whether any flag was given.
    pub(crate) fn is_set(&self) -> bool {
        self.causal || self.window.is_some() || self.sink_blocks > 0
    }

    /// The alignment, where causal. `lengths` are (queries, keys) of every sequence.
    pub(crate) fn alignment(
        &self,
        mut lengths: impl Iterator<Item = (usize, usize)>,
    ) -> Result<Option<Alignment>> {
        match self.causal_align {
            _ if !self.causal => Ok(None),
            Some(AlignArg::TopLeft) => Ok(Some(Alignment::TopLeft)),
            Some(AlignArg::BottomRight) => Ok(Some(Alignment::BottomRight)),
            None => match lengths.find(|(q, k)| q != k) {
                None => Ok(Some(Alignment::TopLeft)),
                Some((q, k)) => Err(Error::input(format!(
                    "--causal is ambiguous for {q} queries and {k} keys; add --causal-align \
                     top-left (query 0 sees key 0) or bottom-right (the last query sees the last key)"
                ))),
            },
        }
    }

    /// The window.
    pub(crate) fn window(&self) -> Option<Window> {
        let right = |w: usize| if self.causal { 0 } else { w - 1 };
        self.window.map(|w| Window { left: Some(w - 1), right: Some(right(w)) })
    }
}

/// What may be skipped.
#[derive(Debug, Clone, Args)]
pub(crate) struct SelectionArgs {
    /// Keep this share of each row's reachable blocks; one value, or one per query head separated
    /// by commas. With --cdf: the union of both. With neither: the default selection
    #[arg(long, value_name = "F", value_delimiter = ',', allow_negative_numbers = true)]
    pub(crate) topk: Vec<f64>,
    /// Keep blocks until their predicted mass reaches this share (the paper's τ)
    #[arg(long, value_name = "T", value_delimiter = ',', allow_negative_numbers = true)]
    pub(crate) cdf: Vec<f64>,
    /// Aim at this relative L1 error: keep blocks until the attention that a row is estimated to lose
    /// is this small
    #[arg(long, value_name = "E", allow_negative_numbers = true, conflicts_with_all = ["topk", "cdf"])]
    pub(crate) target_l1: Option<f64>,
    /// Keep blocks whose mean cosine is not above this (the paper's θ); 0 turns the judge off
    #[arg(long, value_name = "COS", value_delimiter = ',', allow_negative_numbers = true)]
    pub(crate) theta: Vec<f64>,
    /// Skip P·V where every score is this far below the row's maximum, in nats; inf turns it off
    /// [default: 6]
    #[arg(long, value_name = "GAP", value_delimiter = ',', allow_negative_numbers = true)]
    pub(crate) lambda: Vec<f64>,
    /// What the prediction looks at: block (the paper's) or QxK, rows of q and of k per mean; +var
    /// adds the second-order term, +Nrows that many single queries [default: 16x16+2rows]
    #[arg(long, value_name = "POOLING", value_parser = pooling)]
    pub(crate) pooling: Option<Pooling>,
    /// Blocks of 64 keys at the start that are always kept [default: 1]
    #[arg(long, value_name = "N")]
    pub(crate) keep_first: Option<usize>,
    /// Blocks of 64 keys before the diagonal that are always kept, where causal [default: 2]
    #[arg(long, value_name = "N")]
    pub(crate) keep_local: Option<usize>,
    /// Arithmetic of Q·Kᵀ [default: f32]
    #[arg(long, value_enum, value_name = "TYPE")]
    pub(crate) qk: Option<QkArg>,
}

impl SelectionArgs {
    /// Whether no flag was given.
    pub(crate) fn is_empty(&self) -> bool {
        let Self { topk, cdf, target_l1, theta, lambda, pooling, keep_first, keep_local, qk } =
            self;
        [topk, cdf, theta, lambda].into_iter().all(Vec::is_empty)
            && target_l1.is_none()
            && pooling.is_none()
            && keep_first.is_none()
            && keep_local.is_none()
            && qk.is_none()
    }

    /// The configuration these flags ask for.
    pub(crate) fn config(&self, isa: Option<Isa>) -> Result<SpargeConfig> {
        let mut config = SpargeConfig { isa, ..SpargeConfig::default() };
        if let Some(selection) = self.selection()? {
            config.selection = selection;
        } else if !self.theta.is_empty() {
            // A judge that is asked for judges at any length; the default selection would not
            // predict for short sequences.
            config.selection = Selection::TopCdf(Selection::AUTO_CDF).into();
        }
        if let Some(theta) = per_head(&self.theta) {
            config.theta = theta;
        }
        if let Some(lambda) = per_head(&self.lambda) {
            config.lambda = lambda;
        }
        config.pooling = self.pooling.unwrap_or(config.pooling);
        config.keep_first = self.keep_first.unwrap_or(config.keep_first);
        config.keep_local = self.keep_local.unwrap_or(config.keep_local);
        config.qk = match self.qk {
            None => config.qk,
            Some(QkArg::F32) => QkPrecision::F32,
            Some(QkArg::Int8) => QkPrecision::Int8,
        };
        Ok(config)
    }

    fn selection(&self) -> Result<Option<PerHead<Selection>>> {
        let (cdf, topk) = (&self.cdf, &self.topk);
        if let Some(error) = self.target_l1 {
            if !(error > 0.0 && error < 1.0) {
                return Err(Error::input(format!(
                    "--target-l1 is {error}, expected a relative error above 0 and below 1"
                )));
            }
            return Ok(Some(Selection::target_l1(error).into()));
        }
        let each = |f: fn(f64) -> Selection, xs: &[f64]| {
            let xs: Vec<f64> = xs.to_vec();
            per_head(&xs.into_iter().map(f).collect::<Vec<_>>())
        };
        match (cdf.len(), topk.len()) {
            (_, 0) => Ok(each(Selection::TopCdf, cdf)),
            (0, _) => Ok(each(Selection::TopK, topk)),
            (a, b) if a == b || a == 1 || b == 1 => {
                let both = (0..a.max(b))
                    .map(|i| Selection::Union { cdf: cdf[i % a], top_k: topk[i % b] })
                    .collect::<Vec<_>>();
                Ok(per_head(&both))
            }
            (a, b) => Err(Error::input(format!(
                "--cdf has {a} values and --topk {b}; give one value or one per query head to each"
            ))),
        }
    }
}

/// One value for all heads, or a list for each; `None` for no values.
fn per_head<T: Clone>(values: &[T]) -> Option<PerHead<T>> {
    match values {
        [] => None,
        [one] => Some(PerHead::All(one.clone())),
        many => Some(PerHead::Heads(many.to_vec())),
    }
}

fn positive(text: &str) -> std::result::Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("expected a whole number of at least 1".into()),
        Ok(n) => Ok(n),
    }
}

/// The opposite of [`pooling`].
pub(crate) fn pooling_name(p: Pooling) -> String {
    let second = if p.second_order { "+var" } else { "" };
    let rows = if p.sampled_rows > 0 { format!("+{}rows", p.sampled_rows) } else { String::new() };
    format!("{}x{}{second}{rows}", p.q_rows, p.kv_rows)
}

/// `block`, `16x16`, `16x16-2nd`, `QxK`, `QxK+var`, each also with `+Nrows`. Whether the numbers fit is the operator's to say.
pub(crate) fn pooling(text: &str) -> std::result::Result<Pooling, String> {
    let (text, sampled_rows) = match text.strip_suffix("rows").and_then(|s| s.rsplit_once('+')) {
        Some((pooled, rows)) => (pooled, rows.parse().map_err(|_| "expected a number of rows")?),
        None => (text, 0),
    };
    let (size, second_order) = match text {
        "block" => return Ok(Pooling { sampled_rows, ..Pooling::BLOCK }),
        _ => match text.strip_suffix("+var").or_else(|| text.strip_suffix("-2nd")) {
            Some(size) => (size, true),
            None => (text, false),
        },
    };
    let numbers = size.split_once('x').and_then(|(q, k)| Some((q.parse().ok()?, k.parse().ok()?)));
    let (q_rows, kv_rows) = numbers
        .ok_or("expected block, or QxK or QxK+var such as 32x16+var; +Nrows adds samples")?;
    Ok(Pooling { q_rows, kv_rows, second_order, sampled_rows })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn poolings() {
        assert_eq!(pooling("block"), Ok(Pooling::BLOCK));
        assert_eq!(pooling("16x16"), Ok(Pooling::SUB_BLOCK));
        assert_eq!(pooling("16x16-2nd"), Ok(Pooling::SECOND_ORDER));
        assert_eq!(pooling("16x16+var"), Ok(Pooling::SECOND_ORDER));
        assert_eq!(pooling("16x16+2rows"), Ok(Pooling::MIXED));
        assert_eq!(pooling("block+4rows"), Ok(Pooling { sampled_rows: 4, ..Pooling::BLOCK }));
        for p in [Pooling::BLOCK, Pooling::SUB_BLOCK, Pooling::SECOND_ORDER, Pooling::MIXED] {
            assert_eq!(pooling(&pooling_name(p)), Ok(p));
        }
        for bad in
            ["", "16", "ax16", "16x", "16x16x16", "-1x4", "16x16-3rd", "16x16+xrows", "+2rows"]
        {
            assert!(pooling(bad).is_err(), "{bad}");
        }
    }
}

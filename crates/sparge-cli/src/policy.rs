//! Sparsity policies by name, for benchmarks and evaluations: `dense`, `default`, `topk:0.5`,
//! `cdf:0.95`, `cdf:0.9+topk:0.1`.

use serde::{Serialize, Serializer};
use sparge::{Isa, Selection, SpargeConfig};
use std::fmt;
use std::str::FromStr;

/// A named policy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Policy {
    /// Exact attention.
    Dense,
    /// The default configuration.
    Default,
    /// A selection, everything else as in the default.
    Select(Selection),
}

impl Policy {
    /// The operator's configuration.
    pub(crate) fn config(self, isa: Option<Isa>) -> SpargeConfig {
        let config = match self {
            Self::Dense => SpargeConfig::dense(),
            Self::Default => SpargeConfig::default(),
            Self::Select(selection) => {
                SpargeConfig { selection: selection.into(), ..SpargeConfig::default() }
            }
        };
        SpargeConfig { isa, ..config }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Self::Dense | Self::Select(Selection::All) => "dense".into(),
            Self::Default | Self::Select(Selection::Auto) => "default".into(),
            Self::Select(Selection::TopK(f)) => format!("topk:{f}"),
            Self::Select(Selection::TopCdf(t)) => format!("cdf:{t}"),
            Self::Select(Selection::Union { cdf, top_k }) => format!("cdf:{cdf}+topk:{top_k}"),
        };
        f.pad(&text)
    }
}

impl FromStr for Policy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let share = |s: &str| s.parse().ok().filter(|&x: &f64| x > 0.0 && x <= 1.0);
        let (mut cdf, mut top_k) = (None, None);
        match text {
            "dense" => return Ok(Self::Dense),
            "default" => return Ok(Self::Default),
            _ => {}
        }
        for part in text.split('+') {
            let slot = match part.split_once(':') {
                Some(("cdf", value)) if cdf.is_none() => (&mut cdf, share(value)),
                Some(("topk", value)) if top_k.is_none() => (&mut top_k, share(value)),
                _ => (&mut cdf, None),
            };
            let (slot, Some(value)) = slot else {
                return Err(
                    "expected dense, default, topk:F, cdf:T or cdf:T+topk:F with shares above 0 \
                     and at most 1"
                        .into(),
                );
            };
            *slot = Some(value);
        }
        Ok(Self::Select(match (cdf, top_k) {
            (Some(cdf), Some(top_k)) => Selection::Union { cdf, top_k },
            (Some(cdf), None) => Selection::TopCdf(cdf),
            (None, Some(top_k)) => Selection::TopK(top_k),
            (None, None) => Selection::Auto,
        }))
    }
}

impl Serialize for Policy {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for name in ["dense", "default", "topk:0.5", "cdf:0.95", "cdf:0.9+topk:0.1"] {
            assert_eq!(name.parse::<Policy>().map(|p| p.to_string()), Ok(name.into()));
        }
        for bad in
            ["", "sparse", "topk", "topk:", "topk:0", "topk:1.5", "topk:nan", "cdf:0.5+cdf:0.6"]
        {
            assert!(bad.parse::<Policy>().is_err(), "{bad}");
        }
    }
}

//! Policies as text.

use super::Policy;
use crate::error::{Error, Result};
use std::fmt;
use std::str::FromStr;

impl Policy {
    /// The policy called `name` with its authors' defaults.
    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "dense" => Self::Dense,
            "window" => Self::Window { tokens: 1024, sinks: 4 },
            "random" => Self::Random { density: 0.5, seed: 0 },
            "minference" => Self::VerticalSlash { vertical: 1000, slash: 6096 },
            "a-shape" => Self::AShape { first: 1024, local: 4096 },
            "block-sparse" => Self::BlockSparse { blocks: 100 },
            "flexprefill" => Self::FlexPrefill { gamma: 0.95, tau: 0.1, min_budget: 1024 },
            "xattention" => Self::XAttention { stride: 8, threshold: 0.9 },
            "oracle" => Self::Oracle { cdf: 0.95 },
            _ => return None,
        })
    }

    /// Sets one setting; an empty key is the policy's main one. False where there is no such
    /// setting or the value is not of its kind.
    fn set(&mut self, key: &str, value: &str) -> bool {
        fn put<T: FromStr>(slot: &mut T, value: &str) -> bool {
            value.parse().map(|x| *slot = x).is_ok()
        }
        match (self, key) {
            (Self::Window { tokens, .. }, "" | "tokens") => put(tokens, value),
            (Self::Window { sinks, .. }, "sinks") => put(sinks, value),
            (Self::Random { density, .. }, "" | "density") => put(density, value),
            (Self::Random { seed, .. }, "seed") => put(seed, value),
            (Self::VerticalSlash { vertical, .. }, "v") => put(vertical, value),
            (Self::VerticalSlash { slash, .. }, "s") => put(slash, value),
            (Self::AShape { first, .. }, "init") => put(first, value),
            (Self::AShape { local, .. }, "local") => put(local, value),
            (Self::BlockSparse { blocks }, "" | "blocks") => put(blocks, value),
            (Self::FlexPrefill { gamma, .. }, "" | "gamma") => put(gamma, value),
            (Self::FlexPrefill { tau, .. }, "tau") => put(tau, value),
            (Self::FlexPrefill { min_budget, .. }, "min") => put(min_budget, value),
            (Self::XAttention { threshold, .. }, "" | "threshold") => put(threshold, value),
            (Self::XAttention { stride, .. }, "stride") => put(stride, value),
            (Self::Oracle { cdf }, "" | "cdf") => put(cdf, value),
            _ => false,
        }
    }
}

impl FromStr for Policy {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let unknown = || Error::Policy(text.into());
        let (name, settings) = text.split_once(':').unwrap_or((text, ""));
        let mut policy = Self::named(name).ok_or_else(unknown)?;
        if text.contains(':') {
            for (i, part) in settings.split(',').enumerate() {
                let (key, value) = match part.split_once('=') {
                    Some((key, value)) if !key.is_empty() => (key, value),
                    None if i == 0 => ("", part),
                    _ => return Err(unknown()),
                };
                if !policy.set(key, value) {
                    return Err(unknown());
                }
            }
        }
        Ok(policy)
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Self::Dense => "dense".into(),
            Self::Window { tokens, sinks } => format!("window:{tokens},sinks={sinks}"),
            Self::Random { density, seed } => format!("random:{density},seed={seed}"),
            Self::VerticalSlash { vertical, slash } => format!("minference:v={vertical},s={slash}"),
            Self::AShape { first, local } => format!("a-shape:init={first},local={local}"),
            Self::BlockSparse { blocks } => format!("block-sparse:{blocks}"),
            Self::FlexPrefill { gamma, tau, min_budget } => {
                format!("flexprefill:{gamma},tau={tau},min={min_budget}")
            }
            Self::XAttention { stride, threshold } => {
                format!("xattention:{threshold},stride={stride}")
            }
            Self::Oracle { cdf } => format!("oracle:{cdf}"),
        };
        f.pad(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for name in [
            "dense",
            "window:512,sinks=4",
            "random:0.25,seed=7",
            "minference:v=100,s=800",
            "a-shape:init=128,local=256",
            "block-sparse:16",
            "flexprefill:0.9,tau=0.1,min=512",
            "xattention:0.8,stride=16",
            "oracle:0.9",
        ] {
            let policy = name.parse::<Policy>().expect(name);
            assert_eq!(policy.to_string(), name);
        }
        let same = |a: &str, b: &str| assert_eq!(a.parse::<Policy>(), b.parse::<Policy>(), "{a}");
        same("xattention", "xattention:threshold=0.9,stride=8");
        same("window:1024", "window:tokens=1024,sinks=4");
        same("minference:v=1000", "minference");
        for bad in [
            "",
            "topk:0.5",
            "window:",
            "window:x",
            "window:5,6",
            "window:5,sink=6",
            "minference:100",
            "dense:1",
            "random:=3",
            "xattention:0.9,",
        ] {
            assert!(bad.parse::<Policy>().is_err(), "{bad}");
        }
    }
}

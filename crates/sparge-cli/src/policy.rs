//! Sparsity policies by name, for runs, benchmarks and evaluations.
//!
//! `dense`, `default`, `topk:0.5`, `cdf:0.95`, `cdf:0.9+topk:0.1`, or one of [`Method`]'s names; then
//! settings, each after a comma: `pool=`, `theta=`, `lambda=`, `first=`, `local=` for the former,
//! the method's own and `lambda=` for the latter.

use crate::flags;
use serde::{Serialize, Serializer};
use sparge::policy::{self, Policy as Method};
use sparge::{Element, Isa, Plan, Pooling, Selection, Side, SpargeConfig, TensorView};
use sparge_candle::SpargeAttention;
use std::fmt;
use std::str::FromStr;

/// What `--policy` accepts, for help texts.
pub(crate) const EXPECTED: &str = "expected dense, default, topk:F, cdf:T or cdf:T+topk:F (each \
    with any of ,pool=P ,theta=T ,lambda=L ,first=N ,local=N), window:N, random:F, minference:v=N,s=N, \
    a-shape:init=N,local=N, block-sparse:N, flexprefill:G[,tau=T,min=N], \
    xattention:T[,stride=N] or oracle:T[,first=N,local=N] (each also with ,lambda=L); shares are above 0 and at most 1";

/// A named policy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Policy {
    choice: Choice,
    pooling: Option<Pooling>,
    theta: Option<f64>,
    lambda: Option<f64>,
    keep_first: Option<usize>,
    keep_local: Option<usize>,
}

/// How the blocks are chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Choice {
    /// Stage 1 with this selection.
    Select(Selection),
    /// A method the paper compares with.
    Method(Method),
}

impl Policy {
    /// Exact attention.
    pub(crate) const DENSE: Self = Self::of(Choice::Select(Selection::All));

    const fn of(choice: Choice) -> Self {
        Self {
            choice,
            pooling: None,
            theta: None,
            lambda: None,
            keep_first: None,
            keep_local: None,
        }
    }

    /// The operator's configuration. Dense attention and the methods have no stage 2 unless asked.
    pub(crate) fn config(&self, isa: Option<Isa>) -> SpargeConfig {
        let mut config = match self.choice {
            Choice::Select(Selection::All) | Choice::Method(_) => SpargeConfig::dense(),
            Choice::Select(selection) => {
                SpargeConfig { selection: selection.into(), ..SpargeConfig::default() }
            }
        };
        if let Choice::Method(Method::Oracle { .. }) = self.choice {
            // It is compared with stage 1, whose choice it makes.
            config.keep_local = SpargeConfig::default().keep_local;
        }
        config.isa = isa;
        config.pooling = self.pooling.unwrap_or(config.pooling);
        config.keep_first = self.keep_first.unwrap_or(config.keep_first);
        config.keep_local = self.keep_local.unwrap_or(config.keep_local);
        if let Some(theta) = self.theta {
            config.theta = theta.into();
        }
        if let Some(lambda) = self.lambda {
            config.lambda = lambda.into();
        }
        config
    }

    /// The same as a model's attention.
    pub(crate) fn attention(&self, isa: Option<Isa>) -> SpargeAttention {
        match self.choice {
            Choice::Select(_) => SpargeAttention::new(self.config(isa)),
            Choice::Method(method) => SpargeAttention::with_policy(method, self.config(isa)),
        }
    }

    /// The operator under this policy; the plan is one of [`Policy::config`].
    pub(crate) fn forward<T: Element>(
        &self,
        plan: &Plan<'_>,
        [q, k, v]: &[TensorView<'_, T>; 3],
        out: &mut [T],
    ) -> sparge::Result<Side> {
        match self.choice {
            Choice::Select(_) => sparge::forward(plan, q, k, v, out),
            Choice::Method(method) => policy::forward(plan, q, k, v, &method, out),
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = match self.choice {
            Choice::Select(Selection::All) => "dense".into(),
            Choice::Select(Selection::Auto) => "default".into(),
            Choice::Select(Selection::TopK(f)) => format!("topk:{f}"),
            Choice::Select(Selection::TopCdf(t)) => format!("cdf:{t}"),
            Choice::Select(Selection::Union { cdf, top_k }) => format!("cdf:{cdf}+topk:{top_k}"),
            Choice::Method(method) => method.to_string(),
        };
        if let Some(pooling) = self.pooling {
            text += &format!(",pool={}", flags::pooling_name(pooling));
        }
        for (name, value) in [("theta", self.theta), ("lambda", self.lambda)] {
            text += &value.map_or(String::new(), |value| format!(",{name}={value}"));
        }
        for (name, value) in [("first", self.keep_first), ("local", self.keep_local)] {
            text += &value.map_or(String::new(), |value| format!(",{name}={value}"));
        }
        f.pad(&text)
    }
}

impl FromStr for Policy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let no = || format!("'{text}' is no policy; {EXPECTED}");
        let mut parts = text.split(',');
        let name = parts.next().unwrap_or_default();
        let mut policy = Self::of(match selection(name) {
            Some(selection) => Choice::Select(selection),
            None => Choice::Method(Method::Dense),
        });
        let is_method = selection(name).is_none();
        let is_oracle = name.split(':').next() == Some("oracle");
        let mut method = name.to_owned();
        for part in parts {
            match part.split_once('=') {
                Some(("lambda", value)) => {
                    let ok = |x: &f64| *x > 0.0;
                    policy.lambda = Some(value.parse().ok().filter(ok).ok_or_else(no)?);
                }
                Some((key, _))
                    if is_method && !(is_oracle && ["first", "local"].contains(&key)) =>
                {
                    method += &format!(",{part}");
                }
                Some(("pool", value)) => policy.pooling = Some(flags::pooling(value)?),
                Some(("theta", value)) => {
                    let ok = |x: &f64| (0.0..1.0).contains(x);
                    policy.theta = Some(value.parse().ok().filter(ok).ok_or_else(no)?);
                }
                Some(("first", value)) => {
                    policy.keep_first = Some(value.parse().map_err(|_| no())?);
                }
                Some(("local", value)) => {
                    policy.keep_local = Some(value.parse().map_err(|_| no())?);
                }
                _ => return Err(no()),
            }
        }
        if is_method {
            let method: Method = method.parse().map_err(|_| no())?;
            method.validate().map_err(|e| e.to_string())?;
            policy.choice = Choice::Method(method);
        }
        Ok(policy)
    }
}

/// A selection by name; `None` for what is none.
fn selection(name: &str) -> Option<Selection> {
    match name {
        "dense" => return Some(Selection::All),
        "default" => return Some(Selection::Auto),
        _ => {}
    }
    let share = |s: &str| s.parse().ok().filter(|&x: &f64| x > 0.0 && x <= 1.0);
    let (mut cdf, mut top_k) = (None, None);
    for part in name.split('+') {
        let (slot, value) = match part.split_once(':')? {
            ("cdf", value) => (&mut cdf, value),
            ("topk", value) => (&mut top_k, value),
            _ => return None,
        };
        if slot.replace(share(value)?).is_some() {
            return None;
        }
    }
    match (cdf, top_k) {
        (Some(cdf), Some(top_k)) => Some(Selection::Union { cdf, top_k }),
        (Some(cdf), None) => Some(Selection::TopCdf(cdf)),
        (None, Some(top_k)) => Some(Selection::TopK(top_k)),
        (None, None) => None,
    }
}

impl Serialize for Policy {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Policies separated by commas. A part with `=` and no name before it is a setting of the policy
/// before: `dense,minference:v=1000,s=6096,topk:0.5` are three.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Policies(Vec<Policy>);

impl FromStr for Policies {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut names: Vec<String> = Vec::new();
        for part in text.split(',') {
            let is_setting = part.split_once('=').is_some_and(|(key, _)| !key.contains([':', '+']));
            match names.last_mut() {
                Some(last) if is_setting => *last += &format!(",{part}"),
                _ => names.push(part.into()),
            }
        }
        names.iter().map(|name| name.parse()).collect::<Result<_, _>>().map(Self)
    }
}

/// All policies of a flag that can be repeated.
pub(crate) fn flatten(lists: &[Policies]) -> Vec<Policy> {
    lists.iter().flat_map(|list| list.0.iter().copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for name in [
            "dense",
            "default",
            "topk:0.5",
            "cdf:0.95",
            "cdf:0.9+topk:0.1",
            "dense,lambda=5",
            "cdf:0.95,pool=16x16+var,theta=0.3,lambda=inf,first=2,local=8",
            "cdf:0.95,pool=16x16+var+2rows",
            "minference:v=1000,s=6096",
            "flexprefill:0.9,tau=0.1,min=128,lambda=6",
            "window:1024,sinks=4",
            "oracle:0.95,lambda=6,local=0",
        ] {
            assert_eq!(name.parse::<Policy>().map(|p| p.to_string()), Ok(name.into()));
        }
        for bad in [
            "",
            "sparse",
            "topk",
            "topk:",
            "topk:0",
            "topk:1.5",
            "topk:nan",
            "cdf:0.5+cdf:0.6",
            "cdf:0.5,pool=7",
            "cdf:0.5,v=3",
            "cdf:0.5,theta=1",
            "oracle:0.5,theta=0.1",
            "window:64,local=2",
            "dense,lambda=0",
            "xattention:0.9,stride=12",
            "minference:v=3,topk:0.5",
        ] {
            assert!(bad.parse::<Policy>().is_err(), "{bad}");
        }
    }

    #[test]
    fn lists_keep_settings_with_their_policy() {
        let names = |text: &str| {
            let list = text.parse::<Policies>().expect(text);
            list.0.iter().map(Policy::to_string).collect::<Vec<_>>()
        };
        assert_eq!(
            names("dense,minference:v=1000,s=6096,topk:0.5,lambda=4,default"),
            ["dense", "minference:v=1000,s=6096", "topk:0.5,lambda=4", "default"]
        );
        assert!("v=3,dense".parse::<Policies>().is_err());
        assert!("dense,".parse::<Policies>().is_err());
    }
}

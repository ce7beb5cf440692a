//! What to compute and what to skip, from its text form.

use crate::errors::{SpargeError, refused};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use sparge::policy::Policy;
use sparge::{
    Alignment, AttentionOptions, Isa, Layout, PerHead, Pooling, QkPrecision, Selection,
    SpargeConfig, Window,
};
use std::fmt::Display;
use std::ops::Range;
use std::str::FromStr;

/// The settings of a call, made from words `key=value` with single spaces between them. As text
/// they pass through `torch.library` schemas and compiled graphs and stay readable there; Python
/// keeps the parsed form.
///
/// Keys: `layout` HND or NHD; `scale`; `causal` top_left or bottom_right; `window` left,right (`-`
/// is unbounded); `sink_blocks`; `select` auto or all; `topk`, `cdf`, `theta`, `pv_gap` (one value
/// or one per query head, commas between them); `pooling` QxK, QxK+var (with the second-order
/// term), each also with +Nrows (sampled queries); `keep_first`; `keep_local`; `qk` f32, int8, or half (CUDA alone); `isa`;
/// `keep_keys` from:to,… (tokens whose key blocks every query attends); `keep_queries` from:to,…
/// (tokens whose query blocks attend everything); `policy` (another method's way to choose, as [`Policy`] reads it).
#[pyclass(frozen, module = "sparge._sparge")]
#[derive(Debug, Clone, Default)]
pub(crate) struct Settings {
    pub(crate) config: SpargeConfig,
    pub(crate) layout: Layout,
    pub(crate) keep_keys: Vec<Range<usize>>,
    pub(crate) keep_queries: Vec<Range<usize>>,
    pub(crate) policy: Option<Policy>,
    /// Both products in 16 bits, which the CPU does not do.
    is_half: bool,
    softmax_scale: Option<f64>,
    causal: Option<Alignment>,
    window: Option<Window>,
    sink_blocks: usize,
}

impl Settings {
    /// The options of a call with these settings; masks and lengths are the call's own.
    pub(crate) fn options(&self) -> AttentionOptions<'_> {
        AttentionOptions {
            softmax_scale: self.softmax_scale,
            causal: self.causal,
            window: self.window,
            sink_blocks: self.sink_blocks,
            layout: self.layout,
            ..AttentionOptions::default()
        }
    }

    /// Refuses what the CPU does not do.
    pub(crate) fn check_for_cpu(&self) -> PyResult<()> {
        if self.is_half {
            return Err(bad("qk", "half", "f32 or int8 on the CPU: half is a setting of CUDA"));
        }
        Ok(())
    }

    /// Whether blocks are kept that are not predicted.
    pub(crate) fn keeps_more(&self) -> bool {
        !(self.keep_keys.is_empty() && self.keep_queries.is_empty())
    }

    /// Whether nothing is predicted or quantised below [`Selection::AUTO_MIN_LEN`] keys.
    pub(crate) fn is_dense(&self) -> bool {
        !self.keeps_more()
            && self.policy.is_none()
            && self.config.qk == QkPrecision::F32
            && matches!(self.config.selection, PerHead::All(Selection::Auto | Selection::All))
    }
}

#[pymethods]
impl Settings {
    #[new]
    fn parse(text: &str) -> PyResult<Self> {
        let mut settings = Self::default();
        let (mut topk, mut cdf, mut select) = (Vec::new(), Vec::new(), Selection::Auto);
        for word in text.split_ascii_whitespace() {
            let Some((key, value)) = word.split_once('=') else {
                return Err(bad("settings", word, "key=value"));
            };
            match key {
                "layout" => settings.layout = layout(value)?,
                "scale" => settings.softmax_scale = Some(number(key, value)?),
                "causal" => settings.causal = Some(alignment(value)?),
                "window" => settings.window = Some(window(value)?),
                "sink_blocks" => settings.sink_blocks = number(key, value)?,
                "select" => select = selection(value)?,
                "topk" => topk = numbers(key, value)?,
                "cdf" => cdf = numbers(key, value)?,
                "theta" => settings.config.theta = per_head(numbers(key, value)?),
                "pv_gap" => settings.config.lambda = per_head(numbers(key, value)?),
                "pooling" => settings.config.pooling = pooling(value)?,
                "keep_first" => settings.config.keep_first = number(key, value)?,
                "keep_local" => settings.config.keep_local = number(key, value)?,
                "qk" if value == "half" => settings.is_half = true,
                "qk" => settings.config.qk = precision(value)?,
                "policy" => settings.policy = Some(value.parse().map_err(refused)?),
                "isa" => settings.config.isa = Some(isa(value)?),
                "keep_keys" => settings.keep_keys = ranges(key, value)?,
                "keep_queries" => settings.keep_queries = ranges(key, value)?,
                _ => return Err(bad("settings", key, "a key that sparge._sparge.Settings lists")),
            }
        }
        settings.config.selection = budget(&topk, &cdf, select)?;
        Ok(settings)
    }

    /// The other method that chooses blocks: its name as `policy=` has it, and its settings by name.
    #[getter]
    fn policy<'py>(&self, py: Python<'py>) -> PyResult<Option<(&'static str, Bound<'py, PyDict>)>> {
        let Some(policy) = self.policy else { return Ok(None) };
        let with = PyDict::new(py);
        let name = match policy {
            Policy::Dense => "dense",
            Policy::Window { tokens, sinks } => {
                with.set_item("tokens", tokens)?;
                with.set_item("sinks", sinks)?;
                "window"
            }
            Policy::Random { density, seed } => {
                with.set_item("density", density)?;
                with.set_item("seed", seed)?;
                "random"
            }
            Policy::VerticalSlash { vertical, slash } => {
                with.set_item("vertical", vertical)?;
                with.set_item("slash", slash)?;
                "minference"
            }
            Policy::AShape { first, local } => {
                with.set_item("first", first)?;
                with.set_item("local", local)?;
                "a-shape"
            }
            Policy::BlockSparse { blocks } => {
                with.set_item("blocks", blocks)?;
                "block-sparse"
            }
            Policy::FlexPrefill { gamma, tau, min_budget } => {
                with.set_item("gamma", gamma)?;
                with.set_item("tau", tau)?;
                with.set_item("min_budget", min_budget)?;
                "flexprefill"
            }
            Policy::XAttention { stride, threshold } => {
                with.set_item("stride", stride)?;
                with.set_item("threshold", threshold)?;
                "xattention"
            }
            _ => return Err(bad("policy", policy, "one that this package knows")),
        };
        Ok(Some((name, with)))
    }

    /// Refuses a policy whose settings are out of range or that has no meaning for such a call.
    fn check_policy(&self, has_element_mask: bool) -> PyResult<()> {
        let is_causal = self.visibility().2 == Some(0);
        let checked = self.policy.map(|policy| policy.check(is_causal, has_element_mask));
        checked.transpose().map(drop).map_err(refused)
    }

    /// Whether query 0 is aligned with key 0 (else the last with the last), how many keys before and
    /// after its own position a query sees, and the key blocks at the start that all see.
    #[getter]
    fn visibility(&self) -> (bool, Option<usize>, Option<usize>, usize) {
        let window = self.window.unwrap_or_default();
        let right = if self.causal.is_some() { Some(0) } else { window.right };
        (self.causal == Some(Alignment::TopLeft), window.left, right, self.sink_blocks)
    }

    /// What scores are multiplied by; None is 1/√dim.
    #[getter]
    fn scale(&self) -> Option<f64> {
        self.softmax_scale
    }

    fn __repr__(&self) -> String {
        format!("{self:?}")
    }
}

fn bad(what: &str, got: impl Display, expected: &str) -> PyErr {
    SpargeError::new_err(format!("{what} is {got:?}, expected {expected}", got = got.to_string()))
}

fn number<T: FromStr>(key: &str, value: &str) -> PyResult<T> {
    value.parse().map_err(|_| bad(key, value, "a number"))
}

fn numbers(key: &str, value: &str) -> PyResult<Vec<f64>> {
    value.split(',').map(|x| number(key, x)).collect()
}

fn per_head(values: Vec<f64>) -> PerHead<f64> {
    match values[..] {
        [one] => PerHead::All(one),
        _ => PerHead::Heads(values),
    }
}

/// `topk` and `cdf` of each head; both together are their union.
fn budget(topk: &[f64], cdf: &[f64], neither: Selection) -> PyResult<PerHead<Selection>> {
    let heads = topk.len().max(cdf.len());
    if heads == 0 {
        return Ok(neither.into());
    }
    for (name, values) in [("topk", topk), ("cdf", cdf)] {
        if values.len() > 1 && values.len() != heads {
            let expected = format!("{heads} values, as many as the other has");
            return Err(bad(name, format!("{} values", values.len()), &expected));
        }
    }
    let at = |values: &[f64], head: usize| match values {
        [] => None,
        [one] => Some(*one),
        _ => Some(values[head]),
    };
    let of = |head: usize| match (at(topk, head), at(cdf, head)) {
        (Some(top_k), Some(cdf)) => Selection::Union { cdf, top_k },
        (Some(top_k), None) => Selection::TopK(top_k),
        (None, Some(cdf)) => Selection::TopCdf(cdf),
        (None, None) => neither,
    };
    Ok(if heads == 1 { of(0).into() } else { PerHead::Heads((0..heads).map(of).collect()) })
}

fn layout(value: &str) -> PyResult<Layout> {
    match value {
        "HND" => Ok(Layout::Hnd),
        "NHD" => Ok(Layout::Nhd),
        _ => Err(bad("layout", value, "HND ([batch, heads, tokens, dim]) or NHD")),
    }
}

fn alignment(value: &str) -> PyResult<Alignment> {
    match value {
        "top_left" => Ok(Alignment::TopLeft),
        "bottom_right" => Ok(Alignment::BottomRight),
        _ => Err(bad("causal_alignment", value, "top_left (SDPA) or bottom_right (KV cache)")),
    }
}

fn selection(value: &str) -> PyResult<Selection> {
    match value {
        "auto" => Ok(Selection::Auto),
        "all" => Ok(Selection::All),
        _ => Err(bad("select", value, "auto or all")),
    }
}

fn window(value: &str) -> PyResult<Window> {
    let side = |x: &str| if x == "-" { Ok(None) } else { number("window", x).map(Some) };
    let Some((left, right)) = value.split_once(',') else {
        return Err(bad("window", value, "left,right"));
    };
    Ok(Window { left: side(left)?, right: side(right)? })
}

/// The command's words: QxK, QxK+var, each also with +Nrows.
fn pooling(value: &str) -> PyResult<Pooling> {
    let refused = || {
        let expected = "block, sub_block, second_order, mixed, or QxK, for instance 16x16, with +var \
                        for second order, +2rows for samples";
        bad("pooling", value, expected)
    };
    let size = |x: &str| x.parse::<usize>().map_err(|_| refused());
    let (pooled, sampled_rows) =
        match value.strip_suffix("rows").and_then(|rest| rest.rsplit_once('+')) {
            Some((pooled, rows)) => (pooled, size(rows)?),
            None => (value, 0),
        };
    let (sizes, second_order) = match pooled.strip_suffix("+var") {
        Some(sizes) => (sizes, true),
        None => (pooled, false),
    };
    let Some((q, kv)) = sizes.split_once('x') else {
        return Err(refused());
    };
    let (q_rows, kv_rows) = (size(q)?, size(kv)?);
    Ok(Pooling { q_rows, kv_rows, second_order, sampled_rows })
}

fn precision(value: &str) -> PyResult<QkPrecision> {
    match value {
        "f32" => Ok(QkPrecision::F32),
        "int8" => Ok(QkPrecision::Int8),
        _ => Err(bad("qk", value, "f32, int8, or (on CUDA) half")),
    }
}

fn isa(value: &str) -> PyResult<Isa> {
    let is = |isa: &Isa| format!("{isa:?}").eq_ignore_ascii_case(value);
    Isa::ALL.into_iter().find(is).ok_or_else(|| bad("isa", value, "scalar, avx2 or avx512"))
}

fn ranges(key: &str, value: &str) -> PyResult<Vec<Range<usize>>> {
    let one = |x: &str| {
        let (from, to) = x.split_once(':').ok_or_else(|| bad(key, x, "from:to"))?;
        let range: Range<usize> = number(key, from)?..number(key, to)?;
        if range.is_empty() { Err(bad(key, x, "from below to")) } else { Ok(range) }
    };
    value.split(',').map(one).collect()
}

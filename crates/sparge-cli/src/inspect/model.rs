//! A language model: the skipped share of every head, or one head's maps.

use super::{Args, head};
use crate::Context;
use crate::error::{Error, Result};
use crate::language::{Language, TokenBar};
use crate::picture::{Axis, Figure, Panel, Scale};
use crate::terminal::{self, percent};
use serde::Serialize;
use sparge::{Alignment, AttentionOptions, SpargeConfig, TensorView};
use sparge_candle::SpargeAttention;
use sparge_candle::attention::{Attention, AttentionCall};

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    context: usize,
    layer: Option<usize>,
    head: Option<usize>,
    qk_sparsity: f64,
    mass_kept: Option<f64>,
    /// `[layer][head]`.
    heads: Vec<Vec<f64>>,
    output: String,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let number = args.head.unwrap_or(0);
    let config = args.selection.config(context.isa)?;
    let text = args.text.load(context)?;
    let language = Language::open(&args.model(), context)?;
    language.check_config(&config)?;
    let length = args.context.unwrap_or(4096);
    language.check_context(length)?;
    let shape = language.model.config();
    let (layers, heads, dim) = (shape.num_layers, shape.num_qo_heads, shape.head_dim);
    let group = heads / shape.num_kv_heads.max(1);
    for (flag, got, count) in
        [("--layer", args.layer.unwrap_or(0), layers), ("--head", number, heads)]
    {
        if got >= count {
            return Err(Error::input(format!(
                "{flag} is {got}, but the model has {count}; expected 0 to {}",
                count.saturating_sub(1)
            )));
        }
    }
    let tokens = language.tokens(&text.text, length)?;
    let bar = TokenBar::new(tokens.len());
    bar.say("reading");
    let mut attention = Listener {
        inner: SpargeAttention::new(config.clone()),
        at: args.layer.map(|layer| (layer, number, number / group.max(1))),
        q: Vec::new(),
        k: Vec::new(),
    };
    language.read_with(&tokens, 0, &mut attention, &bar, false)?;
    drop(bar);

    let by_head: Vec<Vec<f64>> = attention
        .inner
        .layers()
        .iter()
        .map(|heads| heads.iter().map(sparge::HeadStats::qk_sparsity).collect())
        .collect();
    let total = attention.inner.total();
    let mut report = Report {
        model: language.name.clone(),
        context: tokens.len(),
        layer: args.layer,
        head: args.layer.map(|_| number),
        qk_sparsity: total.qk_sparsity(),
        mass_kept: None,
        heads: by_head,
        output: args.output.display().to_string(),
    };
    match args.layer {
        None => draw_model(&report, &text.name, &config, args)?,
        Some(layer) => {
            let shape = [1, 1, tokens.len(), dim];
            let q = TensorView::hnd(&attention.q, shape)?;
            let k = TensorView::hnd(&attention.k, shape)?;
            let options =
                AttentionOptions { causal: Some(Alignment::TopLeft), ..Default::default() };
            let one = head::of_head(&config, number);
            let name = format!(
                "{}, layer {layer}, head {}, {}, reading {}",
                language.name,
                number,
                head::describe(&one),
                text.name
            );
            let drawn = head::draw(&q, &k, &options, &one, &name, &args.output)?;
            report.qk_sparsity = drawn.qk_sparsity;
            report.mass_kept = drawn.mass_kept;
        }
    }
    if context.json {
        return terminal::print_json(&report);
    }
    let skipped = percent(report.qk_sparsity);
    terminal::print(&format!("{skipped} of the blocks skipped\nwrote {}\n", report.output))
}

fn draw_model(report: &Report, text: &str, config: &SpargeConfig, args: &Args) -> Result<()> {
    let heads = report.heads.first().map_or(0, Vec::len);
    // Layers from left to right, as the data flows.
    let cells = (0..heads).flat_map(|h| report.heads.iter().map(move |layer| layer.get(h)));
    let values = cells.map(|x| x.map_or(f32::NAN, |&x| x as f32)).collect();
    let panel = Panel {
        title: "Share of Q·Kᵀ skipped".into(),
        rows: Axis { label: "head", step: 1, end: heads },
        columns: Axis { label: "layer", step: 1, end: report.heads.len() },
        values,
        scale: Scale::Linear { label: "share of the visible blocks that was skipped" },
        aspect: 1,
    };
    Figure {
        title: format!("{}: sparsity by layer and head", report.model),
        subtitle: format!(
            "{} tokens of {text}, {}; {} skipped in all",
            report.context,
            head::describe(config),
            percent(report.qk_sparsity)
        ),
        panels: vec![panel],
    }
    .save(&args.output)
}

/// Attention that remembers one head's queries and keys.
struct Listener {
    inner: SpargeAttention,
    /// Layer, query head, key/value head.
    at: Option<(usize, usize, usize)>,
    q: Vec<f32>,
    k: Vec<f32>,
}

impl Attention for Listener {
    fn attend(
        &mut self,
        call: AttentionCall<'_>,
    ) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
        if let Some((layer, head, kv_head)) = self.at
            && layer == call.layer
        {
            let ([_, q_len, _], [_, kv_len, _]) = (call.q.shape(), call.k.shape());
            (0..q_len).for_each(|i| self.q.extend(call.q.row(head, i)));
            (kv_len - q_len..kv_len).for_each(|j| self.k.extend(call.k.row(kv_head, j)));
        }
        self.inner.attend(call)
    }
}

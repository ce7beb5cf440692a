//! A head of tensors from a file.

use super::{Args, head};
use crate::error::{Error, Result};
use crate::input::{Extras, Qkv, element_type};
use crate::safetensor::{Reader, Stored};
use crate::terminal::{self, percent};
use crate::{Context, memory};
use half::{bf16, f16};
use safetensors::tensor::Dtype;
use serde::Serialize;
use sparge::{AttentionOptions, AttentionShape, BLOCK_KV, Element, Lengths, Plan};
use std::path::Path;

#[derive(Debug, Serialize)]
struct Report {
    sequence: usize,
    head: usize,
    qo_len: usize,
    kv_len: usize,
    qk_sparsity: f64,
    /// Share of the true attention inside the computed blocks; null for long sequences.
    mass_kept: Option<f64>,
    output: String,
}

pub(super) fn run(args: &Args, input: &Path, context: &Context) -> Result<()> {
    let mut file = Reader::open(input)?;
    let report = match element_type(&file, "")? {
        Dtype::F16 => draw::<f16>(args, &mut file, context),
        Dtype::BF16 => draw::<bf16>(args, &mut file, context),
        _ => draw::<f32>(args, &mut file, context),
    }?;
    if context.json {
        return terminal::print_json(&report);
    }
    let mass = report.mass_kept.map_or(String::new(), |mass| {
        format!(", the others hold {} of the attention", percent(mass))
    });
    terminal::print(&format!(
        "head {} of sequence {}: {} of the blocks skipped{mass}\nwrote {}\n",
        report.head,
        report.sequence,
        percent(report.qk_sparsity),
        report.output
    ))
}

fn draw<T: Stored + Element>(args: &Args, file: &mut Reader, context: &Context) -> Result<Report> {
    let number = args.head.unwrap_or(0);
    let qkv = Qkv::<T>::read(file, args.layout.layout())?;
    let extras = Extras::read(file)?;
    let [q, k, v] = qkv.views()?;
    let shape = AttentionShape::of(&q, &k, &v)?;
    let lengths = extras.sequence_lengths(shape.qo_len, shape.kv_len);
    let longest_q = lengths.iter().map(|l| l.0).max().unwrap_or(0);
    let config = args.selection.config(context.isa)?;
    let options = AttentionOptions {
        softmax_scale: args.scale,
        causal: args.visibility.alignment(lengths.iter().copied())?,
        window: args.visibility.window(),
        sink_blocks: args.visibility.sink_blocks,
        ..AttentionOptions::default()
    };
    // The whole call must be valid, then the head is a part of it.
    let whole = AttentionOptions {
        block_mask: extras.block_mask.as_ref(),
        element_mask: extras.element_mask(longest_q)?,
        lengths: extras.lengths(),
        ..options
    };
    let sequences = Plan::new(shape, &whole, &config)?.mask_shape()[0];
    for (flag, got, count) in
        [("--sequence", args.sequence, sequences), ("--head", number, shape.num_qo_heads)]
    {
        if got >= count {
            return Err(Error::input(format!(
                "{flag} is {got}, but the file has {count}; expected 0 to {}",
                count.saturating_sub(1)
            )));
        }
    }
    let one = qkv.head(&extras, args.sequence, number)?;
    let (q_len, kv_len) = (one.q.dims().len, one.k.dims().len);
    let blocks = kv_len.div_ceil(BLOCK_KV) as u128;
    memory::check(blocks.min(256) * (q_len + kv_len) as u128 * 4, "the picture")?;
    let options = AttentionOptions {
        block_mask: one.block_mask.as_ref(),
        element_mask: one.element_mask,
        lengths: Lengths::Full,
        ..options
    };
    let config = head::of_head(&config, number);
    let causal = if args.visibility.causal { ", causal" } else { "" };
    let name = format!(
        "Head {} of {}, sequence {}{causal}, {}",
        number,
        shape.num_qo_heads,
        args.sequence,
        head::describe(&config)
    );
    let drawn = head::draw(&one.q, &one.k, &options, &config, &name, &args.output)?;
    Ok(Report {
        sequence: args.sequence,
        head: number,
        qo_len: q_len,
        kv_len,
        qk_sparsity: drawn.qk_sparsity,
        mass_kept: drawn.mass_kept,
        output: args.output.display().to_string(),
    })
}

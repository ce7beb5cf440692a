//! A calibration file as a picture or a page: sparsity and error of every layer and head.

use super::{Args, html};
use crate::Context;
use crate::error::{Error, Result};
use crate::output::write_atomically;
use crate::picture::{Axis, Figure, Panel, Scale};
use crate::terminal::{self, percent};
use serde::Serialize;
use sparge::calibrate::{Calibration, HeadSettings};
use std::ffi::OsStr;
use std::path::Path;

#[derive(Debug, Serialize)]
struct Report<'a> {
    model: &'a str,
    rel_l1: f64,
    qk_sparsity: f64,
    pv_sparsity: f64,
    /// `[layer][head]`.
    heads: Vec<Vec<&'a HeadSettings>>,
    output: String,
}

pub(super) fn run(args: &Args, input: &Path, context: &Context) -> Result<()> {
    let calibration = crate::calibration::read(input)?;
    match args.output.extension().and_then(OsStr::to_str) {
        Some("html" | "htm") => {
            let page = html::page(&calibration);
            write_atomically(&args.output, |w| w.write_all(page.as_bytes()))?;
        }
        Some("png") => figure(&calibration).save(&args.output)?,
        _ => {
            return Err(Error::input(format!(
                "the output is {}, expected a name that ends in .png or .html",
                args.output.display()
            )));
        }
    }
    let m = &calibration.measured;
    let output = args.output.display().to_string();
    if context.json {
        return terminal::print_json(&Report {
            model: &calibration.model.id,
            rel_l1: m.rel_l1,
            qk_sparsity: m.qk_sparsity,
            pv_sparsity: m.pv_sparsity,
            heads: calibration.layers.iter().map(|l| l.heads.iter().collect()).collect(),
            output,
        });
    }
    terminal::print(&format!("{}\nwrote {output}\n", summary(&calibration)))
}

/// One line about a calibration.
pub(super) fn summary(c: &Calibration) -> String {
    format!(
        "{} samples of {} tokens of {}; relative L1 within {} and {}; {} of Q·Kᵀ and {} of P·V \
         skipped at relative L1 {:.4}",
        c.data.samples,
        c.data.tokens,
        c.data.source,
        c.bounds.l1,
        c.bounds.l2,
        percent(c.measured.qk_sparsity),
        percent(c.measured.pv_sparsity),
        c.measured.rel_l1
    )
}

fn figure(c: &Calibration) -> Figure {
    let panel = |title: &str, scale: Scale, value: fn(&HeadSettings) -> f64| Panel {
        title: title.into(),
        rows: Axis { label: "head", step: 1, end: c.model.num_qo_heads },
        columns: Axis { label: "layer", step: 1, end: c.layers.len() },
        values: (0..c.model.num_qo_heads)
            .flat_map(|h| c.layers.iter().map(move |l| value(&l.heads[h]) as f32))
            .collect(),
        scale,
        aspect: 1,
    };
    let share = "share of the visible blocks";
    Figure {
        title: format!("{}: what each head skips", c.model.id),
        subtitle: summary(c),
        panels: vec![
            panel("Q·Kᵀ skipped", Scale::Linear { label: share }, |h| h.measured.qk_sparsity),
            panel("P·V skipped", Scale::Linear { label: share }, |h| h.measured.pv_sparsity),
            panel(
                "Relative L1",
                Scale::UpTo { most: c.bounds.l2 as f32, label: "error, up to the bound" },
                |h| h.measured.rel_l1,
            ),
        ],
    }
}

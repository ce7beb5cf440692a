//! Tuning on recorded queries, keys and values.

use super::progress::{Progress, add};
use super::{Args, Times, chosen, measured};
use crate::Context;
use crate::error::{Error, Result};
use crate::input::{Qkv, element_type, recorded_shape};
use crate::language::TokenBar;
use crate::safetensor::Reader;
use sparge::calibrate::{Bounds, CalibratedModel, Calibration, CalibrationData, rerun, survey};
use sparge::{AttentionOptions, AttentionShape, SpargeConfig};
use sparge_candle::hub::file_sha256;
use std::path::Path;
use std::time::Instant;

pub(super) fn tune(args: &Args, bounds: Bounds, context: &Context) -> Result<(Calibration, Times)> {
    let layout = args.layout.layout();
    let (layers, shape) = common(args)?;
    let options = AttentionOptions {
        softmax_scale: args.scale,
        causal: args.visibility.alignment(std::iter::once((shape.qo_len, shape.kv_len)))?,
        window: args.visibility.window(),
        sink_blocks: args.visibility.sink_blocks,
        layout,
        ..AttentionOptions::default()
    };
    let names: Vec<String> = args.input.iter().map(|p| name(p)).collect();
    let model = CalibratedModel {
        id: names.join(", "),
        // Of the model that was recorded, not of the recording: it is not known here.
        sha256: None,
        num_layers: layers.len(),
        num_qo_heads: shape.num_qo_heads,
        num_kv_heads: shape.num_kv_heads,
        head_dim: shape.head_dim,
    };
    let data = CalibrationData {
        source: names.join(", "),
        samples: args.input.len() * shape.batch,
        tokens: shape.kv_len,
        causal: args.visibility.causal,
    };
    let sums = args.input.iter().map(|p| Ok(file_sha256(p)?)).collect::<Result<Vec<String>>>()?;
    let (grid, config) = (args.grid(), args.config(context));
    let what = format!("{sums:?}; {options:?}; {config:?}");
    let mut progress = Progress::open(&args.output, &what, &grid, args.restart)?;

    let per_layer = shape.batch * shape.qo_len;
    let bar = TokenBar::new(2 * per_layer * layers.len() * args.input.len());
    let mut times = Times::default();
    bar.skip(progress.surveyed * per_layer * layers.len());
    let mut dense = vec![0.0; shape.batch * shape.num_qo_heads * shape.qo_len * shape.head_dim_v];
    for (i, path) in args.input.iter().enumerate().skip(progress.surveyed) {
        bar.say(format!("reading {}", names[i]));
        let start = Instant::now();
        let mut file = Reader::open(path)?;
        let mut tallies = Vec::new();
        for prefix in &layers {
            let qkv = Qkv::widened(&mut file, layout, prefix)?;
            let [q, k, v] = qkv.views()?;
            tallies.push(survey(&q, &k, &v, &options, &config, &grid, &mut dense)?);
            bar.skip(per_layer);
        }
        add(&mut progress.tallies, &tallies);
        progress.surveyed = i + 1;
        progress.save(&args.output)?;
        times.survey_s += start.elapsed().as_secs_f64();
    }

    progress.choose(bounds);
    // As they were recorded, so they run, however short.
    let mut calibration = chosen(model, data, args.shared(0), bounds, &grid, &progress.tallies);
    bar.skip(progress.rerun * per_layer * layers.len());
    for (i, path) in args.input.iter().enumerate().skip(progress.rerun) {
        bar.say(format!("running the settings on {}", names[i]));
        let start = Instant::now();
        let mut file = Reader::open(path)?;
        let mut runs = Vec::new();
        for (layer, prefix) in layers.iter().enumerate() {
            let qkv = Qkv::widened(&mut file, layout, prefix)?;
            let [q, k, v] = qkv.views()?;
            let exact = SpargeConfig { isa: context.isa, ..SpargeConfig::dense() };
            let exact = sparge::attention(&q, &k, &v, &options, &exact)?.o;
            let config = SpargeConfig { isa: context.isa, ..calibration.config(layer)? };
            runs.push(rerun(&q, &k, &v, &options, &config, &exact)?);
            bar.skip(per_layer);
        }
        add(&mut progress.runs, &runs);
        progress.rerun = i + 1;
        progress.save(&args.output)?;
        times.rerun_s += start.elapsed().as_secs_f64();
    }
    measured(&mut calibration, &progress.runs);
    Ok((calibration, times))
}

/// The layers (what stands before `q`, `k` and `v` in the names) and the shape that all files share.
fn common(args: &Args) -> Result<(Vec<String>, AttentionShape)> {
    let mut common: Option<(Vec<String>, AttentionShape)> = None;
    for path in &args.input {
        let file = Reader::open(path)?;
        let layers = prefixes(&file);
        let mut shape = None;
        for prefix in &layers {
            element_type(&file, prefix)?;
            let this = recorded_shape(&file, args.layout.layout(), prefix)?;
            if shape.replace(this).is_some_and(|before| before != this) {
                return Err(Error::input(format!(
                    "{}: {prefix}q, k and v have another shape than the layer before; tune layers \
                     of one shape together",
                    path.display()
                )));
            }
        }
        let Some(shape) = shape else { continue };
        match &common {
            None => common = Some((layers, shape)),
            Some(first) if *first == (layers.clone(), shape) => {}
            Some((first_layers, first)) => {
                return Err(Error::input(format!(
                    "{} has {} layers of {shape:?}, {} has {} of {first:?}; tune files of one shape \
                     together",
                    path.display(),
                    layers.len(),
                    args.input[0].display(),
                    first_layers.len()
                )));
            }
        }
    }
    common.ok_or_else(|| Error::input("no recorded tensors; give --input"))
}

fn prefixes(file: &Reader) -> Vec<String> {
    let layers: Vec<String> = (0..)
        .map(|i| format!("layers.{i}."))
        .take_while(|prefix| file.info(&format!("{prefix}q")).is_some())
        .collect();
    if layers.is_empty() { vec![String::new()] } else { layers }
}

fn name(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into())
}

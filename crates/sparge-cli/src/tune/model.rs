//! Tuning a language model on a text.

use super::progress::{Progress, add};
use super::{Args, Times, chosen, measured};
use crate::Context;
use crate::error::{Error, Result};
use crate::language::{Language, TokenBar};
use sparge::calibrate::{Bounds, CalibratedModel, Calibration, CalibrationData};
use sparge::{Selection, SpargeConfig};
use sparge_candle::calibrate::{RerunAttention, SurveyAttention};
use std::time::Instant;

pub(super) fn tune(args: &Args, bounds: Bounds, context: &Context) -> Result<(Calibration, Times)> {
    let text = args.text.load(context)?;
    let language = Language::open(&args.model, context)?;
    let (length, samples) = (args.context, args.samples as usize);
    language.check_context(length)?;
    let min_kv_len = Selection::AUTO_MIN_LEN;
    if length < min_kv_len {
        return Err(Error::input(format!(
            "a context of {length} tokens; expected at least {min_kv_len}: shorter calls run dense"
        )));
    }
    let config = args.config(context);
    language.check_config(&config)?;
    let tokens = language.tokens(&text.text, text.text.len())?;
    let all = length.saturating_mul(samples);
    let Some(start) = tokens.len().checked_sub(all) else {
        return Err(Error::input(format!(
            "{} has {} tokens, expected {all} for {samples} samples of {length}; use a longer text, \
             fewer samples or a shorter context",
            text.name,
            tokens.len()
        )));
    };
    let tokens = &tokens[start..];

    let shape = language.model.config();
    let model = CalibratedModel {
        id: language.name.clone(),
        sha256: Some(language.sha256()?),
        num_layers: shape.num_layers,
        num_qo_heads: shape.num_qo_heads,
        num_kv_heads: shape.num_kv_heads,
        head_dim: shape.head_dim,
    };
    let data = CalibrationData { source: text.name, samples, tokens: length, causal: true };
    let grid = args.grid();
    let what = format!("{model:?}; {data:?} {:x}; {config:?}", fingerprint(tokens));
    let mut progress = Progress::open(&args.output, &what, &grid, args.restart)?;

    let bar = TokenBar::new(2 * all);
    bar.skip(progress.surveyed * length);
    let mut times = Times::default();
    let pieces = || tokens.chunks_exact(length).enumerate();
    for (i, piece) in pieces().skip(progress.surveyed) {
        bar.say(format!("reading, sample {} of {samples}", i + 1));
        let start = Instant::now();
        let mut survey = SurveyAttention::new(grid.clone(), config.clone(), min_kv_len);
        language.read_with(piece, 0, &mut survey, &bar, false)?;
        add(&mut progress.tallies, &survey.into_layers());
        progress.surveyed = i + 1;
        progress.save(&args.output)?;
        times.survey_s += start.elapsed().as_secs_f64();
    }

    progress.choose(bounds);
    let settings = args.shared(min_kv_len);
    let mut calibration = chosen(model, data, settings, bounds, &grid, &progress.tallies);
    let configs = (0..calibration.layers.len())
        .map(|layer| Ok(SpargeConfig { isa: context.isa, ..calibration.config(layer)? }))
        .collect::<Result<Vec<_>>>()?;
    bar.skip(progress.rerun * length);
    for (i, piece) in pieces().skip(progress.rerun) {
        bar.say(format!("running the settings, sample {} of {samples}", i + 1));
        let start = Instant::now();
        let mut rerun = RerunAttention::new(configs.clone(), min_kv_len);
        language.read_with(piece, 0, &mut rerun, &bar, false)?;
        add(&mut progress.runs, &rerun.into_layers());
        progress.rerun = i + 1;
        progress.save(&args.output)?;
        times.rerun_s += start.elapsed().as_secs_f64();
    }
    measured(&mut calibration, &progress.runs);
    Ok((calibration, times))
}

/// FNV-1a of the tokens: another text is another run.
fn fingerprint(tokens: &[u32]) -> u64 {
    tokens.iter().flat_map(|t| t.to_le_bytes()).fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

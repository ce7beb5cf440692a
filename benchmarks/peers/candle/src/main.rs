//! Times candle-nn's CPU flash attention and this project's dense path in turns, on the same inputs:
//!
//!     RUSTFLAGS="-C target-cpu=native" cargo run --release -- 9x8192x64:causal 8x4096x128
//!
//! (candle picks its vector code at compile time, so it needs the flag; ours does not.) One JSON line
//! per shape: medians of three, and the largest difference of the two outputs.

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use candle_nn::attention::{AttnMask, flash_attn};
use sparge::{Alignment, AttentionOptions, Layout, SpargeConfig, TensorView, attention};
use std::time::Instant;

const REPS: usize = 3;

fn main() -> Result<()> {
    for text in std::env::args().skip(1) {
        let (size, causal) = match text.strip_suffix(":causal") {
            Some(size) => (size, true),
            None => (&*text, false),
        };
        let sizes: Vec<usize> = size.split('x').map(str::parse).collect::<Result<_, _>>()?;
        let [heads, len, dim] = sizes[..] else { anyhow::bail!("{text}: expected HxLxD") };
        compare(&text, [heads, len, dim], causal).with_context(|| text.clone())?;
    }
    Ok(())
}

fn compare(name: &str, [heads, len, dim]: [usize; 3], causal: bool) -> Result<()> {
    // Both read [batch, tokens, heads, dim].
    let x: Vec<Tensor> = (1..4)
        .map(|seed| {
            let data = sparge::testing::structured(seed, heads, len, dim);
            let hnd = Tensor::from_vec(data, (1, heads, len, dim), &Device::Cpu)?;
            Ok(hnd.transpose(1, 2)?.contiguous()?)
        })
        .collect::<Result<_>>()?;
    let flat = x.iter().map(|x| Ok(x.flatten_all()?.to_vec1()?)).collect::<Result<Vec<Vec<f32>>>>()?;
    let view = |i: usize| TensorView::nhd(&flat[i], [1, len, heads, dim]);
    let (q, k, v) = (view(0)?, view(1)?, view(2)?);
    let options = AttentionOptions {
        causal: causal.then_some(Alignment::TopLeft),
        layout: Layout::Hnd,
        ..AttentionOptions::default()
    };
    let config = SpargeConfig::dense();
    let scale = 1.0 / (dim as f32).sqrt();

    let (mut theirs, mut ours, mut difference) = (Vec::new(), Vec::new(), 0f32);
    for _ in 0..REPS {
        let mask = if causal { AttnMask::causal() } else { AttnMask::None };
        let start = Instant::now();
        let a = flash_attn::<f32>(&x[0], &x[1], &x[2], scale, mask, None, None)?;
        theirs.push(start.elapsed().as_secs_f64());
        let start = Instant::now();
        let b = attention(&q, &k, &v, &options, &config)?;
        ours.push(start.elapsed().as_secs_f64());
        let a: Vec<f32> = a.flatten_all()?.to_vec1()?;
        difference = a.iter().zip(&b.o).fold(0.0, |m, (a, b)| m.max((a - b).abs()));
    }
    ensure!(difference < 1e-3, "outputs differ by {difference}: one of the two is wrong");
    let median = |x: &mut Vec<f64>| {
        x.sort_by(f64::total_cmp);
        x[x.len() / 2]
    };
    let (theirs, ours) = (median(&mut theirs), median(&mut ours));
    println!(
        r#"{{"peer":"candle-nn 0.11 cpu flash attention","shape":"{name}","threads":{},"candle_s":{theirs:.4},"sparge_dense_s":{ours:.4},"ratio":{:.1},"max_difference":{difference:e}}}"#,
        rayon::current_num_threads(),
        theirs / ours,
    );
    Ok(())
}

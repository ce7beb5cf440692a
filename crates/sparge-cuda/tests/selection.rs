//! The general path's selection where it is easy to get wrong: the judge, key pooling finer than a
//! tile, ragged ends, windows, pooled masks. Skipped where there is no GPU
//! (`SPARGE_REQUIRE_GPU=1` makes that a failure).
#![expect(unsafe_code, reason = "launches on raw device addresses")]
#![expect(clippy::print_stdout, reason = "figures are worth reading")]

mod common;

use common::{Element, Gpu, Lens, Normal, Problem, Ran, gpu, report, rounded};
use sparge::{Alignment, BlockMask, Dims, Pooling, Selection, SpargeConfig, Window, reference};
use sparge_cuda::{CudaOptions, DType, Path, Precision};

const GENERAL: CudaOptions = CudaOptions {
    precision: Precision::Half,
    path: Path::General,
    element_mask: None,
    block_mask: false,
};

/// Rows alike within blocks of `rows`, every other block by far less than the rest.
fn blocks(dims: Dims, rows: usize, dtype: DType, seed: u64) -> Vec<f32> {
    let mut rng = Normal(seed);
    let mut out = Vec::new();
    for _ in 0..dims.batch * dims.heads {
        let mut centre = Vec::new();
        for t in 0..dims.len {
            if t % rows == 0 {
                centre = (0..dims.dim).map(|_| rng.next()).collect();
            }
            let noise = if (t / rows).is_multiple_of(2) { 0.2 } else { 1.6 };
            out.extend(centre.iter().map(|c| rounded(c + noise * rng.next(), dtype)));
        }
    }
    out
}

/// A call whose blocks the judge tells apart.
fn coherent(name: &str, sizes: [usize; 7]) -> Problem {
    let mut p = Problem::new(name, sizes, DType::F16);
    let [q, k, _] = p.dims();
    (p.q, p.k) = (blocks(q, 128, p.dtype, 11), blocks(k, 64, p.dtype, 12));
    p.cuda = GENERAL;
    p
}

fn settings(selection: Selection, pooling: Pooling, theta: f64) -> SpargeConfig {
    SpargeConfig {
        selection: selection.into(),
        pooling,
        theta: theta.into(),
        lambda: f64::INFINITY.into(),
        // Short calls would have nothing left to drop.
        keep_local: 0,
        ..SpargeConfig::default()
    }
}

fn row_of(mask: &BlockMask, row: usize) -> Vec<usize> {
    let [_, heads, q_blocks, _] = mask.shape();
    mask.row(row / q_blocks / heads, row / q_blocks % heads, row % q_blocks).collect()
}

/// Compares the mask with the reference's, row by row, where rounding does not decide. Returns the
/// share of rows that drop reachable blocks.
fn check(p: &Problem, ran: &Ran, failures: &mut Vec<String>) -> f64 {
    // The fast path's pooled rows have 16 bits of mantissa.
    let rounding = if p.cuda.path == Path::General { 2e-5 } else { 2e-4 };
    let mask = ran.mask.as_ref().expect("predicts");
    let [q, k, _] = p.views();
    let plan = p.plan();
    let expected = reference::predict(&plan, &q, &k, &reference::Rules::OURS);
    let mut dense = p.clone();
    dense.config = SpargeConfig::dense();
    let dense = dense.plan();
    let all = reference::predict(&dense, &q, &k, &reference::Rules::OURS).mask;
    let (mut rows, mut sparse) = (0, 0);
    for (row, &margin) in expected.margin.iter().enumerate() {
        let (got, want) = (row_of(mask, row), row_of(&expected.mask, row));
        if got != want && margin > rounding {
            failures.push(format!(
                "{}: row {row}, margin {margin:.1e}: {got:?}, expected {want:?}",
                p.name
            ));
        }
        let reachable = row_of(&all, row).len();
        if reachable > 1 {
            rows += 1;
            sparse += usize::from(got.len() < reachable);
        }
    }
    f64::from(sparse as u32) / f64::from((rows as u32).max(1))
}

fn run(gpu: &Gpu, p: &Problem, least: f64, failures: &mut Vec<String>) {
    let share = check(p, &p.run(gpu), failures);
    println!("{}: {:.0} % of rows drop blocks", p.name, 100.0 * share);
    if share < least {
        failures.push(format!("{}: only {share:.2} of the rows drop blocks", p.name));
    }
}

/// A tile of 16 pooled keys may then be less than a block, and nothing of it be reachable.
#[test]
fn pooled_keys_finer_than_a_tile_are_all_written() {
    let Some(gpu) = gpu() else { return };
    let mut failures = Vec::new();
    for kv_rows in [1, 2, 4] {
        let pooling = Pooling { q_rows: 128, kv_rows, second_order: false, sampled_rows: 0 };
        for (what, window, sink_blocks, causal) in [
            ("ragged", None, 0, None),
            ("window left", Some(Window { left: Some(100), right: None }), 0, None),
            ("window left, sinks", Some(Window { left: Some(70), right: None }), 1, None),
            ("window", Some(Window { left: Some(150), right: Some(90) }), 0, None),
            ("causal", None, 0, Some(Alignment::BottomRight)),
        ] {
            let mut p = coherent(what, [1, 2, 1, 300, 333, 64, 64]);
            p.name = format!("{what}, kv_rows {kv_rows}");
            p.config = settings(Selection::TopCdf(0.7), pooling, 0.0);
            (p.window, p.sink_blocks, p.causal) = (window, sink_blocks, causal);
            run(&gpu, &p, if what == "ragged" { 0.5 } else { 0.1 }, &mut failures);
        }
    }
    report(&failures);
}

/// Sampled queries in every number of passes and items, also past ragged ends, in windows, under masks;
/// and the local blocks, on and beside the diagonal.
#[test]
fn sampled_queries_and_local_blocks() {
    let Some(gpu) = gpu() else { return };
    let mut failures = Vec::new();
    for (sampled_rows, keep_local) in [(1, 0), (2, 1), (5, 0), (33, 3), (128, usize::MAX)] {
        let pooling = Pooling { sampled_rows, ..Pooling::BLOCK };
        for (i, (what, window, sink_blocks, causal)) in [
            ("ragged", None, 0, None),
            ("sinks", Some(Window { left: Some(700), right: None }), 1, None),
            ("window", Some(Window { left: Some(500), right: Some(90) }), 0, None),
            ("bottom right", None, 0, Some(Alignment::BottomRight)),
            ("top left", None, 0, Some(Alignment::TopLeft)),
        ]
        .into_iter()
        .enumerate()
        {
            let dtype = [DType::F16, DType::Bf16, DType::F32][i % 3];
            let mut p = Problem::new(what, [2, 2, 1, 1500, 1333, 72, 64], dtype);
            p.name = format!("{what}, {sampled_rows} samples, {keep_local} local blocks");
            (p.window, p.sink_blocks, p.causal) = (window, sink_blocks, causal);
            p.cuda = GENERAL;
            p.config = settings(Selection::TopCdf(0.5), pooling, 0.0);
            p.config.keep_local = keep_local;
            let is_all = keep_local == usize::MAX && (causal.is_some() || what == "window");
            run(&gpu, &p, if is_all { 0.0 } else { 0.2 }, &mut failures);
            p.element = Some(bias(
                Dims { batch: 1, heads: 2, len: 1500, dim: 1333 },
                DType::F32,
                |at, i, j| if (i + at) % 3 == j % 5 { f32::NEG_INFINITY } else { (j % 7) as f32 },
            ));
            run(&gpu, &p, if is_all { 0.0 } else { 0.2 }, &mut failures);
        }
    }
    report(&failures);
}

/// The same on the fast path, whose selection has kernels of its own: both poolings, groups of queries
/// and chunks of keys in every number, ends that no tile has.
#[test]
fn the_fast_paths_selection_is_the_references() {
    let Some(gpu) = gpu() else { return };
    let mut failures = Vec::new();
    let corners = [Some(Alignment::BottomRight), Some(Alignment::TopLeft), None];
    for (i, (sampled_rows, keep_local, lens)) in [
        (0, 0, [1500, 1333]),
        (1, 1, [129, 9000]),
        (2, 2, [2500, 2500]),
        (5, 0, [300, 20_001]),
        (33, 3, [1500, 700]),
        (65, 1, [1000, 1000]),
        (128, usize::MAX, [1500, 1333]),
    ]
    .into_iter()
    .enumerate()
    {
        for (j, causal) in corners.into_iter().enumerate() {
            for base in [Pooling::BLOCK, Pooling::SUB_BLOCK] {
                let dim = [64, 128][(i + j) % 2];
                let dtype = [DType::F16, DType::Bf16][(i + j / 2) % 2];
                let mut p = Problem::new("fast", [2, 4, 2, lens[0], lens[1], dim, dim], dtype);
                p.name = format!(
                    "{lens:?} × {dim}, {causal:?}, {}, {sampled_rows} samples, {keep_local} local",
                    base.kv_rows
                );
                p.causal = causal;
                let pooling = Pooling { sampled_rows, ..base };
                p.config = settings(Selection::TopCdf(0.5), pooling, 0.0);
                p.config.keep_local = keep_local;
                assert!(p.attention(&gpu).is_fast(), "{}", p.name);
                // Few keys are seen, and those are local.
                let is_all = keep_local > 0 && causal.is_some();
                run(&gpu, &p, if is_all { 0.0 } else { 0.2 }, &mut failures);
            }
        }
    }
    report(&failures);
}

/// Log-sum-exps of neighbouring key blocks that lie far apart, in both directions: what sums are relative
/// to has to change on the way.
#[test]
fn sampled_queries_whose_blocks_are_far_apart() {
    let Some(gpu) = gpu() else { return };
    let mut failures = Vec::new();
    for path in [Path::General, Path::Auto] {
        for causal in [None, Some(Alignment::BottomRight)] {
            let mut p = Problem::new("far apart", [1, 2, 1, 1000, 3000, 64, 64], DType::F16);
            p.name = format!("far apart, {path:?}, {causal:?}");
            p.cuda = CudaOptions { path, ..CudaOptions::default() };
            p.causal = causal;
            for (i, x) in p.k.iter_mut().enumerate() {
                if i / 64 / 64 % 3 == 1 {
                    *x *= 8.0;
                }
            }
            let pooling = Pooling { sampled_rows: 5, ..Pooling::SUB_BLOCK };
            p.config = settings(Selection::TopCdf(0.5), pooling, 0.0);
            run(&gpu, &p, 0.2, &mut failures);
        }
    }
    report(&failures);
}

/// A sampled query that is not finite says nothing about its block: all of it stays, no other block's.
#[test]
fn samples_that_are_not_numbers_keep_their_block() {
    let Some(gpu) = gpu() else { return };
    let mut failures = Vec::new();
    for path in [Path::General, Path::Auto] {
        let mut p = coherent("bad sample", [1, 1, 1, 1000, 1000, 64, 64]);
        p.cuda = CudaOptions { path, ..CudaOptions::default() };
        // The second of two samples of block 1 is query 128 + 96.
        p.q[(128 + 96) * 64 + 3] = f32::NAN;
        let pooling = Pooling { sampled_rows: 2, ..Pooling::SUB_BLOCK };
        p.config = settings(Selection::TopK(0.2), pooling, 0.0);
        let ran = p.run(&gpu);
        let mask = ran.mask.as_ref().expect("predicts");
        let kept: Vec<usize> = (0..8).map(|row| row_of(mask, row).len()).collect();
        if kept[1] != 16 || kept.iter().enumerate().any(|(row, &n)| row != 1 && n > 4) {
            failures.push(format!("{path:?}: {kept:?}"));
        }
    }
    report(&failures);
}

/// θ between the cosines of the tight blocks (about 0.96) and of the others (about 0.29).
#[test]
fn the_judge_decides() {
    let Some(gpu) = gpu() else { return };
    let mut failures = Vec::new();
    for (kv_rows, q_rows) in [(64, 128), (16, 16), (4, 128), (1, 32)] {
        let pooling = Pooling { q_rows, kv_rows, second_order: kv_rows == 16, sampled_rows: 0 };
        let mut kept = Vec::new();
        for theta in [0.0, 0.6] {
            for causal in [None, Some(Alignment::TopLeft)] {
                let mut p = coherent("judge", [1, 2, 1, 1000, 1230, 64, 64]);
                p.name = format!("θ {theta}, pooling {q_rows}×{kv_rows}, causal {causal:?}");
                p.causal = causal;
                p.config = settings(Selection::TopCdf(0.6), pooling, theta);
                run(&gpu, &p, 0.25, &mut failures);
                kept.push(p.run(&gpu).mask.expect("predicts").count());
            }
        }
        // What is not alike is kept.
        assert!(kept[2] > kept[0] && kept[3] > kept[1], "{kept:?}");
    }
    report(&failures);
}

fn bias(dims: Dims, dtype: DType, of: impl Fn(usize, usize, usize) -> f32) -> Element {
    let mut data = Vec::new();
    for at in 0..dims.batch * dims.heads {
        data.extend(
            (0..dims.len * dims.dim).map(|e| rounded(of(at, e / dims.dim, e % dims.dim), dtype)),
        );
    }
    Element::Bias(dims, data, dtype)
}

/// Additive masks of every type, with a block mask, over packed sequences of very unequal lengths:
/// most pooled rows of the short ones are past their ends.
#[test]
fn masks_of_all_kinds_go_together() {
    let Some(gpu) = gpu() else { return };
    let mut failures = Vec::new();
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let mut p = coherent("masks", [1, 2, 1, 900, 1000, 64, 64]);
        p.name = format!("masks, {dtype:?}");
        p.lens = Lens::Packed(vec![0, 1, 801, 900], vec![0, 700, 703, 1000]);
        let dims = Dims { batch: 3, heads: 2, len: 800, dim: 700 };
        p.element = Some(bias(dims, dtype, |at, i, j| match (i + j) % 13 {
            0 => f32::NEG_INFINITY,
            _ => -0.01 * (at + 1) as f32 * ((i / 64) as f32 - (j / 64) as f32).abs(),
        }));
        let mut mask = BlockMask::empty([1, 2, 7, 11]).expect("small");
        for at in (0..2 * 7 * 11).filter(|at| at % 5 != 0) {
            mask.set(0, at / 77, at / 11 % 7, at % 11);
        }
        p.block_mask = Some(mask);
        for pooling in [
            Pooling::BLOCK,
            Pooling { q_rows: 16, kv_rows: 4, second_order: false, sampled_rows: 0 },
        ] {
            p.config = settings(Selection::TopCdf(0.6), pooling, 0.0);
            let ran = p.run(&gpu);
            check(&p, &ran, &mut failures);
            common::compare(&p, &ran, &p.expected(ran.mask.as_ref()), &mut failures);
        }
    }
    report(&failures);
}

/// A bias that is not a number leaves its rows' masses unknown: it must not pass for “not seen”.
#[test]
fn biases_that_are_not_numbers_are_not_dropped() {
    let Some(gpu) = gpu() else { return };
    for value in [f32::NAN, f32::INFINITY] {
        let mut p = coherent("bias", [1, 1, 1, 300, 700, 64, 64]);
        let dims = Dims { batch: 1, heads: 1, len: 300, dim: 700 };
        let at = (140, 410);
        p.element = Some(bias(dims, DType::F32, |_, i, j| if (i, j) == at { value } else { 0.0 }));
        p.config = settings(Selection::TopK(0.2), Pooling::BLOCK, 0.0);
        let ran = p.run(&gpu);
        let mask = ran.mask.as_ref().expect("predicts");
        assert_eq!(row_of(mask, 1).len(), 11, "{value}: all of the row's blocks stay");
        assert!(row_of(mask, 0).len() < 11 && row_of(mask, 2).len() < 11);
        if value.is_nan() {
            assert!(ran.o[140 * 64..141 * 64].iter().all(|x| x.is_nan()));
        }
        assert!(ran.o[141 * 64..].iter().all(|x| x.is_finite()));
    }
}

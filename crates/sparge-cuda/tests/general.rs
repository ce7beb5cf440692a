//! The general path against the f64 reference and the CPU: every option. Skipped where there is no
//! GPU (`SPARGE_REQUIRE_GPU=1` makes that a failure).
#![expect(unsafe_code, reason = "launches on raw device addresses")]

mod common;

use common::{Element, Lens, Problem, compare, gpu, report};
use sparge::{
    Alignment, BLOCK_KV, BlockMask, Dims, Pooling, Selection, SpargeConfig, Window, reference,
};
use sparge_cuda::{CudaOptions, DType, Path, Precision};

const HALF: CudaOptions = CudaOptions {
    precision: Precision::Half,
    path: Path::General,
    element_mask: None,
    block_mask: false,
};
const QUANTIZED: CudaOptions = CudaOptions { precision: Precision::Quantized, ..HALF };

fn bool_mask(dims: Dims, sees: impl Fn(usize, usize) -> bool) -> Element {
    let mut data = Vec::new();
    for _ in 0..dims.batch * dims.heads {
        data.extend((0..dims.len * dims.dim).map(|at| sees(at / dims.dim, at % dims.dim)));
    }
    Element::Bool(dims, data)
}

fn bias(dims: Dims, of: impl Fn(usize, usize, usize) -> f32) -> Element {
    let mut data = Vec::new();
    for head in 0..dims.batch * dims.heads {
        data.extend((0..dims.len * dims.dim).map(|at| of(head, at / dims.dim, at % dims.dim)));
    }
    Element::Bias(dims, data, DType::F32)
}

/// Calls that cover the options; dense, to be made sparse.
fn problems() -> Vec<Problem> {
    use Alignment::{BottomRight, TopLeft};
    use DType::{Bf16, F16, F32};
    let mut all = Vec::new();
    let mut add = |p: Problem, edit: &dyn Fn(&mut Problem)| {
        let mut p = p;
        edit(&mut p);
        all.push(p);
    };
    let window = |left, right| Some(Window { left, right });
    add(Problem::new("plain", [1, 2, 2, 256, 256, 128, 128], F16), &|_| {});
    add(Problem::new("gqa nhd", [2, 4, 2, 300, 515, 64, 64], Bf16).nhd(), &|_| {});
    add(Problem::new("wide", [1, 2, 1, 200, 333, 256, 256], F16), &|_| {});
    add(Problem::new("192", [1, 2, 1, 200, 333, 192, 192], Bf16), &|_| {});
    add(Problem::new("small dims", [1, 2, 2, 130, 190, 8, 24], F16), &|_| {});
    add(Problem::new("72, v 40", [1, 3, 1, 257, 321, 72, 40], Bf16).nhd(), &|_| {});
    add(Problem::new("40, v 104", [1, 2, 1, 150, 321, 40, 104], F16), &|_| {});
    add(Problem::new("f32", [1, 2, 1, 300, 400, 96, 96], F32), &|_| {});
    add(Problem::new("f32 causal", [1, 2, 1, 300, 300, 128, 64], F32).nhd(), &|p| {
        p.causal = Some(TopLeft);
    });
    add(Problem::new("causal", [1, 4, 1, 777, 777, 128, 128], Bf16), &|p| p.causal = Some(TopLeft));
    add(Problem::new("bottom right", [1, 2, 1, 130, 1000, 64, 64], F16), &|p| {
        p.causal = Some(BottomRight);
    });
    add(Problem::new("more queries", [1, 2, 1, 500, 130, 128, 128], F16), &|p| {
        p.causal = Some(BottomRight);
    });
    add(Problem::new("top left short", [1, 2, 1, 500, 130, 64, 64], F16), &|p| {
        p.causal = Some(TopLeft);
    });
    add(Problem::new("one token", [1, 1, 1, 1, 1, 64, 64], F16), &|_| {});
    add(Problem::new("decoding", [2, 8, 2, 1, 1500, 128, 128], Bf16), &|p| {
        p.causal = Some(BottomRight);
    });
    add(Problem::new("window", [1, 2, 2, 700, 700, 64, 64], F16), &|p| {
        p.window = window(Some(90), Some(40));
    });
    add(Problem::new("causal window, sinks", [1, 2, 1, 800, 900, 128, 128], Bf16), &|p| {
        (p.causal, p.window, p.sink_blocks) = (Some(BottomRight), window(Some(200), None), 2);
    });
    add(Problem::new("window left only", [1, 2, 1, 300, 900, 64, 64], F16), &|p| {
        (p.window, p.sink_blocks) = (window(Some(64), None), 1);
    });
    add(Problem::new("key lengths", [4, 2, 1, 200, 400, 64, 64], F16), &|p| {
        p.lens = Lens::Keys(vec![400, 0, 1, 277]);
    });
    add(Problem::new("key lengths causal", [3, 2, 1, 200, 400, 96, 96], Bf16).nhd(), &|p| {
        (p.causal, p.lens) = (Some(BottomRight), Lens::Keys(vec![400, 90, 333]));
    });
    add(Problem::new("packed", [1, 4, 2, 700, 900, 64, 64], F16), &|p| {
        p.lens = Lens::Packed(vec![0, 130, 130, 131, 500, 700], vec![0, 300, 310, 310, 411, 900]);
    });
    add(Problem::new("packed causal", [1, 2, 1, 1100, 1100, 128, 128], Bf16).nhd(), &|p| {
        p.causal = Some(BottomRight);
        p.lens = Lens::Packed(vec![0, 400, 401, 1100], vec![0, 400, 401, 1100]);
    });
    add(Problem::new("bool mask", [2, 4, 2, 260, 300, 64, 64], F16), &|p| {
        // Row 5 sees nothing; whole blocks are out.
        let dims = Dims { batch: 1, heads: 1, len: 260, dim: 300 };
        let sees = |i: usize, j: usize| {
            i != 5 && !(i * 7 + j * 3).is_multiple_of(5) && !(i < 128 && j / 64 == 2)
        };
        p.element = Some(bool_mask(dims, sees));
    });
    add(Problem::new("bool mask, causal", [2, 2, 2, 300, 300, 128, 128], Bf16).nhd(), &|p| {
        p.causal = Some(TopLeft);
        let dims = Dims { batch: 2, heads: 2, len: 300, dim: 300 };
        p.element = Some(bool_mask(dims, |i, j| (i / 16 + j / 16) % 3 != 0));
    });
    add(Problem::new("bias", [2, 2, 1, 290, 330, 64, 64], F16), &|p| {
        let dims = Dims { batch: 1, heads: 2, len: 290, dim: 330 };
        p.element = Some(bias(dims, |head, i, j| match (i + j) % 17 {
            0 => f32::NEG_INFINITY,
            1 => f32::MIN,
            _ => -0.01 * (head + 1) as f32 * (i as f32 - j as f32).abs(),
        }));
    });
    add(Problem::new("bias: padded rows", [1, 2, 1, 200, 200, 64, 64], F16), &|p| {
        let dims = Dims { batch: 1, heads: 1, len: 200, dim: 200 };
        p.element = Some(bias(dims, |_, i, j| if i > 150 || j > 170 { f32::MIN } else { 0.0 }));
    });
    add(Problem::new("block mask", [2, 4, 2, 500, 700, 64, 64], F16), &|p| {
        let mut mask = BlockMask::empty([1, 4, 4, 11]).expect("small");
        for at in (0..4 * 4 * 11).filter(|at| at % 3 != 0 && at / 11 != 6) {
            mask.set(0, at / 44, at / 11 % 4, at % 11);
        }
        p.block_mask = Some(mask);
    });
    add(Problem::new("scale", [1, 2, 1, 300, 300, 64, 64], F16), &|p| p.scale = Some(-0.21));
    add(Problem::new("zero scale", [1, 1, 1, 200, 200, 64, 64], F16), &|p| p.scale = Some(0.0));
    all
}

#[test]
fn dense_calls_match_the_reference() {
    let Some(gpu) = gpu() else { return };
    let mut failures = Vec::new();
    for mut p in problems() {
        let expected = p.expected(None);
        for cuda in [HALF, QUANTIZED] {
            p.cuda = cuda;
            let ran = p.run(&gpu);
            compare(&p, &ran, &expected, &mut failures);
            if ran.bits != p.run(&gpu).bits {
                failures.push(format!("{}: two runs differ", p.name));
            }
        }
    }
    report(&failures);
}

/// Masks: those of the reference, but for rows where rounding decides; outputs under that mask.
#[test]
fn sparse_calls_match_the_reference() {
    let Some(gpu) = gpu() else { return };
    let mut failures = Vec::new();
    let (mut rows, mut close) = (0, 0);
    let odd = Pooling { q_rows: 32, kv_rows: 8, second_order: true, sampled_rows: 0 };
    let sampled = Pooling { sampled_rows: 40, ..Pooling::BLOCK };
    let fine = Pooling { q_rows: 1, kv_rows: 64, second_order: false, sampled_rows: 0 };
    let coarse = Pooling { q_rows: 128, kv_rows: 1, second_order: false, sampled_rows: 0 };
    let settings = [
        (Selection::TopCdf(0.9), Pooling::SECOND_ORDER, 0.0),
        (Selection::TopK(0.3), Pooling::BLOCK, 0.0),
        (Selection::Union { cdf: 0.5, top_k: 0.25 }, odd, 0.0),
        (Selection::TopCdf(0.6), Pooling::SUB_BLOCK, 0.3),
        (Selection::TopK(0.4), fine, 0.0),
        (Selection::TopCdf(0.7), coarse, 0.5),
        (Selection::Auto, Pooling::SECOND_ORDER, 0.2),
        (Selection::TopCdf(0.8), Pooling::MIXED, 0.0),
        (Selection::TopK(0.3), sampled, 0.3),
    ];
    for (i, mut p) in problems().into_iter().enumerate() {
        for (n, (selection, pooling, theta)) in settings.into_iter().enumerate() {
            p.config = SpargeConfig {
                selection: selection.into(),
                pooling,
                theta: theta.into(),
                lambda: f64::INFINITY.into(),
                // Without local blocks short causal rows have more to choose from.
                keep_local: 2 * ((i + n) % 2),
                ..SpargeConfig::default()
            };
            p.cuda = if (i + n) % 3 == 0 { QUANTIZED } else { HALF };
            let ran = p.run(&gpu);
            let mask = ran.mask.as_ref().expect("predicts");
            let [q, k, _] = p.views();
            let plan = p.plan();
            let cpu = sparge::predict(&plan, &q, &k).expect("valid");
            let predicted = reference::predict(&plan, &q, &k, &reference::Rules::OURS);
            let [_, heads, q_blocks, _] = mask.shape();
            for (row, &margin) in predicted.margin.iter().enumerate() {
                let of = |mask: &BlockMask| {
                    let at = (row / q_blocks / heads, row / q_blocks % heads, row % q_blocks);
                    mask.row(at.0, at.1, at.2).collect::<Vec<_>>()
                };
                let (a, b) = (of(mask), of(&predicted.mask));
                rows += 1;
                if a != b {
                    close += 1;
                    // (On rows whose biases are out of range the CPU and the reference differ.)
                    if margin > 2e-5 && a != of(&cpu) {
                        failures.push(format!(
                            "{} {selection:?} {pooling:?} θ {theta}: row {row}, margin {margin:.2e}: {a:?} for {b:?}",
                            p.name
                        ));
                    }
                }
            }
            // Two of the settings, to save time.
            if n < 2 {
                compare(&p, &ran, &p.expected(Some(mask)), &mut failures);
            }
        }
    }
    println!("{rows} rows of masks, {close} differ where rounding decides");
    report(&failures);
}

/// Budgets, judge and λ of each head on its own; the CPU's statistics.
#[test]
fn heads_have_their_own_settings_and_statistics() {
    let Some(gpu) = gpu() else { return };
    let mut failures = Vec::new();
    let mut p = Problem::new("per head", [2, 4, 2, 1200, 1500, 64, 64], DType::F16);

    p.config = SpargeConfig {
        selection: sparge::PerHead::Heads(vec![
            Selection::Auto,
            Selection::All,
            Selection::TopK(0.25),
            Selection::TopCdf(0.8),
        ]),
        theta: sparge::PerHead::Heads(vec![0.0, 0.0, 0.4, 0.0]),
        lambda: sparge::PerHead::Heads(vec![6.0, 2.0, f64::INFINITY, 3.0]),
        ..SpargeConfig::default()
    };
    p.cuda = HALF;
    let ran = p.run(&gpu);
    let mask = ran.mask.as_ref().expect("predicts");
    let plan = p.plan();
    let [q, k, v] = p.views();
    let mut out = vec![0f32; ran.o.len()];
    let side = sparge::attend(&plan, &q, &k, &v, Some(mask), &mut out).expect("valid");
    let expected: Vec<f64> = out.iter().map(|&x| f64::from(x)).collect();
    let error = common::relative_l1(&ran.o, &expected);
    println!("per head: relative L1 {error:.5} of the CPU under the same mask");
    assert!(error < 0.004, "{error}");
    for (i, (stats, cpu)) in ran.stats.chunks(4).zip(side.stats.heads()).enumerate() {
        let [reachable, qk, groups, pv] = [stats[0], stats[1], stats[2], stats[3]];
        println!("head {i}: {stats:?}, CPU {cpu:?}");
        let exact =
            (reachable, qk, groups) == (cpu.reachable_blocks, cpu.qk_blocks, cpu.reachable_groups);
        // Scores on the edge of λ may fall to either side.
        if !exact || pv.abs_diff(cpu.pv_groups) * 200 > cpu.pv_groups {
            failures.push(format!("head {i}: {stats:?}, CPU {cpu:?}"));
        }
    }
    report(&failures);
}

/// Counts of what is reachable under masks, and of what is kept.
#[test]
fn statistics_count_what_is_reachable() {
    let Some(gpu) = gpu() else { return };
    let mut failures = Vec::new();
    for mut p in problems() {
        p.cuda = HALF;
        let ran = p.run(&gpu);
        let [q, k, v] = p.views();
        let mut out = vec![0f32; ran.o.len()];
        let side = sparge::attend(&p.plan(), &q, &k, &v, None, &mut out).expect("valid");
        for (i, (stats, cpu)) in ran.stats.chunks(4).zip(side.stats.heads()).enumerate() {
            // The CPU counts groups by strips of 64 rows.
            let groups = stats[2] <= cpu.reachable_groups && stats[3] == stats[2];
            if (stats[0], stats[1]) != (cpu.reachable_blocks, cpu.qk_blocks) || !groups {
                failures.push(format!("{} head {i}: {stats:?}, CPU {cpu:?}", p.name));
            }
        }
    }
    report(&failures);
}

/// Later tokens change nothing: not a bit, in half precision.
#[test]
fn causal_rows_do_not_see_the_future() {
    let Some(gpu) = gpu() else { return };
    let (len, dim, from) = (1300, 64, 700);
    let mut p = Problem::new("causal", [1, 2, 1, len, len, dim, dim], DType::Bf16);
    (p.causal, p.cuda) = (Some(Alignment::TopLeft), HALF);
    for (config, until) in
        [(SpargeConfig::dense(), from), (SpargeConfig::default(), from / 128 * 128)]
    {
        p.config = config;
        let a = p.run(&gpu);
        let mut other = p.clone();
        for x in [&mut other.k, &mut other.v] {
            x[from * dim..].iter_mut().for_each(|x| *x = common::rounded(1.0 - 3.0 * *x, p.dtype));
        }
        let b = other.run(&gpu);
        for head in 0..2 {
            let start = head * len * dim;
            assert_eq!(a.o[start..start + until * dim], b.o[start..start + until * dim]);
            assert_ne!(a.o[start + from * dim..], b.o[start + from * dim..]);
        }
    }
}

/// What is not finite reaches exactly the rows that see it.
#[test]
fn what_is_not_finite_stays_where_it_belongs() {
    let Some(gpu) = gpu() else { return };
    let mut failures = Vec::new();
    for (causal, masked) in [(Some(Alignment::TopLeft), false), (None, true)] {
        for dim in [64, 128, 256] {
            let mut p = Problem::new("not finite", [1, 2, 1, 300, 300, dim, dim], DType::Bf16);
            p.causal = causal;
            if masked {
                let dims = Dims { batch: 1, heads: 1, len: 300, dim: 300 };
                p.element = Some(bool_mask(dims, |i, j| (i + j) % 4 != 0));
            }
            for (which, value) in [
                (0, f32::NAN),
                (1, f32::NAN),
                (2, f32::NAN),
                (2, f32::INFINITY),
                (1, f32::INFINITY),
            ] {
                let mut clean = p.clone();
                let p = &mut clean;
                let x = [&mut p.q, &mut p.k, &mut p.v].into_iter().nth(which).expect("three");
                x[201 * dim + 5] = value;
                for cuda in [HALF, QUANTIZED] {
                    p.cuda = cuda;
                    p.name = format!("{value} in {which}, dim {dim}, masked {masked}");
                    let (ran, mut expected) = (p.run(&gpu), p.expected(None));
                    // int8 has no infinity: such a key is NaN to every row that sees it, as a NaN is.
                    if which == 1 && value == f32::INFINITY && cuda == QUANTIZED && dim <= 128 {
                        p.k[201 * dim + 5] = f32::NAN;
                        expected = p.expected(None);
                    }
                    let wrong = ran
                        .o
                        .iter()
                        .zip(&expected.o)
                        .filter(|(a, b)| a.is_finite() != b.is_finite())
                        .count();
                    if wrong > 0 {
                        failures.push(format!("{} {cuda:?}: {wrong} elements", p.name));
                    }
                }
            }
        }
    }
    report(&failures);
}

/// int8 keys and queries are the numbers of the plain definition.
#[test]
fn int8_values_are_exact() {
    let Some(gpu) = gpu() else { return };
    let (heads, len, dim) = (2, 333, 72);
    let mut p = Problem::new("int8", [1, heads, heads, len, len, dim, dim], DType::F16);
    p.cuda = QUANTIZED;
    let ran = p.run(&gpu);
    let attention = p.attention(&gpu);
    let offsets = attention.int8_offsets().expect("quantised on the general path");
    let padded = offsets.padded_dim;
    let byte = |at: usize| ran.workspace[at] as i8;
    let float =
        |at: usize| f32::from_le_bytes(ran.workspace[at..at + 4].try_into().expect("four bytes"));
    for head in 0..heads {
        let row = |x: &[f32], i: usize| x[(head * len + i) * dim..][..dim].to_vec();
        let mean: Vec<f32> =
            (0..dim).map(|c| float(offsets.k_mean + (head * dim + c) * 4)).collect();
        for (c, &mean) in mean.iter().enumerate() {
            let exact = (0..len).map(|i| f64::from(row(&p.k, i)[c])).sum::<f64>() / len as f64;
            assert!((f64::from(mean) - exact).abs() < 1e-6 * (1.0 + exact.abs()), "{mean} {exact}");
        }
        for i in 0..len {
            let q = row(&p.q, i);
            let k: Vec<f32> = row(&p.k, i).iter().zip(&mean).map(|(x, m)| x - m).collect();
            let q_row = (head * len.div_ceil(128) * 128 + i) * padded + offsets.q8;
            let k_row = (head * len.div_ceil(BLOCK_KV) * BLOCK_KV + i) * padded + offsets.k8;
            for (x, at) in [(&q, q_row), (&k, k_row)] {
                let inverse = 127.0 / x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                for (c, x) in x.iter().enumerate() {
                    assert_eq!(
                        byte(at + c),
                        (x * inverse).round_ties_even() as i8,
                        "{head} {i} {c}"
                    );
                }
                assert!((dim..padded).all(|c| byte(at + c) == 0));
            }
        }
    }
}

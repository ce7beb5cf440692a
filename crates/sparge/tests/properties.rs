//! The operator against its reference, over everything that combines.

mod common;

use common::{Case, Data, case, magnitudes};
use half::{bf16, f16};
use proptest::prelude::*;
use sparge::testing::{close, tolerance};
use sparge::{reference::Rules, *};

fn run<T: Element>(case: &Case, data: &Data<T>, config: &SpargeConfig) -> AttentionOutput<T> {
    let (q, k, v) = case.views(data);
    attention(&q, &k, &v, &case.options(data), config).expect("a valid call")
}

/// Output and LSE against the reference under the mask that was used.
fn agrees<T: Element>(
    case: &Case,
    config: &SpargeConfig,
) -> std::result::Result<(), TestCaseError> {
    let data = case.data::<T>();
    let (q, k, v) = case.views(&data);
    let options = case.options(&data);
    let out = run(case, &data, config);
    let plan = Plan::new(case.shape, &options, config).expect("a valid plan");
    let expected = reference::attend(&plan, &q, &k, &v, out.block_mask.as_ref());
    let (s_max, v_max) = magnitudes(case, &data);
    // int8: half a step of 1/127 on each of q and k (whose mean is taken out) moves a score by at
    // most this, and a softmax weight by twice that.
    let rounding = if config.qk == QkPrecision::Int8 { 2.0 * s_max / 127.0 } else { 0.0 };
    let quantised = (2.0 * v_max).min(v_max * (2.0 * rounding).exp_m1());
    let tolerance = tolerance::<T>(v_max, s_max) + quantised;
    close(&out.o, &expected.o, tolerance).map_err(TestCaseError::fail)?;
    let lse = out.lse.expect("asked for");
    for (i, (&got, &expected)) in lse.iter().zip(&expected.lse).enumerate() {
        let same = if expected.is_finite() {
            (f64::from(got) - expected).abs() < 1e-5 * (1.0 + s_max) + rounding
        } else {
            f64::from(got) == expected
        };
        prop_assert!(same, "lse {i}: {got}, reference {expected}");
    }
    Ok(())
}

proptest! {
    #[test]
    fn keep_all_equals_dense_reference(case in case()) {
        let config = SpargeConfig { isa: case.isa, ..SpargeConfig::dense() };
        agrees::<f32>(&case, &config)?;
        let data = case.data::<f32>();
        let out = run(&case, &data, &config);
        prop_assert_eq!(out.stats.qk_sparsity(), 0.0);
        prop_assert_eq!(out.stats.pv_sparsity(), 0.0);
    }

    #[test]
    fn sparse_equals_reference_under_its_mask(case in case()) {
        agrees::<f32>(&case, &case.config())?;
    }

    #[test]
    fn half_types_equal_reference(case in case()) {
        agrees::<f16>(&case, &case.config())?;
        agrees::<bf16>(&case, &case.config())?;
    }

    #[test]
    fn mask_equals_reference_mask(case in case()) {
        let data = case.data::<f32>();
        let (q, k, _) = case.views(&data);
        let options = case.options(&data);
        let plan = Plan::new(case.shape, &options, &case.config()).expect("a valid plan");
        let got = predict(&plan, &q, &k).expect("a valid call");
        let expected = reference::predict(&plan, &q, &k, &Rules::OURS);
        let [s, h, b, _] = got.shape();
        // A row may differ only where the f64 decision was within f32 rounding of falling the
        // other way; those are ties, and they must be rare.
        let (s_max, _) = magnitudes(&case, &data);
        let tie = 1e-6 * (4.0 + s_max);
        let mut ties = 0;
        for row in 0..s * h * b {
            let at = (row / b / h, row / b % h, row % b);
            let same = got.row(at.0, at.1, at.2).eq(expected.mask.row(at.0, at.1, at.2));
            if !same {
                prop_assert!(expected.margin[row] < tie, "row {at:?}: margin {}", expected.margin[row]);
                ties += 1;
            }
        }
        prop_assert!(ties * 4 <= s * h * b + 3, "{ties} ties in {} rows", s * h * b);
    }

    #[test]
    fn every_kernel_agrees_with_scalar(case in case()) {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            agrees::<f32>(&Case { isa: Some(isa), ..case.clone() }, &SpargeConfig { isa: Some(isa), ..case.config() })?;
        }
    }

    #[test]
    fn stage_two_drops_only_small_numerators(case in case(), lambda in 0.5f64..12.0) {
        let data = case.data::<f32>();
        let config = SpargeConfig { lambda: lambda.into(), ..case.config() };
        let full = run(&case, &data, &case.config());
        let out = run(&case, &data, &config);
        // The denominator is untouched, and with it the LSE.
        prop_assert_eq!(&out.lse, &full.lse);
        prop_assert!(out.stats.pv_sparsity() >= full.stats.pv_sparsity());
        let (_, v_max) = magnitudes(&case, &data);
        let bound = case.shape.kv_len as f64 * (-lambda).exp() * v_max + 1e-4;
        for (a, b) in out.o.iter().zip(&full.o) {
            prop_assert!(f64::from((a - b).abs()) <= bound);
        }
    }

    #[test]
    fn the_future_changes_nothing(case in case(), cut in 0.0f64..1.0) {
        let case = Case { causal: case.causal.or(Some(Alignment::BottomRight)), ragged: common::Ragged::No, ..case };
        let case = Case { window: case.window.map(|w| Window { right: None, ..w }), ..case };
        let s = case.shape;
        let offset = match case.causal {
            Some(Alignment::TopLeft) => 0,
            _ => s.kv_len as isize - s.qo_len as isize,
        };
        // Everything from key `first` on changes, and every query block that begins there or later:
        // a block's selection is made from all of its own queries and its diagonal.
        let block = (cut * s.qo_len.div_ceil(BLOCK_Q) as f64) as usize;
        let row = (block * BLOCK_Q).min(s.qo_len);
        let first = (row as isize + offset).clamp(0, s.kv_len as isize) as usize;
        let data = case.data::<f32>();
        let mut changed = case.data::<f32>();
        let touch = |x: &mut [f32], heads: usize, len: usize, dim: usize, from: usize| {
            let dims = Dims { batch: s.batch, heads, len, dim: dim + case.gap };
            let st = Strides::contiguous(dims, case.layout);
            for b in 0..s.batch { for h in 0..heads { for t in from..len { for d in 0..dim {
                let x = &mut x[b * st.batch + h * st.head + t * st.token + d];
                *x = if (t + d) % 7 == 0 { f32::NAN } else { -3.0 * *x + 1.0 };
            }}}}
        };
        touch(&mut changed.q, s.num_qo_heads, s.qo_len, s.head_dim, row);
        touch(&mut changed.k, s.num_kv_heads, s.kv_len, s.head_dim, first);
        touch(&mut changed.v, s.num_kv_heads, s.kv_len, s.head_dim_v, first);
        let config = SpargeConfig { lambda: 6.0.into(), ..case.config() };
        same_rows(&case, &run(&case, &data, &config), &run(&case, &changed, &config), 0..row)?;

        // With every block kept, that holds for single tokens.
        let token = (cut * s.qo_len as f64) as usize;
        let first = (token as isize + offset).clamp(0, s.kv_len as isize) as usize;
        let mut changed = case.data::<f32>();
        touch(&mut changed.q, s.num_qo_heads, s.qo_len, s.head_dim, token);
        touch(&mut changed.k, s.num_kv_heads, s.kv_len, s.head_dim, first);
        touch(&mut changed.v, s.num_kv_heads, s.kv_len, s.head_dim_v, first);
        let config = SpargeConfig { isa: case.isa, ..SpargeConfig::dense() };
        same_rows(&case, &run(&case, &data, &config), &run(&case, &changed, &config), 0..token)?;
    }

    #[test]
    fn rows_with_nan_or_inf_stay_alone(case in case(), pick in any::<u64>(), value in prop_oneof![Just(f32::NAN), Just(f32::INFINITY), Just(f32::NEG_INFINITY), Just(3e38f32)]) {
        let mut data = case.data::<f32>();
        let at = pick as usize;
        for x in [&mut data.q, &mut data.k, &mut data.v] {
            let at = at % x.len();
            x[at] = value;
        }
        let config = SpargeConfig { isa: case.isa, ..SpargeConfig::dense() };
        let (q, k, v) = case.views(&data);
        let options = case.options(&data);
        for config in [config, case.config()] {
            let out = run(&case, &data, &config);
            let plan = Plan::new(case.shape, &options, &config).expect("a valid plan");
            let expected = reference::attend(&plan, &q, &k, &v, out.block_mask.as_ref());
            // Scores and outputs near 3e38 overflow in f32 and not in f64: only rows whose reference
            // is of ordinary size are compared by value.
            let (_, v_max) = magnitudes(&case, &case.data::<f32>());
            for (i, (&got, &r)) in out.o.iter().zip(&expected.o).enumerate() {
                if r.is_nan() {
                    prop_assert!(!got.is_finite(), "element {i}: {got}, reference {r}");
                } else if !got.is_finite() || r.abs() > 2.0 * v_max {
                    // Infinite only where the reference is huge or infinite too.
                    let row = i / case.shape.head_dim_v * case.shape.head_dim_v;
                    let touched = expected.o[row..row + case.shape.head_dim_v].iter().any(|x| !x.is_finite() || x.abs() > 1e30)
                        || value == 3e38
                        // Every score is −∞: the operator calls the row empty, but 0·∞ may stand.
                        || expected.lse[lse_index(&case, i)].is_infinite();
                    prop_assert!(touched, "element {i}: {got}, reference {r}");
                }
            }
        }
    }

    #[test]
    fn batch_and_heads_are_independent(case in case()) {
        let shape = AttentionShape { batch: 2, num_qo_heads: 2, num_kv_heads: 2, ..case.shape };
        let case = Case { shape, masks: common::Masks::None, ragged: common::Ragged::No, gap: 0, layout: Layout::Hnd, ..case };
        let data = case.data::<f32>();
        let swap = |x: &[f32]| -> Vec<f32> {
            // Reverses [batch, head] together: exchanges both batch entries and both heads.
            let part = x.len() / 4;
            x.chunks(part).rev().flatten().copied().collect()
        };
        let mut swapped = case.data::<f32>();
        swapped.q = swap(&data.q);
        swapped.k = swap(&data.k);
        swapped.v = swap(&data.v);
        let (a, b) = (run(&case, &data, &case.config()), run(&case, &swapped, &case.config()));
        prop_assert_eq!(swap(&a.o), b.o);
        prop_assert_eq!(swap(&a.lse.expect("asked")), b.lse.expect("asked"));
    }

    #[test]
    fn threads_layouts_and_strides_change_nothing(case in case()) {
        let data = case.data::<f32>();
        let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a pool");
        let three = rayon::ThreadPoolBuilder::new().num_threads(3).build().expect("a pool");
        let a = one.install(|| run(&case, &data, &case.config()));
        let b = three.install(|| run(&case, &data, &case.config()));
        prop_assert_eq!(&a.o, &b.o);
        prop_assert_eq!(&a.lse, &b.lse);
        prop_assert_eq!(&a.block_mask, &b.block_mask);

        // The same tensors, contiguous in the other layout.
        let s = case.shape;
        let other = match case.layout { Layout::Hnd => Layout::Nhd, Layout::Nhd => Layout::Hnd };
        let repack = |x: TensorView<'_, f32>| {
            let d = x.dims();
            let st = Strides::contiguous(d, other);
            let mut out = vec![0.0; d.batch * d.heads * d.len * d.dim];
            for b in 0..d.batch { for h in 0..d.heads { for t in 0..d.len {
                out[b * st.batch + h * st.head + t * st.token..][..d.dim].copy_from_slice(x.row(b, h, t));
            }}}
            out
        };
        let (q, k, v) = case.views(&data);
        let (q2, k2, v2) = (repack(q), repack(k), repack(v));
        let options = AttentionOptions { layout: Layout::Hnd, ..case.options(&data) };
        let view = |x, d| TensorView::contiguous(x, d, other).expect("fits");
        let c = attention(&view(&q2, q.dims()), &view(&k2, k.dims()), &view(&v2, v.dims()), &options, &case.config()).expect("valid");
        let dims = Dims { dim: s.head_dim_v, ..q.dims() };
        let a = TensorView::contiguous(&a.o, dims, case.layout).expect("fits");
        let c = TensorView::hnd(&c.o, [dims.batch, dims.heads, dims.len, dims.dim]).expect("fits");
        for b in 0..dims.batch { for h in 0..dims.heads { for t in 0..dims.len {
            prop_assert_eq!(a.row(b, h, t), c.row(b, h, t));
        }}}
    }
}

/// Where the LSE of output element `i` lies.
fn lse_index(case: &Case, i: usize) -> usize {
    let s = &case.shape;
    let row = i / s.head_dim_v;
    match case.layout {
        Layout::Hnd => row,
        Layout::Nhd => {
            let (head, token) = (row % s.num_qo_heads, row / s.num_qo_heads % s.qo_len);
            (row / s.num_qo_heads / s.qo_len * s.num_qo_heads + head) * s.qo_len + token
        }
    }
}

fn same_rows(
    case: &Case,
    a: &AttentionOutput<f32>,
    b: &AttentionOutput<f32>,
    tokens: std::ops::Range<usize>,
) -> std::result::Result<(), TestCaseError> {
    let s = case.shape;
    let dims = Dims { batch: s.batch, heads: s.num_qo_heads, len: s.qo_len, dim: s.head_dim_v };
    let a = TensorView::contiguous(&a.o, dims, case.layout).expect("fits");
    let b = TensorView::contiguous(&b.o, dims, case.layout).expect("fits");
    for batch in 0..s.batch {
        for head in 0..s.num_qo_heads {
            for t in tokens.clone() {
                let (a, b) = (a.row(batch, head, t), b.row(batch, head, t));
                let same = a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
                prop_assert!(same, "row {t} of head {head} moved: {a:?} {b:?}");
            }
        }
    }
    Ok(())
}

//! Single behaviours with answers that can be seen by eye.

use sparge::testing::{Rng, structured};
use sparge::{reference::Rules, *};

fn view(x: &[f32], heads: usize, len: usize, dim: usize) -> TensorView<'_, f32> {
    TensorView::hnd(x, [1, heads, len, dim]).expect("fits")
}

#[test]
fn int8_is_close_and_the_same_on_every_instruction_set() {
    let (heads, len, dim) = (2, 1000, 64);
    let q = structured(1, heads, len, dim);
    let k = structured(2, heads, len, dim);
    let v = structured(3, heads, len, dim);
    let (q, k, v) =
        (view(&q, heads, len, dim), view(&k, heads, len, dim), view(&v, heads, len, dim));
    let exact =
        attention(&q, &k, &v, &AttentionOptions::default(), &SpargeConfig::dense()).unwrap();
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        let config =
            SpargeConfig { qk: QkPrecision::Int8, isa: Some(isa), ..SpargeConfig::dense() };
        let got = attention(&q, &k, &v, &AttentionOptions::default(), &config).unwrap();
        let error = metrics::compare(
            got.o.iter().map(|&x| f64::from(x)),
            exact.o.iter().map(|&x| f64::from(x)),
        );
        assert!(error.rel_l1 > 0.0, "{isa:?}: int8 did not run");
        assert!(error.rel_l1 < 0.012, "{isa:?}: {error:?}");
    }
}

#[test]
fn quantised_keys_reproduce_the_keys() {
    let (len, dim) = (150, 30);
    let k = structured(7, 1, len, dim);
    let shape = AttentionShape {
        batch: 1,
        num_qo_heads: 1,
        num_kv_heads: 1,
        qo_len: 5,
        kv_len: len,
        head_dim: dim,
        head_dim_v: 8,
    };
    let plan = Plan::new(shape, &AttentionOptions::default(), &SpargeConfig::default()).unwrap();
    let quantized = quantize(&plan, &view(&k, 1, len, dim)).unwrap();
    for token in 0..len {
        let (values, scale, mean) = quantized.key(0, 0, token);
        for d in 0..dim {
            let back = f32::from(values[d]) * scale + mean[d];
            assert!((back - k[token * dim + d]).abs() <= 0.51 * scale, "token {token}, {d}");
        }
    }
    assert!(quantize(&plan, &view(&k[..30], 1, 1, dim)).is_err());
}

/// Rows that point to one of four directions: attention goes to the key blocks of the same one.
fn directions(len: usize, block: usize, of: impl Fn(usize) -> usize) -> Vec<f32> {
    (0..len)
        .flat_map(|i| (0..4).map(move |d| (d, i)))
        .map(|(d, i)| if of(i / block) == d { 6.0 } else { 0.0 })
        .collect()
}

#[test]
fn selection_finds_the_blocks_that_matter() {
    // Query block i points where key blocks 2i and 2i + 1 do.
    let (len, dim) = (512, 4);
    let q = directions(len, BLOCK_Q, |i| i);
    let k = directions(len, BLOCK_KV, |j| j / 2);
    let (q, k) = (view(&q, 1, len, dim), view(&k, 1, len, dim));
    for pooling in [Pooling::BLOCK, Pooling::SUB_BLOCK, Pooling::SECOND_ORDER] {
        for selection in [Selection::TopCdf(0.9), Selection::TopK(0.25)] {
            let config = SpargeConfig {
                selection: selection.into(),
                pooling,
                keep_first: 0,
                ..SpargeConfig::default()
            };
            let options = AttentionOptions { return_mask: true, ..Default::default() };
            let out = attention(&q, &k, &k, &options, &config).unwrap();
            let mask = out.block_mask.unwrap();
            for i in 0..4 {
                assert_eq!(
                    mask.row(0, 0, i).collect::<Vec<_>>(),
                    [2 * i, 2 * i + 1],
                    "{pooling:?} {selection:?}"
                );
            }
            assert!((out.stats.qk_sparsity() - 0.75).abs() < 1e-12);
        }
    }
}

#[test]
fn stage_two_skips_what_the_reference_skips() {
    // After the first key block every score is 18 below the maximum: P·V is skipped from there on.
    let (len, dim) = (256, 4);
    let q = directions(len, 1024, |_| 0);
    let k = directions(len, BLOCK_KV, |j| if j == 0 { 0 } else { 1 });
    let v: Vec<f32> = (0..len * dim).map(|i| i as f32).collect();
    let (q, k, v) = (view(&q, 1, len, dim), view(&k, 1, len, dim), view(&v, 1, len, dim));
    for (lambda, sparsity) in [(17.9, 0.75), (18.1, 0.0)] {
        let config = SpargeConfig { lambda: lambda.into(), ..SpargeConfig::dense() };
        let options = AttentionOptions::default();
        let out = attention(&q, &k, &v, &options, &config).unwrap();
        assert_eq!(out.stats.pv_sparsity(), sparsity);
        assert_eq!(out.stats.qk_sparsity(), 0.0);
        let plan = Plan::new(AttentionShape::of(&q, &k, &v).unwrap(), &options, &config).unwrap();
        let expected = reference::sparge(&plan, &q, &k, &v, &Rules::OURS);
        sparge::testing::close(&out.o, &expected.o, 1e-3).unwrap();
    }
}

#[test]
fn the_judge_keeps_blocks_that_are_not_alike() {
    // Key block 2 is random in sign: its mean says nothing, so it is kept; without the judge not.
    let (len, dim) = (512, 4);
    let mut rng = Rng::new(5);
    let q = directions(len, 1024, |_| 0);
    let mut k = directions(len, BLOCK_KV, |j| usize::from(j != 0));
    for x in &mut k[2 * BLOCK_KV * dim..3 * BLOCK_KV * dim] {
        *x = 20.0 * rng.unit();
    }
    let (q, k) = (view(&q, 1, len, dim), view(&k, 1, len, dim));
    let kept = |theta: f64| {
        let config =
            SpargeConfig { theta: theta.into(), ..SpargeConfig::paper(Selection::TopCdf(0.9)) };
        let options = AttentionOptions { return_mask: true, ..Default::default() };
        let mask = attention(&q, &k, &k, &options, &config).unwrap().block_mask.unwrap();
        mask.row(0, 0, 0).collect::<Vec<_>>()
    };
    assert_eq!(kept(0.0), [0]);
    assert_eq!(kept(0.3), [0, 2]);
}

#[test]
fn zero_rows_and_equal_keys_are_harmless() {
    let (len, dim) = (300, 16);
    let zeros = vec![0.0; len * dim];
    let v: Vec<f32> = (0..len * dim).map(|i| (i % 7) as f32).collect();
    let (x, v) = (view(&zeros, 1, len, dim), view(&v, 1, len, dim));
    let config = SpargeConfig { theta: 0.5.into(), ..SpargeConfig::paper(Selection::TopK(0.5)) };
    let out = attention(&x, &x, &v, &AttentionOptions::default(), &config).unwrap();
    assert!(out.o.iter().all(|x| x.is_finite()));
}

#[test]
fn empty_rows_are_zero_with_minus_infinite_lse() {
    let (len, dim) = (200, 8);
    let x = structured(1, 1, len, dim);
    let x = view(&x, 1, len, dim);
    let mut mask = BlockMask::empty([1, 1, 2, 4]).unwrap();
    mask.set(0, 0, 1, 3);
    let options =
        AttentionOptions { block_mask: Some(&mask), return_lse: true, ..Default::default() };
    for config in [SpargeConfig::dense(), SpargeConfig::paper(Selection::TopK(0.5))] {
        let out = attention(&x, &x, &x, &options, &config).unwrap();
        let lse = out.lse.unwrap();
        assert!(out.o[..128 * dim].iter().all(|&x| x == 0.0));
        assert!(lse[..128].iter().all(|&x| x == f32::NEG_INFINITY));
        assert!(lse[128..].iter().all(|x| x.is_finite()));
        assert!(out.o[128 * dim..].iter().any(|&x| x != 0.0));
    }
}

#[test]
fn the_authors_causal_rules_let_the_future_in() {
    let (len, dim) = (512, 16);
    let q = structured(1, 1, len, dim);
    let k = structured(2, 1, len, dim);
    let (q, k) = (view(&q, 1, len, dim), view(&k, 1, len, dim));
    let options = AttentionOptions { causal: Some(Alignment::TopLeft), ..Default::default() };
    let config = SpargeConfig::paper(Selection::TopK(0.9));
    let plan = Plan::new(AttentionShape::of(&q, &k, &k).unwrap(), &options, &config).unwrap();
    let dense = reference::dense(&plan, &q, &k, &k);
    let error = |rules| {
        let got = reference::sparge(&plan, &q, &k, &k, &rules);
        metrics::compare(got.o, dense.o.iter().copied()).rel_l1
    };
    assert!(error(Rules::OURS) < 0.1, "{}", error(Rules::OURS));
    assert!(error(Rules::AUTHORS) > 0.3, "{}", error(Rules::AUTHORS));
}

#[test]
fn the_papers_and_the_authors_selections_differ_as_described() {
    let (len, dim) = (512, 4);
    let q = directions(len, BLOCK_Q, |i| i);
    let k = directions(len, BLOCK_KV, |j| j / 2);
    let (q, k) = (view(&q, 1, len, dim), view(&k, 1, len, dim));
    let config = SpargeConfig { keep_first: 0, ..SpargeConfig::paper(Selection::TopCdf(0.9)) };
    let plan =
        Plan::new(AttentionShape::of(&q, &k, &k).unwrap(), &AttentionOptions::default(), &config)
            .unwrap();
    let kept = |rules| reference::predict(&plan, &q, &k, &rules).mask.count();
    // Two blocks of half the mass each: the authors leave out the one that crosses τ.
    assert_eq!(kept(Rules::OURS), 8);
    assert_eq!(kept(Rules::PAPER), 8);
    assert_eq!(kept(Rules::AUTHORS), 4);
}

#[test]
fn default_runs_dense_below_the_crossover() {
    let config = SpargeConfig::default();
    for (len, predicts) in [(Selection::AUTO_MIN_LEN - 1, false), (Selection::AUTO_MIN_LEN, true)] {
        let x = structured(1, 1, len, 8);
        let x = view(&x, 1, len, 8);
        let out = attention(&x, &x, &x, &AttentionOptions::default(), &config).unwrap();
        assert_eq!(out.stats.predict.is_zero(), !predicts, "{len}");
        // An explicit setting means what it says at any length.
        let explicit = SpargeConfig { selection: Selection::TopK(0.5).into(), ..config.clone() };
        let out = attention(&x, &x, &x, &AttentionOptions::default(), &explicit).unwrap();
        assert!(out.stats.qk_sparsity() > 0.3, "{len}");
    }
    // What counts is how far a row reaches, not how long the sequence is.
    let x = structured(1, 1, 2 * Selection::AUTO_MIN_LEN, 8);
    let x = view(&x, 1, 2 * Selection::AUTO_MIN_LEN, 8);
    for (left, predicts) in [(Selection::AUTO_MIN_LEN - 2, false), (Selection::AUTO_MIN_LEN, true)]
    {
        let options = AttentionOptions {
            causal: Some(Alignment::TopLeft),
            window: Some(Window { left: Some(left), right: Some(0) }),
            ..Default::default()
        };
        let out = attention(&x, &x, &x, &options, &config).unwrap();
        assert_eq!(out.stats.predict.is_zero(), !predicts, "{left}");
    }
}

#[test]
fn errors_name_what_is_wrong() {
    let x = vec![0.0f32; 4096];
    let q = TensorView::hnd(&x, [1, 2, 16, 8]).unwrap();
    let run =
        |q: &TensorView<'_, f32>,
         k: &TensorView<'_, f32>,
         options: &AttentionOptions<'_>,
         config: &SpargeConfig| { attention(q, k, k, options, config).unwrap_err() };
    let default = (AttentionOptions::default(), SpargeConfig::default());
    let with = |shape| TensorView::hnd(&x, shape).unwrap();

    assert!(matches!(
        TensorView::hnd(&x[..9], [1, 1, 2, 5]),
        Err(Error::BufferTooShort { needed: 10, .. })
    ));
    assert!(matches!(TensorView::hnd(&x, [usize::MAX, 2, 2, 2]), Err(Error::Overflow { .. })));
    assert!(matches!(run(&q, &with([1, 3, 16, 8]), &default.0, &default.1), Error::Groups { .. }));
    assert!(matches!(
        run(&q, &with([2, 2, 16, 8]), &default.0, &default.1),
        Error::Mismatch { name: "batch", .. }
    ));
    assert!(matches!(
        run(&q, &with([1, 2, 16, 4]), &default.0, &default.1),
        Error::Mismatch { name: "head_dim", .. }
    ));
    assert!(matches!(
        run(&q, &with([1, 2, 0, 8]), &default.0, &default.1),
        Error::Dimension { name: "kv_len", .. }
    ));
    let wide = with([1, 1, 1, 257]);
    assert!(matches!(
        run(&wide, &wide, &default.0, &default.1),
        Error::Dimension { name: "head_dim", got: 257, .. }
    ));

    let set = |f: &dyn Fn(&mut SpargeConfig)| {
        let mut config = SpargeConfig::default();
        f(&mut config);
        run(&q, &q, &AttentionOptions::default(), &config)
    };
    assert!(matches!(
        set(&|c| c.selection = Selection::TopK(0.0).into()),
        Error::Setting { name: "top_k", .. }
    ));
    assert!(matches!(
        set(&|c| c.selection = Selection::TopCdf(f64::NAN).into()),
        Error::Setting { name: "cdf", .. }
    ));
    assert!(matches!(set(&|c| c.theta = 1.0.into()), Error::Setting { name: "theta", .. }));
    assert!(matches!(set(&|c| c.lambda = (-1.0).into()), Error::Setting { name: "lambda", .. }));
    assert!(matches!(
        set(&|c| c.pooling.q_rows = 48),
        Error::Setting { name: "pooling.q_rows", .. }
    ));
    assert!(matches!(
        set(&|c| c.theta = PerHead::Heads(vec![0.1])),
        Error::PerHead { name: "theta", got: 1, .. }
    ));
    if let Some(&isa) = Isa::ALL.iter().find(|isa| !isa.is_available()) {
        assert!(matches!(set(&|c| c.isa = Some(isa)), Error::Isa { .. }));
    }

    let opt = |options: AttentionOptions<'_>| run(&q, &q, &options, &SpargeConfig::default());
    assert!(matches!(
        opt(AttentionOptions { softmax_scale: Some(f64::INFINITY), ..Default::default() }),
        Error::Setting { name: "softmax_scale", .. }
    ));
    let window = Some(Window { left: None, right: Some(3) });
    assert!(matches!(
        opt(AttentionOptions { causal: Some(Alignment::TopLeft), window, ..Default::default() }),
        Error::Conflict { .. }
    ));
    let mask = BlockMask::empty([1, 1, 2, 1]).unwrap();
    assert!(matches!(
        opt(AttentionOptions { block_mask: Some(&mask), ..Default::default() }),
        Error::MaskShape { name: "block_mask", .. }
    ));
    let bools = [true; 16];
    let bools = TensorView::hnd(&bools, [1, 1, 1, 16]).unwrap();
    assert!(matches!(
        opt(AttentionOptions {
            element_mask: Some(ElementMask::Bool(bools)),
            ..Default::default()
        }),
        Error::MaskShape { name: "attn_mask", .. }
    ));
    assert!(matches!(
        opt(AttentionOptions { lengths: Lengths::Keys(&[17]), ..Default::default() }),
        Error::Sequences { name: "kv_lens", .. }
    ));
    assert!(matches!(
        opt(AttentionOptions { lengths: Lengths::Keys(&[1, 1]), ..Default::default() }),
        Error::Sequences { name: "kv_lens", .. }
    ));
    for cu in [&[0usize, 17][..], &[0, 9, 4, 16], &[1, 16], &[16], &[]] {
        let lengths = Lengths::Packed { cu_seqlens_q: cu, cu_seqlens_k: &[0, 16] };
        assert!(matches!(
            opt(AttentionOptions { lengths, ..Default::default() }),
            Error::Sequences { name: "cu_seqlens_q", .. }
        ));
    }
    let bad = Csr { shape: [1, 1, 1, 4], indptr: vec![0, 2], indices: vec![3, 1] };
    assert!(matches!(bad.to_mask(), Err(Error::Csr(_))));
}

#[test]
fn the_default_is_exact_below_the_crossover_also_under_a_sink() {
    // One key 6.5 nats above 999 equal ones: stage 2 at the default λ would drop over half of it.
    let (len, dim) = (1000, 4);
    let q = directions(len, 1024, |_| 0);
    let mut k = vec![0.0; len * dim];
    k[0] = 6.5 / 3.0;
    let v = structured(3, 1, len, dim);
    let (q, k, v) = (view(&q, 1, len, dim), view(&k, 1, len, dim), view(&v, 1, len, dim));
    let run = |config| attention(&q, &k, &v, &AttentionOptions::default(), &config).unwrap();
    assert_eq!(run(SpargeConfig::default()).o, run(SpargeConfig::dense()).o);
    // Packed, each sequence counts by itself.
    let cu = [0, 300, 1000];
    let lengths = Lengths::Packed { cu_seqlens_q: &cu, cu_seqlens_k: &cu };
    let options = AttentionOptions { lengths, ..AttentionOptions::default() };
    let packed = |config| attention(&q, &k, &v, &options, &config).unwrap();
    assert_eq!(packed(SpargeConfig::default()).o, packed(SpargeConfig::dense()).o);
}

#[test]
fn a_bias_of_f32_min_is_a_number_and_hides_nothing() {
    let (len, dim) = (256, 8);
    let x = structured(1, 1, len, dim);
    let x = view(&x, 1, len, dim);
    let all = vec![f32::MIN; len * len];
    let causal: Vec<f32> =
        (0..len * len).map(|i| if i % len <= i / len { 0.0 } else { f32::MIN }).collect();
    let run = |bias: &[f32], config: &SpargeConfig| {
        let element_mask =
            Some(ElementMask::Additive(TensorView::hnd(bias, [1, 1, len, len]).unwrap()));
        let options = AttentionOptions { element_mask, ..AttentionOptions::default() };
        attention(&x, &x, &x, &options, config).unwrap()
    };
    let mean: f32 = (0..len).map(|i| x.row(0, 0, i)[0]).sum::<f32>() / len as f32;
    let keep = |f| SpargeConfig {
        selection: Selection::TopK(f).into(),
        keep_first: 0,
        ..SpargeConfig::default()
    };
    for config in [SpargeConfig::dense(), keep(0.5)] {
        let o = run(&all, &config).o;
        assert!((o[0] - mean).abs() < 1e-4, "{} {mean}", o[0]);
    }
    // The first query block sees key blocks 0 and 1 only; half of four blocks are those two.
    let got = run(&causal, &keep(0.5)).o;
    let expected = run(&causal, &SpargeConfig::dense()).o;
    for (a, b) in got[..128 * dim].iter().zip(&expected) {
        assert!((a - b).abs() < 1e-5);
    }
}

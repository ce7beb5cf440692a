//! The compared methods on attention matrices whose right answer can be read off.
//!
//! A hot key has the direction every query looks in; a hot diagonal comes from codes that are nearly
//! orthogonal, so that query i finds the one key that carries its code.

use sparge::policy::{self, Policy};
use sparge::testing::{Rng, structured};
use sparge::*;

const CAUSAL: AttentionOptions<'static> = AttentionOptions {
    softmax_scale: None,
    causal: Some(Alignment::BottomRight),
    window: None,
    sink_blocks: 0,
    block_mask: None,
    element_mask: None,
    lengths: Lengths::Full,
    return_lse: false,
    return_mask: false,
    layout: Layout::Hnd,
};

fn policy(name: &str) -> Policy {
    name.parse().expect(name)
}

/// The mask of one head of `dim`.
fn one(q: &[f32], k: &[f32], dim: usize, options: &AttentionOptions<'_>, name: &str) -> BlockMask {
    let q = TensorView::hnd(q, [1, 1, q.len() / dim, dim]).expect("q");
    let k = TensorView::hnd(k, [1, 1, k.len() / dim, dim]).expect("k");
    policy::mask(&q, &k, options, &policy(name)).expect(name)
}

fn row(mask: &BlockMask, q_block: usize) -> Vec<usize> {
    mask.row(0, 0, q_block).collect()
}

/// Queries that look along the first of 8 directions; keys that lie there with `strength(j)`.
fn hot(len: usize, strength: impl Fn(usize) -> f32) -> [Vec<f32>; 2] {
    let along = |x: f32| [x, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
    [
        (0..len).flat_map(|_| along(1.0)).collect(),
        (0..len).flat_map(|j| along(strength(j))).collect(),
    ]
}

/// Query i has its score's maximum at key i − `offset`.
fn diagonal(len: usize, offset: usize) -> [Vec<f32>; 2] {
    let mut rng = Rng::new(5);
    let codes: Vec<f32> = (0..(len + offset) * 64).map(|_| rng.normal()).collect();
    [codes[..len * 64].iter().map(|x| 4.0 * x).collect(), codes[offset * 64..].to_vec()]
}

/// Blocks that hold a pair (i, j ≤ i) with `attended(i, j)`.
fn blocks_of(len: usize, attended: impl Fn(usize, usize) -> bool) -> BlockMask {
    let shape = [1, 1, len.div_ceil(128), len.div_ceil(64)];
    let mut mask = BlockMask::empty(shape).expect("small");
    for i in 0..len {
        (0..=i).filter(|&j| attended(i, j)).for_each(|j| mask.set(0, 0, i / 128, j / 64));
    }
    mask
}

#[test]
fn window_and_a_shape_keep_their_pairs() {
    for len in [1000, 1024] {
        let x = vec![0.0; len * 8];
        let window = one(&x, &x, 8, &CAUSAL, "window:200,sinks=4");
        assert_eq!(window, blocks_of(len, |i, j| i - j < 200 || j < 4));
        let shape = one(&x, &x, 8, &CAUSAL, "a-shape:init=130,local=65");
        assert_eq!(shape, blocks_of(len, |i, j| i - j < 65 || j < 130));
        assert_eq!(one(&x, &x, 8, &CAUSAL, "dense"), blocks_of(len, |_, _| true));
    }
    // Without a diagonal the window reaches both ways.
    let x = vec![0.0; 1024 * 8];
    let both = one(&x, &x, 8, &AttentionOptions::default(), "window:64,sinks=0");
    assert_eq!(row(&both, 4), [7, 8, 9, 10]);
}

#[test]
fn minference_finds_hot_columns() {
    let len = 2048;
    let [q, k] = hot(len, |j| if j == 700 || j == 1300 { 40.0 } else { 0.0 });
    let got = one(&q, &k, 8, &CAUSAL, "minference:v=32,s=50");
    let near_or_column = |i: usize, j: usize| i - j < 50 || j < 30 || j == 700 || j == 1300;
    assert_eq!(got, blocks_of(len, near_or_column));
    assert_eq!(row(&got, 15), [0, 10, 20, 29, 30, 31]);
}

#[test]
fn minference_finds_hot_diagonals() {
    let len = 2048;
    let [q, k] = diagonal(len, 777);
    // The 100 nearest diagonals come first, the hot one next; the first 30 columns are there anyway.
    let got = one(&q, &k, 64, &CAUSAL, "minference:v=30,s=101");
    assert_eq!(got, blocks_of(len, |i, j| i - j < 100 || i - j == 777 || j < 30));
}

#[test]
fn minference_defaults_keep_short_sequences_whole() {
    let [q, k] = hot(1500, |_| 0.0);
    assert_eq!(one(&q, &k, 8, &CAUSAL, "minference"), blocks_of(1500, |_, _| true));
}

#[test]
fn minference_with_earlier_keys_follows_the_aligned_diagonal() {
    // The last 512 queries of 2048: the same rows as in one piece.
    let [q, k] = diagonal(2048, 777);
    let whole = one(&q, &k, 64, &CAUSAL, "minference:v=30,s=101");
    let last = one(&q[1536 * 64..], &k, 64, &CAUSAL, "minference:v=30,s=101");
    for q_block in 0..4 {
        assert_eq!(row(&last, q_block), row(&whole, 12 + q_block));
    }
}

#[test]
fn block_sparse_takes_the_largest_means() {
    let [q, k] = hot(1024, |j| if j / 64 == 5 { 1.0 } else { -(j as f32) / 1e4 });
    let got = one(&q, &k, 8, &CAUSAL, "block-sparse:2");
    // Keys fall off with their position: the first two blocks, or the hot one and the first where
    // it can be seen. Row 2 holds the block of 64 queries before the hot keys and the one on them.
    assert_eq!(row(&got, 0), [0, 1]);
    assert_eq!(row(&got, 1), [0, 1]);
    assert_eq!(row(&got, 2), [0, 1, 5]);
    assert_eq!(row(&got, 3), [0, 5]);
    assert_eq!(row(&got, 7), [0, 5]);
}

#[test]
fn flexprefill_covers_gamma_of_the_columns() {
    // 128 keys each in wide blocks 3 and 4 hold 45% each, in block 5 together 10%: 95% take 321
    // columns, so 3 blocks: the first (always), 3 and 4.
    let len = 4096;
    let strength = |j: usize| match j / 128 {
        3 | 4 => 40.0,
        5 => 40.0 + 8f32.sqrt() * (0.1f32 / 0.45).ln(),
        _ => 0.0,
    };
    let [q, k] = hot(len, strength);
    let got = one(&q, &k, 8, &CAUSAL, "flexprefill:0.95,tau=0,min=128");
    let wide = |q_block: usize| -> Vec<usize> {
        let mut blocks: Vec<usize> = row(&got, q_block).iter().map(|j| j / 2).collect();
        blocks.dedup();
        blocks
    };
    for q_block in [6, 20, 31] {
        let blocks = wide(q_block);
        assert!([0, 3, 4, q_block].iter().all(|j| blocks.contains(j)), "{q_block}: {blocks:?}");
    }
    // The last queries see block 5 only where a kept diagonal crosses it.
    assert_eq!(got.get(0, 0, 10, 2 * 5), got.get(0, 0, 11, 2 * 6));
    // With a budget for every block nothing is left out.
    assert_eq!(
        one(&q, &k, 8, &CAUSAL, "flexprefill:0.95,tau=0,min=4095"),
        blocks_of(len, |_, _| true)
    );
}

#[test]
fn flexprefill_follows_a_diagonal() {
    // All attention 1280 = 10·128 keys back: its block diagonal, the main one and the first column.
    let len = 4096;
    let [q, k] = diagonal(len, 1280);
    let got = one(&q, &k, 64, &CAUSAL, "flexprefill:0.95,tau=0,min=256");
    for q_block in [15, 24, 31] {
        for j in [0, q_block, q_block - 10] {
            assert!(
                got.get(0, 0, q_block, 2 * j) && got.get(0, 0, q_block, 2 * j + 1),
                "{q_block}"
            );
        }
        // Two columns and two diagonals at most.
        assert!(row(&got, q_block).len() <= 8, "{:?}", row(&got, q_block));
    }
}

#[test]
fn flexprefill_maps_query_aware_heads() {
    // Flat attention: the pooled estimate is right, so the head is query-aware. Every row of the
    // map is flat too, so entries are taken from the short rows on until half the rows are full.
    let len = 2048;
    let x = vec![0.0; len * 8];
    let got = one(&x, &x, 8, &CAUSAL, "flexprefill:0.5,tau=0.1,min=128");
    for q_block in 0..7 {
        assert_eq!(row(&got, q_block), (0..2 * q_block + 2).collect::<Vec<_>>());
    }
    for q_block in 9..16 {
        assert_eq!(row(&got, q_block), [0, 1, 2 * q_block, 2 * q_block + 1]);
    }
    // With τ = 0 it is not: the first column, the main diagonal, and half of the others.
    let never = one(&x, &x, 8, &CAUSAL, "flexprefill:0.5,tau=0,min=128");
    assert!(row(&never, 15).len() > 12);
}

#[test]
fn xattention_finds_a_hot_block() {
    let [q, k] = hot(2048, |j| if j / 128 == 3 { 40.0 } else { 0.0 });
    for name in ["xattention:0.9", "xattention:0.9,stride=16", "xattention:0.9,stride=64"] {
        let got = one(&q, &k, 8, &CAUSAL, name);
        for q_block in [4, 9, 15] {
            let expected = [0, 1, 6, 7, 2 * q_block, 2 * q_block + 1];
            assert_eq!(row(&got, q_block), expected, "{name}");
        }
    }
    // Flat attention at threshold 1 needs everything; without a diagonal nothing is forced.
    let [q, flat] = hot(2048, |_| 0.0);
    assert_eq!(one(&q, &flat, 8, &CAUSAL, "xattention:1"), blocks_of(2048, |_, _| true));
    let free = one(&q, &k, 8, &AttentionOptions::default(), "xattention:0.9");
    assert_eq!(row(&free, 12), [6, 7]);
}

#[test]
fn random_has_its_density() {
    let x = vec![0.0; 4096 * 8];
    let draw = |name: &str| one(&x, &x, 8, &CAUSAL, name);
    let got = draw("random:0.25");
    for q_block in 0..32 {
        let blocks = row(&got, q_block);
        let expected = ((2 * q_block + 2) as f64 * 0.25).ceil() as usize;
        let forced = if q_block == 0 { 2 } else { 3 };
        assert_eq!(blocks.len(), expected.max(forced));
        assert!([0, 2 * q_block, 2 * q_block + 1].iter().all(|j| blocks.contains(j)));
    }
    assert_eq!(got, draw("random:0.25,seed=0"));
    assert_ne!(got, draw("random:0.25,seed=1"));
    assert_ne!(row(&got, 30), row(&got, 31)[..row(&got, 30).len()]);
    // The last rows alone draw what they draw in the whole.
    let last = one(&x[1024 * 8..], &x, 8, &CAUSAL, "random:0.25");
    assert_eq!(row(&last, 20), row(&got, 28));
}

#[test]
fn random_forces_what_its_plan_keeps() {
    let x = vec![0.0; 4096 * 8];
    let view = TensorView::hnd(&x, [1, 1, 4096, 8]).expect("a view");
    let shape = AttentionShape::of(&view, &view, &view).expect("a shape");
    let config = SpargeConfig { keep_first: 2, keep_local: 4, ..SpargeConfig::dense() };
    let plan = Plan::new(shape, &CAUSAL, &config).expect("a plan");
    let got = policy::predict(&plan, &view, &view, &policy("random:0.01")).expect("a mask");
    assert_eq!(row(&got, 20), [0, 1, 36, 37, 38, 39, 40, 41]);
    assert_eq!(row(&one(&x, &x, 8, &CAUSAL, "random:0.01"), 20), [0, 40, 41]);
}

const ALL: [&str; 9] = [
    "dense",
    "window:300",
    "minference:v=40,s=150",
    "a-shape:init=64,local=128",
    "block-sparse:4",
    "flexprefill:0.9,tau=0.2,min=128",
    "xattention:0.7",
    "random:0.3",
    "oracle:0.6",
];

#[test]
fn heads_of_a_group_share_keys_but_choose_alone() {
    let (len, dim) = (1100, 16);
    let (q, k) = (structured(3, 4, len, dim), structured(4, 2, len, dim));
    let views = |q: &'static str| policy(q);
    for name in ALL.into_iter().filter(|name| !name.starts_with("random")) {
        let all = policy::mask(
            &TensorView::hnd(&q, [1, 4, len, dim]).expect("q"),
            &TensorView::hnd(&k, [1, 2, len, dim]).expect("k"),
            &CAUSAL,
            &views(name),
        )
        .expect(name);
        for head in 0..4 {
            let q = &q[head * len * dim..][..len * dim];
            let k = &k[head / 2 * len * dim..][..len * dim];
            let alone = one(q, k, dim, &CAUSAL, name);
            for q_block in 0..len.div_ceil(128) {
                let got: Vec<usize> = all.row(0, head, q_block).collect();
                assert_eq!(got, row(&alone, q_block), "{name}, head {head}, row {q_block}");
            }
        }
    }
}

#[test]
fn packed_sequences_choose_alone() {
    let (a, b, dim) = (700, 900, 16);
    let (q, k) = (structured(5, 1, a + b, dim), structured(6, 1, a + b, dim));
    let lens = [0, a, a + b];
    let packed = Lengths::Packed { cu_seqlens_q: &lens, cu_seqlens_k: &lens };
    let options = AttentionOptions { lengths: packed, ..CAUSAL };
    for name in ALL.into_iter().filter(|name| !name.starts_with("random")) {
        let both = one(&q, &k, dim, &options, name);
        let second = one(&q[a * dim..], &k[a * dim..], dim, &CAUSAL, name);
        for q_block in 0..b.div_ceil(128) {
            let got: Vec<usize> = both.row(1, 0, q_block).collect();
            assert_eq!(got, row(&second, q_block), "{name}, row {q_block}");
        }
    }
}

#[test]
fn the_operator_takes_the_mask() {
    let (len, dim) = (1100, 32);
    let [q, k, v] = [7, 8, 9].map(|seed| structured(seed, 2, len, dim));
    let view = |x| TensorView::hnd(x, [1, 2, len, dim]).expect("a view");
    let (q, k, v) = (view(&q), view(&k), view(&v));
    let shape = AttentionShape::of(&q, &k, &v).expect("a shape");
    let options = AttentionOptions { return_mask: true, ..CAUSAL };
    let plan = Plan::new(shape, &options, &SpargeConfig::dense()).expect("a plan");
    let of = policy::mask(&q, &k, &CAUSAL, &Policy::Dense).expect("dense").count() as f64;
    for name in ALL {
        let mask = policy::mask(&q, &k, &CAUSAL, &policy(name)).expect(name);
        let mut out = vec![0.0; 2 * len * dim];
        let side = policy::forward(&plan, &q, &k, &v, &policy(name), &mut out).expect(name);
        assert_eq!(side.block_mask.as_ref(), Some(&mask), "{name}");
        let sparsity = 1.0 - mask.count() as f64 / of;
        assert!((side.stats.qk_sparsity() - sparsity).abs() < 1e-12, "{name}");
        let through = AttentionOptions { block_mask: Some(&mask), ..CAUSAL };
        let same = attention(&q, &k, &v, &through, &SpargeConfig::dense()).expect(name);
        assert_eq!(same.o, out, "{name}");
    }
}

#[test]
fn what_has_no_meaning_is_refused() {
    let x = vec![0.0; 512 * 8];
    let view = TensorView::hnd(&x, [1, 1, 512, 8]).expect("a view");
    let ask = |options: &AttentionOptions<'_>, name: &str| {
        policy::mask(&view, &view, options, &policy(name)).map(|mask| mask.count())
    };
    for name in ["minference", "flexprefill"] {
        let refused = ask(&AttentionOptions::default(), name);
        assert!(matches!(refused, Err(Error::Conflict { .. })), "{name}: {refused:?}");
    }
    let allowed = vec![true; 512 * 512];
    let mask = TensorView::hnd(&allowed, [1, 1, 512, 512]).expect("a mask");
    let masked = AttentionOptions { element_mask: Some(ElementMask::Bool(mask)), ..CAUSAL };
    for name in ["minference", "flexprefill", "xattention", "block-sparse", "oracle"] {
        assert!(matches!(ask(&masked, name), Err(Error::Conflict { .. })), "{name}");
    }
    for name in ["dense", "window", "random", "a-shape"] {
        assert!(ask(&masked, name).is_ok(), "{name}");
    }
    for name in [
        "window:0",
        "random:0",
        "random:1.5",
        "random:nan",
        "a-shape:init=0,local=0",
        "block-sparse:0",
        "flexprefill:0",
        "flexprefill:0.9,tau=-1",
        "xattention:0",
        "xattention:0.9,stride=0",
        "xattention:0.9,stride=12",
        "xattention:0.9,stride=128",
        "oracle:0",
    ] {
        let refused = ask(&CAUSAL, name);
        let by_name = matches!(refused, Err(Error::Setting { .. } | Error::Dimension { .. }));
        assert!(by_name, "{name}: {refused:?}");
    }
    let huge = "minference:v=18446744073709551615,s=18446744073709551615";
    assert_eq!(ask(&CAUSAL, huge), ask(&CAUSAL, "dense"));
    let huge = "window:18446744073709551615,sinks=18446744073709551615";
    assert_eq!(ask(&CAUSAL, huge), ask(&CAUSAL, "dense"));
    assert_eq!(ask(&CAUSAL, "flexprefill:0.9,min=18446744073709551615"), ask(&CAUSAL, "dense"));
}

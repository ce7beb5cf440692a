//! Small calls with any sizes, options and values: the operator against its reference.
#![no_main]
use libfuzzer_sys::fuzz_target;
use sparge::testing::{close, tolerance};
use sparge::{
    Alignment, AttentionOptions, AttentionShape, Lengths, Plan, Pooling, Selection, SpargeConfig,
    TensorView, Window, attention, reference,
};

fuzz_target!(|data: &[u8]| {
    let [kind, m, n, d, dv, choose, left, fraction, values @ ..] = data else { return };
    if values.is_empty() {
        return;
    }
    let (qo_len, kv_len) = (usize::from(*m) + 1, usize::from(*n) + 1);
    let (dim, dim_v) = (usize::from(*d) % 20 + 1, usize::from(*dv) % 20 + 1);
    let (heads, kv_heads) = [(1, 1), (2, 1), (2, 2), (4, 2)][usize::from(kind % 4)];
    // Bytes as values in −4..4, repeated.
    let tensor = |len: usize, offset: usize| -> Vec<f32> {
        (0..len).map(|i| f32::from(values[(i + offset) % values.len()] as i8) / 32.0).collect()
    };
    let q = tensor(heads * qo_len * dim, 0);
    let k = tensor(kv_heads * kv_len * dim, 1);
    let v = tensor(kv_heads * kv_len * dim_v, 2);
    let view = |x, heads, len, dim| TensorView::hnd(x, [1, heads, len, dim]).expect("fits");
    let (q, k, v) = (
        view(&q, heads, qo_len, dim),
        view(&k, kv_heads, kv_len, dim),
        view(&v, kv_heads, kv_len, dim_v),
    );
    let lens = [usize::from(*left) % (kv_len + 1)];
    let options = AttentionOptions {
        causal: [None, Some(Alignment::TopLeft), Some(Alignment::BottomRight)]
            [usize::from(choose % 3)],
        window: (choose & 8 != 0)
            .then_some(Window { left: Some(usize::from(*left)), right: None }),
        sink_blocks: usize::from(choose >> 4 & 1),
        lengths: if choose & 32 != 0 { Lengths::Keys(&lens) } else { Lengths::Full },
        return_mask: true,
        ..AttentionOptions::default()
    };
    let share = (f64::from(*fraction) + 1.0) / 256.0;
    let config = SpargeConfig {
        selection: if choose & 64 == 0 { Selection::TopK(share) } else { Selection::TopCdf(share) }
            .into(),
        lambda: f64::INFINITY.into(),
        pooling: if choose & 128 == 0 { Pooling::MIXED } else { Pooling::BLOCK },
        ..SpargeConfig::default()
    };
    let out = attention(&q, &k, &v, &options, &config).expect("a valid call");
    let shape = AttentionShape::of(&q, &k, &v).expect("fits");
    let plan = Plan::new(shape, &options, &config).expect("a valid call");
    let expected = reference::attend(&plan, &q, &k, &v, out.block_mask.as_ref());
    let s_max = 16.0 * (dim as f64).sqrt() + 1.0;
    close(&out.o, &expected.o, tolerance::<f32>(4.0, s_max)).expect("the reference");
});

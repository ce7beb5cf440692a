//! Whole calls at the lengths where the operator is used. `cargo bench -p sparge`; with `-- --test`
//! every case runs once. `sparge bench` prints the same shapes beside PyTorch's times.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use sparge::testing::structured;
use sparge::{
    Alignment, AttentionOptions, Pooling, QkPrecision, Selection, SpargeConfig, TensorView,
    attention,
};
use std::hint::black_box;

struct Shape {
    name: &'static str,
    heads: usize,
    len: usize,
    dim: usize,
    causal: Option<Alignment>,
}

const SHAPES: [Shape; 2] = [
    Shape {
        name: "9x8192x64 causal",
        heads: 9,
        len: 8192,
        dim: 64,
        causal: Some(Alignment::TopLeft),
    },
    Shape { name: "8x4096x128", heads: 8, len: 4096, dim: 128, causal: None },
];

fn calls(c: &mut Criterion) {
    let keep = |f| SpargeConfig { selection: Selection::TopK(f).into(), ..SpargeConfig::default() };
    let configs = [
        ("dense", SpargeConfig::dense()),
        ("dense int8", SpargeConfig { qk: QkPrecision::Int8, ..SpargeConfig::dense() }),
        ("keep 0.5", keep(0.5)),
        ("keep 0.15", keep(0.15)),
        ("keep 0.15, one mean per block", SpargeConfig { pooling: Pooling::BLOCK, ..keep(0.15) }),
        ("default", SpargeConfig::default()),
    ];
    for shape in SHAPES {
        let Shape { name, heads, len, dim, causal } = shape;
        let x: Vec<_> = (1..4).map(|seed| structured(seed, heads, len, dim)).collect();
        let view = |i: usize| TensorView::hnd(&x[i], [1, heads, len, dim]).expect("fits");
        let options = AttentionOptions { causal, ..AttentionOptions::default() };
        let mut group = c.benchmark_group(name);
        let pairs = heads * len * len / if causal.is_some() { 2 } else { 1 };
        group.throughput(Throughput::Elements((4 * pairs * dim) as u64));
        group.sample_size(10);
        for (name, config) in &configs {
            group.bench_function(*name, |b| {
                b.iter(|| black_box(attention(&view(0), &view(1), &view(2), &options, config)));
            });
        }
        group.finish();
    }
}

criterion_group!(benches, calls);
criterion_main!(benches);

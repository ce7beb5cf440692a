//! temp
use sparge::*;
use std::time::Instant;
fn main() {
    let args: Vec<String> = std::env::args().collect();
    let (h, n, d, causal) = (args[1].parse::<usize>().unwrap(), args[2].parse::<usize>().unwrap(), args[3].parse::<usize>().unwrap(), args[4] == "causal");
    let mut x = 1u64;
    let mut gen_ = |len: usize| -> Vec<f32> { (0..len).map(|_| { x ^= x << 13; x ^= x >> 7; x ^= x << 17; (x >> 40) as f32 / (1 << 23) as f32 - 1.0 }).collect() };
    let (q, k, v) = (gen_(h * n * d), gen_(h * n * d), gen_(h * n * d));
    let shape = [1, h, n, d];
    let (q, k, v) = (TensorView::hnd(&q, shape).unwrap(), TensorView::hnd(&k, shape).unwrap(), TensorView::hnd(&v, shape).unwrap());
    let options = AttentionOptions { causal: causal.then_some(Alignment::TopLeft), ..Default::default() };
    let threads: usize = args[5].parse().unwrap();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
    for (name, cfg) in [("dense", SpargeConfig::dense()), ("half paper", SpargeConfig::paper(Selection::TopK(0.5))), ("half", SpargeConfig{selection: Selection::TopK(0.5).into(), ..Default::default()}), ("half2", SpargeConfig{selection: Selection::TopK(0.5).into(), pooling: Pooling::SECOND_ORDER, ..Default::default()}),("15%", SpargeConfig{selection: Selection::TopK(0.15).into(), ..Default::default()})] {
        let mut ts = vec![];
        let mut st = Stats::default();
        for _ in 0..3 { let t = Instant::now(); st = attention(&q, &k, &v, &options, &cfg).unwrap().stats; ts.push(t.elapsed().as_secs_f64()); }
        ts.sort_by(f64::total_cmp);
        let flop = 4.0 * h as f64 * n as f64 * n as f64 * d as f64 * if causal { 0.5 } else { 1.0 };
        println!("{name}: {:.3} s  {:.1} GFLOP/s dense-equivalent, predict {:.4}, sparsity {:.2} {:.2}", ts[1], flop / ts[1] / 1e9, st.predict.as_secs_f64(), st.qk_sparsity(), st.pv_sparsity());
    }
    });
}

//! Parity with the f64 reference and the CPU's selection, on a GPU. Skipped where there is none
//! (`SPARGE_REQUIRE_GPU=1` makes that a failure).
#![expect(unsafe_code, reason = "launches on raw device addresses")]
#![expect(clippy::print_stdout, reason = "errors are worth reading")]

mod common;

use common::{Gpu, Normal, gpu};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr};
use half::bf16;
use sparge::{
    Alignment, AttentionOptions, AttentionShape, BlockMask, Dims, Layout, Plan, Pooling, Selection,
    SpargeConfig, Strides, TensorView, reference,
};
use sparge_cuda::{Attention, DType, Device, Inputs, Output, Stream, Tensor};
use std::sync::Arc;

/// Shape and options of a case: batch, query heads, key heads, q_len, kv_len, dim.
#[derive(Debug, Clone, Copy)]
struct Case {
    sizes: [usize; 6],
    causal: Option<Alignment>,
    layout: Layout,
}

const fn case(sizes: [usize; 6], causal: Option<Alignment>, layout: Layout) -> Case {
    Case { sizes, causal, layout }
}

const CASES: [Case; 12] = [
    case([1, 2, 2, 256, 256, 128], None, Layout::Hnd),
    case([2, 4, 2, 300, 515, 64], None, Layout::Nhd),
    case([1, 4, 1, 777, 777, 128], Some(Alignment::TopLeft), Layout::Hnd),
    case([1, 2, 2, 777, 777, 64], Some(Alignment::TopLeft), Layout::Nhd),
    case([1, 2, 1, 130, 1000, 64], Some(Alignment::BottomRight), Layout::Hnd),
    case([1, 2, 1, 500, 130, 128], Some(Alignment::BottomRight), Layout::Hnd),
    case([1, 2, 1, 500, 130, 64], Some(Alignment::TopLeft), Layout::Hnd),
    case([1, 1, 1, 1, 1, 64], None, Layout::Hnd),
    case([1, 8, 2, 1, 1500, 128], Some(Alignment::BottomRight), Layout::Hnd),
    case([1, 1, 1, 129, 63, 128], None, Layout::Hnd),
    case([1, 2, 2, 1100, 1100, 128], Some(Alignment::BottomRight), Layout::Hnd),
    case([3, 3, 3, 128, 64, 128], None, Layout::Nhd),
];

/// Smooth along tokens (neighbours correlate), with a channel bias where asked.
fn smooth(dims: Dims, layout: Layout, seed: u64, bias: f32) -> Vec<bf16> {
    let mut rng = Normal(seed);
    let strides = Strides::contiguous(dims, layout);
    let mut out = vec![bf16::ZERO; dims.batch * dims.heads * dims.len * dims.dim];
    for b in 0..dims.batch {
        for h in 0..dims.heads {
            let centre: Vec<f32> = (0..dims.dim).map(|_| bias * rng.next()).collect();
            let mut x: Vec<f32> = (0..dims.dim).map(|_| rng.next()).collect();
            for t in 0..dims.len {
                for (d, x) in x.iter_mut().enumerate() {
                    *x = 0.9 * *x + 0.436 * rng.next();
                    let at = b * strides.batch + h * strides.head + t * strides.token + d;
                    out[at] = bf16::from_f32(*x + centre[d] + 0.3 * rng.next());
                }
            }
        }
    }
    out
}

/// Inputs of a case on the host.
#[derive(Clone)]
struct Host {
    case: Case,
    shape: AttentionShape,
    q: Vec<bf16>,
    k: Vec<bf16>,
    v: Vec<bf16>,
}

impl Host {
    fn new(case: Case, seed: u64) -> Self {
        let [batch, num_qo_heads, num_kv_heads, qo_len, kv_len, head_dim] = case.sizes;
        let shape = AttentionShape {
            batch,
            num_qo_heads,
            num_kv_heads,
            qo_len,
            kv_len,
            head_dim,
            head_dim_v: head_dim,
        };
        let (q, kv) = (Self::dims(&shape, true), Self::dims(&shape, false));
        Self {
            case,
            shape,
            q: smooth(q, case.layout, seed, 0.0),
            k: smooth(kv, case.layout, seed + 1, 2.0),
            v: smooth(kv, case.layout, seed + 2, 0.5),
        }
    }
    fn dims(shape: &AttentionShape, queries: bool) -> Dims {
        let (heads, len) = if queries {
            (shape.num_qo_heads, shape.qo_len)
        } else {
            (shape.num_kv_heads, shape.kv_len)
        };
        Dims { batch: shape.batch, heads, len, dim: shape.head_dim }
    }
    fn options(&self) -> AttentionOptions<'static> {
        AttentionOptions {
            causal: self.case.causal,
            layout: self.case.layout,
            ..Default::default()
        }
    }
    fn views(&self) -> [TensorView<'_, bf16>; 3] {
        let view = |data, queries| {
            TensorView::contiguous(data, Self::dims(&self.shape, queries), self.case.layout)
                .expect("sizes fit")
        };
        [view(&self.q, true), view(&self.k, false), view(&self.v, false)]
    }
}

/// What a call left behind.
struct Ran {
    o: Vec<f32>,
    lse: Vec<f32>,
    want_lse: bool,
    mask: Option<BlockMask>,
    bits: Vec<u16>,
}

fn address<T>(slice: &CudaSlice<T>, stream: &CudaStream) -> u64 {
    slice.device_ptr(stream).0
}

/// Runs a case from poisoned outputs and a poisoned workspace.
fn run(
    device: &Device,
    context: &Arc<CudaContext>,
    host: &Host,
    config: &SpargeConfig,
    want_lse: bool,
) -> Ran {
    let attention = Attention::new(device, host.shape, DType::Bf16, &host.options(), config)
        .expect("supported");
    let stream = context.default_stream();
    let up = |x: &[bf16]| {
        let bits: Vec<u16> = x.iter().map(|x| x.to_bits()).collect();
        stream.clone_htod(&bits).expect("upload")
    };
    let (q, k, v) = (up(&host.q), up(&host.k), up(&host.v));
    let rows = host.shape.batch * host.shape.num_qo_heads * host.shape.qo_len;
    let o = stream.clone_htod(&vec![0x7fffu16; rows * host.shape.head_dim]).expect("upload");
    let lse = stream.clone_htod(&vec![f32::NAN; rows]).expect("upload");
    let workspace = stream.clone_htod(&vec![0xffu8; attention.workspace_bytes()]).expect("upload");
    let tensor = |slice: &CudaSlice<u16>, queries| Tensor {
        address: address(slice, &stream),
        strides: Strides::contiguous(Host::dims(&host.shape, queries), host.case.layout),
    };
    let inputs = Inputs::new(tensor(&q, true), tensor(&k, false), tensor(&v, false));
    let output =
        Output { lse: want_lse.then(|| address(&lse, &stream)), ..Output::new(tensor(&o, true)) };
    // SAFETY: all buffers have the sizes of the shape and live past the synchronisation.
    unsafe {
        attention.forward(
            Stream(std::ptr::null_mut()),
            &inputs,
            &output,
            address(&workspace, &stream),
        )
    }
    .expect("launch");
    context.synchronize().expect("the kernels ran");
    let bits = stream.clone_dtoh(&o).expect("download");
    let workspace = stream.clone_dtoh(&workspace).expect("download");
    let mask = attention.predicts().then(|| {
        let [batch, heads, q_blocks, words] = attention.mask_shape();
        let kv_blocks = host.shape.kv_len.div_ceil(64);
        let mut mask = BlockMask::empty([batch, heads, q_blocks, kv_blocks]).expect("small");
        let bytes = &workspace[attention.mask_offset()..];
        for row in 0..batch * heads * q_blocks {
            for j in 0..words * 32 {
                let word = &bytes[(row * words + j / 32) * 4..][..4];
                let word = u32::from_le_bytes(word.try_into().expect("4 bytes"));
                if word >> (j % 32) & 1 == 1 {
                    mask.set(row / q_blocks / heads, row / q_blocks % heads, row % q_blocks, j);
                }
            }
        }
        mask
    });
    Ran {
        o: bits.iter().map(|&x| bf16::from_bits(x).to_f32()).collect(),
        lse: stream.clone_dtoh(&lse).expect("download"),
        want_lse,
        mask,
        bits,
    }
}

/// Σ|a − b| / Σ|b|; infinite where a is not finite.
fn relative_l1(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let (mut difference, mut size) = (0.0, 1e-30);
    for (&a, &b) in a.iter().zip(b) {
        if !a.is_finite() {
            return f64::INFINITY;
        }
        difference += (f64::from(a) - b).abs();
        size += b.abs();
    }
    difference / size
}

/// Compares with the reference; what is wrong goes to `failures`, so that one run shows all.
fn check(what: &str, ran: &Ran, expected: &reference::Output, failures: &mut Vec<String>) {
    let error = relative_l1(&ran.o, &expected.o);
    let mut lse_error = 0.0f64;
    for (&a, &b) in ran.lse.iter().zip(&expected.lse).filter(|_| ran.want_lse) {
        let e = if f64::from(a) == b { 0.0 } else { (f64::from(a) - b).abs() };
        lse_error = if e.is_nan() { f64::INFINITY } else { lse_error.max(e) };
    }
    let line = format!("{what}: relative L1 {error:.5}, largest LSE error {lse_error:.5}");
    println!("{line}");
    if !(error < 0.02 && lse_error < 0.1) {
        failures.push(line);
    }
}

#[test]
fn dense_calls_match_the_reference() {
    let Some(Gpu { device, context }) = gpu() else { return };
    let mut failures = Vec::new();
    for (i, case) in CASES.into_iter().enumerate() {
        let host = Host::new(case, 100 + i as u64);
        let config = SpargeConfig::dense();
        let plan = Plan::new(host.shape, &host.options(), &config).expect("valid");
        let [q, k, v] = host.views();
        let expected = reference::dense(&plan, &q, &k, &v);
        for lse in [false, true] {
            let ran = run(&device, &context, &host, &config, lse);
            check(&format!("{case:?} lse {lse}"), &ran, &expected, &mut failures);
            if ran.bits != run(&device, &context, &host, &config, lse).bits {
                failures.push(format!("{case:?}: two runs differ"));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn sparse_calls_match_the_cpu_selection_and_the_reference() {
    let Some(Gpu { device, context }) = gpu() else { return };
    let selections = [
        (Selection::TopK(0.5), Pooling::BLOCK),
        (Selection::TopK(0.3), Pooling::SUB_BLOCK),
        (Selection::TopCdf(0.9), Pooling::SUB_BLOCK),
        (Selection::TopCdf(0.6), Pooling::BLOCK),
        (Selection::Union { cdf: 0.5, top_k: 0.25 }, Pooling::SUB_BLOCK),
        (Selection::TopCdf(0.8), Pooling::MIXED),
        (Selection::TopK(0.4), Pooling { sampled_rows: 7, ..Pooling::BLOCK }),
    ];
    let mut failures = Vec::new();
    for (i, case) in CASES.into_iter().enumerate() {
        let host = Host::new(case, 200 + i as u64);
        for (n, (selection, pooling)) in selections.into_iter().enumerate() {
            let config = SpargeConfig {
                selection: selection.into(),
                pooling,
                lambda: f64::INFINITY.into(),
                // Without local blocks short causal rows have more to choose from.
                keep_local: 2 * ((i + n) % 2),
                ..SpargeConfig::default()
            };
            let what = format!("{case:?} {selection:?} {pooling:?}");
            let plan = Plan::new(host.shape, &host.options(), &config).expect("valid");
            let [q, k, v] = host.views();
            let ran = run(&device, &context, &host, &config, i % 2 == 0);
            let mask = ran.mask.as_ref().expect("predicts");
            let cpu = sparge::predict(&plan, &q, &k).expect("valid");
            let (a, b) = (mask.to_bytes(), cpu.to_bytes());
            let differing = a.iter().zip(&b).filter(|(a, b)| a != b).count();
            let line = format!("{what}: {} blocks kept, {differing} differ", mask.count());
            println!("{line}");
            if differing * 100 > mask.count().max(100) {
                failures.push(line);
            }
            let expected = reference::attend(&plan, &q, &k, &v, Some(mask));
            check(&what, &ran, &expected, &mut failures);
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// What comes after a row must not reach it, beyond the rounding of shared scales.
#[test]
fn causal_rows_do_not_see_the_future() {
    let Some(Gpu { device, context }) = gpu() else { return };
    let case = case([1, 2, 1, 900, 900, 128], Some(Alignment::TopLeft), Layout::Hnd);
    let host = Host::new(case, 7);
    let mut other = host.clone();
    let from = 500;
    for x in [&mut other.k, &mut other.v] {
        for x in &mut x[from * 128..] {
            *x = bf16::from_f32(-3.0 * x.to_f32() + 1.0);
        }
    }
    let config = SpargeConfig::dense();
    let (a, b) = (
        run(&device, &context, &host, &config, false),
        run(&device, &context, &other, &config, false),
    );
    for head in 0..2 {
        let rows = head * 900 * 128..(head * 900 + from) * 128;
        let expected: Vec<f64> = b.o[rows.clone()].iter().map(|&x| f64::from(x)).collect();
        let change = relative_l1(&a.o[rows], &expected);
        println!("change of earlier rows: {change:.5}");
        assert!(change < 0.03, "{change}");
        let later = (head * 900 + from) * 128..(head + 1) * 900 * 128;
        let expected: Vec<f64> = b.o[later.clone()].iter().map(|&x| f64::from(x)).collect();
        assert!(relative_l1(&a.o[later], &expected) > 0.1);
    }
}

/// What is not finite in K or V reaches the rows that see it, and no other, to the row: in blocks that
/// the diagonal or the end of the keys cuts, and in whole ones.
#[test]
fn what_is_not_finite_reaches_the_rows_that_see_it() {
    let Some(Gpu { device, context }) = gpu() else { return };
    let config = SpargeConfig::dense();
    for dim in [64, 128] {
        for (causal, len) in
            [(Some(Alignment::TopLeft), 640), (Some(Alignment::BottomRight), 610), (None, 610)]
        {
            for (which, value) in
                [(0, f32::NAN), (0, f32::INFINITY), (1, f32::NAN), (1, f32::INFINITY)]
            {
                for key in [70, 600] {
                    let mut host =
                        Host::new(case([1, 1, 1, len, len, dim], causal, Layout::Hnd), 9);
                    let x = if which == 0 { &mut host.k } else { &mut host.v };
                    x[key * dim + 5] = bf16::from_f32(value);
                    let ran = run(&device, &context, &host, &config, true);
                    for (i, row) in ran.o.chunks(dim).enumerate() {
                        let sees = causal.is_none() || i >= key;
                        let is_right = if sees {
                            row.iter().any(|x| x.is_nan()) && ran.lse[i].is_nan()
                        } else {
                            row.iter().all(|x| x.is_finite()) && ran.lse[i].is_finite()
                        };
                        let what = if which == 0 { "K" } else { "V" };
                        assert!(
                            is_right,
                            "{value} in {what} {key}, dim {dim}, {causal:?}: row {i}"
                        );
                    }
                }
            }
        }
    }
}

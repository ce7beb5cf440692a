//! Long calls, far strides, captured graphs, several threads; both paths. Skipped where there is no
//! GPU (`SPARGE_REQUIRE_GPU=1` makes that a failure).
#![expect(unsafe_code, reason = "launches on raw device addresses")]

mod common;

use common::{Buffers, Lens, Problem, address, gpu, relative_l1, to_bytes};
use cudarc::driver::sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
use sparge::{Alignment, BlockMask, Selection, SpargeConfig, Strides};
use sparge_cuda::{CudaOptions, DType, Inputs, Output, Path, Precision, Stream, Tensor};

const PATHS: [(Path, Precision); 3] = [
    (Path::Auto, Precision::Quantized),
    (Path::General, Precision::Quantized),
    (Path::General, Precision::Half),
];

/// One row in f64 over the kept blocks.
fn row(p: &Problem, head: usize, i: usize, mask: &BlockMask) -> Vec<f64> {
    let s = &p.shape;
    let (dim, kv_head) = (s.head_dim, head / (s.num_qo_heads / s.num_kv_heads));
    let q = &p.q[(head * s.qo_len + i) * dim..][..dim];
    let keys: Vec<usize> = (0..=i).filter(|&j| mask.get(0, head, i / 128, j / 64)).collect();
    let at = |j: usize| (kv_head * s.kv_len + j) * dim;
    let dot = |k: &[f32]| q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>();
    let scores: Vec<f64> =
        keys.iter().map(|&j| dot(&p.k[at(j)..][..dim]) / (dim as f64).sqrt()).collect();
    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|s| (s - most).exp()).sum();
    let mut o = vec![0.0; dim];
    for (&j, s) in keys.iter().zip(&scores) {
        for (o, v) in o.iter_mut().zip(&p.v[at(j)..][..dim]) {
            *o += (s - most).exp() / sum * f64::from(*v);
        }
    }
    o
}

#[test]
fn long_calls_are_right() {
    let Some(gpu) = gpu() else { return };
    let n = 131072;
    let mut p = Problem::new("128K", [1, 2, 1, n, n, 64, 64], DType::Bf16);
    p.causal = Some(Alignment::BottomRight);
    p.config = SpargeConfig { lambda: f64::INFINITY.into(), ..SpargeConfig::default() };
    for (path, precision) in PATHS {
        p.cuda = CudaOptions { path, precision, ..Default::default() };
        let start = std::time::Instant::now();
        let ran = p.run(&gpu);
        let mask = ran.mask.as_ref().expect("predicts");
        let (mut got, mut expected) = (Vec::new(), Vec::new());
        for (head, i) in [(0, 0), (0, 70000), (1, 99999), (1, n - 1), (0, n - 130)] {
            got.extend_from_slice(&ran.o[(head * n + i) * 64..][..64]);
            expected.extend(row(&p, head, i, mask));
        }
        let error = relative_l1(&got, &expected);
        println!(
            "128K {path:?} {precision:?}: relative L1 {error:.5}, {} blocks kept, {:.1} s in all",
            mask.count(),
            start.elapsed().as_secs_f64()
        );
        assert!(error < if precision == Precision::Half { 0.01 } else { 0.04 }, "{error}");
    }
}

/// Tokens 2²⁵ elements apart: offsets beyond 2³¹ elements.
#[test]
fn far_tokens_are_found() {
    let Some(gpu) = gpu() else { return };
    let mut p = Problem::new("far", [1, 1, 1, 70, 70, 64, 64], DType::Bf16);
    let expected = p.expected(None);
    let stream = gpu.context.default_stream();
    let (token, dim) = (1usize << 25, 64);
    // Rows of q, k, v and o lie beside one another.
    // SAFETY: every element that is read is written below, or by the call.
    let mut memory = unsafe { stream.alloc::<u8>((69 * token + 4 * dim) * 2) }.expect("5 GB");
    for (i, x) in [&p.q, &p.k, &p.v].into_iter().enumerate() {
        for t in 0..70 {
            let bytes = to_bytes(&x[t * dim..][..dim], p.dtype);
            let at = (t * token + i * dim) * 2;
            stream.memcpy_htod(&bytes, &mut memory.slice_mut(at..at + 2 * dim)).expect("upload");
        }
    }
    let start = address(&memory, &stream);
    let tensor = |i: usize| Tensor {
        address: start + (2 * i * dim) as u64,
        strides: Strides { batch: 0, head: 0, token },
    };
    let inputs = Inputs::new(tensor(0), tensor(1), tensor(2));
    for (path, precision) in PATHS {
        p.cuda = CudaOptions { path, precision, ..Default::default() };
        let attention = p.attention(&gpu);
        let workspace =
            stream.clone_htod(&vec![0xffu8; attention.workspace_bytes()]).expect("upload");
        // SAFETY: the tensors lie in `memory`; all of it lives past the synchronisation.
        unsafe {
            let output = Output::new(tensor(3));
            attention
                .forward(
                    Stream(std::ptr::null_mut()),
                    &inputs,
                    &output,
                    address(&workspace, &stream),
                )
                .expect("launch");
        }
        stream.synchronize().expect("the kernels ran");
        let mut o = Vec::new();
        for t in 0..70 {
            let at = (t * token + 3 * dim) * 2;
            let bytes = stream.clone_dtoh(&memory.slice(at..at + 2 * dim)).expect("download");
            o.extend(common::from_bytes(&bytes, p.dtype));
        }
        let error = relative_l1(&o, &expected.o);
        println!("far {path:?} {precision:?}: relative L1 {error:.5}");
        assert!(error < 0.03, "{path:?} {precision:?}: {error}");
    }
}

fn busy_problems() -> Vec<Problem> {
    let mut all = Vec::new();
    for (path, precision) in PATHS {
        for dim in [64, 128] {
            let mut p = Problem::new("busy", [1, 4, 2, 1500, 1500, dim, dim], DType::Bf16);
            p.cuda = CudaOptions { path, precision, ..Default::default() };
            p.causal = Some(Alignment::BottomRight);
            p.config = SpargeConfig::default();
            all.push(p.clone());
            p.config = SpargeConfig::paper(Selection::TopK(0.4));
            all.push(p.clone());
            if path == Path::General {
                p.lens = Lens::Packed(vec![0, 600, 1500], vec![0, 600, 1500]);
                all.push(p);
            }
        }
    }
    all
}

/// A captured call replays on new contents of its tensors.
#[test]
fn calls_can_be_captured() {
    let Some(gpu) = gpu() else { return };
    for p in busy_problems() {
        let mut other = p.clone();
        other.fill(99);
        let expected = [p.run(&gpu).bits, other.run(&gpu).bits];
        let mut buffers = Buffers::new(&p, &gpu);
        let stream = buffers.stream.clone();
        stream.begin_capture(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).expect("capture");
        // SAFETY: all buffers have the sizes of the shape and outlive the graph.
        unsafe {
            buffers.attention.forward(
                Stream(stream.cu_stream().cast()),
                &buffers.inputs,
                &buffers.output,
                buffers.workspace_address,
            )
        }
        .expect("captured");
        let flags =
            cudarc::driver::sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = stream.end_capture(flags).expect("a graph").expect("not empty");
        for (x, expected) in [&p, &other].into_iter().zip(&expected) {
            for (to, from) in buffers.tensors.iter_mut().zip([&x.q, &x.k, &x.v]) {
                stream.memcpy_htod(&to_bytes(from, p.dtype), to).expect("upload");
            }
            graph.launch().expect("replay");
            assert_eq!(&buffers.read(&p).bits, expected, "{} {:?}", p.name, p.cuda);
        }
    }
}

/// Threads with streams of their own get what one thread gets.
#[test]
fn threads_do_not_disturb_one_another() {
    let Some(gpu) = gpu() else { return };
    let problems = busy_problems();
    let alone: Vec<_> = problems.iter().map(|p| p.run(&gpu).bits).collect();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (gpu, problems, alone) = (&gpu, &problems, &alone);
            scope.spawn(move || {
                for i in 0..problems.len() {
                    let i = (i + 3 * thread) % problems.len();
                    assert_eq!(problems[i].run(gpu).bits, alone[i], "{}", problems[i].name);
                }
            });
        }
    });
}

/// The default configuration on the fast path: either path's selection, the fast attention.
#[test]
fn the_default_configuration_is_fast() {
    let Some(gpu) = gpu() else { return };
    let mut allowed = BlockMask::empty([1, 1, 15, 33]).expect("small");
    for at in (0..15 * 33).filter(|at| at % 4 != 1) {
        allowed.set(0, 0, at / 33, at % 33);
    }
    let cases = [
        (None, None, SpargeConfig::default()),
        (Some(Alignment::BottomRight), None, SpargeConfig::default()),
        (None, Some(&allowed), SpargeConfig::default()),
        (None, Some(&allowed), SpargeConfig::dense()),
    ];
    for (causal, allowed, config) in cases {
        let mut p = Problem::new("default", [1, 4, 2, 1900, 2100, 128, 128], DType::Bf16);
        (p.causal, p.block_mask, p.config) = (causal, allowed.cloned(), config);
        assert!(p.attention(&gpu).is_fast() || gpu.device.arch().name() != "sm_90a");
        let fast = p.run(&gpu);
        p.cuda.path = Path::General;
        let general = p.run(&gpu);
        if general.mask.is_some() {
            assert_eq!(fast.mask, general.mask);
        }
        assert_eq!(
            fast.stats.chunks(4).map(|s| &s[..3]).collect::<Vec<_>>(),
            general.stats.chunks(4).map(|s| &s[..3]).collect::<Vec<_>>()
        );
        let expected = p.expected(fast.mask.as_ref());
        for (name, ran) in [("fast", &fast), ("general", &general)] {
            let error = relative_l1(&ran.o, &expected.o);
            println!("default {causal:?} {name}: relative L1 {error:.5}");
            assert!(error < 0.03, "{error}");
        }
    }
}

/// What is passed must be what was announced.
#[test]
fn tensors_that_do_not_fit_are_refused() {
    let Some(gpu) = gpu() else { return };
    let p = Problem::new("refused", [1, 1, 1, 64, 64, 64, 64], DType::Bf16);
    let buffers = Buffers::new(&p, &gpu);
    let mut odd = buffers.inputs;
    odd.q.address += 2;
    let mut strided = buffers.inputs;
    strided.k.strides.token = 68;
    let mut masked = buffers.inputs;
    masked.element_mask = Some(masked.q);
    for inputs in [odd, strided, masked] {
        // SAFETY: the call is refused before anything is enqueued.
        let refused = unsafe {
            buffers.attention.forward(
                Stream(std::ptr::null_mut()),
                &inputs,
                &buffers.output,
                buffers.workspace_address,
            )
        };
        assert!(matches!(refused, Err(sparge_cuda::Error::Tensor { .. })), "{refused:?}");
    }
}

/// Times of the parts, for the record: `cargo test --release -p sparge-cuda --test large timings --
/// --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn timings() {
    let Some(gpu) = gpu() else { return };
    let shapes = [
        ("llama 32K causal", [1, 32, 8, 32768, 32768, 128, 128], Some(Alignment::BottomRight)),
        ("mochi", [1, 24, 24, 22528, 22528, 128, 128], None),
        ("flux", [1, 24, 24, 4608, 4608, 128, 128], None),
    ];
    for (name, sizes, causal) in shapes {
        // One head's inputs for all of them.
        let [batch, heads, kv_heads, q_len, kv_len, dim, dim_v] = sizes;
        let mut p = Problem::new(name, [batch, 1, 1, q_len, kv_len, dim, dim_v], DType::Bf16);
        (p.shape.num_qo_heads, p.shape.num_kv_heads) = (heads, kv_heads);
        (p.q, p.k, p.v) = (p.q.repeat(heads), p.k.repeat(kv_heads), p.v.repeat(kv_heads));
        (p.causal, p.config) = (causal, SpargeConfig::default());
        for (path, precision) in PATHS {
            p.cuda = CudaOptions { path, precision, ..Default::default() };
            let b = Buffers::new(&p, &gpu);
            let stream = Stream(b.stream.cu_stream().cast());
            let mask = b.workspace_address + b.attention.mask_offset() as u64;
            let time = |part: &dyn Fn()| {
                let mut times = Vec::new();
                for _ in 0..7 {
                    let flags = Some(cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT);
                    let start = b.stream.record_event(flags).expect("an event");
                    part();
                    let end = b.stream.record_event(flags).expect("an event");
                    times.push(start.elapsed_ms(&end).expect("finished"));
                }
                times.sort_by(f32::total_cmp);
                times[times.len() / 2]
            };
            let (a, output) = (&b.attention, sparge_cuda::Output { stats: None, ..b.output });
            let (inputs, at) = (&b.inputs, b.workspace_address);
            let quantize = time(&|| {
                // SAFETY: all buffers have the sizes of the shape and outlive the synchronisation.
                unsafe { a.quantize(stream, inputs, at) }.expect("launch");
            });
            let predict = time(&|| {
                // SAFETY: all buffers have the sizes of the shape and outlive the synchronisation.
                unsafe { a.predict(stream, inputs, mask, at) }.expect("launch");
            });
            let all = time(&|| {
                // SAFETY: all buffers have the sizes of the shape and outlive the synchronisation.
                unsafe { a.forward(stream, inputs, &output, at) }.expect("launch");
            });
            let kept = b.read(&p).mask.map_or(0, |mask| mask.count());
            println!(
                "{name} {path:?} {precision:?}: quantize {quantize:.3} ms, predict {predict:.3} ms, all {all:.3} ms, {kept} blocks kept"
            );
        }
    }
}

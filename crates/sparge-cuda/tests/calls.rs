//! How calls are made: verbs on their own, under other masks, on threads with other contexts, with
//! sizes and numbers at the edges. Skipped where there is no GPU (`SPARGE_REQUIRE_GPU=1` makes that a
//! failure).
#![expect(unsafe_code, reason = "launches on raw device addresses")]

mod common;

use common::{Buffers, Element, Problem, address, compare, gpu, report};
use cudarc::driver::result::ctx;
use sparge::{BlockMask, Dims, Selection, SpargeConfig};
use sparge_cuda::{CudaOptions, DType, Error, Path, Stream};

fn general() -> CudaOptions {
    CudaOptions { path: Path::General, ..Default::default() }
}

fn every(shape: [usize; 4], wanted: impl Fn(usize, usize, usize) -> bool) -> BlockMask {
    let [_, heads, q_blocks, kv_blocks] = shape;
    let mut mask = BlockMask::empty(shape).expect("small");
    for at in 0..heads * q_blocks * kv_blocks {
        let (head, i, j) = (at / q_blocks / kv_blocks, at / kv_blocks % q_blocks, at % kv_blocks);
        if wanted(head, i, j) {
            mask.set(0, head, i, j);
        }
    }
    mask
}

fn words(mask: &BlockMask, per_row: usize) -> Vec<u8> {
    let [_, heads, q_blocks, _] = mask.shape();
    let mut words = vec![0u32; heads * q_blocks * per_row];
    for row in 0..heads * q_blocks {
        for j in mask.row(0, row / q_blocks, row % q_blocks) {
            words[row * per_row + j / 32] |= 1 << (j % 32);
        }
    }
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// `attend` under a mask that something else made: the call's own block mask holds all the same.
#[test]
fn foreign_masks_are_intersected_with_the_calls_own() {
    let Some(gpu) = gpu() else { return };
    let mut failures = Vec::new();
    for cuda in [CudaOptions::default(), general()] {
        for own in [false, true] {
            let mut p = Problem::new("foreign", [1, 2, 1, 500, 900, 64, 64], DType::Bf16);
            let shape = [1, 2, 4, 15];
            let foreign = every(shape, |head, i, j| (i + j + head) % 3 != 0);
            p.block_mask = own.then(|| every(shape, |_, i, j| (2 * i + j) % 5 < 3));
            (p.cuda, p.config) = (cuda, SpargeConfig::dense());
            for mask in [Some(&foreign), None] {
                p.name = format!("{:?}, own mask {own}, foreign {}", cuda.path, mask.is_some());
                let buffers = Buffers::new(&p, &gpu);
                let up = |x: &[u8]| buffers.stream.clone_htod(x).expect("upload");
                let on_device =
                    mask.map(|mask| up(&words(mask, buffers.attention.mask_shape()[3])));
                let stream = Stream(buffers.stream.cu_stream().cast());
                let (a, inputs, at) =
                    (&buffers.attention, &buffers.inputs, buffers.workspace_address);
                let under = on_device.as_ref().map(|mask| address(mask, &buffers.stream));
                // SAFETY: all buffers have the sizes of the shape and live past the synchronisation.
                unsafe {
                    a.quantize(stream, inputs, at).expect("launch");
                    let predicted = at + a.mask_offset() as u64;
                    a.predict(stream, inputs, predicted, at).expect("launch");
                    a.attend(stream, inputs, &buffers.output, under, at).expect("launch");
                }
                compare(&p, &buffers.read(&p), &p.expected(mask), &mut failures);
            }
        }
    }
    report(&failures);
}

/// Addresses that kernels cannot use are refused before anything is enqueued.
#[test]
fn masks_at_no_address_are_refused() {
    let Some(gpu) = gpu() else { return };
    let mut p = Problem::new("refused", [1, 2, 1, 500, 2000, 64, 64], DType::Bf16);
    p.config = SpargeConfig { selection: Selection::TopK(0.3).into(), ..SpargeConfig::default() };
    for cuda in [CudaOptions::default(), general()] {
        p.cuda = cuda;
        let b = Buffers::new(&p, &gpu);
        let stream = Stream(b.stream.cu_stream().cast());
        let at = b.workspace_address;
        for mask in [0, at + 2] {
            // SAFETY: as above; nothing is enqueued.
            let (predicted, attended) = unsafe {
                (
                    b.attention.predict(stream, &b.inputs, mask, at),
                    b.attention.attend(stream, &b.inputs, &b.output, Some(mask), at),
                )
            };
            for refused in [predicted, attended] {
                assert!(
                    matches!(refused, Err(Error::Tensor { tensor: "mask", .. })),
                    "{refused:?}"
                );
            }
        }
    }
}

/// A call leaves the thread's current context as it was, as does opening a device.
#[test]
fn the_current_context_is_left_alone() {
    let Some(gpu) = gpu() else { return };
    let p = Problem::new("context", [1, 2, 1, 300, 300, 64, 64], DType::F16);
    let b = Buffers::new(&p, &gpu);
    // SAFETY: no context is current afterwards, which any thread may have.
    unsafe { ctx::set_current(std::ptr::null_mut()) }.expect("set");
    // SAFETY: all buffers have the sizes of the shape and live past the synchronisation.
    unsafe {
        let stream = Stream(b.stream.cu_stream().cast());
        b.attention.forward(stream, &b.inputs, &b.output, b.workspace_address)
    }
    .expect("launch");
    assert_eq!(ctx::get_current().expect("asked"), None, "after forward");
    let device = sparge_cuda::Device::new(0, &sparge_cuda::Environment::from_process());
    assert_eq!(ctx::get_current().expect("asked"), None, "after opening");
    drop(device);
    assert_eq!(ctx::get_current().expect("asked"), None, "after closing");
    let mut failures = Vec::new();
    gpu.context.bind_to_thread().expect("bound");
    compare(&p, &b.read(&p), &p.expected(None), &mut failures);
    report(&failures);
}

/// More heads than a grid has rows.
#[test]
fn very_many_heads_are_one_call() {
    let Some(gpu) = gpu() else { return };
    let mut failures = Vec::new();
    for masked in [false, true] {
        let mut p = Problem::new("heads", [35_000, 2, 1, 1, 3, 64, 64], DType::F16);
        if masked {
            let dims = Dims { batch: 35_000, heads: 2, len: 1, dim: 3 };
            let data = (0..35_000 * 6).map(|at| at % 7 != 0).collect();
            p.element = Some(Element::Bool(dims, data));
        }
        compare(&p, &p.run(&gpu), &p.expected(None), &mut failures);
    }
    report(&failures);
}

/// Numbers whose inverses leave f32's range.
#[test]
fn tiny_tensors_are_zero_not_nan() {
    let Some(gpu) = gpu() else { return };
    for cuda in [CudaOptions::default(), general()] {
        for tiny in 0..3 {
            let mut p = Problem::new("tiny", [1, 2, 1, 200, 333, 64, 64], DType::Bf16);
            p.cuda = cuda;
            let x = [&mut p.q, &mut p.k, &mut p.v].into_iter().nth(tiny).expect("three");
            // Some channels are zero.
            x.iter_mut().enumerate().for_each(|(i, x)| *x *= if i % 3 == 0 { 0.0 } else { 1e-38 });
            x.iter_mut().for_each(|x| *x = common::rounded(*x, DType::Bf16));
            let (ran, expected) = (p.run(&gpu), p.expected(None));
            for (got, want) in ran.o.iter().zip(&expected.o) {
                let ok = (f64::from(*got) - want).abs() < if tiny == 2 { 1e-30 } else { 0.3 };
                assert!(ok, "{:?}, tensor {tiny}: {got}, expected {want}", cuda.path);
            }
        }
    }
}

/// With a pack there is no need for NVRTC, and it is not looked for.
#[test]
fn a_pack_stands_in_for_nvrtc() {
    let Some(gpu) = gpu() else { return };
    let env = sparge_cuda::Environment::from_process();
    let Some(pack_dir) = env.pack_dir else {
        println!("skipped: SPARGE_CUBINS names no pack");
        return;
    };
    let before = std::fs::read_to_string("/proc/self/maps").expect("Linux");
    let env = sparge_cuda::Environment { pack_dir: Some(pack_dir), ..Default::default() };
    let device = sparge_cuda::Device::new(0, &env).expect("opens");
    let gpu = common::Gpu { device, context: gpu.context };
    let mut failures = Vec::new();
    let p = Problem::new("packed", [1, 2, 1, 300, 300, 64, 64], DType::F16);
    compare(&p, &p.run(&gpu), &p.expected(None), &mut failures);
    let after = std::fs::read_to_string("/proc/self/maps").expect("Linux");
    assert_eq!(before.contains("libnvrtc"), after.contains("libnvrtc"), "NVRTC was loaded");
    report(&failures);
}

/// Scores from next to nothing to tens of thousands, alike and in turns: int8 holds these queries and
/// keys (sign patterns whose mean is zero) exactly, so the reference's answer is the right one, and a
/// number that overflowed anywhere would show.
#[test]
fn scores_may_lie_however_far_apart() {
    let Some(gpu) = gpu() else { return };
    let mut failures = Vec::new();
    let sizes = |dim| [1, 2, 1, 1088, 1088, dim, dim];
    // Of queries, of keys of even and of odd pairs of blocks. Norms: sizes times 16 (d = 128: times 23).
    let amounts = [
        [1.0, 0.0078125, 0.0078125],
        [1.0, 2.0, 2.0],
        [2.0, 2.0, 2.0],
        [8.0, 8.0, 8.0],
        [1.0, 0.015625, 16.0],
        [8.0, 8.0, 0.015625],
        [64.0, 64.0, 64.0],
        [4096.0, 4096.0, 4096.0],
        [1e-8, 1e-8, 1e-8],
    ];
    for dim in [64, 128] {
        for [of_q, even, odd] in amounts {
            for causal in [None, Some(sparge::Alignment::TopLeft)] {
                let mut p = Problem::new("spread", sizes(dim), DType::Bf16);
                p.causal = causal;
                p.name = format!("d = {dim}, {of_q} × {even}, {odd}, {causal:?}");
                let mut rng = common::Normal(dim as u64);
                let signs: Vec<f32> = (0..32 * dim).map(|_| rng.next().signum()).collect();
                for (i, q) in p.q.iter_mut().enumerate() {
                    *q = of_q * signs[i % (32 * dim)];
                }
                for (i, k) in p.k.iter_mut().enumerate() {
                    let pair = i / (128 * dim);
                    let sign = if i / (32 * dim) % 2 == 0 { 1.0 } else { -1.0 };
                    *k = if pair.is_multiple_of(2) { even } else { odd }
                        * sign
                        * signs[i % (32 * dim)];
                }
                let (ran, expected) = (p.run(&gpu), p.expected(None));
                let error = common::relative_l1(&ran.o, &expected.o);
                let lse = ran.lse.iter().zip(&expected.lse).fold(0.0f64, |most, (&a, &b)| {
                    most.max((f64::from(a) - b).abs() / (1.0 + 1e-3 * b.abs()))
                });
                println!("{}: relative L1 {error:.5}, LSE {lse:.5}", p.name);
                if !(error < 0.03 && lse < 0.1) {
                    failures.push(p.name.clone());
                }
            }
        }
    }
    report(&failures);
}

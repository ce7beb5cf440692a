//! `sparge attend` on small inputs: every flag, every optional tensor.

mod common;

use common::*;

/// Runs attend on `tensors` and returns its JSON and the output's path.
#[track_caller]
fn attend(
    files: &Files,
    tensors: &[(&str, Tensor)],
    flags: &[&str],
) -> (serde_json::Value, String) {
    let (input, output) = (files.write("in.safetensors", tensors), files.path("out.safetensors"));
    let mut args = vec!["attend", &input, "-o", &output, "--json"];
    args.extend(flags);
    (sparge(&args).json(), output)
}

/// The output o of attend.
#[track_caller]
fn o(tensors: &[(&str, Tensor)], flags: &[&str]) -> Vec<f64> {
    let files = Files::new();
    let (_, output) = attend(&files, tensors, flags);
    read(&output, "o").2
}

#[test]
fn dense_is_the_reference() {
    let cases: &[&[&str]] = &[
        &[],
        &["--causal", "--causal-align", "top-left"],
        &["--causal", "--causal-align", "bottom-right"],
        &["--window", "40"],
        &["--causal", "--causal-align", "bottom-right", "--window", "70", "--sink-blocks", "1"],
        &["--scale", "-0.3"],
        &["--isa", "scalar"],
        &["--threads", "1"],
    ];
    let tensors = qkv([4, 2], [150, 200], 24);
    for flags in cases {
        let dense = o(&tensors, &[flags, &["--dense"][..]].concat());
        let reference = o(&tensors, &[flags, &["--dense", "--reference"][..]].concat());
        assert!(distance(&dense, &reference) < 1e-5, "{flags:?}");
    }
}

#[test]
fn sparse_is_the_reference() {
    let cases: &[&[&str]] = &[
        &["--topk", "0.5"],
        &["--topk", "0.5,0.3,0.25,1.0"],
        &["--cdf", "0.6"],
        &["--cdf", "0.4,0.5,0.6,0.7", "--topk", "0.3"],
        &["--cdf", "0.6", "--theta", "0.3"],
        &["--theta", "0.3"],
        &["--topk", "0.5", "--lambda", "inf"],
        &["--topk", "0.5", "--lambda", "2"],
        &["--topk", "0.4", "--pooling", "block"],
        &["--topk", "0.4", "--pooling", "16x16"],
        &["--topk", "0.4", "--pooling", "16x16-2nd"],
        &["--topk", "0.4", "--pooling", "32x64+var"],
        &["--topk", "0.2", "--keep-first", "2"],
        &["--topk", "0.3", "--causal", "--causal-align", "bottom-right"],
    ];
    let tensors = qkv([4, 2], [300, 700], 32);
    for flags in cases {
        let files = Files::new();
        let flags = [flags, &["--lse", "--write-mask"][..]].concat();
        let (json, output) = attend(&files, &tensors, &flags);
        let fast = ["o", "lse", "block_mask"].map(|name| read(&output, name));
        let (slow_json, output) =
            attend(&files, &tensors, &[&flags, &["--reference"][..]].concat());
        let slow = ["o", "lse", "block_mask"].map(|name| read(&output, name));
        assert_eq!(fast[2], slow[2], "masks {flags:?}");
        assert!(distance(&fast[0].2, &slow[0].2) < 1e-5, "o {flags:?}");
        assert!(distance(&fast[1].2, &slow[1].2) < 1e-4, "lse {flags:?}");
        assert_eq!(fast[2].1, [1, 4, 3, 11]);
        assert_eq!(fast[1].1, [1, 4, 300]);
        assert_eq!((&*slow[0].0, &*fast[0].0), ("F64", "F32"));
        let sparsity = |json: &serde_json::Value| json["qk_sparsity"].as_f64().expect("a number");
        assert!((sparsity(&json) - sparsity(&slow_json)).abs() < 1e-12, "{flags:?}");
        // The judge finds these blocks not self-similar and keeps them all.
        assert_eq!(sparsity(&json) > 0.0, !flags.contains(&"--theta"), "{flags:?}");
    }
}

#[test]
fn int8_is_near() {
    let tensors = qkv([2, 2], [256, 256], 64);
    let files = Files::new();
    let (json, _) = attend(&files, &tensors, &["--topk", "1", "--qk", "int8", "--compare"]);
    assert!(json["rel_l1"].as_f64().is_some_and(|e| e > 0.0 && e < 0.05), "{json}");
    let (json, _) = attend(&files, &tensors, &["--topk", "1", "--qk", "f32", "--compare"]);
    assert!(json["rel_l1"].as_f64().is_some_and(|e| e < 1e-4), "{json}");
}

#[test]
fn json_has_its_keys() {
    let files = Files::new();
    let tensors = qkv([4, 2], [300, 700], 32);
    let (json, output) = attend(&files, &tensors, &["--topk", "0.5", "--compare"]);
    for key in [
        "qk_sparsity",
        "pv_sparsity",
        "predict_s",
        "attend_s",
        "rel_l1",
        "cosine",
        "rmse",
        "dense_s",
    ] {
        assert!(json[key].is_number(), "{key} in {json}");
    }
    assert_eq!(json["output"], *output);
    assert_eq!(json["shape"]["num_kv_heads"], 2);
    let (json, _) = attend(&files, &tensors, &[]);
    assert!(json.get("rel_l1").is_none());
}

#[test]
fn text_names_the_result() {
    let files = Files::new();
    let input = files.write("in.safetensors", &qkv([2, 1], [70, 70], 16));
    let output = files.path("out.safetensors");
    let ran = sparge(["attend", &input, "-o", &output, "--compare", "--causal", "--topk", "0.5"]);
    for part in ["QK skipped", "PV skipped", "predict", "attend", "dense", "relative L1", &output] {
        assert!(ran.ok().stdout.contains(part), "no {part} in {}", ran.stdout);
    }
    assert_eq!(ran.stderr, "");
}

#[test]
fn half_types_keep_their_type() {
    let shape = [1, 2, 130, 16];
    let n = shape.iter().product();
    for (dtype, make) in [("F16", f16s as fn(&[usize], &[f32]) -> Tensor), ("BF16", bf16s)] {
        let tensors = [1.0, 2.0, 3.0].map(|phase| make(&shape, &wave(n, phase)));
        let [q, k, v] = tensors;
        let files = Files::new();
        let (json, output) = attend(&files, &[("q", q), ("k", k), ("v", v)], &["--compare"]);
        assert_eq!(read(&output, "o").0, dtype);
        assert_eq!(json["dtype"], dtype.to_lowercase());
    }
}

#[test]
fn layouts_agree() {
    let (heads, len, dim) = (2, 90, 8);
    let hnd = qkv([heads, heads], [len, len], dim);
    let nhd: Vec<(&str, Tensor)> = hnd
        .iter()
        .map(|(name, tensor)| {
            let token = dim * 4;
            let mut bytes = Vec::new();
            for t in 0..len {
                for h in 0..heads {
                    bytes.extend(&tensor.bytes[(h * len + t) * token..][..token]);
                }
            }
            (*name, Tensor { dtype: "F32", shape: vec![1, len, heads, dim], bytes })
        })
        .collect();
    let a = o(&hnd, &["--dense", "--layout", "hnd"]);
    let b = o(&nhd, &["--dense", "--layout", "nhd"]);
    for h in 0..heads {
        for t in 0..len {
            for i in 0..dim {
                assert_eq!(a[(h * len + t) * dim + i], b[(t * heads + h) * dim + i]);
            }
        }
    }
}

#[test]
fn three_dimensions_are_one_batch_entry() {
    let four = qkv([2, 2], [90, 90], 8);
    let three: Vec<(&str, Tensor)> = four
        .iter()
        .map(|(name, t)| (*name, Tensor { shape: t.shape[1..].to_vec(), ..t.clone() }))
        .collect();
    assert_eq!(o(&four, &[]), o(&three, &[]));
}

#[test]
fn element_masks() {
    let (q_len, kv_len) = (70, 90);
    let seen = |i: usize, j: usize| !(i + 2 * j).is_multiple_of(3);
    let pairs = || (0..q_len).flat_map(|i| (0..kv_len).map(move |j| (i, j)));
    let bytes: Vec<u8> = pairs().map(|(i, j)| u8::from(seen(i, j))).collect();
    let floats: Vec<f32> =
        pairs().map(|(i, j)| if seen(i, j) { 0.0 } else { f32::NEG_INFINITY }).collect();
    let four = [1, 1, q_len, kv_len];
    let outputs: Vec<Vec<f64>> = [
        u8s("BOOL", &four, &bytes),
        u8s("U8", &[q_len, kv_len], &bytes),
        f32s(&four, &floats),
        f16s(&four, &floats),
        bf16s(&[q_len, kv_len], &floats),
    ]
    .into_iter()
    .map(|mask| {
        let mut tensors = qkv([2, 1], [q_len, kv_len], 8);
        tensors.push(("attn_mask", mask));
        let dense = o(&tensors, &["--dense"]);
        let reference = o(&tensors, &["--dense", "--reference"]);
        assert!(distance(&dense, &reference) < 1e-5);
        dense
    })
    .collect();
    assert!(outputs.iter().all(|o| *o == outputs[0]));
    assert_ne!(outputs[0], o(&qkv([2, 1], [q_len, kv_len], 8), &["--dense"]));
}

#[test]
fn one_mask_row_stands_for_all() {
    let keys: Vec<u8> = (0..90).map(|j| u8::from(j < 60)).collect();
    let mut tensors = qkv([2, 1], [70, 90], 8);
    tensors.push(("attn_mask", u8s("BOOL", &[1, 1, 1, 90], &keys)));
    let masked = o(&tensors, &["--dense"]);
    let mut tensors = qkv([2, 1], [70, 90], 8);
    tensors.push(("kv_lens", i64s(&[60])));
    assert!(distance(&masked, &o(&tensors, &["--dense"])) < 1e-6);
}

#[test]
fn block_masks_round_trip() {
    let files = Files::new();
    let mut tensors = qkv([2, 2], [300, 400], 16);
    let blocks: Vec<u8> = (0..2 * 3 * 7).map(|i| u8::from(i % 3 != 1)).collect();
    tensors.push(("block_mask", u8s("U8", &[1, 2, 3, 7], &blocks)));
    let (json, output) = attend(&files, &tensors, &["--dense", "--write-mask", "--compare"]);
    let mask = read(&output, "block_mask").2;
    assert_eq!(mask, blocks.iter().map(|&b| f64::from(b)).collect::<Vec<_>>());
    // Compared with attention over all blocks, not over the mask's.
    assert!(json["rel_l1"].as_f64().is_some_and(|e| e > 1e-3), "{json}");
}

#[test]
fn packed_sequences() {
    let mut packed = qkv([2, 1], [200, 200], 8);
    packed.push(("cu_seqlens_q", i32s(&[0, 70, 70, 200])));
    packed.push(("cu_seqlens_k", i64s(&[0, 70, 70, 200])));
    let whole = o(&packed, &["--dense", "--causal"]);
    let first: Vec<(&str, Tensor)> = qkv([2, 1], [200, 200], 8)
        .into_iter()
        .map(|(name, t)| {
            let heads = t.shape[1];
            let bytes =
                (0..heads).flat_map(|h| t.bytes[h * 200 * 32..][..70 * 32].to_vec()).collect();
            (name, Tensor { dtype: "F32", shape: vec![1, heads, 70, 8], bytes })
        })
        .collect();
    let part = o(&first, &["--dense", "--causal"]);
    for h in 0..2 {
        assert!(distance(&whole[h * 200 * 8..][..70 * 8], &part[h * 70 * 8..][..70 * 8]) < 1e-6);
    }
    let files = Files::new();
    let (_, output) =
        attend(&files, &packed, &["--topk", "0.5", "--causal", "--write-mask", "--lse"]);
    assert_eq!(read(&output, "block_mask").1, [3, 2, 2, 3]);
}

#[test]
fn data_need_not_be_aligned() {
    let mut tensors = qkv([2, 1], [70, 90], 8);
    let aligned = o(&tensors, &[]);
    // One byte in front moves every tensor off its alignment.
    tensors.insert(0, ("a", u8s("U8", &[1], &[7])));
    assert_eq!(aligned, o(&tensors, &[]));
}

#[test]
fn nan_and_infinity_stay_in_their_rows() {
    let mut tensors = qkv([2, 2], [200, 200], 8);
    let row = 8 * 4;
    tensors[0].1.bytes[5 * row..5 * row + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    tensors[0].1.bytes[(200 + 7) * row..(200 + 7) * row + 4]
        .copy_from_slice(&f32::INFINITY.to_le_bytes());
    let o = o(&tensors, &["--topk", "0.5"]);
    let bad: Vec<usize> = o
        .chunks(8)
        .enumerate()
        .filter(|(_, row)| row.iter().any(|x| x.is_nan()))
        .map(|r| r.0)
        .collect();
    assert!(bad.iter().all(|r| [5, 207].contains(r)) && bad.contains(&5), "{bad:?}");
}

#[test]
fn threads_do_not_change_the_result() {
    let tensors = qkv([3, 3], [300, 300], 16);
    let flags = ["--topk", "0.4", "--causal"];
    let one = o(&tensors, &[&flags[..], &["--threads", "1"]].concat());
    assert_eq!(one, o(&tensors, &[&flags[..], &["--threads", "3"]].concat()));
}

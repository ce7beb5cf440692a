//! Named policies in attend and bench, and orders of tokens.

mod common;

use common::*;

const METHODS: [&str; 8] = [
    "minference:v=30,s=60",
    "a-shape:init=64,local=64",
    "block-sparse:1",
    "flexprefill:0.5,min=128",
    "xattention:0.3",
    "window:64,sinks=0",
    "random:0.3",
    "oracle:0.6",
];

#[test]
fn attend_computes_what_a_policy_chose() {
    let files = Files::new();
    let tensors = qkv([4, 2], [600, 600], 16);
    let input = files.write("in.safetensors", &tensors);
    let attend = |input: &str, name: &str, flags: &[&str]| {
        let output = files.path(name);
        let args = ["attend", input, "-o", &output, "--causal", "--json"];
        (sparge(args.iter().chain(flags)).json(), output)
    };
    for policy in METHODS {
        let flags = ["--policy", policy, "--write-mask", "--compare"];
        let (json, output) = attend(&input, "out.safetensors", &flags);
        assert!(json["qk_sparsity"].as_f64().is_some_and(|s| s > 0.1), "{policy}: {json}");
        assert!(json["rel_l1"].is_number());
        // The mask that it wrote, given as a mask, gives the same output.
        let (_, shape, mask) = read(&output, "block_mask");
        let mask: Vec<u8> = mask.iter().map(|&x| x as u8).collect();
        let mut masked = qkv([4, 2], [600, 600], 16);
        masked.push(("block_mask", u8s("U8", &shape, &mask)));
        let again = files.write("masked.safetensors", &masked);
        let (_, same) = attend(&again, "same.safetensors", &["--dense"]);
        assert_eq!(read(&output, "o").2, read(&same, "o").2, "{policy}");
    }
    let refused = |flags: &[&str], part: &str| {
        let output = files.path("none.safetensors");
        sparge(["attend", &input, "-o", &output].iter().chain(flags)).refused(2, part);
    };
    refused(&["--policy", "minference"], "not causal");
    refused(&["--policy", "xattention:7"], "xattention threshold is 7");
    refused(&["--policy", "zigzag"], "is no policy");
}

#[test]
fn bench_times_every_policy() {
    let list = format!("dense,dense,lambda=3,cdf:0.9,pool=block,theta=0.2,{}", METHODS.join(","));
    let args =
        ["bench", "--shape", "2/1x600x16:causal", "--reps", "1", "--warmup", "0", "--policy"];
    let json = sparge(args.iter().copied().chain([list.as_str(), "--json"])).json();
    let results = json["results"].as_array().expect("a list");
    assert_eq!(results.len(), 3 + METHODS.len());
    assert_eq!(results[1]["policy"], "dense,lambda=3");
    assert_eq!(results[2]["policy"], "cdf:0.9,pool=128x64,theta=0.2");
    for row in &results[3..] {
        assert!(row["qk_sparsity"].as_f64().is_some_and(|s| s > 0.1), "{row}");
    }
    let full = ["bench", "--shape", "1x300x8", "--policy", "flexprefill", "--reps", "1"];
    sparge(full).refused(2, "not causal");
}

/// `[1, 1, 32·32, 8]`: a 32×32 picture of blobs of 8×8 cells, alike inside and unlike each other.
fn picture() -> Vec<f32> {
    let value = |i: usize| {
        let (y, x, c) = (i / 8 / 32, i / 8 % 32, i % 8);
        3.0 * ((y / 8 * 7 + x / 8 * 3 + 1) as f32 * (c + 1) as f32).sin()
    };
    (0..32 * 32 * 8).map(value).collect()
}

#[test]
fn hilbert_order_is_ahead_on_a_picture() {
    let files = Files::new();
    let x = picture();
    // Values without structure: the error is the attention that was lost.
    let noise: Vec<f32> =
        (0..x.len() as u64).map(|i| (i * 2_654_435_761 % 1009) as f32 / 504.0 - 1.0).collect();
    let shape = [1, 1, 32 * 32, 8];
    let tensors = [("q", f32s(&shape, &x)), ("k", f32s(&shape, &x)), ("v", f32s(&shape, &noise))];
    let input = files.write("picture.safetensors", &tensors);
    let args = ["eval", "order", &input, "--grid", "1x32x32"];
    let json = sparge(args.iter().chain(&["--json"])).json();
    let results = json["results"].as_array().expect("a list");
    assert_eq!(results.len(), 5);
    let of = |order: &str, key: &str| {
        let row = results.iter().find(|row| row["order"] == order).expect("an order");
        let value = if key == "qk_sparsity" { &row["at_bound"][0][key] } else { &row[key] };
        value.as_f64().expect("a number")
    };
    // A block of 64 keys is a blob, a block of 128 queries is two.
    assert!((of("hilbert", "similarity_k") - 1.0).abs() < 1e-4, "{json}");
    assert!(of("hilbert", "blocks_95") < 0.25, "{json}");
    for other in ["random", "row-major", "column-major", "time-major"] {
        assert!(of("hilbert", "similarity_k") > of(other, "similarity_k"), "{json}");
        assert!(of("hilbert", "distance") < of(other, "distance"), "{json}");
        assert!(of("hilbert", "blocks_95") < of(other, "blocks_95"), "{json}");
        assert!(of("hilbert", "qk_sparsity") > of(other, "qk_sparsity"), "{json}");
    }
    assert!(sparge(args).ok().stdout.contains("similarity"));
    let wrong = |grid: &str, part: &str| {
        sparge(["eval", "order", &input, "--grid", grid]).refused(2, part);
    };
    wrong("1x32x33", "more than the 1024 tokens");
    wrong("24x32", "TIMExHEIGHTxWIDTH");
}

//! bench, inspect, doctor and the help texts.

mod common;

use common::*;

#[test]
fn help_names_every_subcommand() {
    let ran = sparge(["--help"]);
    for name in ["attend", "bench", "inspect", "doctor", "SPARGE_CACHE", "SPARGE_ISA"] {
        assert!(ran.ok().stdout.contains(name), "no {name} in {}", ran.stdout);
    }
    for name in ["attend", "bench", "inspect", "doctor"] {
        assert!(sparge([name, "--help"]).ok().stdout.contains("Usage: sparge"));
    }
    assert!(sparge(["--version"]).ok().stdout.starts_with("sparge 0."));
    let bare = sparge::<&str>([]);
    assert_eq!(bare.code, Some(2));
    assert!(bare.stderr.contains("attend") && bare.stdout.is_empty());
}

#[test]
fn bench_reports_every_shape_and_policy() {
    let files = Files::new();
    let peers = files.write_bytes(
        "peers.jsonl",
        b"{\"peer\": \"torch.sdpa\", \"shape\": \"2/1x300x16:causal\", \"median_s\": 0.5, \"reps\": 7}\n\n",
    );
    let args = [
        "bench",
        "--shape",
        "2/1x300x16:causal",
        "--shape",
        "1x200x8",
        "--policy",
        "dense,topk:0.5",
        "--policy",
        "cdf:0.9+topk:0.1",
        "--reps",
        "2",
        "--warmup",
        "0",
        "--seed",
        "7",
        "--peer-json",
        &peers,
    ];
    let json = sparge(args.iter().chain(&["--json"])).json();
    let results = json["results"].as_array().expect("a list");
    assert_eq!(results.len(), 6);
    for row in results {
        for key in [
            "median_s",
            "min_s",
            "max_s",
            "predict_s",
            "predict_share",
            "qk_sparsity",
            "pv_sparsity",
            "gflops_dense_equivalent",
            "gflops_computed",
            "speedup",
        ] {
            assert!(row[key].is_number(), "{key} in {row}");
        }
        assert_eq!(
            row["peer_ratio"]["torch.sdpa"].is_number(),
            row["shape"] == "2/1x300x16:causal"
        );
    }
    assert_eq!(results[0]["policy"], "dense");
    assert_eq!(results[0]["qk_sparsity"], 0.0);
    let text = sparge(args).ok().stdout.clone();
    for part in ["2/1x300x16:causal", "topk:0.5", "× torch.sdpa", "GFLOP/s"] {
        assert!(text.contains(part), "no {part} in {text}");
    }
    for dtype in ["f16", "bf16"] {
        let args = ["bench", "--shape", "1x100x8", "--reps", "1", "--dtype", dtype, "--json"];
        assert_eq!(sparge(args).json()["dtype"], dtype);
    }
    let bad = files.write_bytes("bad.jsonl", b"{\"peer\": 3}\n");
    sparge(["bench", "--shape", "1x9x9", "--peer-json", &bad]).refused(2, "is no peer result");
}

/// Size of a PNG, decoded completely.
fn png_size(path: &str) -> (u32, u32) {
    let file = std::io::BufReader::new(std::fs::File::open(path).expect("there"));
    let mut reader = png::Decoder::new(file).read_info().expect("a PNG");
    let mut pixels = vec![0; reader.output_buffer_size().expect("a size")];
    let info = reader.next_frame(&mut pixels).expect("complete");
    (info.width, info.height)
}

#[test]
fn inspect_draws() {
    let files = Files::new();
    let picture = files.path("mask.png");
    let mut packed = qkv([4, 2], [500, 500], 16);
    packed.push(("cu_seqlens_q", i32s(&[0, 200, 500])));
    packed.push(("cu_seqlens_k", i32s(&[0, 200, 500])));
    let mut masked = qkv([4, 2], [300, 400], 16);
    let pairs: Vec<u8> = (0..4 * 300 * 400).map(|i| u8::from(i % 5 != 0)).collect();
    masked.push(("attn_mask", u8s("BOOL", &[1, 4, 300, 400], &pairs)));
    let blocks: Vec<u8> = (0..4 * 3 * 7).map(|i| u8::from(i % 4 != 1)).collect();
    masked.push(("block_mask", u8s("U8", &[1, 4, 3, 7], &blocks)));
    let mut padded = qkv([4, 2], [300, 400], 16);
    padded.push(("kv_lens", i32s(&[333])));
    let cases: Vec<Case<'_>> = vec![
        (qkv([4, 2], [500, 500], 16), &["--causal", "--topk", "0.4", "--head", "3"]),
        (qkv([4, 2], [500, 700], 16), &["--window", "100", "--cdf", "0.5"]),
        (qkv([4, 2], [1, 1], 4), &[]),
        (packed, &["--causal", "--sequence", "1", "--topk", "0.1,0.2,0.3,0.4", "--head", "2"]),
        (masked, &["--topk", "0.4", "--head", "1"]),
        (padded, &["--cdf", "0.7", "--head", "1"]),
    ];
    for (tensors, flags) in cases {
        let input = files.write("in.safetensors", &tensors);
        let args = [&["inspect", &input, "-o", &picture, "--json"][..], flags].concat();
        let json = sparge(&args).json();
        assert!(json["qk_sparsity"].is_number(), "{json}");
        assert!(json["mass_kept"].as_f64().is_some_and(|m| m > 0.0 && m < 1.0001), "{json}");
        let (width, height) = png_size(&picture);
        assert!(width > 600 && height > 200, "{width}x{height}");
        std::fs::remove_file(&picture).expect("removed");
    }
}

#[test]
fn inspect_says_what_attend_computes() {
    let files = Files::new();
    let input = files.write("in.safetensors", &qkv([2, 1], [500, 700], 16));
    let (picture, output) = (files.path("mask.png"), files.path("out.safetensors"));
    let flags = ["--causal", "--causal-align", "bottom-right", "--topk", "0.3", "--json"];
    let mut sparsity = 0.0;
    for head in ["0", "1"] {
        let args = [&["inspect", &input, "-o", &picture, "--head", head][..], &flags].concat();
        sparsity += sparge(&args).json()["qk_sparsity"].as_f64().expect("a number") / 2.0;
    }
    let args = [&["attend", &input, "-o", &output][..], &flags].concat();
    let whole = sparge(&args).json()["qk_sparsity"].as_f64().expect("a number");
    assert!((whole - sparsity).abs() < 1e-12, "{whole} {sparsity}");
}

#[test]
fn doctor_tells() {
    let json = sparge(["doctor", "--json"]).json();
    assert_eq!(json["threads"], 2);
    assert_eq!(json["default_config"][0]["tokens"], 512);
    assert!(json["isa_available"].as_array().is_some_and(|a| a.contains(&json["isa_chosen"])));
    let text = sparge(["doctor"]).ok().stdout.clone();
    for part in ["processor", "kernels", "threads", "cache", "32768"] {
        assert!(text.contains(part), "no {part} in {text}");
    }
}

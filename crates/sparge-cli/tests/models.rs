//! The subcommands with a language model.
//!
//! The model and the text come from the cache or the network. Without both the tests pass with a
//! message; `SPARGE_REQUIRE_MODELS=1` makes that a failure. `SPARGE_CACHE` names another cache.

#![expect(clippy::disallowed_methods, reason = "tests are configured by the environment")]
#![expect(clippy::print_stdout, reason = "a skipped test says so")]

mod common;

use common::*;

/// Runs with the caller's cache; `None`, with a message, where the model cannot be had.
fn with_model(args: &[&str]) -> Option<Ran> {
    let mut command = command();
    for name in ["SPARGE_CACHE", "SPARGE_INDEX_URL", "SPARGE_OFFLINE"] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    let ran = ran(&command.args(args).output().expect("starts"));
    if ran.code == Some(1) && ran.stderr.contains("cannot fetch") {
        assert_ne!(std::env::var("SPARGE_REQUIRE_MODELS").as_deref(), Ok("1"), "{}", ran.stderr);
        println!("SKIPPED: {} (SPARGE_REQUIRE_MODELS=1 makes this a failure)", ran.stderr.trim());
        return None;
    }
    Some(ran)
}

#[test]
fn run_has_its_keys() {
    let args = ["run", "--context", "400", "--max-new-tokens", "6", "--topk", "0.6", "--json"];
    let Some(ran) = with_model(&args) else { return };
    let json = ran.json();
    for key in
        ["ttft_sparse_s", "ttft_dense_s", "ppl_sparse", "ppl_dense", "qk_sparsity", "pv_sparsity"]
    {
        assert!(json[key].is_number(), "{key} in {json}");
    }
    assert_eq!((&json["model"], &json["context"]), (&"smollm2-135m".into(), &400.into()));
    assert!(json["text"].as_str().is_some_and(|text| !text.is_empty()));
    assert_eq!(json["layers"].as_array().map(Vec::len), Some(30));
    let (sparse, dense) = (json["ppl_sparse"].as_f64(), json["ppl_dense"].as_f64());
    assert!(dense.is_some_and(|x| x > 10.0 && x < 100.0) && sparse != dense, "{json}");
    assert_eq!(ran.stderr, "");
}

#[test]
fn run_in_words() {
    let files = Files::new();
    let prompt = "The quick brown fox jumps over the lazy dog. ".repeat(20);
    let prompt = files.write_bytes("prompt.txt", prompt.as_bytes());
    let args = [
        "run",
        "--prompt-file",
        &prompt,
        "--max-new-tokens",
        "8",
        "--cdf",
        "0.9",
        "--theta",
        "0.1",
        "--lambda",
        "8",
        "--threads",
        "2",
    ];
    let Some(ran) = with_model(&args) else { return };
    for part in ["time to first token", "perplexity", "by layer", "quick", "8 tokens"] {
        assert!(ran.ok().stdout.contains(part), "no {part} in {}", ran.stdout);
    }
    // A pipe is no terminal: no bars.
    assert_eq!(ran.stderr, "");
}

#[test]
fn run_dense_only_and_sparse_only() {
    let args = ["run", "--context", "200", "--max-new-tokens", "2", "--json"];
    let Some(ran) = with_model(&[&args[..], &["--policy", "dense"]].concat()) else { return };
    let json = ran.json();
    assert!(json["ttft_sparse_s"].is_null() && json["ttft_dense_s"].is_number(), "{json}");
    let sampled = ["--no-compare", "--temperature", "0.8", "--top-p", "0.9", "--seed", "3"];
    let Some(ran) = with_model(&[&args[..], &sampled].concat()) else { return };
    let json = ran.json();
    assert!(json["ttft_sparse_s"].is_number() && json["ttft_dense_s"].is_null(), "{json}");
}

#[test]
fn run_refuses() {
    let cases: [(&[&str], &str); 5] = [
        (&["run", "--context", "9000"], "8192"),
        (&["run", "--context", "200", "--topk", "1.5"], "top_k is 1.5"),
        (&["run", "--context", "1"], "at least 2"),
        (&["run", "--context", "200", "--topk", "0.5,0.6"], "entries"),
        (&["eval", "ppl", "--context", "1"], "at least 2"),
    ];
    for (args, part) in cases {
        let Some(ran) = with_model(args) else { return };
        ran.refused(2, part);
    }
}

#[test]
fn ppl() {
    let args =
        ["eval", "ppl", "--context", "150,300", "--windows", "2", "--policy", "dense,topk:0.5"];
    let Some(ran) = with_model(&[&args[..], &["--json"]].concat()) else { return };
    let json = ran.json();
    let results = json["results"].as_array().expect("a list");
    assert_eq!(results.len(), 4);
    for row in results {
        for key in ["ppl", "ppl_change", "ttft_s", "attention_s", "qk_sparsity", "speedup"] {
            assert!(row[key].is_number(), "{key} in {row}");
        }
    }
    let Some(ran) = with_model(&args) else { return };
    assert!(ran.ok().stdout.contains("perplexity"));
}

#[test]
fn needle() {
    let args = [
        "eval",
        "needle",
        "--context",
        "300",
        "--depth",
        "0.2,0.8",
        "--policy",
        "dense,cdf:0.99",
        "--trials",
        "1",
    ];
    let Some(ran) = with_model(&[&args[..], &["--json"]].concat()) else { return };
    let json = ran.json();
    assert_eq!(json["results"].as_array().map(Vec::len), Some(4));
    assert!(json["accuracy"][0]["accuracy"].as_f64().is_some_and(|a| a >= 0.5), "{json}");
    let Some(ran) = with_model(&args) else { return };
    assert!(ran.ok().stdout.contains("depth"));
    let Some(ran) = with_model(&["eval", "needle", "--context", "20"]) else { return };
    ran.refused(2, "no room");
    let Some(ran) = with_model(&["eval", "needle", "--depth", "2"]) else { return };
    ran.refused(2, "--depth");
}

#[test]
fn needles_among_needles() {
    for hay in [&["--keys", "3"][..], &["--haystack", "needles"]] {
        let args = ["eval", "needle", "--context", "400", "--depth", "1", "--policy", "dense"];
        let Some(ran) = with_model(&[&args[..], hay, &["--json"]].concat()) else { return };
        let json = ran.json();
        assert_eq!(json["results"][0]["trials"], 1, "{json}");
        assert!(json["results"][0]["answer"].as_str().is_some_and(|a| !a.is_empty()), "{json}");
    }
}

#[test]
fn error_of_every_policy_in_one_reading() {
    let args = [
        "eval",
        "error",
        "--context",
        "600",
        "--every",
        "15",
        "--policy",
        "dense,topk:0.5,minference:v=30,s=100,xattention:0.8",
    ];
    let Some(ran) = with_model(&[&args[..], &["--json"]].concat()) else { return };
    let json = ran.json();
    let results = json["results"].as_array().expect("a list");
    assert_eq!(results.len(), 4);
    assert_eq!(results[0]["rel_l1"], 0.0);
    for row in &results[1..] {
        assert_eq!(row["layers"].as_array().map(Vec::len), Some(2));
        assert!(row["rel_l1"].as_f64().is_some_and(|e| e > 0.0 && e < 0.5), "{row}");
        assert!(row["qk_sparsity"].as_f64().is_some_and(|s| s > 0.1), "{row}");
    }
    let Some(ran) = with_model(&args) else { return };
    assert!(ran.ok().stdout.contains("relative L1"));
}

#[test]
fn run_under_a_method() {
    let args = ["run", "--context", "600", "--max-new-tokens", "4", "--json", "--policy"];
    let Some(ran) = with_model(&[&args[..], &["flexprefill:0.9,min=128"]].concat()) else { return };
    let json = ran.json();
    assert!(json["ppl_dense"].is_number() && json["qk_sparsity"].as_f64().is_some_and(|s| s > 0.0));
}

#[test]
fn inspect() {
    let files = Files::new();
    let picture = files.path("model.png");
    let args = [
        "inspect",
        "--model",
        "smollm2-135m",
        "--context",
        "300",
        "-o",
        &picture,
        "--topk",
        "0.5",
        "--json",
    ];
    let Some(ran) = with_model(&args) else { return };
    let json = ran.json();
    assert_eq!(json["heads"].as_array().map(Vec::len), Some(30));
    assert!(std::fs::read(&picture).is_ok_and(|bytes| bytes.starts_with(b"\x89PNG")));
    let Some(ran) = with_model(&[&args[..], &["--layer", "3", "--head", "5"]].concat()) else {
        return;
    };
    // The picture's head is the one that the model computed.
    let (all, one) = (&json["heads"][3][5], &ran.json()["qk_sparsity"]);
    assert!(matches!((all.as_f64(), one.as_f64()), (Some(a), Some(b)) if (a - b).abs() < 1e-12));
    for (layer, head, part) in [("30", "0", "0 to 29"), ("0", "9", "0 to 8")] {
        let at = ["--layer", layer, "--head", head];
        let Some(ran) = with_model(&[&args[..], &at].concat()) else { return };
        ran.refused(2, part);
    }
}

#[test]
fn texts_that_are_too_short() {
    let files = Files::new();
    let text = files.write_bytes("prompt.txt", b"Some words to read, and some more.");
    for eval in ["ppl", "needle", "error"] {
        let args = ["eval", eval, "--context", "300", "--prompt-file", &text];
        let Some(ran) = with_model(&args) else { return };
        ran.refused(2, "tokens, expected 300; use a longer text");
    }
}

#[test]
fn models_that_are_not_there() {
    let files = Files::new();
    let text = files.write_bytes("prompt.txt", b"Some words to read, and some more.");
    let run = |args: &[&str]| sparge([&["run", "--prompt-file", &text][..], args].concat());
    run(&["--model", "gpt-17"]).refused(2, "unknown model");
    run(&["--model", "/nowhere/model.gguf"]).refused(2, "there is no file");
    let empty = files.path("cache");
    run(&["--offline", "--cache-dir", &empty]).refused(1, "the network is switched off");
    run(&["--offline", "--cache-dir", &empty, "--model", "someone/something"])
        .refused(1, "the network is switched off");
    run(&["--policy", "dense", "--topk", "0.5"]).refused(2, "nothing to select");
    run(&["--temperature", "-1"]).refused(2, "temperature");
    sparge(["run", "--prompt-file", "/nowhere/text.txt"]).refused(2, "cannot read");
    let binary = files.write_bytes("binary.txt", &[0xff, 0xfe, 0x00]);
    sparge(["run", "--prompt-file", &binary]).refused(2, "is not UTF-8");
}

#[test]
fn hostile_models() {
    let files = Files::new();
    let text = files.write_bytes("prompt.txt", b"Some words to read, and some more.");
    let head = |tensors: u64, keys: u64| {
        [&b"GGUF"[..], &3u32.to_le_bytes(), &tensors.to_le_bytes(), &keys.to_le_bytes()].concat()
    };
    let cases: Vec<Vec<u8>> = vec![
        vec![],
        b"GGUF".to_vec(),
        b"PK\x03\x04 no model at all, but long enough to have a header".to_vec(),
        head(0, 0),
        head(u64::MAX, u64::MAX),
        head(1 << 40, 1),
        [head(0, 1), u64::MAX.to_le_bytes().to_vec()].concat(),
        [head(1, 0), 3u64.to_le_bytes().to_vec(), b"abc".to_vec(), vec![255; 64]].concat(),
    ];
    for bytes in cases {
        let model = files.write_bytes("model.gguf", &bytes);
        let ran = sparge(["run", "--model", &model, "--prompt-file", &text]);
        ran.refused(2, "");
    }
}

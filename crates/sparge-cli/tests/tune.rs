//! `sparge tune` on recorded tensors, and the file it writes in other hands.

mod common;

use common::*;

fn sample(files: &Files, name: &str, seed: f32) -> String {
    let (heads, len, dim) = (2, 700, 16);
    let shape = [1, heads, len, dim];
    let n = heads * len * dim;
    // Louder queries and keys than the other tests': attention that has something to select.
    let loud = |phase| wave(n, phase).iter().map(|x| 3.0 * x).collect::<Vec<f32>>();
    files.write(
        name,
        &[
            ("q", f32s(&shape, &loud(seed))),
            ("k", f32s(&shape, &loud(seed + 1.0))),
            ("v", f32s(&shape, &wave(n, seed + 2.0))),
        ],
    )
}

#[test]
fn tune_writes_what_attend_uses() {
    let files = Files::new();
    let (a, b) = (sample(&files, "a.safetensors", 1.0), sample(&files, "b.safetensors", 5.0));
    let (file, out) = (files.path("tuned.json"), files.path("o.safetensors"));
    let args = ["tune", "--input", &a, "--input", &b, "--causal", "--l1", "0.1", "-o", &file];
    let json = sparge(args.iter().chain(&["--json"])).json();
    assert_eq!(json["format"], "sparge-calibration");
    assert_eq!(json["data"]["samples"], 2);
    let (heads, bound) = (&json["layers"][0]["heads"], json["bounds"]["l2"].as_f64().expect("l2"));
    assert_eq!(heads.as_array().map(Vec::len), Some(2));
    for head in heads.as_array().expect("heads") {
        let error = head["rel_l1"].as_f64().expect("a number");
        assert!(error <= bound * 1.001, "{head}");
    }
    assert!(json["measured"]["qk_sparsity"].as_f64().is_some_and(|x| x > 0.03), "{json}");
    assert!(!files.names().iter().any(|n| n.contains("progress")), "{:?}", files.names());

    // On the two samples together attend skips and errs as the file says.
    let mut sparsity = 0.0;
    for input in [&a, &b] {
        let args = ["attend", input, "-o", &out, "--causal", "--calibration", &file, "--compare"];
        let ran = sparge(args.iter().chain(&["--json"])).json();
        assert!(ran["rel_l1"].as_f64().is_some_and(|x| x > 0.0 && x < 2.0 * bound), "{ran}");
        sparsity += ran["qk_sparsity"].as_f64().expect("a number") / 2.0;
    }
    let said = json["measured"]["qk_sparsity"].as_f64().expect("a number");
    assert!((sparsity - said).abs() < 1e-4, "{sparsity} {said}");

    let other = files.write("other.safetensors", &qkv([4, 2], [100, 100], 16));
    let attend = |extra: &[&str]| {
        let args = [&["attend", &other, "-o", &out, "--calibration"], extra].concat();
        sparge(args)
    };
    attend(&[&file]).refused(2, "with 2 query heads, this model has 4");
    attend(&[&other]).refused(2, "other.safetensors");
    attend(&[&file, "--topk", "0.5"]).refused(2, "--topk");
    let old =
        std::fs::read_to_string(&file).expect("there").replace("\"version\": 1", "\"version\": 0");
    let old = files.write_bytes("old.json", old.as_bytes());
    attend(&[&old]).refused(2, "its version is 0");
    let args = ["attend", &a, "-o", &out, "--calibration", &file, "--layer", "1"];
    sparge(args).refused(2, "there is no layer 1");

    let page = files.path("page.html");
    sparge(["inspect", "--calibration", &file, "-o", &page]).ok();
    let html = std::fs::read_to_string(&page).expect("there");
    assert!(html.starts_with("<!DOCTYPE html>") && html.matches("<rect").count() == 3 * 2);
    assert!(!html.contains("http"), "the page is self-contained");
    let picture = files.path("page.png");
    sparge(["inspect", "--calibration", &file, "-o", &picture]).ok();
    assert!(std::fs::read(&picture).expect("there").starts_with(b"\x89PNG"));
    let args = ["inspect", "--calibration", &file, "-o", &files.path("page.txt")];
    sparge(args).refused(2, ".png or .html");
}

#[test]
fn layers_in_one_file() {
    let files = Files::new();
    let layer = |i: usize, phase: f32| {
        let names = [
            ["layers.0.q", "layers.0.k", "layers.0.v"],
            ["layers.1.q", "layers.1.k", "layers.1.v"],
        ];
        let shape = [1, 2, 300, 8];
        names[i].map(|n| (n, bf16s(&shape, &wave(2 * 300 * 8, phase + n.len() as f32 + i as f32))))
    };
    let input = files.write("r.safetensors", &[layer(0, 1.0), layer(1, 2.0)].concat());
    let file = files.path("tuned.json");
    let json = sparge(["tune", "--input", &input, "-o", &file, "--topk", "--json"]).json();
    assert_eq!(json["layers"].as_array().map(Vec::len), Some(2));
    assert!(json["layers"][1]["heads"][1]["cdf"].is_null());
    let mixed = [layer(0, 1.0).to_vec(), qkv([1, 1], [30, 30], 8)].concat();
    let mixed: Vec<_> = mixed
        .into_iter()
        .map(|(n, t)| {
            (
                match n {
                    "q" => "layers.1.q",
                    "k" => "layers.1.k",
                    "v" => "layers.1.v",
                    n => n,
                },
                t,
            )
        })
        .collect();
    let mixed = files.write("mixed.safetensors", &mixed);
    sparge(["tune", "--input", &mixed, "-o", &file])
        .refused(2, "another shape than the layer before");
    sparge(["tune", "--input", &input, "--l1", "0.1", "--l2", "0.05", "-o", &file])
        .refused(2, "--l2 is 0.05, below --l1");
    sparge(["tune", "--input", &input, "--l1", "2", "-o", &file]).refused(2, "below 1");
}

#[test]
fn an_interrupted_run_goes_on() {
    let files = Files::new();
    let good = sample(&files, "good.safetensors", 1.0);
    let shape = [1, 2, 700, 16];
    let n = shape.iter().product();
    let mut v = wave(n, 3.0);
    v[5] = f32::INFINITY;
    let x = wave(n, 1.0);
    let tensors = [("q", f32s(&shape, &x)), ("k", f32s(&shape, &x)), ("v", f32s(&shape, &v))];
    let bad = files.write("bad.safetensors", &tensors);
    let file = files.path("tuned.json");
    let args = ["tune", "--input", &good, "--input", &bad, "-o", &file];
    sparge(args).refused(2, "not finite");
    assert!(files.names().contains(&"tuned.json.progress".into()), "{:?}", files.names());
    let again = sparge(args);
    assert_eq!(again.code, Some(2));
    assert!(
        again.stderr.contains("going on") && again.stderr.contains("1 samples read"),
        "{}",
        again.stderr
    );
    // Other data: the progress is not this run's.
    let other = ["tune", "--input", &good, "-o", &file];
    sparge(other).refused(2, "begin again with --restart");
    sparge(other.iter().chain(&["--restart"])).ok();
    assert!(!files.names().contains(&"tuned.json.progress".into()), "{:?}", files.names());
}

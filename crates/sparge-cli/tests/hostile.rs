//! Bad usage, broken files, outputs that must appear whole or not at all.

mod common;

use common::*;

#[track_caller]
fn refused(files: &Files, input: &str, flags: &[&str], part: &str) {
    let output = files.path("out.safetensors");
    let args = [&["attend", input, "-o", &output][..], flags].concat();
    sparge(&args).refused(2, part);
    assert!(!files.names().iter().any(|n| n.starts_with("out") || n.ends_with(".part")));
}

#[test]
fn broken_files() {
    let good = bytes(&qkv([2, 1], [70, 70], 8));
    let entry = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"q":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let huge = u64::MAX.to_string();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("empty", vec![]),
        ("five bytes", good[..5].to_vec()),
        ("header cut", good[..60].to_vec()),
        ("data cut", good[..good.len() - 1].to_vec()),
        ("data too long", [good.clone(), vec![0]].concat()),
        ("header of 2^64-1", [vec![255; 8], vec![b' '; 64]].concat()),
        ("header of 90 MB", [90_000_000u64.to_le_bytes().to_vec(), b"{}".to_vec()].concat()),
        ("no JSON", raw("hello", &[])),
        ("not UTF-8", raw_bytes(&[b'{', 0xff, 0xfe, b'}'])),
        ("deep JSON", raw(&"[".repeat(100_000), &[])),
        ("a list", raw("[]", &[])),
        ("unknown dtype", raw(&entry("F33", "[1]", "[0,4]"), &[0; 4])),
        ("negative shape", raw(&entry("F32", "[-1]", "[0,4]"), &[0; 4])),
        ("huge shape", raw(&entry("F32", &format!("[{huge},{huge}]"), "[0,4]"), &[0; 4])),
        ("huge offsets", raw(&entry("F32", "[1]", &format!("[{huge},{huge}]")), &[0; 4])),
        ("offsets backwards", raw(&entry("F32", "[1]", "[4,0]"), &[0; 4])),
        ("shape against offsets", raw(&entry("F32", "[1000000]", "[0,4]"), &[0; 4])),
        (
            "overlap",
            raw(
                r#"{"q":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"k":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#,
                &[0; 6],
            ),
        ),
        (
            "hole",
            raw(
                r#"{"q":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"k":{"dtype":"U8","shape":[4],"data_offsets":[6,10]}}"#,
                &[0; 10],
            ),
        ),
    ];
    for (name, bytes) in cases {
        let files = Files::new();
        let input = files.write_bytes("in.safetensors", &bytes);
        eprintln!("{name}");
        refused(&files, &input, &[], "is not a valid safetensors file");
    }
}

fn raw_bytes(header: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header].concat()
}

#[expect(clippy::type_complexity, reason = "tensors, flags, and what the error says")]
#[test]
fn wrong_tensors() {
    let good = || qkv([2, 1], [70, 70], 8);
    let with = |name: &'static str, tensor: Tensor| {
        let mut tensors = good();
        tensors.retain(|t| t.0 != name);
        tensors.push((name, tensor));
        tensors
    };
    let zeros = |n: usize| vec![0.0; n];
    let cases: Vec<(Vec<(&'static str, Tensor)>, &[&str], &str)> = vec![
        (good()[..2].to_vec(), &[], "no tensor 'v'"),
        (vec![], &[], "no tensor 'q'"),
        (with("k", f16s(&[1, 1, 70, 8], &zeros(560))), &[], "must have one type"),
        (
            vec![
                ("q", u8s("U8", &[1], &[0])),
                ("k", u8s("U8", &[1], &[0])),
                ("v", u8s("U8", &[1], &[0])),
            ],
            &[],
            "expected F32, F16 or BF16",
        ),
        (with("q", f32s(&[70, 8], &zeros(560))), &[], "expected [batch, heads, tokens, head_dim]"),
        (with("q", f32s(&[1, 2, 0, 8], &[])), &[], "qo_len is 0"),
        (with("q", f32s(&[1, 2, 70, 0], &[])), &[], "head_dim"),
        (with("q", f32s(&[1, 2, 70, 16], &zeros(2240))), &[], "head_dim"),
        (with("q", f32s(&[2, 1, 70, 8], &zeros(1120))), &[], "batch"),
        (with("v", f32s(&[1, 1, 71, 8], &zeros(568))), &[], "kv_len"),
        (with("v", f32s(&[1, 1, 70, 257], &zeros(17990))), &[], "head_dim of v"),
        (with("attn_mask", i32s(&[1])), &[], "'attn_mask' is I32"),
        (with("attn_mask", f32s(&[1, 1, 70, 71], &zeros(4970))), &[], "attn_mask"),
        (with("attn_mask", f32s(&[70], &zeros(70))), &[], "'attn_mask' has shape"),
        (with("block_mask", u8s("U8", &[1, 2, 1, 3], &[1; 6])), &[], "block_mask"),
        (with("block_mask", u8s("U8", &[2], &[1; 2])), &[], "'block_mask' has shape"),
        (with("block_mask", f32s(&[1, 2, 1, 2], &zeros(4))), &[], "expected U8 or BOOL"),
        (with("cu_seqlens_q", i32s(&[0, 70])), &[], "no cu_seqlens_k"),
        (with("kv_lens", i32s(&[-3])), &[], "holds -3"),
        (with("kv_lens", i32s(&[71])), &[], "kv_lens"),
        (with("kv_lens", f32s(&[1], &[70.0])), &[], "expected I32 or I64"),
        (good(), &["--topk", "0.5,0.6,0.7"], "entries"),
        (good(), &["--topk", "0.5,0.6", "--cdf", "0.5,0.6,0.7"], "one per query head"),
        (good(), &["--topk", "1.5"], "top_k is 1.5"),
        (good(), &["--cdf", "nan"], "cdf is NaN"),
        (good(), &["--theta", "1"], "theta"),
        (good(), &["--lambda", "-3"], "lambda"),
        (good(), &["--pooling", "17x16"], "pooling"),
        (good(), &["--scale", "inf"], "softmax_scale"),
        (qkv([2, 1], [70, 80], 8), &["--causal"], "--causal-align"),
    ];
    for (tensors, flags, part) in cases {
        let files = Files::new();
        let input = files.write("in.safetensors", &tensors);
        refused(&files, &input, flags, part);
    }
    let files = Files::new();
    let mut tensors = good();
    tensors.push(("cu_seqlens_q", i32s(&[0, 60, 50, 70])));
    tensors.push(("cu_seqlens_k", i32s(&[0, 60, 50, 70])));
    let input = files.write("in.safetensors", &tensors);
    refused(&files, &input, &[], "cu_seqlens_q");
    tensors.push(("kv_lens", i32s(&[70])));
    let input = files.write("in.safetensors", &tensors);
    refused(&files, &input, &[], "both cu_seqlens and kv_lens");
}

#[test]
fn small_files_cannot_ask_for_huge_results() {
    // 2 million rows of one element, but values of 256: half a terabyte of output per head.
    let rows = 1 << 21;
    let q = Tensor { dtype: "F32", shape: vec![1, 256, rows / 256, 1], bytes: vec![0; rows * 4] };
    let k = Tensor { dtype: "F32", shape: vec![1, 1, 1, 1], bytes: vec![0; 4] };
    let v = Tensor { dtype: "F32", shape: vec![1, 1, 1, 256], bytes: vec![0; 1024] };
    // Packed: a million empty sequences, each with a mask row for the longest one's blocks.
    let n = 1 << 17;
    let mut offsets = vec![0; 1 << 20];
    offsets.push(n);
    let long = |h| Tensor {
        dtype: "F32",
        shape: vec![1, h, n as usize, 1],
        bytes: vec![0; h * n as usize * 4],
    };
    let packed = vec![
        ("q", long(4)),
        ("k", long(1)),
        ("v", long(1)),
        ("cu_seqlens_q", i32s(&offsets)),
        ("cu_seqlens_k", i32s(&offsets)),
    ];
    let files = Files::new();
    let input = files.write("in.safetensors", &packed);
    refused(&files, &input, &["--topk", "0.1", "--write-mask"], "of memory are available");
    // The first fits on large machines: it must end in a result or in the same refusal.
    let input = files.write("wide.safetensors", &[("q", q), ("k", k), ("v", v)]);
    let output = files.path("wide-out.safetensors");
    let ran = sparge(["attend", &input, "-o", &output, "--json", "--dense"]);
    assert!(matches!(ran.code, Some(0 | 2)), "{:?} {}", ran.code, ran.stderr);
}

#[test]
fn bad_usage() {
    let files = Files::new();
    let input = files.write("in.safetensors", &qkv([2, 1], [70, 70], 8));
    let output = files.path("out.safetensors");
    let cases: &[(&[&str], &str)] = &[
        (&["attend"], "required arguments"),
        (&["attend", &input], "--output"),
        (&["attend", &input, "-o", &output, "--frobnicate"], "--frobnicate"),
        (&["attend", &input, "-o", &output, "--dense", "--topk", "0.5"], "cannot be used with"),
        (&["attend", &input, "-o", &output, "--causal-align", "top-left"], "--causal"),
        (&["attend", &input, "-o", &output, "--window", "0"], "at least 1"),
        (&["attend", &input, "-o", &output, "--pooling", "huge"], "expected block"),
        (&["attend", &input, "-o", &output, "--isa", "sse9"], "sse9"),
        (&["attend", &input, "-o", &output, "--threads", "0"], "--threads"),
        (&["attend", "/nowhere/in.safetensors", "-o", &output], "cannot read"),
        (&["attend", "/dev/zero", "-o", &output], "not a regular file"),
        (&["attend", &input, "-o", "/nowhere/out.safetensors"], "does not exist"),
        (&["attend", &input, "-o", "/"], "is a directory"),
        (&["paint"], "unrecognized subcommand"),
        (&["bench", "--shape", "9x9"], "expected HEADSxTOKENSxDIM"),
        (&["bench", "--shape", "3/2x9x9", "--reps", "1"], "num_qo_heads"),
        (&["bench", "--policy", "topk:2"], "expected dense, default"),
        (&["bench", "--peer-json", "/nowhere", "--shape", "1x9x9"], "cannot read"),
        (&["inspect", "-o", &output], "nothing to draw"),
        (&["inspect", "-o", &output, "--model", "x", "--causal"], "drop --causal"),
        (&["inspect", "-o", &output, "--model", "x", "--head", "1"], "needs --layer"),
        (&["inspect", "-o", &output, "--model", "x", "--sequence", "1"], "cannot be used with"),
        (&["inspect", &input, "-o", &output, "--prompt-file", "x"], "drop them"),
        (&["inspect", &input, "-o", &output, "--context", "9"], "drop them"),
        (&["run", "--top-p", "0.5"], "--temperature"),
        (&["inspect", &input, "-o", &output, "--head", "2"], "expected 0 to 1"),
        (&["inspect", &input, "-o", &output, "--sequence", "1"], "expected 0 to 0"),
    ];
    for (args, part) in cases {
        sparge(*args).refused(2, part);
    }
    assert_eq!(files.names(), ["in.safetensors"]);
}

#[test]
fn errors_with_json_leave_stdout_empty() {
    sparge(["attend", "/nowhere", "-o", "x.safetensors", "--json"]).refused(2, "cannot read");
}

#[test]
fn the_environment_is_read_and_checked() {
    let run = |name: &str, value: &str| {
        ran(&command().args(["doctor", "--json"]).env(name, value).output().expect("starts"))
    };
    assert_eq!(run("SPARGE_ISA", "scalar").json()["isa_chosen"], "scalar");
    assert_eq!(run("SPARGE_THREADS", "3").json()["threads"], 3);
    assert_eq!(run("SPARGE_CACHE", "/nowhere").json()["cache"]["directory"], "/nowhere");
    run("SPARGE_ISA", "sse9").refused(2, "sse9");
}

#[test]
fn a_failed_write_is_exit_code_1_and_leaves_the_old_output() {
    // A file where the directory should be writable, but the disk (/dev/full) is not.
    let files = Files::new();
    let input = files.write("in.safetensors", &qkv([1, 1], [70, 70], 8));
    if std::fs::metadata("/proc/self").is_ok() {
        sparge(["attend", &input, "-o", "/proc/self/out.safetensors"]).refused(1, "cannot write");
    }
}

#[test]
fn a_closed_stdout_is_no_error() {
    use std::process::Stdio;
    let mut child = command()
        .args(["doctor"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("ends");
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
}

#[cfg(unix)]
#[test]
fn an_interrupt_leaves_no_file() {
    use std::process::Command;
    use std::time::Duration;
    let files = Files::new();
    let input = files.write("in.safetensors", &qkv([8, 8], [6000, 6000], 64));
    for (signal, wait) in [("INT", 50), ("TERM", 150), ("INT", 700), ("TERM", 1500)] {
        let output = files.path("out.safetensors");
        let mut child =
            command().args(["attend", &input, "-o", &output, "--dense"]).spawn().expect("starts");
        std::thread::sleep(Duration::from_millis(wait));
        let id = child.id().to_string();
        let kill = Command::new("sh").args(["-c", "kill -$0 $1", signal, &id]).status();
        assert!(kill.is_ok_and(|s| s.success()) || child.try_wait().is_ok_and(|s| s.is_some()));
        let status = child.wait().expect("ends");
        let names = files.names();
        assert!(!names.iter().any(|n| n.ends_with(".part")), "{names:?}");
        // Whatever is there is whole.
        if names.iter().any(|n| n.starts_with("out")) {
            assert!(status.success() || status.code() == Some(130), "{status}");
            assert_eq!(read(&output, "o").1, [1, 8, 6000, 64]);
            std::fs::remove_file(&output).expect("removed");
        }
    }
}

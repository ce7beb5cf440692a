//! What the tests of the binary share: running it, and writing and reading safetensors.

#![expect(dead_code, reason = "each test binary uses a part")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A run that has ended.
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs `sparge` with `args`, two threads, and none of the caller's SPARGE variables.
pub(crate) fn sparge<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Ran {
    let output = command().args(args).output().expect("the binary starts");
    ran(&output)
}

/// `sparge`, ready for arguments.
pub(crate) fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sparge"));
    for (name, _) in std::env::vars() {
        if name.starts_with("SPARGE_") {
            command.env_remove(name);
        }
    }
    command.env("SPARGE_THREADS", "2");
    command
}

pub(crate) fn ran(output: &Output) -> Ran {
    Ran {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

impl Ran {
    /// Succeeded; returns stdout as JSON.
    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        self.ok();
        serde_json::from_str(&self.stdout).expect("stdout is one JSON document")
    }

    /// Succeeded.
    #[track_caller]
    pub(crate) fn ok(&self) -> &Self {
        assert_eq!(self.code, Some(0), "stderr: {}", self.stderr);
        self
    }

    /// Failed with `code` and one line that holds `part`, and nothing on stdout.
    #[track_caller]
    pub(crate) fn refused(&self, code: i32, part: &str) {
        assert_eq!(self.code, Some(code), "stderr: {}", self.stderr);
        assert!(self.stderr.starts_with("error: "), "stderr: {}", self.stderr);
        assert_eq!(self.stderr.lines().count(), 1, "stderr: {}", self.stderr);
        assert!(self.stderr.contains(part), "no {part:?} in: {}", self.stderr);
        assert_eq!(self.stdout, "");
    }
}

/// A tensor of a file.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tensor {
    pub(crate) dtype: &'static str,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

pub(crate) fn f32s(shape: &[usize], data: &[f32]) -> Tensor {
    let bytes = data.iter().flat_map(|x| x.to_le_bytes()).collect();
    Tensor { dtype: "F32", shape: shape.to_vec(), bytes }
}

pub(crate) fn f16s(shape: &[usize], data: &[f32]) -> Tensor {
    let bytes = data.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect();
    Tensor { dtype: "F16", shape: shape.to_vec(), bytes }
}

pub(crate) fn bf16s(shape: &[usize], data: &[f32]) -> Tensor {
    let bytes = data.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect();
    Tensor { dtype: "BF16", shape: shape.to_vec(), bytes }
}

pub(crate) fn i32s(data: &[i32]) -> Tensor {
    let bytes = data.iter().flat_map(|x| x.to_le_bytes()).collect();
    Tensor { dtype: "I32", shape: vec![data.len()], bytes }
}

pub(crate) fn i64s(data: &[i64]) -> Tensor {
    let bytes = data.iter().flat_map(|x| x.to_le_bytes()).collect();
    Tensor { dtype: "I64", shape: vec![data.len()], bytes }
}

pub(crate) fn u8s(dtype: &'static str, shape: &[usize], data: &[u8]) -> Tensor {
    Tensor { dtype, shape: shape.to_vec(), bytes: data.to_vec() }
}

/// Smooth data with noise, so that no two blocks are alike.
pub(crate) fn wave(n: usize, phase: f32) -> Vec<f32> {
    let noise = |i: usize| {
        let hash = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15 ^ u64::from(phase.to_bits()));
        ((hash ^ (hash >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) as f32 / (1 << 24) as f32
    };
    (0..n).map(|i| (i as f32 * 0.0037 + phase).sin() + noise(i) - 0.5).collect()
}

/// q, k and v of `[1, heads, len, dim]` with `kv_heads` and `kv_len` for k and v.
pub(crate) fn qkv(
    [heads, kv_heads]: [usize; 2],
    [len, kv_len]: [usize; 2],
    dim: usize,
) -> Vec<(&'static str, Tensor)> {
    let q = [1, heads, len, dim];
    let k = [1, kv_heads, kv_len, dim];
    let size = |s: [usize; 4]| s.iter().product();
    vec![
        ("q", f32s(&q, &wave(size(q), 1.0))),
        ("k", f32s(&k, &wave(size(k), 2.0))),
        ("v", f32s(&k, &wave(size(k), 3.0))),
    ]
}

/// Tensors of a file, and flags to run on them.
pub(crate) type Case<'a> = (Vec<(&'static str, Tensor)>, &'a [&'a str]);

/// The bytes of a safetensors file.
pub(crate) fn bytes(tensors: &[(&str, Tensor)]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data: Vec<u8> = Vec::new();
    for (name, tensor) in tensors {
        let start = data.len();
        data.extend(&tensor.bytes);
        header.insert(
            (*name).into(),
            serde_json::json!({
                "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, data.len()]
            }),
        );
    }
    raw(&serde_json::Value::Object(header).to_string(), &data)
}

/// A file with this header, whatever it says.
pub(crate) fn raw(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    file
}

/// A directory that goes away, and files in it.
pub(crate) struct Files {
    directory: tempfile::TempDir,
}

impl Files {
    pub(crate) fn new() -> Self {
        Self { directory: tempfile::tempdir().expect("a temporary directory") }
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }

    pub(crate) fn root(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn write(&self, name: &str, tensors: &[(&str, Tensor)]) -> String {
        self.write_bytes(name, &bytes(tensors))
    }

    pub(crate) fn write_bytes(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.path(name);
        std::fs::write(&path, bytes).expect("written");
        path
    }

    /// Names of all files, sorted.
    pub(crate) fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(self.directory.path())
            .expect("readable")
            .map(|e| e.expect("readable").file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }
}

/// A tensor of a file as f64 values, with its dtype and shape.
pub(crate) fn read(path: &str, name: &str) -> (String, Vec<usize>, Vec<f64>) {
    let file = std::fs::read(PathBuf::from(path)).expect("readable");
    let tensors = safetensors::SafeTensors::deserialize(&file).expect("valid");
    let tensor = tensors.tensor(name).expect("there");
    let data = tensor.data();
    let values: Vec<f64> = match tensor.dtype() {
        safetensors::Dtype::F64 => map(data, f64::from_le_bytes),
        safetensors::Dtype::F32 => map(data, |b| f64::from(f32::from_le_bytes(b))),
        safetensors::Dtype::F16 => map(data, |b| half::f16::from_le_bytes(b).to_f64()),
        safetensors::Dtype::BF16 => map(data, |b| half::bf16::from_le_bytes(b).to_f64()),
        safetensors::Dtype::U8 => data.iter().map(|&b| f64::from(b)).collect(),
        other => panic!("{other:?}"),
    };
    (format!("{:?}", tensor.dtype()), tensor.shape().to_vec(), values)
}

fn map<const N: usize>(data: &[u8], f: impl Fn([u8; N]) -> f64) -> Vec<f64> {
    data.chunks(N).map(|b| f(b.try_into().expect("whole elements"))).collect()
}

/// Largest difference.
#[track_caller]
pub(crate) fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

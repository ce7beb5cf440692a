//! A tiny random model as the bytes of a GGUF file.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, reason = "a broken test stops")]

use std::path::PathBuf;

/// SplitMix64 as floats in [-1, 1).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }
}

pub const LAYERS: usize = 2;
pub const HIDDEN: usize = 32;
pub const FEED_FORWARD: usize = 48;
pub const HEADS: usize = 4;
pub const KV_HEADS: usize = 2;
pub const HEAD_DIM: usize = 8;
pub const EPS: f32 = 1e-5;
pub const BASE: f32 = 100.0;

pub struct Tiny {
    pub arch: &'static str,
    pub vocab: Vec<String>,
    /// Name, [rows, cols], values.
    pub tensors: Vec<(String, [usize; 2], Vec<f32>)>,
}

/// GPT-2's printable character for each byte.
fn byte_characters() -> Vec<String> {
    let printable =
        |b: u32| (33..127).contains(&b) || (161..173).contains(&b) || (174..256).contains(&b);
    let mut other = 256;
    (0..256)
        .map(|b| {
            let code = if printable(b) {
                b
            } else {
                other += 1;
                other - 1
            };
            char::from_u32(code).unwrap().to_string()
        })
        .collect()
}

pub const MERGES: [&str; 3] = ["h e", "l l", "he ll"];

impl Tiny {
    pub fn new(arch: &'static str, seed: u64) -> Self {
        let mut vocab = byte_characters();
        vocab.extend(MERGES.iter().map(|m| m.replace(' ', "")));
        vocab.extend(["<|im_start|>", "<|im_end|>"].map(String::from));
        let mut random = Random(seed);
        let mut tensors = Vec::new();
        let mut add = |name: String, rows: usize, cols: usize, scale: f32, offset: f32| {
            let values = (0..rows * cols).map(|_| random.next() * scale + offset).collect();
            tensors.push((name, [rows, cols], values));
        };
        add("token_embd.weight".into(), vocab.len(), HIDDEN, 1.0, 0.0);
        add("output_norm.weight".into(), 1, HIDDEN, 0.2, 1.0);
        for i in 0..LAYERS {
            let name = |part: &str| format!("blk.{i}.{part}");
            let kv = KV_HEADS * HEAD_DIM;
            add(name("attn_norm.weight"), 1, HIDDEN, 0.2, 1.0);
            add(name("ffn_norm.weight"), 1, HIDDEN, 0.2, 1.0);
            for (part, rows) in [("attn_q", HEADS * HEAD_DIM), ("attn_k", kv), ("attn_v", kv)] {
                add(name(&format!("{part}.weight")), rows, HIDDEN, 0.5, 0.0);
                if arch == "qwen2" {
                    add(name(&format!("{part}.bias")), 1, rows, 0.5, 0.0);
                }
            }
            add(name("attn_output.weight"), HIDDEN, HEADS * HEAD_DIM, 0.3, 0.0);
            add(name("ffn_gate.weight"), FEED_FORWARD, HIDDEN, 0.3, 0.0);
            add(name("ffn_up.weight"), FEED_FORWARD, HIDDEN, 0.3, 0.0);
            add(name("ffn_down.weight"), HIDDEN, FEED_FORWARD, 0.3, 0.0);
        }
        Self { arch, vocab, tensors }
    }

    pub fn tensor(&self, name: &str) -> Option<&[f32]> {
        self.tensors.iter().find(|t| t.0 == name).map(|t| &t.2[..])
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut values: Vec<(String, Vec<u8>)> = Vec::new();
        let text = |s: &str| [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat();
        let key = |name: &str| format!("{}.{name}", self.arch);
        let typed = |kind: u32, data: &[u8]| [&kind.to_le_bytes()[..], data].concat();
        let texts = |list: &[String]| {
            let mut out =
                typed(9, &[&8u32.to_le_bytes()[..], &(list.len() as u64).to_le_bytes()].concat());
            list.iter().for_each(|t| out.extend(text(t)));
            out
        };
        values.push(("general.architecture".into(), typed(8, &text(self.arch))));
        for (name, n) in [
            ("block_count", LAYERS),
            ("context_length", 512),
            ("embedding_length", HIDDEN),
            ("feed_forward_length", FEED_FORWARD),
            ("attention.head_count", HEADS),
            ("attention.head_count_kv", KV_HEADS),
        ] {
            values.push((key(name), typed(4, &(n as u32).to_le_bytes())));
        }
        values.push((key("rope.freq_base"), typed(6, &BASE.to_le_bytes())));
        values.push((key("attention.layer_norm_rms_epsilon"), typed(6, &EPS.to_le_bytes())));
        values.push(("tokenizer.ggml.model".into(), typed(8, &text("gpt2"))));
        values.push(("tokenizer.ggml.pre".into(), typed(8, &text("smollm"))));
        values.push(("tokenizer.ggml.tokens".into(), texts(&self.vocab)));
        values.push(("tokenizer.ggml.merges".into(), texts(&MERGES.map(String::from))));
        let mut types =
            typed(9, &[&5u32.to_le_bytes()[..], &(self.vocab.len() as u64).to_le_bytes()].concat());
        for token in &self.vocab {
            types.extend(if token.starts_with("<|") { 3i32 } else { 1 }.to_le_bytes());
        }
        values.push(("tokenizer.ggml.token_type".into(), types));
        let template = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}\
                        {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
        values.push(("tokenizer.chat_template".into(), typed(8, &text(template))));

        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((values.len() as u64).to_le_bytes());
        for (name, value) in values {
            out.extend(text(&name));
            out.extend(value);
        }
        let mut offset = 0u64;
        for (name, [rows, cols], data) in &self.tensors {
            out.extend(text(name));
            let dims: &[u64] =
                if *rows == 1 { &[*cols as u64] } else { &[*cols as u64, *rows as u64] };
            out.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(0u32.to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset += (data.len() as u64 * 4).next_multiple_of(32);
        }
        for (_, _, data) in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            data.iter().for_each(|x| out.extend(x.to_le_bytes()));
        }
        out
    }

    pub fn write(&self) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tiny.gguf");
        std::fs::write(&path, self.bytes()).unwrap();
        (dir, path)
    }
}

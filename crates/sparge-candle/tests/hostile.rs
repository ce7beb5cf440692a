//! Broken and hostile GGUF files: an error, at once, without a panic or a large allocation.

mod common;

use common::Tiny;
use proptest::prelude::*;
use sparge_candle::gguf::Header;
use sparge_candle::models::{Config, Model};
use sparge_candle::{Error, Tokenizer};

#[test]
fn a_good_header_is_read() {
    let bytes = Tiny::new("llama", 1).bytes();
    let header = Header::read(&bytes).unwrap();
    assert_eq!(header.text("general.architecture"), Some("llama"));
    assert_eq!(header.int("llama.block_count"), Some(2));
    let last = header.tensors.values().map(|t| t.bytes.end).max().unwrap();
    assert_eq!(last, bytes.len());
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = Tiny::new("llama", 1).bytes();
    for len in (0..bytes.len()).step_by(13) {
        assert!(matches!(Header::read(&bytes[..len]), Err(Error::Gguf(_))), "{len} bytes");
    }
}

#[test]
fn huge_counts_are_refused_before_anything_is_allocated() {
    let bytes = Tiny::new("llama", 1).bytes();
    let huge = [u64::MAX, u64::MAX / 2, 1 << 40, u64::from(u32::MAX)];
    for n in huge {
        for at in [8, 16] {
            // Tensor count, metadata count.
            let mut broken = bytes.clone();
            broken[at..at + 8].copy_from_slice(&n.to_le_bytes());
            assert!(Header::read(&broken).is_err());
        }
        // The first key's length, and every eight bytes of the vocabulary's and tensors' part.
        for at in (24..bytes.len().min(20_000)).step_by(7) {
            let mut broken = bytes.clone();
            broken[at..at + 8].copy_from_slice(&n.to_le_bytes());
            check(&broken);
        }
    }
}

/// Whatever is accepted must be usable without a panic.
fn check(bytes: &[u8]) {
    if let Ok(header) = Header::read(bytes) {
        for tensor in header.tensors.values() {
            assert!(tensor.bytes.end <= bytes.len());
        }
        let _ = Config::read(&header);
        let _ = Tokenizer::from_gguf(&header);
    }
}

#[test]
fn other_models_are_named() {
    let (dir, path) = Tiny::new("gemma3", 1).write();
    let error = Model::open(&path).unwrap_err().to_string();
    assert!(error.contains("\"gemma3\" is not supported; expected llama"), "{error}");
    assert!(matches!(Model::open(&dir.path().join("missing.gguf")), Err(Error::Io { .. })));
    assert!(matches!(Model::open(dir.path()), Err(Error::Argument(_))));
    std::fs::write(&path, b"").unwrap();
    assert!(Model::open(&path).is_err());
    let mut tiny = Tiny::new("llama", 1);
    tiny.tensors.retain(|t| t.0 != "blk.1.ffn_up.weight");
    let (_dir, path) = tiny.write();
    let error = Model::open(&path).unwrap_err().to_string();
    assert!(error.contains("\"blk.1.ffn_up.weight\" is missing"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn flipped_bytes_never_panic(flips in prop::collection::vec((0usize..12_000, any::<u8>()), 1..6)) {
        let mut bytes = Tiny::new("qwen2", 2).bytes();
        for (at, value) in flips {
            bytes[at] = value;
        }
        check(&bytes);
    }

    #[test]
    fn noise_never_panics(noise in prop::collection::vec(any::<u8>(), 0..300)) {
        check(&noise);
        check(&[b"GGUF\x03\0\0\0", &noise[..]].concat());
    }
}

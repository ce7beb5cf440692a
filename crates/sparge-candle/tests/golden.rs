//! Two real models against independent implementations (`scripts/golden.py`).
//!
//! The models come from the cache or the network. Without both the tests pass with a message;
//! `SPARGE_REQUIRE_MODELS=1` makes that a failure. `SPARGE_CACHE` names another cache directory.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests, outside test functions"
)]

use serde::Deserialize;
use sparge_candle::attention::DenseReference;
use sparge_candle::hub::{Hub, HubOptions};
use sparge_candle::models::{KvCache, Model, PrefillOptions};
use sparge_candle::{Error, Message, Tokenizer};

#[derive(Deserialize)]
struct Golden {
    model: String,
    tokens: Vec<u32>,
    nll: Vec<f32>,
    argmax: Vec<u32>,
    ids: Vec<usize>,
    last_logits: Vec<f32>,
    /// Number of tokens of Emma, and their perplexity.
    perplexity: (usize, f64),
    tricky: String,
    tricky_tokens: Vec<u32>,
}

#[expect(clippy::disallowed_methods, reason = "tests are configured by the environment")]
fn env(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn hub() -> Hub {
    Hub::new(HubOptions { cache: env("SPARGE_CACHE").map(Into::into), ..Default::default() })
        .unwrap()
}

/// `None`, with a message, if the file cannot be had and need not be.
fn available<T>(result: Result<T, Error>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(e) if env("SPARGE_REQUIRE_MODELS").as_deref() == Some("1") => panic!("{e}"),
        Err(e) => {
            println!("SKIPPED: {e} (SPARGE_REQUIRE_MODELS=1 makes this a failure)");
            None
        }
    }
}

fn golden(name: &str) -> Golden {
    let all: Vec<Golden> = serde_json::from_str(include_str!("data/golden.json")).unwrap();
    all.into_iter().find(|g| g.model == name).unwrap()
}

fn check(name: &str) {
    let Some(path) = available(hub().model(name, None, &mut ())) else { return };
    let (golden, model) = (golden(name), Model::open(&path).unwrap());

    let tokenizer = Tokenizer::from_gguf(model.header()).unwrap();
    let tokens = tokenizer.encode(&golden.tricky).unwrap();
    assert_eq!(tokens, golden.tricky_tokens, "tokens of {:?}", golden.tricky);
    let plain = golden.tricky.replace("<|im_start|>", "").replace("<|im_end|>", "");
    assert_eq!(tokenizer.decode(&tokens).unwrap(), plain);
    let message = Message { role: "user".into(), content: "Hi".into() };
    let chat = tokenizer.chat(&[message]).unwrap();
    assert!(chat.ends_with("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"), "{chat}");

    let mut cache = KvCache::new(model.config(), golden.tokens.len()).unwrap();
    let options = PrefillOptions { score: true, ..Default::default() };
    let read = model.prefill(&golden.tokens, &mut cache, &mut DenseReference, options).unwrap();
    for (i, (got, want)) in read.nll.iter().zip(&golden.nll).enumerate() {
        assert!((got - want).abs() < 5e-3, "{name}, nll {i}: {got}, expected {want}");
    }
    for (id, want) in golden.ids.iter().zip(&golden.last_logits) {
        let got = read.logits[*id];
        assert!((got - want).abs() < 1e-2, "{name}, logit {id}: {got}, expected {want}");
    }
    // The same through single tokens, where the products take another path.
    let mut cache = KvCache::new(model.config(), golden.tokens.len()).unwrap();
    for (i, token) in golden.tokens.iter().enumerate().take(16) {
        let (logits, _) = model.decode(*token, &mut cache, &mut DenseReference).unwrap();
        let best = (0u32..).zip(&logits).max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
        assert_eq!(best, golden.argmax[i], "{name}, most likely token after token {i}");
    }
}

#[test]
fn smollm2_agrees_with_numpy_and_llama_cpp() {
    check("smollm2-135m");
}

#[test]
fn qwen2_agrees_with_numpy_and_llama_cpp() {
    check("qwen2.5-coder-0.5b");
}

#[test]
fn smollm2_reads_emma_with_the_known_perplexity() {
    let Some(path) = available(hub().model("smollm2-135m", None, &mut ())) else { return };
    let Some(emma) = available(hub().emma(&mut ())) else { return };
    let model = Model::open(&path).unwrap();
    let tokens = Tokenizer::from_gguf(model.header()).unwrap().encode(&emma[..8000]).unwrap();
    let (count, want) = golden("smollm2-135m").perplexity;
    let mut cache = KvCache::new(model.config(), count).unwrap();
    let options = PrefillOptions { score: true, chunk: 400, progress: None };
    let read = model.prefill(&tokens[..count], &mut cache, &mut DenseReference, options).unwrap();
    assert!(
        (read.perplexity() / want - 1.0).abs() < 1e-3,
        "{}, expected {want}",
        read.perplexity()
    );
}

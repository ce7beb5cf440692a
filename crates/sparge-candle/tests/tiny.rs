//! A tiny random model against a naive f64 implementation, and against itself in other orders.

#![allow(clippy::unwrap_used, reason = "helpers of tests, outside test functions")]

mod common;

use std::ops::ControlFlow;

use common::*;
use sparge_candle::attention::{Attention, AttentionCall, DenseReference};
use sparge_candle::models::{KvCache, Model, PrefillOptions};
use sparge_candle::{Error, GenerateOptions, Message, Sampler, Tokenizer, generate};

fn linear(w: &[f32], x: &[f64], bias: Option<&[f32]>) -> Vec<f64> {
    w.chunks(x.len())
        .enumerate()
        .map(|(r, row)| {
            let sum: f64 = row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum();
            sum + bias.map_or(0.0, |b| f64::from(b[r]))
        })
        .collect()
}

fn norm(x: &[f64], w: &[f32]) -> Vec<f64> {
    let ms = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    x.iter().zip(w).map(|(x, w)| x / (ms + f64::from(EPS)).sqrt() * f64::from(*w)).collect()
}

fn rotate(head: &mut [f64], position: usize, arch: &str) {
    let d = head.len();
    for i in 0..d / 2 {
        let angle = position as f64 * f64::from(BASE).powf(-2.0 * i as f64 / d as f64);
        let (a, b) = if arch == "qwen2" { (i, i + d / 2) } else { (2 * i, 2 * i + 1) };
        let (x, y) = (head[a], head[b]);
        head[a] = x * angle.cos() - y * angle.sin();
        head[b] = x * angle.sin() + y * angle.cos();
    }
}

/// Logits after every token, token by token, in f64.
fn naive(tiny: &Tiny, tokens: &[u32]) -> Vec<Vec<f64>> {
    let embedding = tiny.tensor("token_embd.weight").unwrap();
    let mut caches = vec![Vec::<(Vec<f64>, Vec<f64>)>::new(); LAYERS];
    let mut all = Vec::new();
    for (position, token) in tokens.iter().enumerate() {
        let mut x: Vec<f64> =
            embedding[*token as usize * HIDDEN..][..HIDDEN].iter().map(|x| f64::from(*x)).collect();
        for (i, cache) in caches.iter_mut().enumerate() {
            let get = |part: &str| tiny.tensor(&format!("blk.{i}.{part}")).unwrap();
            let bias = |part: &str| tiny.tensor(&format!("blk.{i}.{part}.bias"));
            let y = norm(&x, get("attn_norm.weight"));
            let mut q = linear(get("attn_q.weight"), &y, bias("attn_q"));
            let mut k = linear(get("attn_k.weight"), &y, bias("attn_k"));
            let v = linear(get("attn_v.weight"), &y, bias("attn_v"));
            q.chunks_mut(HEAD_DIM).for_each(|h| rotate(h, position, tiny.arch));
            k.chunks_mut(HEAD_DIM).for_each(|h| rotate(h, position, tiny.arch));
            cache.push((k, v));
            let mut attended = Vec::new();
            for (h, q) in q.chunks(HEAD_DIM).enumerate() {
                let at = h / (HEADS / KV_HEADS) * HEAD_DIM;
                let weight: Vec<f64> = cache
                    .iter()
                    .map(|(k, _)| {
                        let s: f64 = q.iter().zip(&k[at..]).map(|(q, k)| q * k).sum();
                        (s / (HEAD_DIM as f64).sqrt()).exp()
                    })
                    .collect();
                let sum: f64 = weight.iter().sum();
                attended.extend((0..HEAD_DIM).map(|j| {
                    cache.iter().zip(&weight).map(|((_, v), w)| v[at + j] * w / sum).sum::<f64>()
                }));
            }
            let add = |x: &mut [f64], y: Vec<f64>| x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
            add(&mut x, linear(get("attn_output.weight"), &attended, None));
            let y = norm(&x, get("ffn_norm.weight"));
            let gate = linear(get("ffn_gate.weight"), &y, None);
            let up = linear(get("ffn_up.weight"), &y, None);
            let hidden: Vec<f64> =
                gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            add(&mut x, linear(get("ffn_down.weight"), &hidden, None));
        }
        all.push(linear(embedding, &norm(&x, tiny.tensor("output_norm.weight").unwrap()), None));
    }
    all
}

fn close(got: &[f32], want: &[f64], what: &str) {
    assert_eq!(got.len(), want.len());
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!(
            (f64::from(*g) - w).abs() < 2e-4 * (1.0 + w.abs()),
            "{what}, logit {i}: {g}, expected {w}"
        );
    }
}

fn tokens(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| (i * 37 + 11) % 259).collect()
}

#[test]
fn every_way_of_reading_agrees_with_the_naive_model() {
    for arch in ["llama", "qwen2"] {
        let tiny = Tiny::new(arch, 7);
        let (_dir, path) = tiny.write();
        let model = Model::open(&path).unwrap();
        let tokens = tokens(41);
        let want = naive(&tiny, &tokens);
        for chunk in [1, 3, 16, 41, 1000] {
            let mut cache = KvCache::new(model.config(), 64).unwrap();
            let options = PrefillOptions { chunk, score: true, progress: None };
            let read = model.prefill(&tokens, &mut cache, &mut DenseReference, options).unwrap();
            close(&read.logits, &want[40], &format!("{arch}, chunks of {chunk}"));
            assert_eq!((cache.len(), read.nll.len()), (41, 40));
            for (i, nll) in read.nll.iter().enumerate() {
                let sum: f64 = want[i].iter().map(|x| x.exp()).sum();
                let want = sum.ln() - want[i][tokens[i + 1] as usize];
                assert!(
                    (f64::from(*nll) - want).abs() < 1e-3,
                    "{arch}, token {i}: {nll}, expected {want}"
                );
            }
        }
        let mut cache = KvCache::new(model.config(), 41).unwrap();
        let options = PrefillOptions::default();
        model.prefill(&tokens[..30], &mut cache, &mut DenseReference, options).unwrap();
        for (i, token) in tokens.iter().enumerate().skip(30) {
            let (logits, _) = model.decode(*token, &mut cache, &mut DenseReference).unwrap();
            close(&logits, &want[i], &format!("{arch}, decoding token {i}"));
        }
        // Forgetting and reading again changes nothing.
        cache.truncate(20);
        let read = model
            .prefill(&tokens[20..], &mut cache, &mut DenseReference, PrefillOptions::default())
            .unwrap();
        close(&read.logits, &want[40], "after truncation");
    }
}

#[test]
fn wrong_calls_are_named() {
    let (_dir, path) = Tiny::new("llama", 1).write();
    let model = Model::open(&path).unwrap();
    let mut cache = KvCache::new(model.config(), 8).unwrap();
    let mut read = |tokens: &[u32]| {
        model
            .prefill(tokens, &mut cache, &mut DenseReference, PrefillOptions::default())
            .map(|r| r.logits.len())
    };
    assert!(matches!(read(&tokens(9)), Err(Error::CacheFull { needed: 9, capacity: 8 })));
    assert!(matches!(read(&[]), Err(Error::Argument(_))));
    assert!(matches!(read(&[100_000]), Err(Error::Argument(_))));
    assert!(matches!(KvCache::new(model.config(), 513), Err(Error::Argument(_))));

    let mut stop = |_: usize| ControlFlow::Break(());
    let options = PrefillOptions { chunk: 2, score: false, progress: Some(&mut stop) };
    let mut cache = KvCache::new(model.config(), 8).unwrap();
    let stopped = model.prefill(&tokens(8), &mut cache, &mut DenseReference, options);
    assert!(matches!(stopped, Err(Error::Stopped)));
    assert_eq!(cache.len(), 2);

    struct Broken;
    impl Attention for Broken {
        fn attend(
            &mut self,
            _: AttentionCall<'_>,
        ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
            Err("out of order".into())
        }
    }
    let error = model.decode(1, &mut cache, &mut Broken).unwrap_err().to_string();
    assert_eq!(error, "attention in layer 0: out of order");
    assert_eq!(cache.len(), 2, "a failed step must not count");
}

#[test]
fn text_goes_to_tokens_and_back() {
    let (_dir, path) = Tiny::new("llama", 1).write();
    let model = Model::open(&path).unwrap();
    let tokenizer = Tokenizer::from_gguf(model.header()).unwrap();
    assert_eq!(tokenizer.encode("hell").unwrap(), [258]);
    for text in ["", "hello hell 123", "naïve 你好 🎉\r\n\t  x ", "<|x|>"] {
        let tokens = tokenizer.encode(text).unwrap();
        assert_eq!(tokenizer.decode(&tokens).unwrap(), text);
        let mut stream = tokenizer.stream();
        let pieces: Vec<_> = tokens.iter().filter_map(|t| stream(*t).unwrap()).collect();
        assert_eq!(pieces.concat(), text);
    }
    let message = Message { role: "user".into(), content: "hell".into() };
    let prompt = tokenizer.chat(&[message]).unwrap();
    assert_eq!(prompt, "<|im_start|>user\nhell<|im_end|>\n<|im_start|>assistant\n");
    let tokens = tokenizer.encode(&prompt).unwrap();
    assert_eq!((tokens[0], tokens[6], tokens[7]), (259, 258, 260));
    assert!(tokenizer.is_end(260) && !tokenizer.is_end(258));
}

#[test]
fn sampling_is_reproducible_and_stays_in_the_nucleus() {
    let logits = [0.0, 3.0, f32::NAN, 2.0, -1.0];
    assert_eq!(Sampler::greedy().sample(&logits), 1);
    let draw = |seed| {
        let mut sampler = Sampler::new(1.0, 0.9, seed).unwrap();
        (0..500).map(|_| sampler.sample(&logits)).collect::<Vec<_>>()
    };
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
    // e³ and e² hold 0.95 of the mass: the nucleus of 0.9 is exactly these two, 73 to 27.
    let count = |token| draw(3).iter().filter(|t| **t == token).count();
    assert_eq!(count(1) + count(3), 500);
    assert!((320..410).contains(&count(1)), "{}", count(1));
    assert!(Sampler::new(-1.0, 0.9, 0).is_err() && Sampler::new(1.0, 0.0, 0).is_err());
}

#[test]
fn generation_ends_at_the_end_token_and_at_the_cache() {
    let (_dir, path) = Tiny::new("qwen2", 3).write();
    let model = Model::open(&path).unwrap();
    let run = |capacity, end: Option<u32>| {
        let mut cache = KvCache::new(model.config(), capacity).unwrap();
        let read = model
            .prefill(&tokens(5), &mut cache, &mut DenseReference, PrefillOptions::default())
            .unwrap();
        let options = GenerateOptions {
            sampler: &mut Sampler::greedy(),
            max_new_tokens: 20,
            is_end: &|t| Some(t) == end,
            on_token: &mut |_| ControlFlow::Continue(()),
        };
        generate(&model, read.logits, &mut cache, &mut DenseReference, options).unwrap().tokens
    };
    let free = run(64, None);
    assert_eq!(free.len(), 20);
    assert_eq!(run(9, None), free[..5]);
    let end = free[7];
    let first = free.iter().position(|t| *t == end).unwrap();
    assert_eq!(run(64, Some(end)), free[..first]);
}

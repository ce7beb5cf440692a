//! Text to tokens and back, built from the vocabulary that a GGUF file carries.

use std::path::Path;

use minijinja::{Environment, context};
use serde::Serialize;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior};

use crate::error::{Error, Result};
use crate::gguf::{Header, Value};

/// A turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// A byte-level BPE tokenizer with the model's special tokens and chat template.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    bos: Option<u32>,
    ends: Vec<u32>,
    template: Option<String>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("bos", &self.bos)
            .field("ends", &self.ends)
            .finish_non_exhaustive()
    }
}

fn failed(e: impl std::fmt::Display) -> Error {
    Error::Tokenizer(e.to_string())
}

impl Tokenizer {
    /// Builds the tokenizer described by a GGUF file's metadata.
    pub fn from_gguf(header: &Header) -> Result<Self> {
        let model = header.text("tokenizer.ggml.model").unwrap_or("none");
        if model != "gpt2" {
            return Err(Error::Unsupported {
                what: format!("tokenizer model {model:?}"),
                expected: "gpt2 (byte-level BPE), or a tokenizer.json beside the model",
            });
        }
        let texts = |key: &str| match header.metadata.get(key) {
            Some(Value::Texts(texts)) => Ok(texts),
            _ => Err(Error::gguf(format!("metadata {key:?} is missing"))),
        };
        let tokens = texts("tokenizer.ggml.tokens")?;
        let mut vocab = Vocab::default();
        for (id, token) in (0u32..).zip(tokens) {
            vocab.insert(token.clone(), id);
        }
        let merges = texts("tokenizer.ggml.merges")?
            .iter()
            .map(|m| {
                let pair = m
                    .split_once(' ')
                    .ok_or_else(|| Error::gguf(format!("merge {m:?} is no pair")))?;
                Ok((pair.0.to_owned(), pair.1.to_owned()))
            })
            .collect::<Result<Vec<_>>>()?;

        let pre = header.text("tokenizer.ggml.pre").unwrap_or("default");
        // Llama 3 looks whole words up before it merges.
        let bpe = BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(pre == "llama-bpe");
        let mut inner = tokenizers::Tokenizer::new(bpe.build().map_err(failed)?);
        if pre == "qwen2" {
            inner.with_normalizer(Some(NFC)).map_err(failed)?;
        }
        inner.with_pre_tokenizer(Some(pre_tokenizer(pre)?));
        inner.with_decoder(Some(ByteLevel::default()));
        if let Some(Value::Ints(types)) = header.metadata.get("tokenizer.ggml.token_type") {
            // ggml's types: 3 is a control token, 4 a user-defined one.
            let of_type = |kind| {
                tokens.iter().zip(types).filter(move |(_, t)| **t == kind).map(|(token, _)| token)
            };
            let added = |kind, special| {
                of_type(kind).map(|t| AddedToken::from(t.clone(), special)).collect::<Vec<_>>()
            };
            inner.add_special_tokens(added(3, true)).map_err(failed)?;
            inner.add_tokens(added(4, false)).map_err(failed)?;
        }
        Ok(Self::finish(inner, header))
    }

    /// Reads a Hugging Face `tokenizer.json`; the chat template and special tokens still come from
    /// the GGUF file's metadata.
    pub fn from_json(path: &Path, header: &Header) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        Ok(Self::finish(tokenizers::Tokenizer::from_bytes(bytes).map_err(failed)?, header))
    }

    fn finish(inner: tokenizers::Tokenizer, header: &Header) -> Self {
        let id = |key: &str| header.int(key).and_then(|id| u32::try_from(id).ok());
        let bos = id("tokenizer.ggml.bos_token_id")
            .filter(|_| header.bool("tokenizer.ggml.add_bos_token") == Some(true));
        // Some files name only one of the two tokens with which an answer can end.
        let named = ["<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>"];
        let mut ends: Vec<u32> = named.iter().filter_map(|t| inner.token_to_id(t)).collect();
        ends.extend(id("tokenizer.ggml.eos_token_id"));
        let template = header.text("tokenizer.chat_template").map(str::to_owned);
        Self { inner, bos, ends, template }
    }

    /// Tokens of `text`. Special tokens written out in the text (as a chat template does) are
    /// recognised; a leading begin-of-text token is added if the model asks for it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false).map_err(failed)?;
        let ids = encoding.get_ids();
        let bos = self.bos.filter(|bos| ids.first() != Some(bos));
        Ok(bos.into_iter().chain(ids.iter().copied()).collect())
    }

    /// Text of `tokens`, without special tokens.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        self.inner.decode(tokens, true).map_err(failed)
    }

    /// A function that takes one token after another and returns the text that has become complete:
    /// `None` while a character still misses bytes.
    pub fn stream(&self) -> impl FnMut(u32) -> Result<Option<String>> + '_ {
        let mut stream = self.inner.decode_stream(true);
        move |token| stream.step(token).map_err(failed)
    }

    /// Whether the model ends its answer with `token`.
    pub fn is_end(&self, token: u32) -> bool {
        self.ends.contains(&token)
    }

    /// Size of the vocabulary, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Whether the file carries a chat template, as instruct models do.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// The conversation in the model's own format, ending where the assistant is to speak.
    pub fn chat(&self, messages: &[Message]) -> Result<String> {
        let source = self.template.as_deref().ok_or_else(|| Error::Unsupported {
            what: "chat with a model without tokenizer.chat_template".into(),
            expected: "an instruct model, or plain text",
        })?;
        let mut env = Environment::new();
        // A template is code from a file: bound what it may compute.
        env.set_fuel(Some(1_000_000));
        env.set_trim_blocks(true);
        env.set_lstrip_blocks(true);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_function("raise_exception", |text: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, text))
        });
        let bos = self.bos.and_then(|id| self.inner.id_to_token(id)).unwrap_or_default();
        env.render_str(
            source,
            context! { messages, add_generation_prompt => true, bos_token => bos },
        )
        .map_err(|e| Error::Tokenizer(format!("chat template: {e:#}")))
    }
}

/// How text is cut into words before merging, by `tokenizer.ggml.pre`.
fn pre_tokenizer(pre: &str) -> Result<PreTokenizerWrapper> {
    // A word with at most one leading symbol; numbers in groups; punctuation; line ends; spaces.
    let words = |digits: &str| {
        format!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    };
    let split = |pattern: String| -> Result<PreTokenizerWrapper> {
        let split =
            Split::new(SplitPattern::Regex(pattern), SplitDelimiterBehavior::Isolated, false)
                .map_err(failed)?;
        Ok(Sequence::new(vec![split.into(), ByteLevel::new(false, true, false).into()]).into())
    };
    let gpt2 = ByteLevel::new(false, true, true);
    match pre {
        "gpt-2" | "default" => Ok(gpt2.into()),
        "smollm" => Ok(Sequence::new(vec![Digits::new(true).into(), gpt2.into()]).into()),
        "qwen2" => split(words("")),
        "llama-bpe" | "llama3" => split(words("{1,3}")),
        other => Err(Error::Unsupported {
            what: format!("pre-tokenizer {other:?}"),
            expected: "smollm, qwen2, llama-bpe, gpt-2, or a tokenizer.json beside the model",
        }),
    }
}

//! What the subcommands with a language model share: finding it, its text, reading it.

mod charts;

pub(crate) use charts::layers as layer_chart;

use crate::Context;
use crate::error::{Error, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use sparge::{Alignment, AttentionOptions, AttentionShape, HeadStats, Plan, SpargeConfig};
use sparge_candle::attention::Attention;
use sparge_candle::hub::{Bar, Hub, HubOptions, file_sha256};
use sparge_candle::models::{KvCache, Model, Prefill, PrefillOptions};
use sparge_candle::{SpargeAttention, Tokenizer};
use std::fs::File;
use std::io::Read;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Largest prompt file.
const MAX_TEXT: u64 = 64 << 20;

/// Which model.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ModelArgs {
    /// smollm2-135m, qwen2.5-coder-0.5b, qwen2.5-coder-1.5b, a Hugging Face id (owner/name), or
    /// the path of a .gguf file
    #[arg(long, value_name = "MODEL", default_value = "smollm2-135m")]
    pub(crate) model: String,
    /// Which .gguf file of a Hugging Face id
    #[arg(long, value_name = "FILE")]
    pub(crate) model_file: Option<String>,
}

/// Which text.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct TextArgs {
    /// The text to read, UTF-8 [default: Jane Austen's Emma, which is fetched]
    #[arg(long, value_name = "FILE")]
    pub(crate) prompt_file: Option<PathBuf>,
}

/// An open model and its tokenizer.
#[derive(Debug)]
pub(crate) struct Language {
    pub(crate) name: String,
    path: PathBuf,
    pub(crate) model: Model,
    pub(crate) tokenizer: Tokenizer,
}

/// The models and texts of this machine.
pub(crate) fn hub(context: &Context) -> Result<Hub> {
    let mut options = HubOptions { offline: context.offline, ..HubOptions::default() };
    options.cache = context.cache_dir.clone();
    if let Some(url) = &context.index_url {
        options.index_url.clone_from(url);
    }
    Ok(Hub::new(options)?)
}

impl Language {
    /// Finds, fetches if need be, and opens the model.
    pub(crate) fn open(args: &ModelArgs, context: &Context) -> Result<Self> {
        let path = hub(context)?.model(&args.model, args.model_file.as_deref(), &mut Bar::new())?;
        let model = Model::open(&path)?;
        let tokenizer = Tokenizer::from_gguf(model.header())?;
        Ok(Self { name: args.model.clone(), path, model, tokenizer })
    }

    /// The checksum of the model's file.
    pub(crate) fn sha256(&self) -> Result<String> {
        Ok(file_sha256(&self.path)?)
    }

    /// `[layers, query heads, key/value heads, elements per head]`, as calibrations have it.
    pub(crate) fn shape(&self) -> [usize; 4] {
        let c = self.model.config();
        [c.num_layers, c.num_qo_heads, c.num_kv_heads, c.head_dim]
    }

    /// Checks that `tokens` fit the model's context.
    pub(crate) fn check_context(&self, tokens: usize) -> Result<()> {
        let most = self.model.config().context;
        if tokens <= most {
            return Ok(());
        }
        Err(Error::input(format!(
            "{tokens} tokens are more than the {most} that {} was made for; use a shorter context",
            self.name
        )))
    }

    /// Checks a configuration against the model's heads, so that a bad one is refused by name and
    /// before the first layer.
    pub(crate) fn check_config(&self, config: &SpargeConfig) -> Result<()> {
        let c = self.model.config();
        let shape = AttentionShape {
            batch: 1,
            num_qo_heads: c.num_qo_heads,
            num_kv_heads: c.num_kv_heads,
            qo_len: 1,
            kv_len: 1,
            head_dim: c.head_dim,
            head_dim_v: c.head_dim,
        };
        let options =
            AttentionOptions { causal: Some(Alignment::BottomRight), ..Default::default() };
        Plan::new(shape, &options, config)?;
        Ok(())
    }

    /// The first `count` tokens of `text`, or all where it is shorter.
    pub(crate) fn tokens(&self, text: &str, count: usize) -> Result<Vec<u32>> {
        // Cutting the text first saves tokenizing a whole novel. No common token is this long on
        // average, and the cut is far behind the last token used.
        let most = count.saturating_mul(32).saturating_add(1024);
        let text = &text[..text.floor_char_boundary(most)];
        let mut tokens = self.tokenizer.encode(text)?;
        tokens.truncate(count);
        if tokens.len() < 2 {
            return Err(Error::input(format!(
                "the text has {} tokens, expected at least 2; give a longer one",
                tokens.len()
            )));
        }
        Ok(tokens)
    }

    /// The first `count` tokens of `text`; one that has fewer is refused.
    pub(crate) fn first_tokens(&self, text: &Text, count: usize) -> Result<Vec<u32>> {
        let tokens = self.tokens(&text.text, count)?;
        if tokens.len() < count {
            return Err(Error::input(format!(
                "{} has {} tokens, expected {count}; use a longer text or read less of it",
                text.name,
                tokens.len()
            )));
        }
        Ok(tokens)
    }

    /// Reads every weight once, so that the first reading that is timed does not also read the
    /// file from the disk.
    pub(crate) fn warm_up(&self) -> Result<()> {
        let mut cache = KvCache::new(self.model.config(), 16)?;
        let mut attention = SpargeAttention::new(SpargeConfig::dense());
        self.model.prefill(&[0; 16], &mut cache, &mut attention, PrefillOptions::default())?;
        Ok(())
    }

    /// Reads `tokens` with attention under `config`; the cache keeps room for `room` more.
    pub(crate) fn read(
        &self,
        tokens: &[u32],
        room: usize,
        config: &SpargeConfig,
        bar: &TokenBar,
        score: bool,
    ) -> Result<Reading> {
        self.read_as(tokens, room, SpargeAttention::new(config.clone()), bar, score)
    }

    /// The same with an attention that counts; in one piece where its policy looks at the last
    /// queries first.
    pub(crate) fn read_as(
        &self,
        tokens: &[u32],
        room: usize,
        mut attention: SpargeAttention,
        bar: &TokenBar,
        score: bool,
    ) -> Result<Reading> {
        let chunk = if attention.looks_ahead() { tokens.len() } else { CHUNK };
        let read = Prompt { tokens, room, chunk, score };
        let (prefill, cache) = self.prefill(&read, &mut attention, bar)?;
        Ok(Reading { prefill, cache, attention })
    }

    /// The same with any attention.
    pub(crate) fn read_with(
        &self,
        tokens: &[u32],
        room: usize,
        attention: &mut dyn Attention,
        bar: &TokenBar,
        score: bool,
    ) -> Result<(Prefill, KvCache)> {
        self.prefill(&Prompt { tokens, room, chunk: CHUNK, score }, attention, bar)
    }

    /// The same in chunks of any size.
    pub(crate) fn prefill(
        &self,
        read: &Prompt<'_>,
        attention: &mut dyn Attention,
        bar: &TokenBar,
    ) -> Result<(Prefill, KvCache)> {
        let &Prompt { tokens, room, chunk, score } = read;
        let mut cache = KvCache::new(self.model.config(), tokens.len() + room)?;
        let mut before = 0;
        let mut progress = |read: usize| {
            bar.0.inc((read - before) as u64);
            before = read;
            ControlFlow::Continue(())
        };
        let options = PrefillOptions { chunk, score, progress: Some(&mut progress) };
        let prefill = self.model.prefill(tokens, &mut cache, attention, options)?;
        Ok((prefill, cache))
    }
}

/// Tokens that go through the layers together.
const CHUNK: usize = 1024;

/// What to read, and how.
pub(crate) struct Prompt<'a> {
    pub(crate) tokens: &'a [u32],
    /// Tokens the cache keeps room for.
    pub(crate) room: usize,
    /// Tokens that go through the layers together.
    pub(crate) chunk: usize,
    /// Whether to score every token.
    pub(crate) score: bool,
}

/// What reading a prompt gave.
pub(crate) struct Reading {
    pub(crate) prefill: Prefill,
    pub(crate) cache: KvCache,
    pub(crate) attention: SpargeAttention,
}

impl Reading {
    /// Time to the first token.
    pub(crate) fn ttft_s(&self) -> f64 {
        let t = &self.prefill.timings;
        (t.total() - t.scoring).as_secs_f64()
    }

    /// Time of the attention, prediction included.
    pub(crate) fn attention_s(&self) -> f64 {
        self.prefill.timings.attention.as_secs_f64()
    }

    /// What each layer skipped.
    pub(crate) fn layers(&self) -> Vec<Layer> {
        let sum = |heads: &[HeadStats]| heads.iter().fold(HeadStats::default(), |a, &b| a + b);
        let layers = self.attention.layers().iter().map(|heads| sum(heads)).enumerate();
        layers
            .map(|(layer, stats)| Layer {
                layer,
                qk_sparsity: stats.qk_sparsity(),
                pv_sparsity: stats.pv_sparsity(),
            })
            .collect()
    }
}

/// What a layer skipped.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Layer {
    pub(crate) layer: usize,
    pub(crate) qk_sparsity: f64,
    pub(crate) pv_sparsity: f64,
}

/// A text and what to call it.
#[derive(Debug)]
pub(crate) struct Text {
    pub(crate) name: String,
    pub(crate) text: String,
}

impl TextArgs {
    /// The file's text, or Emma.
    pub(crate) fn load(&self, context: &Context) -> Result<Text> {
        match &self.prompt_file {
            Some(path) => Ok(Text { name: path.display().to_string(), text: read_text(path)? }),
            None => Ok(Text { name: "Emma".into(), text: hub(context)?.emma(&mut Bar::new())? }),
        }
    }
}

fn read_text(path: &Path) -> Result<String> {
    let cannot = |e: std::io::Error| Error::input(format!("cannot read {}: {e}", path.display()));
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_TEXT + 1).read_to_end(&mut bytes))
        .map_err(cannot)?;
    if bytes.len() as u64 > MAX_TEXT {
        return Err(Error::input(format!(
            "{} has more than {} MiB; expected a text",
            path.display(),
            MAX_TEXT >> 20
        )));
    }
    String::from_utf8(bytes).map_err(|e| {
        Error::input(format!("{} is not UTF-8 ({e}); convert it first", path.display()))
    })
}

/// A bar that counts tokens, on stderr and only where that is a terminal.
pub(crate) struct TokenBar(ProgressBar);

impl TokenBar {
    /// A bar for `tokens` tokens in all.
    pub(crate) fn new(tokens: usize) -> Self {
        let bar = ProgressBar::new(tokens as u64);
        let template = "{msg} {bar:32} {pos}/{len} tokens {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Self(bar)
    }

    /// Counts `tokens` that did not have to be read, or were read at once.
    pub(crate) fn skip(&self, tokens: usize) {
        self.0.inc(tokens as u64);
    }

    /// What is being read now.
    pub(crate) fn say(&self, what: impl Into<String>) {
        self.0.set_message(what.into());
    }
}

impl Drop for TokenBar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

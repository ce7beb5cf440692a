//! `sparge doctor`: what this machine has and what would be chosen on it.

use crate::error::Result;
use crate::terminal;
use crate::{Context, language, memory};
use serde::Serialize;
use sparge::{Isa, Selection, SpargeConfig};
use std::path::{Path, PathBuf};

/// Show the processor's features, threads, the cache, and what the default configuration does.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    processor: Option<String>,
    cpu_features: Vec<Feature>,
    isa_available: Vec<String>,
    isa_chosen: String,
    cores: usize,
    threads: usize,
    memory_available_bytes: Option<u64>,
    cache: Cache,
    default_config: Vec<Choice>,
}

#[derive(Debug, Serialize)]
struct Feature {
    name: &'static str,
    present: bool,
}

#[derive(Debug, Serialize)]
struct Cache {
    directory: PathBuf,
    files: Vec<CachedFile>,
}

#[derive(Debug, Serialize)]
struct CachedFile {
    name: String,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct Choice {
    tokens: usize,
    predicts: bool,
    selection: String,
}

/// Runs the subcommand.
pub(crate) fn run(_: &Args, context: &Context) -> Result<()> {
    let chosen = context.isa.unwrap_or_else(Isa::detect);
    // An override this processor lacks is refused as in every other subcommand.
    sparge::Plan::new(
        sparge::AttentionShape {
            batch: 1,
            num_qo_heads: 1,
            num_kv_heads: 1,
            qo_len: 1,
            kv_len: 1,
            head_dim: 1,
            head_dim_v: 1,
        },
        &sparge::AttentionOptions::default(),
        &SpargeConfig { isa: context.isa, ..SpargeConfig::default() },
    )?;
    let name = |isa: Isa| format!("{isa:?}").to_lowercase();
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        processor: processor(),
        cpu_features: cpu_features(),
        isa_available: Isa::ALL.into_iter().filter(|i| i.is_available()).map(name).collect(),
        isa_chosen: name(chosen),
        cores: std::thread::available_parallelism().map_or(1, Into::into),
        threads: rayon::current_num_threads(),
        memory_available_bytes: memory::available(),
        cache: cache(language::hub(context)?.cache_dir()),
        default_config: [512, 4096, 32768].map(choice).into(),
    };
    if context.json { terminal::print_json(&report) } else { terminal::print(&render(&report)) }
}

/// What [`SpargeConfig::default`] does with `tokens` keys.
fn choice(tokens: usize) -> Choice {
    let predicts = tokens >= Selection::AUTO_MIN_LEN;
    let selection = if predicts {
        format!("cdf:{}", Selection::AUTO_CDF)
    } else {
        "dense (prediction costs more than it saves)".into()
    };
    Choice { tokens, predicts, selection }
}

fn processor() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
fn cpu_features() -> Vec<Feature> {
    macro_rules! features {
        ($($name:tt),*) => {
            vec![$(Feature { name: $name, present: is_x86_feature_detected!($name) }),*]
        };
    }
    features![
        "avx2",
        "fma",
        "f16c",
        "avx512f",
        "avx512bw",
        "avx512vl",
        "avx512vnni",
        "avx512bf16",
        "avx512fp16",
        "avxvnni"
    ]
}

#[cfg(not(any(target_arch = "x86", target_arch = "x86_64")))]
fn cpu_features() -> Vec<Feature> {
    Vec::new()
}

/// The cache's files, at most a few levels deep.
fn cache(directory: &Path) -> Cache {
    let mut files = Vec::new();
    list(directory, directory, 3, &mut files);
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Cache { directory: directory.to_owned(), files }
}

fn list(root: &Path, directory: &Path, depth: usize, files: &mut Vec<CachedFile>) {
    let Ok(entries) = std::fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        let Ok(meta) = entry.metadata() else { continue };
        if meta.is_dir() && depth > 0 {
            list(root, &path, depth - 1, files);
        } else if meta.is_file() {
            let name = path.strip_prefix(root).unwrap_or(&path).display().to_string();
            files.push(CachedFile { name, bytes: meta.len() });
        }
    }
}

fn render(report: &Report) -> String {
    let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30));
    let with = |present: bool| {
        let names = report.cpu_features.iter().filter(|f| f.present == present).map(|f| f.name);
        let names: Vec<&str> = names.collect();
        if names.is_empty() { "none".into() } else { names.join(" ") }
    };
    let mut text = format!("sparge {}\n\n", report.version);
    let mut line = |name: &str, value: String| text += &format!("{name:<12}{value}\n");
    line("processor", report.processor.clone().unwrap_or_else(|| "unknown".into()));
    line("features", with(true));
    line("absent", with(false));
    line(
        "kernels",
        format!("{} (available: {})", report.isa_chosen, report.isa_available.join(", ")),
    );
    line("threads", format!("{} of {} cores", report.threads, report.cores));
    line("memory", report.memory_available_bytes.map_or("unknown".into(), gib) + " available");
    line("cache", report.cache.directory.display().to_string());
    if report.cache.files.is_empty() {
        line("", "empty".into());
    }
    for file in &report.cache.files {
        line("", format!("{:>9.1} MB  {}", file.bytes as f64 / 1e6, file.name));
    }
    line("default", "keys    selection".into());
    for choice in &report.default_config {
        line("", format!("{:<7} {}", choice.tokens, choice.selection));
    }
    text
}

//! Reads a text with a model and prints perplexity, phases and decoding speed:
//! `prefill MODEL.gguf TEXT.txt TOKENS`.

use std::error::Error;
use std::path::Path;

use sparge_candle::attention::DenseReference;
use sparge_candle::models::{KvCache, Model, PrefillOptions};
use sparge_candle::{Sampler, Tokenizer, generate};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, model, text, count] = &args[..] else {
        return Err("expected: MODEL.gguf TEXT.txt TOKENS".into());
    };
    let model = Model::open(Path::new(model))?;
    let tokenizer = Tokenizer::from_gguf(model.header())?;
    let mut tokens = tokenizer.encode(&std::fs::read_to_string(text)?)?;
    tokens.truncate(count.parse()?);

    let mut cache = KvCache::new(model.config(), tokens.len() + 64)?;
    let options = PrefillOptions { score: true, ..Default::default() };
    let read = model.prefill(&tokens, &mut cache, &mut DenseReference, options)?;
    let (perplexity, t) = (read.perplexity(), read.timings);
    let new = generate(
        &model,
        read.logits,
        &mut cache,
        &mut DenseReference,
        &mut Sampler::greedy(),
        64,
        |_| false,
        |_| std::ops::ControlFlow::Continue(()),
    )?;
    let rate = (new.tokens.len() - 1) as f64 / new.timings.total().as_secs_f64();
    #[expect(clippy::print_stdout, reason = "an example's output")]
    {
        println!("{} tokens, perplexity {perplexity:.3}, {t:.2?}", tokens.len());
        println!("{rate:.1} tokens/s, {:.2?}: {:?}", new.timings, tokenizer.decode(&new.tokens)?);
    }
    Ok(())
}

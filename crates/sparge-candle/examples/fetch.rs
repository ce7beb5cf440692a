//! Fetches a model and the novel Emma into a cache directory: `fetch MODEL CACHE_DIRECTORY`.

use std::error::Error;

use sparge_candle::hub::{Bar, Hub, HubOptions};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, model, cache] = &args[..] else {
        return Err("expected: MODEL CACHE_DIRECTORY".into());
    };
    let hub = Hub::new(HubOptions { cache: Some(cache.into()), ..Default::default() })?;
    let path = hub.model(model, None, &mut Bar::new())?;
    let emma = hub.emma(&mut Bar::new())?;
    #[expect(clippy::print_stdout, reason = "an example's output")]
    {
        println!("{}, and {} characters of Emma", path.display(), emma.len());
    }
    Ok(())
}

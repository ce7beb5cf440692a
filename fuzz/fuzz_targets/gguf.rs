//! A model header from any bytes: an error or a header, never a panic or a huge allocation.
#![no_main]
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = sparge_candle::gguf::Header::read(data);
});

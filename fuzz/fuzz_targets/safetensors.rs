//! The command's input file from any bytes: an error or tensors, never a panic, and no allocation
//! that the file's size does not vouch for.
#![no_main]
#![allow(dead_code, reason = "the command's own modules, of which reading is a part")]

#[path = "../../crates/sparge-cli/src/error.rs"]
mod error;
#[path = "../../crates/sparge-cli/src/input.rs"]
mod input;
#[path = "../../crates/sparge-cli/src/output.rs"]
mod output;
#[path = "../../crates/sparge-cli/src/safetensor.rs"]
mod safetensor;

use input::{Extras, Qkv};
use libfuzzer_sys::fuzz_target;
use safetensor::Reader;
use sparge::Layout;

fuzz_target!(|data: &[u8]| {
    let path = std::env::temp_dir().join(format!("sparge-fuzz-{}", std::process::id()));
    std::fs::write(&path, data).expect("the temporary directory can be written");
    if let Ok(mut file) = Reader::open(&path) {
        let _ = input::element_type(&file, "");
        let extras = Extras::read(&mut file);
        if let Ok(qkv) = Qkv::<f32>::read(&mut file, Layout::Hnd)
            && let Ok([q, k, _]) = qkv.views()
            && let Ok(extras) = extras
        {
            let _ = extras.lengths();
            let _ = extras.sequence_lengths(q.dims().len, k.dims().len);
            let _ = extras.element_mask(q.dims().len);
        }
        let _ = Qkv::<f32>::widened(&mut file, Layout::Nhd, "");
    }
    let _ = std::fs::remove_file(&path);
});

//! Masks survive the round trip through CSR and bytes; malformed CSR is refused.
#![no_main]
use libfuzzer_sys::fuzz_target;
use sparge::{BlockMask, Csr};

fuzz_target!(|data: &[u8]| {
    let [a, b, c, d, rest @ ..] = data else { return };
    let shape = [a, b, c, d].map(|&x| usize::from(x % 9));
    let size: usize = shape.iter().product();
    if let Ok(mask) = BlockMask::from_bytes(shape, &rest[..size.min(rest.len())]) {
        let csr = Csr::from(&mask);
        assert_eq!(csr.to_mask().expect("made from a mask"), mask);
        assert_eq!(BlockMask::from_bytes(shape, &mask.to_bytes()).expect("same size"), mask);
        assert_eq!(csr.indices.len(), mask.count());
    }
    let (indptr, indices) = rest.split_at(rest.len() / 2);
    let csr = Csr {
        shape: [a, b, c, d].map(|&x| usize::from(x)),
        indptr: indptr.iter().map(|&x| usize::from(x)).collect(),
        indices: indices.iter().map(|&x| u32::from(x)).collect(),
    };
    if let Ok(mask) = csr.to_mask() {
        assert_eq!(Csr::from(&mask), csr);
    }
});

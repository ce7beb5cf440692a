//! The operator and its reference against PyTorch's attention in f64
//! (`benchmarks/peers/golden_sdpa.py` writes the file).

use safetensors::SafeTensors;
use serde_json::Value;
use sparge::testing::close;
use sparge::*;

struct Case<'a> {
    name: &'a str,
    file: &'a SafeTensors<'a>,
    about: &'a Value,
}

impl Case<'_> {
    fn shape(&self, tensor: &str) -> [usize; 4] {
        let view = self.file.tensor(&format!("{}.{tensor}", self.name)).expect("present");
        let mut shape = [1; 4];
        let given = view.shape();
        shape[4 - given.len()..].copy_from_slice(given);
        shape
    }

    fn bytes(&self, tensor: &str) -> &[u8] {
        self.file.tensor(&format!("{}.{tensor}", self.name)).expect("present").data()
    }

    fn f32s(&self, tensor: &str) -> Vec<f32> {
        let value = |b: &[u8]| f32::from_le_bytes(b.try_into().expect("four bytes"));
        self.bytes(tensor).chunks_exact(4).map(value).collect()
    }
}

#[test]
fn equals_pytorch() {
    let bytes = include_bytes!("data/sdpa.safetensors");
    let (_, metadata) = SafeTensors::read_metadata(bytes).expect("a safetensors file");
    let golden = metadata.metadata().as_ref().expect("metadata")["golden"].clone();
    let golden: Value = serde_json::from_str(&golden).expect("json");
    assert_eq!(golden["format"], "sparge-golden-sdpa-1");
    let file = SafeTensors::deserialize(bytes).expect("a safetensors file");
    let cases = golden["cases"].as_object().expect("cases");
    assert!(cases.len() >= 20);
    for (name, about) in cases {
        check(&Case { name, file: &file, about });
    }
}

fn check(case: &Case<'_>) {
    let (q, k, v) = (case.f32s("q"), case.f32s("k"), case.f32s("v"));
    let view = |x, name| TensorView::hnd(x, case.shape(name)).expect("fits");
    let (q, k, v) = (view(&q, "q"), view(&k, "k"), view(&v, "v"));
    let bools: Vec<bool>;
    let biases: Vec<f32>;
    let element_mask = match case.about["mask"].as_str() {
        Some("bool") => {
            bools = case.bytes("mask").iter().map(|&x| x != 0).collect();
            Some(ElementMask::Bool(TensorView::hnd(&bools, case.shape("mask")).expect("fits")))
        }
        Some("additive") => {
            biases = case.f32s("mask");
            Some(ElementMask::Additive(TensorView::hnd(&biases, case.shape("mask")).expect("fits")))
        }
        _ => None,
    };
    let options = AttentionOptions {
        softmax_scale: case.about["scale"].as_f64(),
        causal: match case.about["causal"].as_str() {
            Some("top-left") => Some(Alignment::TopLeft),
            Some("bottom-right") => Some(Alignment::BottomRight),
            _ => None,
        },
        element_mask,
        return_lse: true,
        ..AttentionOptions::default()
    };
    let wide = |x: Vec<f32>| x.into_iter().map(f64::from).collect::<Vec<_>>();
    let (o, lse) = (wide(case.f32s("o")), wide(case.f32s("lse")));
    let named = |e: String| panic!("{} ({}): {e}", case.name, case.about["about"]);

    // The file's own rounding to f32.
    let plan =
        Plan::new(AttentionShape::of(&q, &k, &v).expect("fits"), &options, &SpargeConfig::dense())
            .expect("valid");
    let reference = reference::dense(&plan, &q, &k, &v);
    let narrow: Vec<f32> = reference.o.iter().map(|&x| x as f32).collect();
    close(&narrow, &o, 1e-6).unwrap_or_else(named);

    // Scores of several hundred lose four digits in f32.
    let tolerance = if case.about["about"] == "scores of several hundred" { 2e-3 } else { 5e-6 };
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        let config = SpargeConfig { isa: Some(isa), ..SpargeConfig::dense() };
        let got = attention(&q, &k, &v, &options, &config).expect("valid");
        close(&got.o, &o, tolerance).unwrap_or_else(named);
        for (got, &lse) in got.lse.expect("asked for").iter().zip(&lse) {
            let same =
                f64::from(*got) == lse || (f64::from(*got) - lse).abs() < 1e-5 * (1.0 + lse.abs());
            assert!(same, "{}: lse {got}, expected {lse}", case.name);
        }
    }
}

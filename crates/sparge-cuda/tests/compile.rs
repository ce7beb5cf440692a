//! Compiles every kernel for every supported architecture; needs NVRTC, no GPU.

use sparge_cuda::{Compiler, Environment, Error, KernelSpec};

#[test]
fn all_kernels_compile_without_spills_or_warnings() {
    let env = Environment::from_process();
    let compiler = match Compiler::load(&env) {
        Ok(compiler) => compiler,
        Err(error @ Error::NoNvrtc { .. }) => {
            assert!(std::env::var_os("SPARGE_REQUIRE_NVRTC").is_none_or(|v| v != "1"), "{error}");
            eprintln!("skipped: {error}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let mut failures = Vec::new();
    for arch in KernelSpec::architectures() {
        for spec in KernelSpec::all() {
            match compiler.compile(&spec, arch) {
                Err(error) => failures.push(error.to_string()),
                Ok(compiled) => {
                    assert!(!compiled.cubin.is_empty());
                    assert!(!compiled.log.is_empty(), "the assembler reports resources");
                    failures.extend(
                        compiled
                            .log
                            .lines()
                            .filter(|line| is_bad(line))
                            .map(|line| format!("{} for {arch}: {line}", spec.name())),
                    );
                }
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Spills, and the assembler's words for a kernel that will be slow.
fn is_bad(line: &str) -> bool {
    let spills =
        line.contains("spill") && !line.contains("0 bytes spill stores, 0 bytes spill loads");
    // Such as C7505, C7508, C7510, C7513, C7602.
    spills || line.contains("warning") || line.contains("(C7")
}

#[test]
fn specs_are_distinct() {
    let mut names: Vec<String> = KernelSpec::all().iter().map(KernelSpec::name).collect();
    let all = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), all);
}

//! Compiles every kernel for every architecture; needs NVRTC, no GPU.

use sparge_cuda::{Compiler, Environment, Error, KernelSpec};
use std::collections::HashSet;
use std::process::{Command, Stdio};

/// NVRTC compiles one program at a time in a process: the work is shared out among processes of
/// this very test, which are told their part in this variable, as `part/parts`.
const PART: &str = "SPARGE_COMPILE_PART";

#[test]
fn all_kernels_compile_without_spills_or_warnings() {
    let part = std::env::var(PART).ok();
    let compiler = match Compiler::load(&Environment::from_process()) {
        Ok(compiler) => compiler,
        Err(error @ Error::NoNvrtc { .. }) => {
            assert!(std::env::var_os("SPARGE_REQUIRE_NVRTC").is_none_or(|v| v != "1"), "{error}");
            eprintln!("skipped: {error}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    match part {
        Some(part) => {
            let (part, parts) = part.split_once('/').expect("part/parts");
            compile(&compiler, part.parse().expect("a number"), parts.parse().expect("a number"));
        }
        None => share_out(),
    }
}

/// Starts a process a processor and waits for all of them.
fn share_out() {
    let parts = std::thread::available_parallelism().map_or(1, |n| n.get().min(8));
    let this = std::env::current_exe().expect("a test has an executable");
    let children: Vec<_> = (0..parts)
        .map(|part| {
            Command::new(&this)
                .args(["--exact", "all_kernels_compile_without_spills_or_warnings", "--nocapture"])
                .env(PART, format!("{part}/{parts}"))
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .expect("the test starts itself")
        })
        .collect();
    for child in children {
        let output = child.wait_with_output().expect("the process ran");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
    }
}

fn compile(compiler: &Compiler, part: usize, parts: usize) {
    let mut failures = Vec::new();
    for (arch, spec) in KernelSpec::all().iter().skip(part).step_by(parts) {
        match compiler.compile(spec, arch.name()) {
            Err(error) => failures.push(error.to_string()),
            Ok(compiled) => {
                assert!(!compiled.cubin.is_empty());
                assert!(!compiled.log.is_empty(), "the assembler reports resources");
                let bad = compiled.log.lines().filter(|line| is_bad(line));
                failures
                    .extend(bad.map(|line| format!("{} for {}: {line}", spec.name(), arch.name())));
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
    let all = KernelSpec::all();
    let names: HashSet<String> =
        all.iter().map(|(arch, spec)| format!("{} {}", arch.name(), spec.name())).collect();
    assert_eq!(names.len(), all.len());
}

//! Compiles every kernel for every architecture; needs NVRTC, no GPU.

use sparge_cuda::{Compiler, Environment, Error, KernelSpec};
use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

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
    let failures = Mutex::new(Vec::new());
    let all = KernelSpec::all();
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some((arch, spec)) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
            let fail = |what: String| failures.lock().expect("no panics").push(what);
            match compiler.compile(spec, arch.name()) {
                Err(error) => fail(error.to_string()),
                Ok(compiled) => {
                    assert!(!compiled.cubin.is_empty());
                    assert!(!compiled.log.is_empty(), "the assembler reports resources");
                    for line in compiled.log.lines().filter(|line| is_bad(line)) {
                        fail(format!("{} for {}: {line}", spec.name(), arch.name()));
                    }
                }
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(8));
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    let failures = failures.into_inner().expect("no panics");
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

//! Compiles every kernel ahead of time into a directory (`SPARGE_CUBINS` names it at run time).
//!
//!     cargo run --release -p sparge-cuda --example pack -- DIRECTORY [ARCHITECTURE...]
//!
//! Needs NVRTC, no GPU. Binaries of NVRTC 12.8 and 12.9 run on drivers from 525 on, those of 13.x
//! need 580. Architectures: sm_80, sm_89, sm_90a, sm_100, sm_120; all where none is named.
#![expect(clippy::print_stdout, reason = "a command")]

use sparge_cuda::{Compiler, Environment, KernelSpec};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut arguments = std::env::args().skip(1);
    let dir = PathBuf::from(arguments.next().ok_or("usage: pack DIRECTORY [ARCHITECTURE...]")?);
    let wanted: Vec<String> = arguments.collect();
    let compiler = Compiler::load(&Environment::from_process())?;
    let mut specs = KernelSpec::all();
    specs.retain(|(arch, _)| wanted.is_empty() || wanted.iter().any(|name| name == arch.name()));
    if specs.is_empty() {
        return Err(format!("no kernels for {wanted:?}").into());
    }
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some((arch, spec)) = specs.get(next.fetch_add(1, Ordering::Relaxed)) {
            compiler.pack(spec, arch.name(), &dir)?;
        }
        Ok::<(), sparge_cuda::Error>(())
    };
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().unwrap_or(Ok(())))
    })?;
    println!("{} kernels in {}", specs.len(), dir.display());
    Ok(())
}

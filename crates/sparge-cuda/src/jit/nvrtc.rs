//! NVRTC through cudarc's raw bindings: its safe layer yields PTX only and takes no headers.
#![expect(unsafe_code, reason = "NVRTC is a C library")]

use crate::env::{Environment, children};
use crate::error::{Error, Result};
use crate::spec::{HEADERS, KernelSpec};
use cudarc::nvrtc::sys;
use std::ffi::{CStr, CString, c_char};
use std::path::Path;
use std::sync::Mutex;

/// A loaded NVRTC.
#[derive(Debug, Clone, Copy)]
pub struct Compiler {
    version: (i32, i32),
}

/// A compiled kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compiled {
    /// The entry point's mangled name.
    pub entry: String,
    /// The machine code.
    pub cubin: Vec<u8>,
    /// What the compiler and the assembler said (registers, spills, warnings); empty where the
    /// kernel came from the cache.
    pub log: String,
}

impl Compiler {
    /// Finds and loads NVRTC: the one that the process has loaded already (as one with PyTorch has),
    /// else that in the environment's directories, else where the loader looks.
    ///
    /// # Errors
    /// [`Error::NoNvrtc`].
    pub fn load(env: &Environment) -> Result<Self> {
        static LOADING: Mutex<()> = Mutex::new(());
        let _guard = LOADING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if !is_loaded() {
            for dir in &env.nvrtc_dirs {
                if load_from(dir) {
                    break;
                }
            }
        }
        // SAFETY: only looks for the library (dlopen of NVIDIA's library, which has no
        // initialisers with requirements).
        if !unsafe { sys::is_culib_present() } {
            let searched = env.nvrtc_dirs.iter().map(|d| d.display().to_string()).collect();
            return Err(Error::NoNvrtc { searched });
        }
        let mut version = (0, 0);
        // SAFETY: both pointers are valid for the call.
        unsafe { sys::nvrtcVersion(&raw mut version.0, &raw mut version.1) };
        Ok(Self { version })
    }

    /// NVRTC's version.
    #[must_use]
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    pub(crate) fn options(spec: &KernelSpec, arch: &str) -> [String; 5] {
        [
            format!("--gpu-architecture={arch}"),
            "--std=c++17".into(),
            "-default-device".into(),
            "--ptxas-options=-v".into(),
            // The kernels assert that the host's number is theirs.
            format!("--define-macro=SPARGE_SHARED_BYTES={}", spec.most_shared_bytes()),
        ]
    }

    /// Compiles a kernel to machine code.
    ///
    /// # Errors
    /// [`Error::Compile`] with the compiler's log.
    pub fn compile(&self, spec: &KernelSpec, arch: &str) -> Result<Compiled> {
        let name = spec.name();
        let fail = |log: String| Error::Compile { kernel: name.clone(), arch: arch.into(), log };
        let text = |s: &str| CString::new(s).map_err(|_| fail("a source holds a NUL byte".into()));
        let source = spec.source();
        let (code, file, expression) = (text(source.text)?, text(source.name)?, text(&name)?);
        let headers = HEADERS.map(|h| (text(h.text), text(h.name)));
        let mut texts = Vec::new();
        let mut names = Vec::new();
        for (header, header_name) in headers {
            texts.push(header?);
            names.push(header_name?);
        }
        let pointers = |list: &[CString]| list.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
        let options: Vec<CString> =
            Self::options(spec, arch).iter().map(|s| text(s)).collect::<Result<_>>()?;

        let mut program = Program(std::ptr::null_mut());
        let (texts, names, options) = (pointers(&texts), pointers(&names), pointers(&options));
        // SAFETY: all strings are NUL-terminated and outlive the call, the counts match.
        let made = unsafe {
            sys::nvrtcCreateProgram(
                &raw mut program.0,
                code.as_ptr(),
                file.as_ptr(),
                texts.len() as i32,
                texts.as_ptr(),
                names.as_ptr(),
            )
        };
        check(made).map_err(&fail)?;
        // SAFETY: the program is live and the name NUL-terminated.
        check(unsafe { sys::nvrtcAddNameExpression(program.0, expression.as_ptr()) })
            .map_err(&fail)?;
        // SAFETY: the program is live, the options NUL-terminated and as many as counted.
        let compiled =
            unsafe { sys::nvrtcCompileProgram(program.0, options.len() as i32, options.as_ptr()) };
        let log = program.bytes(sys::nvrtcGetProgramLogSize, sys::nvrtcGetProgramLog);
        let log = String::from_utf8_lossy(&log).trim_end_matches('\0').to_owned();
        if let Err(message) = check(compiled) {
            return Err(fail(format!("{message}\n{log}")));
        }
        let mut lowered: *const c_char = std::ptr::null();
        // SAFETY: the program is compiled; the name is the one registered above.
        let got =
            unsafe { sys::nvrtcGetLoweredName(program.0, expression.as_ptr(), &raw mut lowered) };
        check(got).map_err(&fail)?;
        // SAFETY: NVRTC returned a NUL-terminated string that lives as long as the program.
        let entry = unsafe { CStr::from_ptr(lowered) }.to_string_lossy().into_owned();
        let cubin = program.bytes(sys::nvrtcGetCUBINSize, sys::nvrtcGetCUBIN);
        Ok(Compiled { entry, cubin, log })
    }
}

type SizeOf = unsafe fn(sys::nvrtcProgram, *mut usize) -> sys::nvrtcResult;
type Fill = unsafe fn(sys::nvrtcProgram, *mut c_char) -> sys::nvrtcResult;

struct Program(sys::nvrtcProgram);

impl Program {
    /// One of NVRTC's outputs; empty where it has none.
    fn bytes(&self, size_of: SizeOf, fill: Fill) -> Vec<u8> {
        let mut size = 0;
        // SAFETY: the program is live; the function writes one size.
        if check(unsafe { size_of(self.0, &raw mut size) }).is_err() {
            return Vec::new();
        }
        let mut bytes = vec![0u8; size];
        // SAFETY: the buffer has the size that NVRTC asked for.
        let filled = unsafe { fill(self.0, bytes.as_mut_ptr().cast()) };
        if check(filled).is_ok() { bytes } else { Vec::new() }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: made by nvrtcCreateProgram and not destroyed before.
            unsafe { sys::nvrtcDestroyProgram(&raw mut self.0) };
        }
    }
}

fn check(result: sys::nvrtcResult) -> std::result::Result<(), String> {
    if result == sys::nvrtcResult::NVRTC_SUCCESS { Ok(()) } else { Err(format!("{result:?}")) }
}

/// Whether the process has an NVRTC: a second one beside it would compile with the first one's
/// builtins.
#[cfg(target_os = "linux")]
fn is_loaded() -> bool {
    use libloading::os::unix::{Library, RTLD_NOW};
    /// As Linux's dlfcn.h has it: nothing is loaded that is not there already.
    const RTLD_NOLOAD: i32 = 4;
    ["libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"].iter().any(|name| {
        // SAFETY: loads nothing.
        let library = unsafe { Library::open(Some(*name), RTLD_NOW | RTLD_NOLOAD) };
        // It stays loaded: its owner may give it up while kernels are compiled.
        library.map(std::mem::forget).is_ok()
    })
}

#[cfg(not(target_os = "linux"))]
fn is_loaded() -> bool {
    false
}

/// Loads the libraries of one directory by absolute path, builtins first (NVRTC 13.0 has no
/// RUNPATH), and leaves them loaded, so that cudarc finds them by name.
fn load_from(dir: &Path) -> bool {
    let keep = |path: &Path| {
        // SAFETY: loads NVIDIA's library, which has no initialisers with requirements.
        let library = unsafe { libloading::Library::new(path) };
        library.map(std::mem::forget).is_ok()
    };
    for file in children(dir, "libnvrtc-builtins.so") {
        keep(&file);
    }
    let mut found = children(dir, "libnvrtc.so");
    found.sort_unstable_by_key(|path| path.as_os_str().len());
    // The shortest name is the link that stands for the library.
    found.iter().filter(|file| keep(file)).count() > 0
}

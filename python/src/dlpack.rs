//! DLPack, the array exchange protocol: CPU arrays of any framework in, ours out.
#![expect(unsafe_code, reason = "DLPack is a C struct behind a capsule")]

use crate::errors::SpargeError;
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict, PyTuple};
use std::ffi::{CStr, c_void};
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

const NAME: &CStr = c"dltensor";
const USED: &CStr = c"used_dltensor";
const CPU: i32 = 1;

#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device_type: i32,
    device_id: i32,
    ndim: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

#[repr(C)]
struct DlManagedTensor {
    tensor: DlTensor,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut DlManagedTensor)>,
}

/// (our name, DLPack's type code, bits)
const TYPES: [(&str, u8, u8); 8] = [
    ("f32", 2, 32),
    ("f16", 2, 16),
    ("bf16", 4, 16),
    ("f64", 2, 64),
    ("bool", 6, 8),
    ("i8", 0, 8),
    ("u8", 1, 8),
    ("i64", 0, 64),
];

/// A CPU array: another framework's, held through DLPack, or memory of this module.
#[pyclass(frozen, module = "sparge._sparge")]
pub(crate) struct Array {
    memory: Memory,
    address: usize,
    dtype: &'static str,
    shape: Vec<i64>,
    strides: Vec<i64>,
}

enum Memory {
    Owned(Arc<Vec<u64>>),
    /// Kept only to be released.
    Borrowed {
        _held: Held,
    },
}

/// A managed tensor whose deleter runs when this is dropped.
struct Held(NonNull<DlManagedTensor>);

// SAFETY: the producer's deleter may be called from any thread (DLPack requires it), and nothing
// else is done with the pointer.
unsafe impl Send for Held {}
// SAFETY: as above.
unsafe impl Sync for Held {}

impl Drop for Held {
    fn drop(&mut self) {
        // SAFETY: the struct is the producer's until its deleter has run, which is now.
        unsafe {
            if let Some(deleter) = self.0.as_ref().deleter {
                deleter(self.0.as_ptr());
            }
        }
    }
}

#[pymethods]
impl Array {
    /// Takes a CPU array over through `array.__dlpack__()`, without a copy.
    #[staticmethod]
    fn take(array: &Bound<'_, PyAny>) -> PyResult<Self> {
        let capsule = array.call_method0("__dlpack__")?;
        let capsule =
            capsule.cast::<PyCapsule>().map_err(|e| PyBufferError::new_err(e.to_string()))?;
        // SAFETY: a capsule named "dltensor" holds a DLManagedTensor; renaming it takes it over.
        let held = unsafe {
            let pointer = ffi::PyCapsule_GetPointer(capsule.as_ptr(), NAME.as_ptr());
            let Some(pointer) = NonNull::new(pointer.cast::<DlManagedTensor>()) else {
                return Err(PyErr::fetch(array.py()));
            };
            if ffi::PyCapsule_SetName(capsule.as_ptr(), USED.as_ptr()) != 0 {
                return Err(PyErr::fetch(array.py()));
            }
            Held(pointer)
        };
        // SAFETY: the producer keeps the struct valid until the deleter runs.
        let tensor = unsafe { &held.0.as_ref().tensor };
        if tensor.device_type != CPU {
            let m = format!(
                "the array is on DLPack device {}, expected the CPU (1)",
                tensor.device_type
            );
            return Err(SpargeError::new_err(m));
        }
        let of = |(_, code, bits): &&(&str, u8, u8)| {
            *code == tensor.code && *bits == tensor.bits && tensor.lanes == 1
        };
        let Some(&(dtype, _, _)) = TYPES.iter().find(of) else {
            let m = format!(
                "the array's type is DLPack code {} with {} bits, expected f32, f16, bf16 or bool",
                tensor.code, tensor.bits
            );
            return Err(SpargeError::new_err(m));
        };
        let ndim = usize::try_from(tensor.ndim).unwrap_or(0);
        // SAFETY: shape and strides have ndim entries; strides may be null for C order.
        let (shape, strides) = unsafe {
            let shape = crate::tensor::slice::<i64>(tensor.shape as usize, ndim).to_vec();
            let strides = if tensor.strides.is_null() {
                contiguous(&shape)
            } else {
                crate::tensor::slice::<i64>(tensor.strides as usize, ndim).to_vec()
            };
            (shape, strides)
        };
        let address = tensor.data as usize + tensor.byte_offset as usize;
        Ok(Self { memory: Memory::Borrowed { _held: held }, address, dtype, shape, strides })
    }

    /// A zeroed array.
    #[staticmethod]
    fn zeros(shape: Vec<i64>, dtype: &str) -> PyResult<Self> {
        let Some(&(dtype, _, bits)) = TYPES.iter().find(|(name, _, _)| *name == dtype) else {
            return Err(SpargeError::new_err(format!("no array type {dtype:?}")));
        };
        let words = shape
            .iter()
            .try_fold(1usize, |a, &n| a.checked_mul(usize::try_from(n).ok()?))
            .and_then(|n| n.checked_mul(usize::from(bits / 8)))
            .map(|bytes| bytes.div_ceil(8))
            .ok_or_else(|| SpargeError::new_err(format!("shape {shape:?} is not addressable")))?;
        let memory = Arc::new(vec![0u64; words]);
        let address = memory.as_ptr() as usize;
        let strides = contiguous(&shape);
        Ok(Self { memory: Memory::Owned(memory), address, dtype, shape, strides })
    }

    /// A copy in C order. A last dimension of 1 is repeated to `columns` where that is given.
    #[pyo3(signature = (columns=None))]
    fn copied(&self, columns: Option<i64>) -> PyResult<Self> {
        let mut shape = self.shape.clone();
        let mut strides = self.strides.clone();
        if let (Some(columns), Some(size), Some(stride)) =
            (columns, shape.last_mut(), strides.last_mut())
            && *size == 1
        {
            (*size, *stride) = (columns, 0);
        }
        let copy = Self::zeros(shape.clone(), self.dtype)?;
        let count: i64 = shape.iter().product();
        let bits = TYPES.iter().find(|(name, _, _)| *name == self.dtype).map_or(8, |x| x.2);
        let size = usize::from(bits / 8);
        let mut at = vec![0i64; shape.len()];
        for i in 0..usize::try_from(count).unwrap_or(0) {
            let offset: i64 = at.iter().zip(&strides).map(|(a, s)| a * s).sum();
            let from = self.address.wrapping_add_signed(offset as isize * size as isize);
            // SAFETY: `at` is inside the shape, whose elements the producer holds for as long as
            // `self` lives; `copy` has `count` elements of the same size.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    from as *const u8,
                    (copy.address + i * size) as *mut u8,
                    size,
                );
            }
            for d in (0..shape.len()).rev() {
                at[d] += 1;
                if at[d] < shape[d] {
                    break;
                }
                at[d] = 0;
            }
        }
        Ok(copy)
    }

    /// Address of the first element.
    #[getter]
    fn address(&self) -> usize {
        self.address
    }

    /// f32, f16, bf16, bool, i8, u8 or i64.
    #[getter]
    fn dtype(&self) -> &'static str {
        self.dtype
    }

    /// Sizes.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.shape)
    }

    /// Strides in elements.
    #[getter]
    fn strides<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.strides)
    }

    /// DLPack's device: the CPU.
    fn __dlpack_device__(&self) -> (i32, i32) {
        (CPU, 0)
    }

    /// A DLPack capsule that shares this memory.
    #[pyo3(signature = (**options))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        options: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        // stream, max_version, dl_device and copy change nothing for CPU memory.
        let _ = options;
        let Memory::Owned(memory) = &self.memory else {
            return Err(PyBufferError::new_err("a borrowed array is not exported again"));
        };
        export(py, Arc::clone(memory), self)
    }
}

/// What an exported tensor keeps alive.
struct Export {
    managed: DlManagedTensor,
    shape: Vec<i64>,
    strides: Vec<i64>,
    _memory: Arc<Vec<u64>>,
}

fn export<'py>(
    py: Python<'py>,
    memory: Arc<Vec<u64>>,
    array: &Array,
) -> PyResult<Bound<'py, PyAny>> {
    let (code, bits) = TYPES
        .iter()
        .find(|(name, _, _)| *name == array.dtype)
        .map_or((0, 0), |&(_, code, bits)| (code, bits));
    let mut export = Box::new(Export {
        managed: DlManagedTensor {
            tensor: DlTensor {
                data: array.address as *mut c_void,
                device_type: CPU,
                device_id: 0,
                ndim: array.shape.len() as i32,
                code,
                bits,
                lanes: 1,
                shape: null_mut(),
                strides: null_mut(),
                byte_offset: 0,
            },
            context: null_mut(),
            deleter: Some(release),
        },
        shape: array.shape.clone(),
        strides: array.strides.clone(),
        _memory: memory,
    });
    export.managed.tensor.shape = export.shape.as_mut_ptr();
    export.managed.tensor.strides = export.strides.as_mut_ptr();
    let raw = Box::into_raw(export);
    // SAFETY: `raw` came from a box just now; the capsule's destructor or the consumer's call of
    // the deleter frees it, exactly one of them (the consumer renames the capsule).
    unsafe {
        (*raw).managed.context = raw.cast();
        let managed = (&raw mut (*raw).managed).cast();
        let capsule = ffi::PyCapsule_New(managed, NAME.as_ptr(), Some(destroy));
        if capsule.is_null() {
            drop(Box::from_raw(raw));
            return Err(PyErr::fetch(py));
        }
        Ok(Bound::from_owned_ptr(py, capsule))
    }
}

/// DLPack's deleter.
unsafe extern "C" fn release(managed: *mut DlManagedTensor) {
    // SAFETY: `context` is the box made in `export`; the consumer calls this once.
    unsafe { drop(Box::from_raw((*managed).context.cast::<Export>())) }
}

/// The capsule's destructor: frees what no consumer took.
unsafe extern "C" fn destroy(capsule: *mut ffi::PyObject) {
    // SAFETY: Python passes the capsule; only one that still has its first name owns the tensor.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, NAME.as_ptr()) == 1 {
            let managed = ffi::PyCapsule_GetPointer(capsule, NAME.as_ptr());
            release(managed.cast());
        }
    }
}

fn contiguous(shape: &[i64]) -> Vec<i64> {
    let mut strides = vec![1i64; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i].wrapping_mul(shape[i].max(1));
    }
    strides
}

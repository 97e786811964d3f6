//! Torch tensors → Rust slices, without copying.
//!
//! A tensor arrives as a `DLPack` capsule (the exchange struct of dmlc/dlpack, version 0), which
//! carries its own device, type, shape and strides, so everything is checked here and nothing is
//! taken on trust. The capsule is only looked at, never consumed: it keeps the tensor alive while
//! the [`Argument`] that borrows it lives.

use super::exceptions::QloraError;
use crate::element::Floats;
use half::{bf16, f16};
use pyo3::prelude::*;
use pyo3::types::PyCapsule;
use std::ffi::{CStr, c_int, c_void};

const CAPSULE_NAME: &CStr = c"dltensor";
const CPU: c_int = 1;
const INTEGER: (u8, u8) = (1, 8);

#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device_type: c_int,
    device_id: c_int,
    dimensions: c_int,
    type_code: u8,
    type_bits: u8,
    type_lanes: u16,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

/// A tensor on the CPU whose elements lie one after another.
pub(super) struct Argument<'py> {
    name: &'static str,
    data: *mut u8,
    count: usize,
    element: (u8, u8),
    _capsule: Bound<'py, PyCapsule>,
}

/// The element types of the format, as `DLPack` numbers them: (kind, bits).
pub(super) trait Scalar: Copy + 'static {
    const ELEMENT: (u8, u8);
}
impl Scalar for u8 {
    const ELEMENT: (u8, u8) = INTEGER;
}
impl Scalar for i64 {
    const ELEMENT: (u8, u8) = (0, 64);
}
impl Scalar for f32 {
    const ELEMENT: (u8, u8) = (2, 32);
}
impl Scalar for f16 {
    const ELEMENT: (u8, u8) = (2, 16);
}
impl Scalar for bf16 {
    const ELEMENT: (u8, u8) = (4, 16);
}

impl<'py> Argument<'py> {
    pub(super) fn new(name: &'static str, capsule: &Bound<'py, PyCapsule>) -> PyResult<Self> {
        let pointer = capsule.pointer_checked(Some(CAPSULE_NAME))?;
        // SAFETY: a capsule of this name points to a DLManagedTensor, whose first field is the
        // DLTensor read here; the capsule is alive for the length of this borrow.
        let tensor = unsafe { pointer.cast::<DlTensor>().as_ref() };
        if tensor.device_type != CPU {
            return Err(QloraError::new_err(format!("{name} is not on the CPU; move it with .to(\"cpu\")")));
        }
        let dimensions = usize::try_from(tensor.dimensions).unwrap_or(0);
        // SAFETY: DLPack says that shape holds `dimensions` entries.
        let shape = unsafe { slice_or_empty(tensor.shape, dimensions) };
        let count: i64 = shape.iter().product();
        if !tensor.strides.is_null() && count > 0 {
            // SAFETY: DLPack says that strides, where present, hold `dimensions` entries.
            let strides = unsafe { slice_or_empty(tensor.strides, dimensions) };
            let mut expected = 1;
            for (&size, &stride) in shape.iter().zip(strides).rev() {
                if size != 1 && stride != expected {
                    return Err(QloraError::new_err(format!("{name} is not contiguous; call .contiguous()")));
                }
                expected *= size;
            }
        }
        Ok(Self {
            name,
            data: tensor.data.cast::<u8>().wrapping_add(tensor.byte_offset as usize),
            count: usize::try_from(count).unwrap_or(0),
            element: (tensor.type_code, tensor.type_bits),
            _capsule: capsule.clone(),
        })
    }

    pub(super) fn element(&self) -> (u8, u8) {
        self.element
    }

    pub(super) fn wrong_type(&self, expected: &str) -> PyErr {
        QloraError::new_err(format!("{} has the wrong dtype: it must be {expected}", self.name))
    }

    /// The elements, if they are of type `T`.
    pub(super) fn slice<T: Scalar>(&self) -> PyResult<&[T]> {
        self.check::<T>()?;
        if self.count == 0 {
            return Ok(&[]);
        }
        // SAFETY: device, type, count and contiguity were read from the tensor itself; the capsule
        // keeps it alive. As for every torch operator, the caller must not write to an input while
        // the call runs.
        Ok(unsafe { std::slice::from_raw_parts(self.data.cast(), self.count) })
    }

    /// The elements, of whichever float type they are.
    pub(super) fn floats(&self) -> PyResult<Floats<'_>> {
        match self.element {
            <f32 as Scalar>::ELEMENT => Ok(Floats::F32(self.slice()?)),
            <f16 as Scalar>::ELEMENT => Ok(Floats::F16(self.slice()?)),
            <bf16 as Scalar>::ELEMENT => Ok(Floats::Bf16(self.slice()?)),
            _ => Err(self.wrong_type("float32, float16 or bfloat16")),
        }
    }

    /// The elements for writing, if they are of type `T`.
    pub(super) fn slice_mut<T: Scalar>(&mut self) -> PyResult<&mut [T]> {
        self.check::<T>()?;
        if self.count == 0 {
            return Ok(&mut []);
        }
        // SAFETY: as in `slice`; outputs are tensors that our own Python made and has not handed out
        // yet, each given once per call, so no other reference to their memory exists.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.data.cast(), self.count) })
    }

    fn check<T: Scalar>(&self) -> PyResult<()> {
        if self.element != T::ELEMENT {
            return Err(self.wrong_type(std::any::type_name::<T>()));
        }
        if self.count > 0 && !(self.data as usize).is_multiple_of(align_of::<T>()) {
            return Err(QloraError::new_err(format!(
                "{} is not aligned in memory; call .clone()",
                self.name
            )));
        }
        Ok(())
    }
}

/// # Safety
/// `first` must be null or point to `length` readable elements.
unsafe fn slice_or_empty<'a, T>(first: *const T, length: usize) -> &'a [T] {
    if first.is_null() || length == 0 {
        &[]
    } else {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(first, length) }
    }
}

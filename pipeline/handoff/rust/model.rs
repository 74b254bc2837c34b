// SPDX-License-Identifier: Apache-2.0
//! A safe face over native/model.h.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::fmt;
use std::os::raw::{c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::{self, NonNull};
use std::slice;

use crate::tensor::{Data, Tensor};

const MAX_RANK: usize = 8;
const ERROR_SIZE: usize = 512;

#[repr(C)]
struct RawModel {
    _opaque: [u8; 0],
}

/// `Tensor` of native/model.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawTensor {
    name: *const c_char,
    onnx_type: c_int,
    rank: usize,
    shape: [i64; MAX_RANK],
    data: *mut c_void,
    size: usize,
    value: *mut c_void,
}

extern "C" {
    fn model_open(file: *const c_char, threads: c_int, error: *mut c_char) -> *mut RawModel;
    fn model_close(model: *mut RawModel);
    fn model_input_count(model: *const RawModel) -> usize;
    fn model_output_count(model: *const RawModel) -> usize;
    fn model_input(model: *const RawModel, index: usize) -> *const RawTensor;
    fn model_output(model: *const RawModel, index: usize) -> *const RawTensor;
    fn model_run(
        model: *mut RawModel,
        inputs: *const RawTensor,
        count: usize,
        outputs: *mut RawTensor,
        error: *mut c_char,
    ) -> bool;
    fn tensor_release(tensor: *mut RawTensor);
    fn type_name(onnx_type: c_int) -> *const c_char;
}

/// What went wrong, in ONNX Runtime's words or in ours.
#[derive(Debug)]
pub struct Error(String);

impl fmt::Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

/// What the model says of one input or output.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    pub name: String,
    /// `float32`, `int64`, ...
    pub dtype: String,
    /// `None` where any size goes.
    pub shape: Vec<Option<usize>>,
}

/// A loaded model.
pub struct Model(NonNull<RawModel>);

// ONNX Runtime's session may run in several threads at once, and nothing else in a RawModel changes after it is made.
unsafe impl Send for Model {}
unsafe impl Sync for Model {}

impl Model {
    /// Loads a model; `threads` is for one operator, 0 leaves it to the runtime.
    pub fn open(file: impl AsRef<Path>, threads: u16) -> Result<Model, Error> {
        let path = CString::new(file.as_ref().as_os_str().as_bytes()).map_err(|_| Error("a path with a NUL".into()))?;
        let mut error = Message::new();
        // SAFETY: `path` is a C string and `error` has ERROR_SIZE bytes.
        let raw = unsafe { model_open(path.as_ptr(), c_int::from(threads), error.as_mut_ptr()) };
        NonNull::new(raw).map(Model).ok_or_else(|| error.into())
    }

    pub fn inputs(&self) -> Vec<Spec> {
        // SAFETY: the model is alive, and every index is below the count.
        unsafe { (0..model_input_count(self.raw())).map(|i| spec(&*model_input(self.raw(), i))).collect() }
    }

    pub fn outputs(&self) -> Vec<Spec> {
        // SAFETY: as above.
        unsafe { (0..model_output_count(self.raw())).map(|i| spec(&*model_output(self.raw(), i))).collect() }
    }

    /// Every output by name. Fails for an input that is missing, unknown, or of another type or shape than the model
    /// takes.
    pub fn run(&self, inputs: &[(&str, &Tensor)]) -> Result<BTreeMap<String, Tensor>, Error> {
        let names: Vec<CString> = inputs
            .iter()
            .map(|(name, _)| CString::new(*name).map_err(|_| Error("a name with a NUL".into())))
            .collect::<Result<_, _>>()?;
        let raw_inputs: Vec<RawTensor> =
            inputs.iter().zip(&names).map(|((_, tensor), name)| borrowed(name, tensor)).collect::<Result<_, _>>()?;
        let mut error = Message::new();
        // SAFETY: the inputs borrow from `inputs` and `names`, which outlive the call; ONNX Runtime does not write to
        // them. There is room for every output, and each is released in `Outputs::drop`.
        unsafe {
            let mut outputs = Outputs(vec![EMPTY; model_output_count(self.raw())]);
            let raw = self.0.as_ptr();
            if !model_run(raw, raw_inputs.as_ptr(), raw_inputs.len(), outputs.0.as_mut_ptr(), error.as_mut_ptr()) {
                return Err(error.into());
            }
            outputs.0.iter().map(|raw| owned(raw)).collect()
        }
    }

    fn raw(&self) -> *const RawModel {
        self.0.as_ptr()
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        // SAFETY: made by model_open, and closed once.
        unsafe { model_close(self.0.as_ptr()) }
    }
}

const EMPTY: RawTensor = RawTensor {
    name: ptr::null(),
    onnx_type: 0,
    rank: 0,
    shape: [0; MAX_RANK],
    data: ptr::null_mut(),
    size: 0,
    value: ptr::null_mut(),
};

/// Outputs that C made, released whatever happens.
struct Outputs(Vec<RawTensor>);

impl Drop for Outputs {
    fn drop(&mut self) {
        for tensor in &mut self.0 {
            // SAFETY: what model_run filled, or EMPTY, which holds nothing.
            unsafe { tensor_release(tensor) }
        }
    }
}

struct Message([u8; ERROR_SIZE]);

impl Message {
    fn new() -> Message {
        Message([0; ERROR_SIZE])
    }

    fn as_mut_ptr(&mut self) -> *mut c_char {
        self.0.as_mut_ptr().cast()
    }
}

impl From<Message> for Error {
    fn from(message: Message) -> Error {
        let end = message.0.iter().position(|&byte| byte == 0).unwrap_or(ERROR_SIZE);
        Error(String::from_utf8_lossy(&message.0[..end]).into_owned())
    }
}

fn borrowed(name: &CStr, tensor: &Tensor) -> Result<RawTensor, Error> {
    if tensor.shape.len() > MAX_RANK {
        return Err(Error(format!("a tensor has more than {MAX_RANK} axes")));
    }
    let mut shape = [0; MAX_RANK];
    for (to, &from) in shape.iter_mut().zip(&tensor.shape) {
        *to = from as i64;
    }
    let (data, size) = tensor.data.raw();
    let (onnx_type, rank) = (tensor.data.onnx_type(), tensor.shape.len());
    Ok(RawTensor { name: name.as_ptr(), onnx_type, rank, shape, data: data.cast_mut(), size, value: ptr::null_mut() })
}

/// Copies an output into memory of Rust's.
unsafe fn owned(raw: &RawTensor) -> Result<(String, Tensor), Error> {
    let bytes = if raw.size == 0 { &[] } else { slice::from_raw_parts(raw.data.cast::<u8>().cast_const(), raw.size) };
    let data = Data::from_bytes(raw.onnx_type, bytes).ok_or_else(|| Error("an output holds no numbers".into()))?;
    let shape: Vec<usize> = raw.shape[..raw.rank].iter().map(|&dim| dim as usize).collect();
    Ok((text(raw.name), Tensor::new(&shape, data)))
}

unsafe fn spec(raw: &RawTensor) -> Spec {
    let shape = raw.shape[..raw.rank].iter().map(|&dim| usize::try_from(dim).ok()).collect();
    Spec { name: text(raw.name), dtype: text(type_name(raw.onnx_type)), shape }
}

unsafe fn text(raw: *const c_char) -> String {
    CStr::from_ptr(raw).to_string_lossy().into_owned()
}

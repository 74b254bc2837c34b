// SPDX-License-Identifier: Apache-2.0
//! One ONNX model in ONNX Runtime: loaded once, run many times, tensors by name.
//!
//! No crate is needed: `native/model.c` speaks ONNX Runtime's C interface, and [`Model`] is a safe face over it.

#[cfg(not(unix))]
compile_error!("paths are passed to ONNX Runtime as bytes here: on Windows they are UTF-16, see native/model.h");

pub mod golden;
mod model;
mod tensor;

pub use model::{Error, Model, Spec};
pub use tensor::{Data, Tensor};

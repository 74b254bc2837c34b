// SPDX-License-Identifier: Apache-2.0
//! Tensors: a shape, and numbers of one of ONNX's types in C order.

use std::os::raw::{c_int, c_void};

/// The numbers. Half-precision ones are their bits, which [`Tensor::to_f64`] reads.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    Float32(Vec<f32>),
    Float64(Vec<f64>),
    Float16(Vec<u16>),
    Bfloat16(Vec<u16>),
    Int64(Vec<i64>),
    Int32(Vec<i32>),
    Int16(Vec<i16>),
    Int8(Vec<i8>),
    Uint64(Vec<u64>),
    Uint32(Vec<u32>),
    Uint16(Vec<u16>),
    Uint8(Vec<u8>),
    Bool(Vec<u8>),
}

/// Runs the same expression on the vector of whichever variant there is.
macro_rules! each {
    ($data:expr, $vector:ident => $body:expr) => {
        match $data {
            Data::Float32($vector) => $body,
            Data::Float64($vector) => $body,
            Data::Float16($vector) => $body,
            Data::Bfloat16($vector) => $body,
            Data::Int64($vector) => $body,
            Data::Int32($vector) => $body,
            Data::Int16($vector) => $body,
            Data::Int8($vector) => $body,
            Data::Uint64($vector) => $body,
            Data::Uint32($vector) => $body,
            Data::Uint16($vector) => $body,
            Data::Uint8($vector) => $body,
            Data::Bool($vector) => $body,
        }
    };
}

impl Data {
    pub fn len(&self) -> usize {
        each!(self, numbers => numbers.len())
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// ONNXTensorElementDataType of onnxruntime_c_api.h.
    pub(crate) fn onnx_type(&self) -> c_int {
        match self {
            Data::Float32(_) => 1,
            Data::Uint8(_) => 2,
            Data::Int8(_) => 3,
            Data::Uint16(_) => 4,
            Data::Int16(_) => 5,
            Data::Int32(_) => 6,
            Data::Int64(_) => 7,
            Data::Bool(_) => 9,
            Data::Float16(_) => 10,
            Data::Float64(_) => 11,
            Data::Uint32(_) => 12,
            Data::Uint64(_) => 13,
            Data::Bfloat16(_) => 16,
        }
    }

    /// The numbers in `bytes`, little-endian; `None` for a type that is no number, and for a remainder.
    pub(crate) fn from_bytes(onnx_type: c_int, bytes: &[u8]) -> Option<Data> {
        Some(match onnx_type {
            1 => Data::Float32(read(bytes, f32::from_le_bytes)?),
            2 => Data::Uint8(bytes.to_vec()),
            3 => Data::Int8(read(bytes, i8::from_le_bytes)?),
            4 => Data::Uint16(read(bytes, u16::from_le_bytes)?),
            5 => Data::Int16(read(bytes, i16::from_le_bytes)?),
            6 => Data::Int32(read(bytes, i32::from_le_bytes)?),
            7 => Data::Int64(read(bytes, i64::from_le_bytes)?),
            9 => Data::Bool(bytes.to_vec()),
            10 => Data::Float16(read(bytes, u16::from_le_bytes)?),
            11 => Data::Float64(read(bytes, f64::from_le_bytes)?),
            12 => Data::Uint32(read(bytes, u32::from_le_bytes)?),
            13 => Data::Uint64(read(bytes, u64::from_le_bytes)?),
            16 => Data::Bfloat16(read(bytes, u16::from_le_bytes)?),
            _ => return None,
        })
    }

    /// Address and size in bytes, for C.
    pub(crate) fn raw(&self) -> (*const c_void, usize) {
        each!(self, numbers => (numbers.as_ptr().cast(), std::mem::size_of_val(numbers.as_slice())))
    }
}

fn read<T, const N: usize>(bytes: &[u8], number: fn([u8; N]) -> T) -> Option<Vec<T>> {
    let chunks = bytes.chunks_exact(N);
    let whole = chunks.remainder().is_empty();
    whole.then(|| chunks.map(|chunk| number(chunk.try_into().expect("chunks are of N bytes"))).collect())
}

/// ONNXTensorElementDataType of a name such as `float16`; `None` for others.
pub(crate) fn type_named(name: &str) -> Option<c_int> {
    Some(match name {
        "float32" => 1,
        "uint8" => 2,
        "int8" => 3,
        "uint16" => 4,
        "int16" => 5,
        "int32" => 6,
        "int64" => 7,
        "bool" => 9,
        "float16" => 10,
        "float64" => 11,
        "uint32" => 12,
        "uint64" => 13,
        "bfloat16" => 16,
        _ => return None,
    })
}

/// A tensor; `data` holds as many numbers as `shape` says. Any axis may be 0, as in a cache before the first token.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub data: Data,
}

impl Tensor {
    pub fn new(shape: &[usize], data: Data) -> Tensor {
        assert_eq!(shape.iter().product::<usize>(), data.len(), "the shape does not fit the numbers");
        Tensor { shape: shape.to_vec(), data }
    }

    /// Every number as f64; integers beyond 2^53 lose their last digits.
    #[allow(clippy::unnecessary_cast)] // for f64 itself: the macro writes the same for every type
    pub fn to_f64(&self) -> Vec<f64> {
        match &self.data {
            Data::Float16(bits) => bits.iter().map(|&b| half(b)).collect(),
            Data::Bfloat16(bits) => bits.iter().map(|&b| f64::from(f32::from_bits(u32::from(b) << 16))).collect(),
            data => each!(data, numbers => numbers.iter().map(|&number| number as f64).collect()),
        }
    }
}

fn half(bits: u16) -> f64 {
    let (exponent, fraction) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023));
    let magnitude = match exponent {
        31 if fraction != 0.0 => f64::NAN,
        31 => f64::INFINITY,
        0 => fraction * 2f64.powi(-24),
        _ => (fraction + 1024.0) * 2f64.powi(exponent - 25),
    };
    if bits & 0x8000 == 0 {
        magnitude
    } else {
        -magnitude
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_precision_is_read() {
        let bits = vec![0x3c00, 0xc000, 0x7bff, 0x0001, 0x7c00, 0x8000];
        let numbers = Tensor::new(&[6], Data::Float16(bits)).to_f64();
        assert_eq!(numbers, [1.0, -2.0, 65504.0, 2f64.powi(-24), f64::INFINITY, 0.0]);
        assert!(half(0x7e00).is_nan());
        assert_eq!(Tensor::new(&[1], Data::Bfloat16(vec![0xbf80])).to_f64(), [-1.0]);
    }

    #[test]
    fn bytes_are_read_by_type_and_remainders_refused() {
        assert_eq!(Data::from_bytes(7, &[2, 0, 0, 0, 0, 0, 0, 0]), Some(Data::Int64(vec![2])));
        assert_eq!(Data::from_bytes(1, &[]), Some(Data::Float32(vec![])));
        assert_eq!(Data::from_bytes(1, &[0, 0, 0]), None);
        assert_eq!(Data::from_bytes(8, &[]), None);
    }
}

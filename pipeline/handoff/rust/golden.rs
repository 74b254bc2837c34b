// SPDX-License-Identifier: Apache-2.0
//! The golden samples (golden/tensors.txt and golden/tensors.bin), and how far two tensors lie apart.
//!
//! tensors.txt has one line a tensor, `SAMPLE KIND NAME DTYPE OFFSET BYTES TOLERANCE RANK DIM...`; tensors.bin the
//! numbers, little-endian, in C order.

use std::fs;
use std::io;
use std::path::Path;
use std::str::{FromStr, SplitWhitespace};

use crate::tensor::{type_named, Data, Tensor};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Input,
    /// What the original model answered.
    Reference,
    /// What ONNX Runtime answers in Python with this very model.
    Python,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Golden {
    pub sample: usize,
    pub kind: Kind,
    pub name: String,
    /// Of a reference, absolute.
    pub tolerance: Option<f64>,
    pub tensor: Tensor,
}

/// Reads the golden samples of a folder.
pub fn read(folder: &Path) -> io::Result<Vec<Golden>> {
    let numbers = fs::read(folder.join("tensors.bin"))?;
    let index = fs::read_to_string(folder.join("tensors.txt"))?;
    let damaged = |line: &str| io::Error::new(io::ErrorKind::InvalidData, format!("tensors.txt is damaged: {line}"));
    index.lines().map(|line| parse(line, &numbers).ok_or_else(|| damaged(line))).collect()
}

fn parse(line: &str, numbers: &[u8]) -> Option<Golden> {
    let mut fields = line.split_whitespace();
    let sample = next(&mut fields)?;
    let kind = match fields.next()? {
        "input" => Kind::Input,
        "reference" => Kind::Reference,
        "python" => Kind::Python,
        _ => return None,
    };
    let name = fields.next()?.to_owned();
    let onnx_type = type_named(fields.next()?)?;
    let (offset, size): (usize, usize) = (next(&mut fields)?, next(&mut fields)?);
    let tolerance = match fields.next()? {
        "-" => None,
        number => Some(number.parse().ok()?),
    };
    let rank: usize = next(&mut fields)?;
    let shape: Vec<usize> = fields.map(|dim| dim.parse().ok()).collect::<Option<_>>()?;
    let data = Data::from_bytes(onnx_type, numbers.get(offset..offset.checked_add(size)?)?)?;
    let whole = shape.len() == rank && shape.iter().product::<usize>() == data.len();
    whole.then(|| Golden { sample, kind, name, tolerance, tensor: Tensor::new(&shape, data) })
}

fn next<T: FromStr>(fields: &mut SplitWhitespace) -> Option<T> {
    fields.next()?.parse().ok()
}

/// Largest absolute difference; infinite for tensors of two shapes. Equal infinities, and two NaN, do not differ;
/// where one of both is finite, they differ infinitely.
pub fn largest_difference(actual: &Tensor, expected: &Tensor) -> f64 {
    if actual.shape != expected.shape {
        return f64::INFINITY;
    }
    let pairs = actual.to_f64().into_iter().zip(expected.to_f64());
    pairs.map(|(a, b)| difference(a, b)).fold(0.0, f64::max)
}

fn difference(a: f64, b: f64) -> f64 {
    if a == b || (a.is_nan() && b.is_nan()) {
        return 0.0;
    }
    let difference = (a - b).abs();
    if difference.is_nan() {
        f64::INFINITY
    } else {
        difference
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floats(numbers: &[f32]) -> Tensor {
        Tensor::new(&[numbers.len()], Data::Float32(numbers.to_vec()))
    }

    #[test]
    fn a_line_is_read() {
        let mut numbers = vec![0; 64];
        numbers.extend(2.5f32.to_le_bytes());
        let golden = parse("3 reference a/b.c float32 64 4 0.5 2 1 1", &numbers).unwrap();
        assert_eq!((golden.sample, golden.kind, golden.tolerance), (3, Kind::Reference, Some(0.5)));
        assert_eq!(golden.tensor, Tensor::new(&[1, 1], Data::Float32(vec![2.5])));
        assert_eq!(parse("0 input n int64 0 8 - 0", &numbers).unwrap().tensor.shape, Vec::<usize>::new());
        assert!(parse("0 input cache float32 64 0 - 4 1 4 0 8", &numbers).unwrap().tensor.data.is_empty());
    }

    #[test]
    fn damaged_lines_are_refused() {
        for line in [
            "",
            "0 input",
            "0 other x int64 0 8 - 0",
            "0 input x text 0 8 - 0",
            "0 input x int64 8 8 - 0",
            "0 input x int64 0 8 - 2 1",
            "0 input x int64 0 8 - 1 2",
            "0 input x int64 18446744073709551615 8 - 0",
        ] {
            assert_eq!(parse(line, &[0; 8]), None, "{line}");
        }
    }

    #[test]
    fn differences_are_the_largest() {
        assert_eq!(largest_difference(&floats(&[1.0, 2.0, -4.0]), &floats(&[1.5, 2.0, -1.0])), 3.0);
        assert_eq!(largest_difference(&floats(&[]), &floats(&[])), 0.0);
        assert_eq!(largest_difference(&floats(&[1.0]), &floats(&[1.0, 2.0])), f64::INFINITY);
        let odd = [f32::NAN, f32::INFINITY];
        assert_eq!(largest_difference(&floats(&odd), &floats(&odd)), 0.0);
        assert_eq!(largest_difference(&floats(&odd), &floats(&[0.0, f32::INFINITY])), f64::INFINITY);
        assert_eq!(largest_difference(&floats(&odd), &floats(&[f32::NAN, 0.0])), f64::INFINITY);
    }
}

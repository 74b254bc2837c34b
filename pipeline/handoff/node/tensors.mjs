// SPDX-License-Identifier: Apache-2.0
// Numbers to tensors and back, by the names that ONNX Runtime has for types. int64 needs BigInt; float16 is the raw
// bits where the engine has no Float16Array. Takes the ONNX Runtime package as an argument: -node and -web are alike.

export const ARRAYS = {
  float32: Float32Array, float64: Float64Array, float16: Uint16Array, bool: Uint8Array,
  int8: Int8Array, int16: Int16Array, int32: Int32Array, int64: BigInt64Array,
  uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, uint64: BigUint64Array,
};

/** A tensor of plain numbers (an array, nested as deep as you like): tensor(ort, "int64", [[101, 2], [7, 0]]). */
export function tensor(ort, dtype, values, dims = shapeOf(values)) {
  const flat = Array.isArray(values) ? values.flat(Infinity) : [values];
  const convert = { int64: BigInt, uint64: BigInt, float16: toHalf }[dtype] ?? Number;
  return new ort.Tensor(dtype, ARRAYS[dtype].from(flat, convert), dims);
}

/** The values of a tensor as doubles, whatever its type. */
export function numbers({ type, data }) {
  if (type === "float16" && data instanceof Uint16Array) return Float64Array.from(data, fromHalf);
  return Float64Array.from(data, Number);
}

function shapeOf(values) {
  return Array.isArray(values) ? [values.length, ...(values.length ? shapeOf(values[0]) : [])] : [];
}

/** The value of IEEE 754 binary16 bits. */
export function fromHalf(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return exponent ? sign * 2 ** (exponent - 15) * (1 + fraction / 1024) : sign * 2 ** -14 * (fraction / 1024);
}

/** The bits of the nearest binary16, ties to even. */
export function toHalf(value) {
  const sign = Object.is(value, -0) || value < 0 ? 0x8000 : 0, size = Math.abs(value);
  if (Number.isNaN(size)) return 0x7e00;
  if (size >= 65520) return sign | 0x7c00;
  const exponent = Math.max(-14, Math.floor(Math.log2(size)));
  const scaled = size / 2 ** (exponent - 10); // of the last place, 0 to 2048
  const down = Math.floor(scaled), rest = scaled - down;
  const rounded = down + (rest > 0.5 || (rest === 0.5 && down % 2 === 1) ? 1 : 0);
  return sign | (rounded + (exponent + 14) * 1024); // a carry out of the fraction raises the exponent
}

// SPDX-License-Identifier: Apache-2.0
import Foundation

/// A tensor of numbers: little-endian bytes in C order. Any axis may be 0, as in a cache before the first token.
public struct Tensor {
    public enum Dtype: String {
        case float32, int64, int32, int8, uint8, uint32, uint64, bool

        /// Bytes of one number.
        public var size: Int {
            switch self {
            case .int8, .uint8, .bool: return 1
            case .float32, .int32, .uint32: return 4
            case .int64, .uint64: return 8
            }
        }
    }

    public let dtype: Dtype
    public let shape: [Int]
    public let data: Data

    public init(dtype: Dtype, shape: [Int], data: Data) {
        precondition(data.count == shape.reduce(dtype.size, *), "the shape does not fit the bytes")
        self.dtype = dtype
        self.shape = shape
        self.data = data
    }

    public init(_ numbers: [Float], shape: [Int]) {
        self.init(dtype: .float32, shape: shape, data: numbers.withUnsafeBytes { Data($0) })
    }

    public init(_ numbers: [Int64], shape: [Int]) {
        self.init(dtype: .int64, shape: shape, data: numbers.withUnsafeBytes { Data($0) })
    }

    /// Every number as a Double; integers beyond 2^53 lose their last digits.
    public var doubles: [Double] {
        switch dtype {
        case .float32: return read(Float.self).map(Double.init)
        case .int64: return read(Int64.self).map(Double.init)
        case .int32: return read(Int32.self).map(Double.init)
        case .int8: return read(Int8.self).map(Double.init)
        case .uint64: return read(UInt64.self).map(Double.init)
        case .uint32: return read(UInt32.self).map(Double.init)
        case .uint8, .bool: return data.map(Double.init)
        }
    }

    private func read<Number>(_: Number.Type) -> [Number] {
        data.withUnsafeBytes { bytes in
            stride(from: 0, to: bytes.count, by: MemoryLayout<Number>.size).map {
                bytes.loadUnaligned(fromByteOffset: $0, as: Number.self)
            }
        }
    }
}

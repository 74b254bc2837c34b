// SPDX-License-Identifier: Apache-2.0
import Foundation
import OnnxRuntimeBindings

/// One model in ONNX Runtime: loaded once, run many times, tensors by name.
public final class Model {
    public enum Failure: Error {
        case noModel
        case unsupportedOutput(String)
    }

    public let inputNames: [String]
    public let outputNames: [String]

    private let environment: ORTEnv
    private let session: ORTSession

    /// Loads the model of this package.
    ///
    /// - Parameter coreML: Give Core ML the parts that it takes; see PARTITIONS.md for how many these are.
    public convenience init(coreML: Bool = false) throws {
        guard let file = Bundle.module.url(forResource: "model", withExtension: "ort") else { throw Failure.noModel }
        try self.init(file: file, coreML: coreML)
    }

    public init(file: URL, coreML: Bool = false) throws {
        environment = try ORTEnv(loggingLevel: .warning)
        let options = try ORTSessionOptions()
        if coreML {
            try options.appendCoreMLExecutionProvider(with: ORTCoreMLExecutionProviderOptions())
        }
        session = try ORTSession(env: environment, modelPath: file.path, sessionOptions: options)
        inputNames = try session.inputNames()
        outputNames = try session.outputNames()
    }

    /// Every output by name, copied.
    public func run(_ inputs: [String: Tensor]) throws -> [String: Tensor] {
        let feeds = try inputs.mapValues(Model.value)
        let results = try session.run(withInputs: feeds, outputNames: Set(outputNames), runOptions: nil)
        return try Dictionary(uniqueKeysWithValues: results.map { ($0.key, try Model.tensor($0.value, name: $0.key)) })
    }

    private static func value(_ tensor: Tensor) throws -> ORTValue {
        let data = NSMutableData(data: tensor.data)
        let shape = tensor.shape.map { NSNumber(value: $0) }
        return try ORTValue(tensorData: data, elementType: elementType(tensor.dtype), shape: shape)
    }

    private static func tensor(_ value: ORTValue, name: String) throws -> Tensor {
        let info = try value.tensorTypeAndShapeInfo()
        guard let dtype = dtype(info.elementType) else { throw Failure.unsupportedOutput(name) }
        return Tensor(dtype: dtype, shape: info.shape.map(\.intValue), data: try value.tensorData() as Data)
    }

    private static func elementType(_ dtype: Tensor.Dtype) -> ORTTensorElementDataType {
        switch dtype {
        case .float32: return .float
        case .int64: return .int64
        case .int32: return .int32
        case .int8: return .int8
        case .uint8: return .uInt8
        case .uint32: return .uInt32
        case .uint64: return .uInt64
        case .bool: return .bool
        }
    }

    private static func dtype(_ type: ORTTensorElementDataType) -> Tensor.Dtype? {
        switch type {
        case .float: return .float32
        case .int64: return .int64
        case .int32: return .int32
        case .int8: return .int8
        case .uInt8: return .uint8
        case .uInt32: return .uint32
        case .uInt64: return .uint64
        case .bool: return .bool
        default: return nil
        }
    }
}

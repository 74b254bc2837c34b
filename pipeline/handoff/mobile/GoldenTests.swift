// SPDX-License-Identifier: Apache-2.0
import Model
import XCTest

/// One tensor of the golden samples: a line `SAMPLE KIND NAME DTYPE OFFSET BYTES TOLERANCE RANK DIM...` of
/// golden/tensors.txt, and its numbers in golden/tensors.bin.
private struct Golden {
    let sample: Int
    let kind: String
    let name: String
    let tolerance: Double
    let tensor: Tensor

    static func read(_ folder: URL) throws -> [Golden] {
        let numbers = try Data(contentsOf: folder.appendingPathComponent("tensors.bin"))
        let index = try String(contentsOf: folder.appendingPathComponent("tensors.txt"), encoding: .utf8)
        return try index.split(separator: "\n").map { try parse(String($0), numbers) }
    }

    private static func parse(_ line: String, _ numbers: Data) throws -> Golden {
        let fields = line.split(separator: " ").map(String.init)
        let dtype = try XCTUnwrap(Tensor.Dtype(rawValue: fields[3]), line)
        let offset = try XCTUnwrap(Int(fields[4]), line)
        let size = try XCTUnwrap(Int(fields[5]), line)
        let shape = try fields[8...].map { try XCTUnwrap(Int($0), line) }
        let tensor = Tensor(dtype: dtype, shape: shape, data: numbers.subdata(in: offset ..< offset + size))
        let sample = try XCTUnwrap(Int(fields[0]), line)
        return Golden(sample: sample, kind: fields[1], name: fields[2], tolerance: Double(fields[6]) ?? 0, tensor: tensor)
    }
}

/// Equal infinities, and two NaN, do not differ; where one of both is finite, they differ infinitely.
private func largestDifference(_ actual: Tensor, _ expected: Tensor) -> Double {
    guard actual.shape == expected.shape else { return .infinity }
    return zip(actual.doubles, expected.doubles).map { a, b in
        if a == b || (a.isNaN && b.isNaN) { return 0 }
        let difference = abs(a - b)
        return difference.isNaN ? .infinity : difference
    }.max() ?? 0
}

final class GoldenTests: XCTestCase {
    func testTheModelGivesTheGoldenAnswers() throws {
        let folder = try XCTUnwrap(Bundle.module.url(forResource: "golden", withExtension: nil))
        let golden = try Golden.read(folder)
        let model = try Model()
        for (sample, tensors) in Dictionary(grouping: golden, by: \.sample).sorted(by: { $0.key < $1.key }) {
            let inputs = tensors.filter { $0.kind == "input" }.map { ($0.name, $0.tensor) }
            let outputs = try model.run(Dictionary(uniqueKeysWithValues: inputs))
            for expected in tensors where expected.kind == "reference" {
                let actual = try XCTUnwrap(outputs[expected.name], expected.name)
                let difference = largestDifference(actual, expected.tensor)
                XCTAssertLessThanOrEqual(difference, expected.tolerance, "\(expected.name), sample \(sample)")
            }
        }
    }
}

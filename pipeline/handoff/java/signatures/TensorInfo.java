// SPDX-License-Identifier: Apache-2.0
// Signatures only, so that the consumer can be compiled without the library. Nothing here can run.
package ai.onnxruntime;

public class TensorInfo {
    public enum OnnxTensorType {
        ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
    }

    public final OnnxTensorType onnxType = OnnxTensorType.ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;

    public long[] getShape() {
        throw new UnsupportedOperationException();
    }
}

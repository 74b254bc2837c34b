// SPDX-License-Identifier: Apache-2.0
// Signatures only, so that the consumer can be compiled without the library. Nothing here can run.
package ai.onnxruntime;

import java.nio.ByteBuffer;

public class OnnxTensor extends OnnxTensorLike {
    public static OnnxTensor createTensor(OrtEnvironment env, ByteBuffer data, long[] shape, OnnxJavaType type)
            throws OrtException {
        throw new UnsupportedOperationException();
    }

    public ByteBuffer getByteBuffer() {
        throw new UnsupportedOperationException();
    }

    public TensorInfo getInfo() {
        throw new UnsupportedOperationException();
    }

    @Override
    public void close() {}
}

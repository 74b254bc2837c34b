// SPDX-License-Identifier: Apache-2.0
// Signatures only, so that the consumer can be compiled without the library. Nothing here can run.
package ai.onnxruntime;

import java.util.Iterator;
import java.util.Map;

public class OrtSession implements AutoCloseable {
    public Map<String, NodeInfo> getInputInfo() throws OrtException {
        throw new UnsupportedOperationException();
    }

    public Map<String, NodeInfo> getOutputInfo() throws OrtException {
        throw new UnsupportedOperationException();
    }

    public Result run(Map<String, ? extends OnnxTensorLike> inputs) throws OrtException {
        throw new UnsupportedOperationException();
    }

    @Override
    public void close() throws OrtException {}

    public static class SessionOptions implements AutoCloseable {
        public void setIntraOpNumThreads(int threads) throws OrtException {
            throw new UnsupportedOperationException();
        }

        @Override
        public void close() {}
    }

    public static class Result implements AutoCloseable, Iterable<Map.Entry<String, OnnxValue>> {
        @Override
        public Iterator<Map.Entry<String, OnnxValue>> iterator() {
            throw new UnsupportedOperationException();
        }

        @Override
        public void close() {}
    }
}

// SPDX-License-Identifier: Apache-2.0
package model;

import ai.onnxruntime.NodeInfo;
import ai.onnxruntime.OnnxJavaType;
import ai.onnxruntime.OnnxTensor;
import ai.onnxruntime.OnnxValue;
import ai.onnxruntime.OrtEnvironment;
import ai.onnxruntime.OrtException;
import ai.onnxruntime.OrtSession;
import ai.onnxruntime.TensorInfo;
import java.nio.ByteOrder;
import java.nio.file.Path;
import java.util.HashMap;
import java.util.LinkedHashMap;
import java.util.Map;

/**
 * One ONNX model in ONNX Runtime: loaded once, run many times, tensors by name. {@link #run} may be called from several
 * threads at once.
 */
public final class Model implements Runner, AutoCloseable {
    private final OrtEnvironment environment = OrtEnvironment.getEnvironment(); // one for the process, never closed
    private final OrtSession session;

    /**
     * Loads a model.
     *
     * @param threads for one operator; 0 leaves it to the runtime
     */
    public Model(Path file, int threads) throws OrtException {
        try (OrtSession.SessionOptions options = new OrtSession.SessionOptions()) {
            if (threads > 0) {
                options.setIntraOpNumThreads(threads);
            }
            session = environment.createSession(file.toString(), options);
        }
    }

    /** Inputs by name, with type and shape, -1 where any size goes. */
    public Map<String, NodeInfo> inputs() throws OrtException {
        return session.getInputInfo();
    }

    public Map<String, NodeInfo> outputs() throws OrtException {
        return session.getOutputInfo();
    }

    /** Every output by name, copied: nothing of it needs closing. */
    @Override
    public Map<String, Tensor> run(Map<String, Tensor> inputs) throws OrtException {
        Map<String, OnnxTensor> feeds = new HashMap<>();
        try {
            for (var input : inputs.entrySet()) {
                Tensor tensor = input.getValue();
                OnnxJavaType type = javaType(tensor.dtype());
                feeds.put(
                        input.getKey(),
                        OnnxTensor.createTensor(environment, tensor.data().duplicate(), tensor.shape(), type));
            }
            try (OrtSession.Result results = session.run(feeds)) {
                Map<String, Tensor> outputs = new LinkedHashMap<>();
                for (var result : results) {
                    outputs.put(result.getKey(), copied(result.getValue()));
                }
                return outputs;
            }
        } finally {
            feeds.values().forEach(OnnxTensor::close);
        }
    }

    @Override
    public void close() throws OrtException {
        session.close();
    }

    private static Tensor copied(OnnxValue value) {
        if (!(value instanceof OnnxTensor tensor)) {
            throw new IllegalStateException("an output is no tensor");
        }
        TensorInfo info = tensor.getInfo();
        return new Tensor(dtype(info.onnxType), info.getShape(), tensor.getByteBuffer().order(ByteOrder.nativeOrder()));
    }

    private static OnnxJavaType javaType(String dtype) {
        return switch (dtype) {
            case "float32" -> OnnxJavaType.FLOAT;
            case "float64" -> OnnxJavaType.DOUBLE;
            case "float16" -> OnnxJavaType.FLOAT16;
            case "bfloat16" -> OnnxJavaType.BFLOAT16;
            case "int64" -> OnnxJavaType.INT64;
            case "int32" -> OnnxJavaType.INT32;
            case "int16" -> OnnxJavaType.INT16;
            case "int8" -> OnnxJavaType.INT8;
            case "uint8" -> OnnxJavaType.UINT8;
            case "bool" -> OnnxJavaType.BOOL;
            default -> throw new IllegalArgumentException("ONNX Runtime's Java interface has no tensors of " + dtype);
        };
    }

    private static String dtype(TensorInfo.OnnxTensorType type) {
        String name = type.name().replace("ONNX_TENSOR_ELEMENT_DATA_TYPE_", "").toLowerCase(java.util.Locale.ROOT);
        return switch (name) {
            case "float" -> "float32";
            case "double" -> "float64";
            default -> name;
        };
    }
}

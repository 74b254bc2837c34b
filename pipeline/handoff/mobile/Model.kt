// SPDX-License-Identifier: Apache-2.0
package model

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OnnxValue
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import android.content.Context
import java.io.Closeable
import java.nio.ByteOrder

/**
 * One model in ONNX Runtime: loaded once, run many times, tensors by name. [run] may be called from several threads at
 * once.
 *
 * @param bytes the `.ort` file
 * @param nnapi give NNAPI the parts that it takes; see PARTITIONS.md for how many these are
 */
class Model(bytes: ByteArray, nnapi: Boolean = false) : Closeable {
    private val environment = OrtEnvironment.getEnvironment() // one for the process, never closed
    private val session: OrtSession = OrtSession.SessionOptions().use { options ->
        if (nnapi) options.addNnapi()
        environment.createSession(bytes, options)
    }

    val inputNames: Set<String> get() = session.inputNames
    val outputNames: Set<String> get() = session.outputNames

    /** Every output by name, copied: nothing of it needs closing. */
    fun run(inputs: Map<String, Tensor>): Map<String, Tensor> {
        val feeds = HashMap<String, OnnxTensor>()
        try {
            for ((name, tensor) in inputs) {
                val type = javaType(tensor.dtype)
                feeds[name] = OnnxTensor.createTensor(environment, tensor.data.duplicate(), tensor.shape, type)
            }
            session.run(feeds).use { results -> return results.associate { (name, value) -> name to copied(value) } }
        } finally {
            feeds.values.forEach(OnnxTensor::close)
        }
    }

    override fun close() = session.close()

    private fun copied(value: OnnxValue): Tensor {
        val tensor = value as OnnxTensor
        val data = tensor.byteBuffer.order(ByteOrder.nativeOrder())
        return Tensor(dtype(tensor.info.onnxType.name), tensor.info.shape, data)
    }

    companion object {
        /** The model of this module. */
        fun open(context: Context, nnapi: Boolean = false): Model =
            Model(context.assets.open("model.ort").use { it.readBytes() }, nnapi)

        private fun javaType(dtype: String): OnnxJavaType = when (dtype) {
            "float32" -> OnnxJavaType.FLOAT
            "float64" -> OnnxJavaType.DOUBLE
            "float16" -> OnnxJavaType.FLOAT16
            "bfloat16" -> OnnxJavaType.BFLOAT16
            "int64" -> OnnxJavaType.INT64
            "int32" -> OnnxJavaType.INT32
            "int16" -> OnnxJavaType.INT16
            "int8" -> OnnxJavaType.INT8
            "uint8" -> OnnxJavaType.UINT8
            "bool" -> OnnxJavaType.BOOL
            else -> throw IllegalArgumentException("ONNX Runtime's Java interface has no tensors of $dtype")
        }

        private fun dtype(onnxType: String): String =
            when (val name = onnxType.removePrefix("ONNX_TENSOR_ELEMENT_DATA_TYPE_").lowercase()) {
                "float" -> "float32"
                "double" -> "float64"
                else -> name
            }
    }
}

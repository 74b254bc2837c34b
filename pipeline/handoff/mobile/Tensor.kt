// SPDX-License-Identifier: Apache-2.0
package model

import java.nio.ByteBuffer
import java.nio.ByteOrder

/**
 * A tensor of numbers in C order and the machine's byte order. Any axis of [shape] may be 0, as in a cache before the
 * first token. [dtype] is `float32`, `int64`, ...
 */
class Tensor(val dtype: String, val shape: LongArray, val data: ByteBuffer) {
    init {
        val bytes = shape.fold(size(dtype).toLong(), Math::multiplyExact)
        require(bytes == data.remaining().toLong()) { "${data.remaining()} bytes do not fill $dtype ${shape.toList()}" }
    }

    /** Every number as a Double; integers beyond 2^53 lose their last digits. */
    fun toDoubles(): DoubleArray {
        val numbers = data.duplicate().order(data.order())
        return DoubleArray(numbers.remaining() / size(dtype)) { next(numbers) }
    }

    private fun next(numbers: ByteBuffer): Double = when (dtype) {
        "float32" -> numbers.float.toDouble()
        "float64" -> numbers.double
        "float16" -> half(numbers.short.toInt())
        "bfloat16" -> Float.fromBits(numbers.short.toInt() shl 16).toDouble()
        "int64" -> numbers.long.toDouble()
        "int32" -> numbers.int.toDouble()
        "int16" -> numbers.short.toDouble()
        "int8" -> numbers.get().toDouble()
        else -> numbers.get().toUByte().toDouble() // uint8, bool
    }

    companion object {
        fun of(numbers: LongArray, vararg shape: Long): Tensor {
            val data = allocate(numbers.size * Long.SIZE_BYTES)
            data.asLongBuffer().put(numbers)
            return Tensor("int64", shape, data)
        }

        fun of(numbers: FloatArray, vararg shape: Long): Tensor {
            val data = allocate(numbers.size * Float.SIZE_BYTES)
            data.asFloatBuffer().put(numbers)
            return Tensor("float32", shape, data)
        }

        /** Direct memory, which ONNX Runtime reads without a copy. */
        fun allocate(bytes: Int): ByteBuffer = ByteBuffer.allocateDirect(bytes).order(ByteOrder.nativeOrder())

        /** Bytes of one number. */
        fun size(dtype: String): Int = when (dtype) {
            "bool", "int8", "uint8" -> 1
            "int16", "float16", "bfloat16" -> 2
            "int32", "float32" -> 4
            "int64", "float64" -> 8
            else -> throw IllegalArgumentException("tensors of $dtype are not handled here")
        }

        private fun half(bits: Int): Double {
            val exponent = bits shr 10 and 31
            val fraction = bits and 1023
            val magnitude = when (exponent) {
                31 -> if (fraction != 0) Double.NaN else Double.POSITIVE_INFINITY
                0 -> Math.scalb(fraction.toDouble(), -24)
                else -> Math.scalb(fraction + 1024.0, exponent - 25)
            }
            return if (bits and 0x8000 != 0) -magnitude else magnitude
        }
    }
}

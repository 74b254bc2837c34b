// SPDX-License-Identifier: Apache-2.0
package model

import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import kotlin.math.abs
import org.junit.Assert.assertTrue
import org.junit.Test

/**
 * One tensor of the golden samples: a line `SAMPLE KIND NAME DTYPE OFFSET BYTES TOLERANCE RANK DIM...` of
 * golden/tensors.txt, and its numbers, little-endian, in golden/tensors.bin.
 */
private class Golden(val sample: Int, val kind: String, val name: String, val tolerance: Double, val tensor: Tensor) {
    companion object {
        fun read(folder: File): List<Golden> {
            check(ByteOrder.nativeOrder() == ByteOrder.LITTLE_ENDIAN)
            val numbers = File(folder, "tensors.bin").readBytes()
            return File(folder, "tensors.txt").readLines().map { parse(it.split(" "), numbers) }
        }

        private fun parse(fields: List<String>, numbers: ByteArray): Golden {
            val shape = fields.drop(8).map(String::toLong).toLongArray()
            val data: ByteBuffer = Tensor.allocate(fields[5].toInt())
            data.put(numbers, fields[4].toInt(), fields[5].toInt()).rewind()
            val tolerance = if (fields[6] == "-") 0.0 else fields[6].toDouble()
            return Golden(fields[0].toInt(), fields[1], fields[2], tolerance, Tensor(fields[3], shape, data))
        }
    }
}

/** Equal infinities, and two NaN, do not differ; where one of both is finite, they differ infinitely. */
private fun largestDifference(actual: Tensor, expected: Tensor): Double {
    if (!actual.shape.contentEquals(expected.shape)) return Double.POSITIVE_INFINITY
    return actual.toDoubles().zip(expected.toDoubles().asList()).maxOfOrNull { (a, b) ->
        val difference = abs(a - b)
        when {
            a == b || (a.isNaN() && b.isNaN()) -> 0.0
            difference.isNaN() -> Double.POSITIVE_INFINITY
            else -> difference
        }
    } ?: 0.0
}

class GoldenTest {
    @Test
    fun theModelGivesTheGoldenAnswers() {
        Model(File("src/main/assets/model.ort").readBytes()).use { model ->
            for ((sample, tensors) in Golden.read(File("golden")).groupBy { it.sample }) {
                val outputs = model.run(tensors.filter { it.kind == "input" }.associate { it.name to it.tensor })
                for (expected in tensors.filter { it.kind == "reference" }) {
                    val difference = largestDifference(outputs.getValue(expected.name), expected.tensor)
                    val told = "${expected.name}, sample $sample: $difference, allowed ${expected.tolerance}"
                    assertTrue(told, difference <= expected.tolerance)
                }
            }
        }
    }
}

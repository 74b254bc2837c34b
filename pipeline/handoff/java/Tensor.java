// SPDX-License-Identifier: Apache-2.0
package model;

import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.Arrays;

/**
 * A tensor of numbers.
 *
 * @param dtype {@code float32}, {@code int64}, ...
 * @param shape any axis may be 0, as in a cache before the first token
 * @param data the numbers in C order and the machine's byte order
 */
public record Tensor(String dtype, long[] shape, ByteBuffer data) {
    public Tensor {
        long bytes = Arrays.stream(shape).reduce(size(dtype), Math::multiplyExact);
        if (bytes != data.remaining()) {
            throw new IllegalArgumentException(data.remaining() + " bytes do not fill " + dtype + Arrays.toString(shape));
        }
    }

    public static Tensor of(long[] numbers, long... shape) {
        ByteBuffer data = allocate(numbers.length * Long.BYTES);
        data.asLongBuffer().put(numbers);
        return new Tensor("int64", shape, data);
    }

    public static Tensor of(int[] numbers, long... shape) {
        ByteBuffer data = allocate(numbers.length * Integer.BYTES);
        data.asIntBuffer().put(numbers);
        return new Tensor("int32", shape, data);
    }

    public static Tensor of(float[] numbers, long... shape) {
        ByteBuffer data = allocate(numbers.length * Float.BYTES);
        data.asFloatBuffer().put(numbers);
        return new Tensor("float32", shape, data);
    }

    /** All zeros. */
    public static Tensor zeros(String dtype, long... shape) {
        long bytes = Arrays.stream(shape).reduce(size(dtype), Math::multiplyExact);
        return new Tensor(dtype, shape, allocate(Math.toIntExact(bytes)));
    }

    /** Direct memory, which ONNX Runtime reads without a copy. */
    static ByteBuffer allocate(int bytes) {
        return ByteBuffer.allocateDirect(bytes).order(ByteOrder.nativeOrder());
    }

    /** Bytes of one number. */
    static long size(String dtype) {
        return switch (dtype) {
            case "bool", "int8", "uint8" -> 1;
            case "int16", "uint16", "float16", "bfloat16" -> 2;
            case "int32", "uint32", "float32" -> 4;
            case "int64", "uint64", "float64" -> 8;
            default -> throw new IllegalArgumentException("tensors of " + dtype + " are not handled here");
        };
    }

    /** Every number as a double; integers beyond 2^53 lose their last digits. */
    public double[] toDoubles() {
        ByteBuffer numbers = data.duplicate().order(data.order());
        double[] result = new double[(int) (numbers.remaining() / size(dtype))];
        for (int i = 0; i < result.length; i++) {
            result[i] = next(numbers);
        }
        return result;
    }

    private double next(ByteBuffer numbers) {
        return switch (dtype) {
            case "float32" -> numbers.getFloat();
            case "float64" -> numbers.getDouble();
            case "float16" -> half(numbers.getShort());
            case "bfloat16" -> Float.intBitsToFloat(numbers.getShort() << 16);
            case "int64" -> numbers.getLong();
            case "uint64" -> unsigned(numbers.getLong());
            case "int32" -> numbers.getInt();
            case "uint32" -> Integer.toUnsignedLong(numbers.getInt());
            case "int16" -> numbers.getShort();
            case "uint16" -> Short.toUnsignedInt(numbers.getShort());
            case "int8" -> numbers.get();
            default -> Byte.toUnsignedInt(numbers.get());
        };
    }

    private static double unsigned(long bits) {
        return bits >= 0 ? bits : (bits >>> 1) * 2.0;
    }

    /** Java 20 has Float.float16ToFloat. */
    private static double half(short bits) {
        int exponent = bits >> 10 & 31;
        int fraction = bits & 1023;
        double magnitude = switch (exponent) {
            case 31 -> fraction != 0 ? Double.NaN : Double.POSITIVE_INFINITY;
            case 0 -> Math.scalb((double) fraction, -24);
            default -> Math.scalb(fraction + 1024.0, exponent - 25);
        };
        return bits < 0 ? -magnitude : magnitude;
    }
}

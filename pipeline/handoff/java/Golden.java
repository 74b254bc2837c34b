// SPDX-License-Identifier: Apache-2.0
package model;

import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;

/**
 * One tensor of the golden samples: a line {@code SAMPLE KIND NAME DTYPE OFFSET BYTES TOLERANCE RANK DIM...} of
 * golden/tensors.txt, and its numbers, little-endian, in golden/tensors.bin.
 *
 * @param kind {@code input}, {@code reference} (the original model's answer) or {@code python} (ONNX Runtime's there)
 * @param tolerance of a reference, absolute
 */
public record Golden(int sample, String kind, String name, double tolerance, Tensor tensor) {
    public static List<Golden> read(Path folder) throws IOException {
        ByteBuffer numbers = ByteBuffer.wrap(Files.readAllBytes(folder.resolve("tensors.bin")));
        List<Golden> all = new ArrayList<>();
        for (String line : Files.readAllLines(folder.resolve("tensors.txt"))) {
            try {
                all.add(parse(line.split(" "), numbers));
            } catch (IndexOutOfBoundsException | IllegalArgumentException error) {
                throw new IOException("golden/tensors.txt is damaged: " + line, error);
            }
        }
        return all;
    }

    private static Golden parse(String[] fields, ByteBuffer numbers) {
        int rank = Integer.parseInt(fields[7]);
        if (fields.length != 8 + rank) {
            throw new IllegalArgumentException("not " + rank + " axes");
        }
        long[] shape = Arrays.stream(fields, 8, fields.length).mapToLong(Long::parseLong).toArray();
        double tolerance = fields[6].equals("-") ? 0 : Double.parseDouble(fields[6]);
        ByteBuffer raw = numbers.slice(Integer.parseInt(fields[4]), Integer.parseInt(fields[5]));
        ByteBuffer data = nativeOrder(raw, (int) Tensor.size(fields[3]));
        return new Golden(Integer.parseInt(fields[0]), fields[1], fields[2], tolerance, new Tensor(fields[3], shape, data));
    }

    /** A copy in memory that ONNX Runtime reads as it is. */
    private static ByteBuffer nativeOrder(ByteBuffer raw, int size) {
        ByteBuffer data = Tensor.allocate(raw.remaining());
        boolean little = ByteOrder.nativeOrder() == ByteOrder.LITTLE_ENDIAN;
        for (int i = 0; i < raw.remaining(); i++) {
            data.put(i, raw.get(little ? i : i - i % size + size - 1 - i % size));
        }
        return data;
    }

    /**
     * The largest absolute difference; infinite for tensors of two shapes. Equal infinities, and two NaN, do not differ;
     * where one of both is finite, they differ infinitely.
     */
    public static double largestDifference(Tensor actual, Tensor expected) {
        if (!Arrays.equals(actual.shape(), expected.shape())) {
            return Double.POSITIVE_INFINITY;
        }
        double[] found = actual.toDoubles();
        double[] wanted = expected.toDoubles();
        double worst = 0;
        for (int i = 0; i < found.length; i++) {
            if (found[i] == wanted[i] || Double.isNaN(found[i]) && Double.isNaN(wanted[i])) {
                continue;
            }
            double difference = Math.abs(found[i] - wanted[i]);
            worst = Math.max(worst, Double.isNaN(difference) ? Double.POSITIVE_INFINITY : difference);
        }
        return worst;
    }
}

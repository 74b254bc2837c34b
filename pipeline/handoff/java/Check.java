// SPDX-License-Identifier: Apache-2.0
package model;

import java.nio.file.Path;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;

/**
 * Runs the model on the golden samples and prints one line an output:
 *
 * <pre>OUTPUT DIFFERENCE TOLERANCE DIFFERENCE-FROM-PYTHON</pre>
 *
 * Exit code 0 where every output is within its tolerance. To be run in the folder that holds model/ and golden/.
 */
public final class Check {
    private static final class Outcome {
        double difference;
        double tolerance;
        double fromPython;
    }

    private Check() {}

    public static void main(String[] words) throws Exception {
        try (Model model = new Model(Path.of("model", "model.onnx"), 1)) {
            System.exit(compare(model, Golden.read(Path.of("golden"))) ? 0 : 1);
        }
    }

    /** Prints the lines; whether every output is within its tolerance. */
    static boolean compare(Runner model, List<Golden> golden) throws Exception {
        Map<String, Outcome> outcomes = new TreeMap<>();
        for (int sample : golden.stream().mapToInt(Golden::sample).distinct().toArray()) {
            List<Golden> tensors = golden.stream().filter(one -> one.sample() == sample).toList();
            compareSample(model, tensors, outcomes);
        }
        outcomes.forEach((name, outcome) -> System.out.println(
                name + " " + outcome.difference + " " + outcome.tolerance + " " + outcome.fromPython));
        return outcomes.values().stream().allMatch(outcome -> outcome.difference <= outcome.tolerance);
    }

    private static void compareSample(Runner model, List<Golden> tensors, Map<String, Outcome> outcomes)
            throws Exception {
        Map<String, Tensor> inputs = new HashMap<>();
        tensors.stream().filter(one -> one.kind().equals("input")).forEach(one -> inputs.put(one.name(), one.tensor()));
        Map<String, Tensor> outputs = model.run(inputs);
        for (Golden expected : tensors) {
            if (expected.kind().equals("input")) {
                continue;
            }
            double difference = Golden.largestDifference(outputs.get(expected.name()), expected.tensor());
            Outcome outcome = outcomes.computeIfAbsent(expected.name(), name -> new Outcome());
            if (expected.kind().equals("python")) {
                outcome.fromPython = Math.max(outcome.fromPython, difference);
            } else {
                outcome.difference = Math.max(outcome.difference, difference);
                outcome.tolerance = expected.tolerance();
            }
        }
    }
}

// SPDX-License-Identifier: Apache-2.0
using System.Globalization;

namespace Handoff;

/// <summary>
/// Runs the model on the golden samples and prints one line an output:
/// <c>OUTPUT DIFFERENCE TOLERANCE DIFFERENCE-FROM-PYTHON</c>.
/// </summary>
public static class Check
{
    private sealed class Outcome
    {
        public double Difference, Tolerance, FromPython;
    }

    /// <returns>Whether every output is within its tolerance.</returns>
    public static bool Run(Model model, IReadOnlyCollection<Golden> golden)
    {
        var outcomes = new SortedDictionary<string, Outcome>(StringComparer.Ordinal);
        foreach (var sample in golden.GroupBy(one => one.Sample))
        {
            var inputs = sample.Where(one => one.Kind == "input").ToDictionary(one => one.Name, one => one.Tensor);
            var outputs = model.Run(inputs);
            foreach (var expected in sample.Where(one => one.Kind != "input"))
            {
                var difference = Golden.LargestDifference(outputs[expected.Name], expected.Tensor);
                if (!outcomes.TryGetValue(expected.Name, out var outcome))
                    outcomes[expected.Name] = outcome = new Outcome();
                if (expected.Kind == "python")
                {
                    outcome.FromPython = Math.Max(outcome.FromPython, difference);
                }
                else
                {
                    outcome.Difference = Math.Max(outcome.Difference, difference);
                    outcome.Tolerance = expected.Tolerance;
                }
            }
        }
        foreach (var (name, o) in outcomes)
            Console.WriteLine(FormattableString.Invariant($"{name} {o.Difference} {o.Tolerance} {o.FromPython}"));
        return outcomes.Values.All(outcome => outcome.Difference <= outcome.Tolerance);
    }
}

// SPDX-License-Identifier: Apache-2.0
using System.Globalization;

namespace Handoff;

/// <summary>
/// One tensor of the golden samples: a line <c>SAMPLE KIND NAME DTYPE OFFSET BYTES TOLERANCE RANK DIM...</c> of
/// golden/tensors.txt, and its numbers in golden/tensors.bin. Kind is <c>input</c>, <c>reference</c> (the original
/// model's answer, with an absolute tolerance) or <c>python</c> (what ONNX Runtime answers in Python).
/// </summary>
public sealed record Golden(int Sample, string Kind, string Name, double Tolerance, Tensor Tensor)
{
    public static List<Golden> Read(string folder)
    {
        var numbers = File.ReadAllBytes(Path.Combine(folder, "tensors.bin"));
        return File.ReadLines(Path.Combine(folder, "tensors.txt")).Select(line => Parse(line, numbers)).ToList();
    }

    private static Golden Parse(string line, byte[] numbers)
    {
        var fields = line.Split(' ');
        var rank = int.Parse(fields[7], CultureInfo.InvariantCulture);
        var shape = fields.Skip(8).Select(dim => long.Parse(dim, CultureInfo.InvariantCulture)).ToArray();
        if (shape.Length != rank) throw new InvalidDataException($"golden/tensors.txt is damaged: {line}");
        var offset = int.Parse(fields[4], CultureInfo.InvariantCulture);
        var data = numbers.AsSpan(offset, int.Parse(fields[5], CultureInfo.InvariantCulture)).ToArray();
        var tolerance = fields[6] == "-" ? 0 : double.Parse(fields[6], CultureInfo.InvariantCulture);
        var sample = int.Parse(fields[0], CultureInfo.InvariantCulture);
        return new Golden(sample, fields[1], fields[2], tolerance, new Tensor(fields[3], shape, data));
    }

    /// <summary>
    /// The largest absolute difference; infinite for tensors of two shapes. Equal infinities, and two NaN, do not
    /// differ; where one of both is finite, they differ infinitely.
    /// </summary>
    public static double LargestDifference(Tensor actual, Tensor expected)
    {
        if (!actual.Shape.SequenceEqual(expected.Shape)) return double.PositiveInfinity;
        var pairs = actual.ToDoubles().Zip(expected.ToDoubles());
        return pairs.Select(pair => Difference(pair.First, pair.Second)).DefaultIfEmpty(0).Max();
    }

    private static double Difference(double a, double b)
    {
        if (a == b || (double.IsNaN(a) && double.IsNaN(b))) return 0;
        var difference = Math.Abs(a - b);
        return double.IsNaN(difference) ? double.PositiveInfinity : difference;
    }
}

// SPDX-License-Identifier: Apache-2.0
using System.Buffers.Binary;
using System.Runtime.InteropServices;

namespace Handoff;

/// <summary>A tensor of numbers: little-endian bytes in C order. Any axis may be 0, as in an empty cache.</summary>
public sealed record Tensor(string Dtype, long[] Shape, byte[] Data)
{
    public static Tensor Of<T>(string dtype, T[] numbers, params long[] shape) where T : unmanaged =>
        new(dtype, shape, MemoryMarshal.AsBytes(numbers.AsSpan()).ToArray());

    public static Tensor Zeros(string dtype, params long[] shape) =>
        new(dtype, shape, new byte[shape.Aggregate(Size(dtype), (total, dim) => checked(total * dim))]);

    /// <summary>Bytes of one number.</summary>
    public static long Size(string dtype) => dtype switch
    {
        "bool" or "int8" or "uint8" => 1,
        "int16" or "uint16" or "float16" or "bfloat16" => 2,
        "int32" or "uint32" or "float32" => 4,
        "int64" or "uint64" or "float64" => 8,
        _ => throw new ArgumentException($"tensors of {dtype} are not handled here"),
    };

    /// <summary>Every number as a double; integers beyond 2^53 lose their last digits.</summary>
    public double[] ToDoubles()
    {
        var size = (int)Size(Dtype);
        var result = new double[Data.Length / size];
        for (var i = 0; i < result.Length; i++) result[i] = Number(Data.AsSpan(i * size, size));
        return result;
    }

    private double Number(ReadOnlySpan<byte> raw) => Dtype switch
    {
        "float32" => BinaryPrimitives.ReadSingleLittleEndian(raw),
        "float64" => BinaryPrimitives.ReadDoubleLittleEndian(raw),
        "float16" => (double)BinaryPrimitives.ReadHalfLittleEndian(raw),
        "bfloat16" => BitConverter.Int32BitsToSingle(BinaryPrimitives.ReadInt16LittleEndian(raw) << 16),
        "int64" => BinaryPrimitives.ReadInt64LittleEndian(raw),
        "uint64" => BinaryPrimitives.ReadUInt64LittleEndian(raw),
        "int32" => BinaryPrimitives.ReadInt32LittleEndian(raw),
        "uint32" => BinaryPrimitives.ReadUInt32LittleEndian(raw),
        "int16" => BinaryPrimitives.ReadInt16LittleEndian(raw),
        "uint16" => BinaryPrimitives.ReadUInt16LittleEndian(raw),
        "int8" => (sbyte)raw[0],
        _ => raw[0],
    };
}

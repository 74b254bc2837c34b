// SPDX-License-Identifier: Apache-2.0
using Microsoft.ML.OnnxRuntime;
using Microsoft.ML.OnnxRuntime.Tensors;

namespace Handoff;

/// <summary>
/// One ONNX model in ONNX Runtime: loaded once, run many times, tensors by name. <see cref="Run"/> may be called from
/// several threads at once.
/// </summary>
public sealed class Model : IDisposable
{
    private readonly InferenceSession session;
    private readonly RunOptions options = new();

    /// <param name="threads">For one operator; 0 leaves it to the runtime.</param>
    public Model(string file, int threads = 0)
    {
        using var sessionOptions = new SessionOptions { IntraOpNumThreads = threads };
        session = new InferenceSession(file, sessionOptions);
    }

    public IReadOnlyDictionary<string, NodeMetadata> Inputs => session.InputMetadata;

    public IReadOnlyDictionary<string, NodeMetadata> Outputs => session.OutputMetadata;

    /// <summary>Every output by name, copied: nothing of it needs disposing.</summary>
    public IReadOnlyDictionary<string, Tensor> Run(IReadOnlyDictionary<string, Tensor> inputs)
    {
        var feeds = new Dictionary<string, OrtValue>();
        try
        {
            foreach (var (name, tensor) in inputs) feeds[name] = Value(tensor);
            using var results = session.Run(options, feeds, session.OutputNames);
            return session.OutputNames.Zip(results).ToDictionary(pair => pair.First, pair => Copied(pair.Second));
        }
        finally
        {
            foreach (var value in feeds.Values) value.Dispose();
        }
    }

    public void Dispose()
    {
        options.Dispose();
        session.Dispose();
    }

    private static OrtValue Value(Tensor tensor)
    {
        var type = ElementTypes[tensor.Dtype];
        var value = OrtValue.CreateAllocatedTensorValue(OrtAllocator.DefaultInstance, type, tensor.Shape);
        if (tensor.Data.Length > 0) tensor.Data.CopyTo(value.GetTensorMutableRawData());
        return value;
    }

    private static Tensor Copied(OrtValue value)
    {
        var info = value.GetTensorTypeAndShape();
        var dtype = ElementTypes.Single(pair => pair.Value == info.ElementDataType).Key;
        var data = info.ElementCount > 0 ? value.GetTensorMutableRawData().ToArray() : Array.Empty<byte>();
        return new Tensor(dtype, info.Shape, data);
    }

    private static readonly Dictionary<string, TensorElementType> ElementTypes = new()
    {
        ["float32"] = TensorElementType.Float,
        ["float64"] = TensorElementType.Double,
        ["float16"] = TensorElementType.Float16,
        ["bfloat16"] = TensorElementType.BFloat16,
        ["int64"] = TensorElementType.Int64,
        ["int32"] = TensorElementType.Int32,
        ["int16"] = TensorElementType.Int16,
        ["int8"] = TensorElementType.Int8,
        ["uint64"] = TensorElementType.UInt64,
        ["uint32"] = TensorElementType.UInt32,
        ["uint16"] = TensorElementType.UInt16,
        ["uint8"] = TensorElementType.UInt8,
        ["bool"] = TensorElementType.Bool,
    };
}

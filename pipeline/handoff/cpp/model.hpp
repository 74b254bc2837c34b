// SPDX-License-Identifier: Apache-2.0
// One ONNX model in ONNX Runtime: loaded once, run many times, tensors by name.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

// Name to tensor. An Ort::Value owns its memory and can be moved, not copied.
using Tensors = std::map<std::string, Ort::Value>;
using Shape = std::vector<std::int64_t>;

// What the model says of one input or output.
struct TensorSpec {
  std::string name;
  ONNXTensorElementDataType type;
  Shape shape;  // -1 where any size goes
};

// Not to be copied. `run` may be called from several threads at once.
class Model {
 public:
  // Throws std::runtime_error or Ort::Exception where the file is missing or no model. `threads`: for one operator.
  explicit Model(const std::filesystem::path& file, int threads = 0);

  const std::vector<TensorSpec>& inputs() const { return inputs_; }
  const std::vector<TensorSpec>& outputs() const { return outputs_; }

  // Every output by name. Throws std::invalid_argument for an input that is missing, unknown, or of another type or
  // shape than the model takes.
  Tensors run(const Tensors& inputs);

 private:
  void require(const Tensors& inputs) const;

  Ort::Session session_{nullptr};
  std::vector<TensorSpec> inputs_, outputs_;
};

// A tensor of its own memory, all zeros. Any size may be 0, as that of a cache before the first token.
Ort::Value zeros(ONNXTensorElementDataType type, const Shape& shape);

// The same from bytes; throws std::invalid_argument where their number is not what the shape needs.
Ort::Value tensor_from_bytes(ONNXTensorElementDataType type, const Shape& shape, const void* data, std::size_t size);

// A tensor of the numbers in `values`, which are copied: tensor<std::int64_t>({1, 2, 3}, {1, 3}).
template <typename T>
Ort::Value tensor(const std::vector<T>& values, const Shape& shape) {
  return tensor_from_bytes(Ort::TypeToTensorType<T>::type, shape, values.data(), values.size() * sizeof(T));
}

Shape shape_of(const Ort::Value& value);

// The numbers of a tensor of any floating-point type as float, of any other type as int64.
std::vector<float> floats(const Ort::Value& value);
std::vector<std::int64_t> integers(const Ort::Value& value);
bool is_floating(const Ort::Value& value);

// `float16` for ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 and back; throws std::invalid_argument for others than numbers.
const char* type_name(ONNXTensorElementDataType type);
ONNXTensorElementDataType type_named(const std::string& name);

// SPDX-License-Identifier: Apache-2.0
#include "model.hpp"

#include <cstring>
#include <stdexcept>

namespace {

struct ElementType {
  const char* name;
  ONNXTensorElementDataType type;
  std::size_t size;
};

constexpr ElementType element_types[] = {
    {"float32", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 4},     {"float64", ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, 8},
    {"float16", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, 2},   {"bfloat16", ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, 2},
    {"int64", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, 8},       {"int32", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, 4},
    {"int16", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16, 2},       {"int8", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, 1},
    {"uint64", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64, 8},     {"uint32", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32, 4},
    {"uint16", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16, 2},     {"uint8", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, 1},
    {"bool", ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL, 1},
};

const ElementType& element(ONNXTensorElementDataType type) {
  for (const auto& known : element_types)
    if (known.type == type) return known;
  throw std::invalid_argument("tensors of ONNX type " + std::to_string(type) + " are not handled here");
}

// One for the process: it owns the thread pools and the log.
Ort::Env& environment() {
  // A library that is older than the headers answers null, and the first call through it would crash.
  if (OrtGetApiBase()->GetApi(ORT_API_VERSION) == nullptr)
    throw std::runtime_error("built for ONNX Runtime 1." + std::to_string(ORT_API_VERSION) + ", but the library is " +
                             OrtGetApiBase()->GetVersionString());
  static Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "model");
  return env;
}

TensorSpec spec(const char* name, const Ort::TypeInfo& type) {
  if (type.GetONNXType() != ONNX_TYPE_TENSOR) throw std::runtime_error(std::string(name) + " is no tensor");
  const auto info = type.GetTensorTypeAndShapeInfo();
  return {name, info.GetElementType(), info.GetShape()};
}

std::string text(const Shape& shape) {
  std::string result = "[";
  for (const auto dim : shape) result += (result.size() > 1 ? ", " : "") + (dim < 0 ? "?" : std::to_string(dim));
  return result + "]";
}

bool fits(const Shape& shape, const Shape& wanted) {
  if (shape.size() != wanted.size()) return false;
  for (std::size_t axis = 0; axis < shape.size(); ++axis)
    if (wanted[axis] >= 0 && wanted[axis] != shape[axis]) return false;
  return true;
}

std::size_t count(const Ort::Value& value) { return value.GetTensorTypeAndShapeInfo().GetElementCount(); }

Ort::Value allocated(ONNXTensorElementDataType type, const Shape& shape) {
  Ort::AllocatorWithDefaultOptions allocator;
  return Ort::Value::CreateTensor(allocator, shape.data(), shape.size(), type);
}

template <typename Stored, typename Wanted>
std::vector<Wanted> converted(const Ort::Value& value) {
  const auto* numbers = static_cast<const Stored*>(value.GetTensorRawData());
  std::vector<Wanted> result;
  result.reserve(count(value));
  for (std::size_t i = 0; i < count(value); ++i) result.push_back(static_cast<Wanted>(numbers[i]));
  return result;
}

}  // namespace

Model::Model(const std::filesystem::path& file, int threads) {
  auto& env = environment();
  Ort::SessionOptions options;
  if (threads > 0) options.SetIntraOpNumThreads(threads);
  session_ = Ort::Session(env, file.c_str(), options);
  Ort::AllocatorWithDefaultOptions allocator;
  for (std::size_t i = 0; i < session_.GetInputCount(); ++i)
    inputs_.push_back(spec(session_.GetInputNameAllocated(i, allocator).get(), session_.GetInputTypeInfo(i)));
  for (std::size_t i = 0; i < session_.GetOutputCount(); ++i)
    outputs_.push_back(spec(session_.GetOutputNameAllocated(i, allocator).get(), session_.GetOutputTypeInfo(i)));
}

Tensors Model::run(const Tensors& inputs) {
  require(inputs);
  Ort::IoBinding binding(session_);  // binds by name, and leaves the outputs where the runtime made them
  for (const auto& [name, value] : inputs) binding.BindInput(name.c_str(), value);
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
  for (const auto& output : outputs_) binding.BindOutput(output.name.c_str(), memory);
  session_.Run(Ort::RunOptions{}, binding);
  Tensors results;
  auto values = binding.GetOutputValues();  // in the order in which they were bound
  for (std::size_t i = 0; i < outputs_.size(); ++i) results.emplace(outputs_[i].name, std::move(values[i]));
  return results;
}

void Model::require(const Tensors& inputs) const {
  for (const auto& wanted : inputs_) {
    const auto found = inputs.find(wanted.name);
    if (found == inputs.end()) throw std::invalid_argument("input '" + wanted.name + "' is missing");
    const auto info = found->second.GetTensorTypeAndShapeInfo();
    if (info.GetElementType() != wanted.type || !fits(info.GetShape(), wanted.shape))
      throw std::invalid_argument("input '" + wanted.name + "' is " + type_name(info.GetElementType()) + " " +
                                  text(info.GetShape()) + ": the model wants " + type_name(wanted.type) + " " +
                                  text(wanted.shape));
  }
  if (inputs.size() > inputs_.size()) throw std::invalid_argument("there are more inputs than the model has");
}

Ort::Value zeros(ONNXTensorElementDataType type, const Shape& shape) {
  auto value = allocated(type, shape);
  const auto size = count(value) * element(type).size;
  if (size > 0) std::memset(value.GetTensorMutableRawData(), 0, size);
  return value;
}

Ort::Value tensor_from_bytes(ONNXTensorElementDataType type, const Shape& shape, const void* data, std::size_t size) {
  auto value = allocated(type, shape);
  if (size != count(value) * element(type).size)
    throw std::invalid_argument(std::to_string(size) + " bytes do not fill a tensor of shape " + text(shape));
  if (size > 0) std::memcpy(value.GetTensorMutableRawData(), data, size);
  return value;
}

Shape shape_of(const Ort::Value& value) { return value.GetTensorTypeAndShapeInfo().GetShape(); }

bool is_floating(const Ort::Value& value) {
  switch (value.GetTensorTypeAndShapeInfo().GetElementType()) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return true;
    default:
      return false;
  }
}

std::vector<float> floats(const Ort::Value& value) {
  const auto type = value.GetTensorTypeAndShapeInfo().GetElementType();
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return converted<float, float>(value);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE: return converted<double, float>(value);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return converted<Ort::Float16_t, float>(value);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return converted<Ort::BFloat16_t, float>(value);
    default: throw std::invalid_argument(std::string("a tensor of ") + type_name(type) + " holds no fractions");
  }
}

std::vector<std::int64_t> integers(const Ort::Value& value) {
  const auto type = value.GetTensorTypeAndShapeInfo().GetElementType();
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64: return converted<std::int64_t, std::int64_t>(value);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32: return converted<std::int32_t, std::int64_t>(value);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16: return converted<std::int16_t, std::int64_t>(value);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8: return converted<std::int8_t, std::int64_t>(value);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64: return converted<std::uint64_t, std::int64_t>(value);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32: return converted<std::uint32_t, std::int64_t>(value);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16: return converted<std::uint16_t, std::int64_t>(value);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL: return converted<std::uint8_t, std::int64_t>(value);
    default: throw std::invalid_argument(std::string("a tensor of ") + type_name(type) + " holds no integers");
  }
}

const char* type_name(ONNXTensorElementDataType type) { return element(type).name; }

ONNXTensorElementDataType type_named(const std::string& name) {
  for (const auto& known : element_types)
    if (name == known.name) return known.type;
  throw std::invalid_argument("tensors of " + name + " are not handled here");
}

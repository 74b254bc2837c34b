// SPDX-License-Identifier: Apache-2.0
#include "model.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace {

const std::map<std::string, ov::element::Type> element_types = {
    {"float32", ov::element::f32}, {"float64", ov::element::f64}, {"float16", ov::element::f16},
    {"bfloat16", ov::element::bf16}, {"int64", ov::element::i64}, {"int32", ov::element::i32},
    {"int16", ov::element::i16}, {"int8", ov::element::i8}, {"uint64", ov::element::u64},
    {"uint32", ov::element::u32}, {"uint16", ov::element::u16}, {"uint8", ov::element::u8},
    {"bool", ov::element::boolean},
};

template <typename T>
std::vector<double> read(const ov::Tensor& tensor) {
  const auto* first = static_cast<const T*>(static_cast<const void*>(tensor.data()));
  std::vector<double> result;
  result.reserve(tensor.get_size());
  for (std::size_t i = 0; i < tensor.get_size(); ++i) result.push_back(static_cast<double>(first[i]));
  return result;
}

// On processors with AMX or AVX512-BF16, OpenVINO computes float32 models in bfloat16 unless it is told not to.
ov::AnyMap exact() {
  return {ov::hint::inference_precision(ov::element::f32), ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY)};
}

}  // namespace

Model::Model(const std::filesystem::path& file) : compiled_(core_.compile_model(file, "CPU", exact())) {}

bool Model::has_input(const std::string& name) const {
  const auto all = inputs();
  return std::any_of(all.begin(), all.end(), [&](const auto& input) { return input.get_names().count(name) > 0; });
}

Tensors Model::run(const Tensors& inputs) {
  for (const auto& [name, value] : inputs)
    if (!has_input(name)) throw std::invalid_argument("the model has no input '" + name + "'");
  auto request = compiled_.create_infer_request();
  for (const auto& input : this->inputs()) {
    const auto& names = input.get_names();
    const auto given = std::find_if(inputs.begin(), inputs.end(), [&](const auto& pair) { return names.count(pair.first) > 0; });
    if (given == inputs.end()) throw std::invalid_argument("input '" + input.get_any_name() + "' is missing");
    request.set_tensor(input, given->second);
  }
  request.infer();
  Tensors results;
  for (const auto& output : outputs()) {
    const auto value = request.get_tensor(output);
    ov::Tensor copy(value.get_element_type(), value.get_shape());
    if (value.get_size() > 0) value.copy_to(copy);  // which reads through a null pointer otherwise
    for (const auto& name : output.get_names()) results[name] = copy;
  }
  return results;
}

ov::Tensor tensor(const std::string& dtype, const ov::Shape& shape, const void* data, std::size_t size) {
  const auto type = element_types.find(dtype);
  if (type == element_types.end()) throw std::invalid_argument("tensors of " + dtype + " are not handled here");
  ov::Tensor result(type->second, shape);
  if (result.get_byte_size() != size)
    throw std::invalid_argument(std::to_string(size) + " bytes do not fill a tensor of " + dtype);
  if (size > 0) std::memcpy(result.data(), data, size);
  return result;
}

std::vector<double> numbers(const ov::Tensor& tensor) {
  switch (tensor.get_element_type()) {
    case ov::element::Type_t::f32: return read<float>(tensor);
    case ov::element::Type_t::f64: return read<double>(tensor);
    case ov::element::Type_t::f16: return read<ov::float16>(tensor);
    case ov::element::Type_t::bf16: return read<ov::bfloat16>(tensor);
    case ov::element::Type_t::i64: return read<std::int64_t>(tensor);
    case ov::element::Type_t::i32: return read<std::int32_t>(tensor);
    case ov::element::Type_t::i16: return read<std::int16_t>(tensor);
    case ov::element::Type_t::i8: return read<std::int8_t>(tensor);
    case ov::element::Type_t::u64: return read<std::uint64_t>(tensor);
    case ov::element::Type_t::u32: return read<std::uint32_t>(tensor);
    case ov::element::Type_t::u16: return read<std::uint16_t>(tensor);
    case ov::element::Type_t::u8:
    case ov::element::Type_t::boolean: return read<std::uint8_t>(tensor);
    default: throw std::invalid_argument("a tensor of " + tensor.get_element_type().get_type_name() + " is not handled here");
  }
}

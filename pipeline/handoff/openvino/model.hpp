// SPDX-License-Identifier: Apache-2.0
// One ONNX model (or OpenVINO's own .xml) in OpenVINO on the processor: loaded once, run many times, tensors by name.
#pragma once

#include <filesystem>
#include <map>
#include <openvino/openvino.hpp>
#include <string>
#include <vector>

using Tensors = std::map<std::string, ov::Tensor>;

class Model {
 public:
  // Throws ov::Exception where the file is missing or holds operators that OpenVINO does not know.
  explicit Model(const std::filesystem::path& file);

  // Inputs and outputs, with their types and shapes. An input that nothing in the model uses is not among them.
  std::vector<ov::Output<const ov::Node>> inputs() const { return compiled_.inputs(); }
  std::vector<ov::Output<const ov::Node>> outputs() const { return compiled_.outputs(); }
  bool has_input(const std::string& name) const;

  // Every output by name; the tensors are copies, yours to keep. May be called from several threads at once. Throws
  // std::invalid_argument for an input that is missing or unknown, ov::Exception for one that does not fit.
  Tensors run(const Tensors& inputs);

 private:
  ov::Core core_;
  ov::CompiledModel compiled_;
};

// A tensor of its own memory, from bytes: tensor("int64", {1, 3}, ids.data(), 24). Throws std::invalid_argument where
// the number of bytes is not what the shape needs.
ov::Tensor tensor(const std::string& dtype, const ov::Shape& shape, const void* data, std::size_t size);

// The numbers of a tensor of any type.
std::vector<double> numbers(const ov::Tensor& tensor);

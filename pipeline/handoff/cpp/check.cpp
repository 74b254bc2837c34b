// SPDX-License-Identifier: Apache-2.0
// Runs the model on the golden samples and prints one line an output:
//
//   OUTPUT DIFFERENCE TOLERANCE DIFFERENCE-FROM-PYTHON
//
// Exit code 0 where every output is within its tolerance. Usage: check [FOLDER] [MODEL]
#include <cstdio>
#include <exception>
#include <set>

#include "golden.hpp"
#include "model.hpp"

namespace {

struct Result {
  double difference = 0, tolerance = 0, from_python = 0;
};

double difference(const Ort::Value& actual, const golden::Tensor& expected) {
  if (shape_of(actual) != expected.shape) return std::numeric_limits<double>::infinity();
  if (expected.dtype == "float32") return golden::largest_difference(floats(actual), expected.values<float>());
  return golden::largest_difference(integers(actual), expected.values<std::int64_t>());
}

Tensors inputs_of(const std::vector<golden::Tensor>& tensors, int sample) {
  Tensors inputs;
  for (const auto& t : tensors)
    if (t.sample == sample && t.kind == "input")
      inputs.emplace(t.name, tensor_from_bytes(type_named(t.dtype), t.shape, t.bytes.data(), t.bytes.size()));
  return inputs;
}

std::map<std::string, Result> compare(Model& model, const std::vector<golden::Tensor>& tensors) {
  std::set<int> samples;
  for (const auto& tensor : tensors) samples.insert(tensor.sample);
  std::map<std::string, Result> results;
  for (const int sample : samples) {
    const auto outputs = model.run(inputs_of(tensors, sample));
    for (const auto& tensor : tensors) {
      if (tensor.sample != sample || tensor.kind == "input") continue;
      const double found = difference(outputs.at(tensor.name), tensor);
      auto& result = results[tensor.name];
      if (tensor.kind == "python") {
        result.from_python = std::max(result.from_python, found);
      } else {
        result.difference = std::max(result.difference, found);
        result.tolerance = tensor.tolerance;
      }
    }
  }
  return results;
}

}  // namespace

int main(int count, char** words) try {
  const std::filesystem::path folder = count > 1 ? words[1] : ".";
  Model model(folder / (count > 2 ? words[2] : "model/model.onnx"), 1);
  bool within = true;
  for (const auto& [name, result] : compare(model, golden::read(folder / "golden"))) {
    std::printf("%s %.9g %.9g %.9g\n", name.c_str(), result.difference, result.tolerance, result.from_python);
    within = within && result.difference <= result.tolerance;
  }
  return within ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "check: %s\n", error.what());
  return 2;
}

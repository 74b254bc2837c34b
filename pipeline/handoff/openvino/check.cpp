// SPDX-License-Identifier: Apache-2.0
// Runs the model on the golden samples and prints one line an output:
//
//   OUTPUT DIFFERENCE TOLERANCE DIFFERENCE-FROM-PYTHON
//
// Exit code 0 where every output is within its tolerance. Usage: check [MODEL]
#include <cstdio>
#include <exception>
#include <map>
#include <set>

#include "golden.hpp"
#include "model.hpp"

namespace {

struct Result {
  double difference = 0, tolerance = 0, from_python = 0;
};

double difference(const ov::Tensor& actual, const golden::Tensor& expected) {
  if (actual.get_shape() != ov::Shape(expected.shape.begin(), expected.shape.end()))
    return std::numeric_limits<double>::infinity();
  const auto found = numbers(actual);
  if (expected.dtype != "float32") {
    const auto wanted = expected.values<std::int64_t>();
    return golden::largest_difference(found, std::vector<double>(wanted.begin(), wanted.end()));
  }
  const auto wanted = expected.values<float>();
  return golden::largest_difference(found, std::vector<double>(wanted.begin(), wanted.end()));
}

Tensors inputs_of(const Model& model, const std::vector<golden::Tensor>& tensors, int sample) {
  Tensors inputs;
  for (const auto& t : tensors)
    if (t.sample == sample && t.kind == "input" && model.has_input(t.name))
      inputs[t.name] = tensor(t.dtype, ov::Shape(t.shape.begin(), t.shape.end()), t.bytes.data(), t.bytes.size());
  return inputs;
}

std::map<std::string, Result> compare(Model& model, const std::vector<golden::Tensor>& tensors) {
  std::set<int> samples;
  for (const auto& tensor : tensors) samples.insert(tensor.sample);
  std::map<std::string, Result> results;
  for (const int sample : samples) {
    const auto outputs = model.run(inputs_of(model, tensors, sample));
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
  Model model(count > 1 ? words[1] : "model/model.onnx");
  bool within = true;
  for (const auto& [name, result] : compare(model, golden::read("golden"))) {
    std::printf("%s %.9g %.9g %.9g\n", name.c_str(), result.difference, result.tolerance, result.from_python);
    within = within && result.difference <= result.tolerance;
  }
  return within ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "check: %s\n", error.what());
  return 2;
}

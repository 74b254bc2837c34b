// SPDX-License-Identifier: Apache-2.0
// Runs the model on the golden samples and prints one line an output:
//
//   OUTPUT DIFFERENCE TOLERANCE DIFFERENCE-FROM-PYTHON
//
// Exit code 0 where every output is within its tolerance. Usage: check [MODEL]
#include <cstdio>
#include <exception>

#include "golden.hpp"
#include "model.hpp"

namespace {

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

}  // namespace

int main(int count, char** words) try {
  Model model(count > 1 ? words[1] : "model/model.onnx");
  const auto tensors = golden::read("golden");
  const auto run = [&](int sample) { return model.run(inputs_of(model, tensors, sample)); };
  return golden::report(golden::compare(tensors, run, difference));
} catch (const std::exception& error) {
  std::fprintf(stderr, "check: %s\n", error.what());
  return 2;
}

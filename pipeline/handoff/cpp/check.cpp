// SPDX-License-Identifier: Apache-2.0
// Runs the model on the golden samples and prints one line an output:
//
//   OUTPUT DIFFERENCE TOLERANCE DIFFERENCE-FROM-PYTHON
//
// Exit code 0 where every output is within its tolerance. Usage: check [FOLDER] [MODEL]
#include <cstdio>
#include <exception>

#include "golden.hpp"
#include "model.hpp"

namespace {

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

}  // namespace

int main(int count, char** words) try {
  const std::filesystem::path folder = count > 1 ? words[1] : ".";
  Model model(folder / (count > 2 ? words[2] : "model/model.onnx"), 1);
  const auto tensors = golden::read(folder / "golden");
  const auto run = [&](int sample) { return model.run(inputs_of(tensors, sample)); };
  return golden::report(golden::compare(tensors, run, difference));
} catch (const std::exception& error) {
  std::fprintf(stderr, "check: %s\n", error.what());
  return 2;
}

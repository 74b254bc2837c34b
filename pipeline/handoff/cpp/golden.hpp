// SPDX-License-Identifier: Apache-2.0
// The golden samples (golden/tensors.txt and golden/tensors.bin), how far two tensors lie apart, and what a check says.
//
//   tensors.txt  one line a tensor: SAMPLE KIND NAME DTYPE OFFSET BYTES TOLERANCE RANK DIM...
//   tensors.bin  the numbers, little-endian, in C order
//
// KIND is `input`, `reference` (the original model's answer) or `python` (what ONNX Runtime answers in Python).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace golden {

struct Tensor {
  int sample = 0;
  std::string kind, name, dtype;
  double tolerance = 0;  // of a reference, absolute
  std::vector<std::int64_t> shape;
  std::vector<char> bytes;

  // The numbers as T, which has to be what `dtype` says.
  template <typename T>
  std::vector<T> values() const {
    std::vector<T> numbers(bytes.size() / sizeof(T));
    if (!bytes.empty()) std::memcpy(numbers.data(), bytes.data(), numbers.size() * sizeof(T));
    return numbers;
  }
};

inline std::vector<Tensor> read(const std::filesystem::path& folder) {
  std::ifstream index(folder / "tensors.txt");
  std::ifstream numbers(folder / "tensors.bin", std::ios::binary);
  if (!index || !numbers) throw std::runtime_error("no golden tensors in " + folder.string());
  std::vector<Tensor> tensors;
  for (std::string line; std::getline(index, line);) {
    std::istringstream fields(line);
    Tensor tensor;
    std::string tolerance;
    std::size_t offset = 0, size = 0, rank = 0;
    fields >> tensor.sample >> tensor.kind >> tensor.name >> tensor.dtype >> offset >> size >> tolerance >> rank;
    for (std::int64_t dim = 0; rank > 0 && fields >> dim; --rank) tensor.shape.push_back(dim);
    if (fields.fail() || rank > 0) throw std::runtime_error("golden/tensors.txt is damaged: " + line);
    if (tolerance != "-") tensor.tolerance = std::stod(tolerance);
    tensor.bytes.resize(size);
    numbers.seekg(static_cast<std::streamoff>(offset));
    if (!numbers.read(tensor.bytes.data(), static_cast<std::streamsize>(size)) && size > 0)
      throw std::runtime_error("golden/tensors.bin is cut short at " + tensor.name);
    tensors.push_back(std::move(tensor));
  }
  return tensors;
}

// Largest absolute difference. Equal infinities, and two NaN, do not differ; finite and not finite differ infinitely.
template <typename T>
double largest_difference(const std::vector<T>& actual, const std::vector<T>& expected) {
  constexpr double infinite = std::numeric_limits<double>::infinity();
  if (actual.size() != expected.size()) return infinite;
  double worst = 0;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    const double a = static_cast<double>(actual[i]), b = static_cast<double>(expected[i]);
    if (a == b || (std::isnan(a) && std::isnan(b))) continue;
    const double difference = std::fabs(a - b);
    worst = std::max(worst, std::isnan(difference) ? infinite : difference);
  }
  return worst;
}

// Of one output, over all samples.
struct Result {
  double difference = 0, tolerance = 0, from_python = 0;
};

// `run(sample)` answers a sample by name; `difference(answer, expected)` says how far an answer is from a golden tensor.
template <typename Run, typename Difference>
std::map<std::string, Result> compare(const std::vector<Tensor>& tensors, Run run, Difference difference) {
  std::set<int> samples;
  for (const auto& tensor : tensors) samples.insert(tensor.sample);
  std::map<std::string, Result> results;
  for (const int sample : samples) {
    const auto outputs = run(sample);
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

// Prints one line an output and returns the exit code: 0 where every output is within its tolerance.
inline int report(const std::map<std::string, Result>& results) {
  bool within = true;
  for (const auto& [name, result] : results) {
    std::printf("%s %.9g %.9g %.9g\n", name.c_str(), result.difference, result.tolerance, result.from_python);
    within = within && result.difference <= result.tolerance;
  }
  return within ? 0 : 1;
}

}  // namespace golden

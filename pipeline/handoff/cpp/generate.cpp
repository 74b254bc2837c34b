// SPDX-License-Identifier: Apache-2.0
// Greedy decoding with a cache: the prompt in one call, then one token a call, each cache output moved (not copied)
// into the input that takes it next.
//
//   generate TOKEN...    prints the tokens that follow, up to the end of text or 16 of them
//   generate             does so for the prompt in golden/generation.txt, and compares with what Python generated
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "model.hpp"

namespace {

using Tokens = std::vector<std::int64_t>;

struct Generation {
  Tokens prompt, expected, end;
};

Generation read_generation(const std::filesystem::path& file) {
  std::ifstream lines(file);
  if (!lines) throw std::runtime_error("cannot read " + file.string());
  Generation generation;
  for (std::string line; std::getline(lines, line);) {
    std::istringstream fields(line);
    std::string kind;
    fields >> kind;
    auto& tokens = kind == "prompt" ? generation.prompt : kind == "expected" ? generation.expected : generation.end;
    for (std::int64_t token = 0; fields >> token;) tokens.push_back(token);
  }
  return generation;
}

// The output that takes the place of a cache input in the next call; nothing for an input that is no cache.
std::optional<std::string> present_of(const std::string& past) {
  static const std::pair<const char*, const char*> prefixes[] = {
      {"past_key_values.", "present."}, {"past_conv.", "present_conv."}, {"past_recurrent.", "present_recurrent."}};
  for (const auto& [old_prefix, new_prefix] : prefixes)
    if (past.rfind(old_prefix, 0) == 0) return new_prefix + past.substr(std::string(old_prefix).size());
  return std::nullopt;
}

// Nothing along the axis that grows (the first open one behind the batch), zeros in states of fixed size.
Ort::Value empty_cache(const TensorSpec& spec) {
  Shape shape = spec.shape;
  bool growing = true;
  for (std::size_t axis = 0; axis < shape.size(); ++axis)
    if (shape[axis] < 0) shape[axis] = axis > 0 && growing ? (growing = false, 0) : 1;
  return zeros(spec.type, shape);
}

// All inputs but the caches, for the tokens from `first` on.
Tensors feeds(const Model& model, const Tokens& tokens, std::size_t first) {
  const auto total = static_cast<std::int64_t>(tokens.size()), done = static_cast<std::int64_t>(first);
  Tokens positions;
  for (std::int64_t position = done; position < total; ++position) positions.push_back(position);
  Tensors inputs;
  for (const auto& spec : model.inputs()) {
    if (spec.name == "input_ids")
      inputs.emplace(spec.name, tensor(Tokens(tokens.begin() + done, tokens.end()), {1, total - done}));
    else if (spec.name == "attention_mask")
      inputs.emplace(spec.name, tensor(Tokens(tokens.size(), 1), {1, total}));
    else if (spec.name == "position_ids")
      inputs.emplace(spec.name, tensor(positions, {1, total - done}));
    else if (spec.name == "num_logits_to_keep")
      inputs.emplace(spec.name, tensor(Tokens{1}, {}));
    else if (!present_of(spec.name))
      throw std::runtime_error("input '" + spec.name + "' is none of a decoder");
  }
  return inputs;
}

std::int64_t best_of_last(const Ort::Value& logits) {
  const auto scores = floats(logits);
  const auto row = scores.end() - shape_of(logits).back();
  return std::max_element(row, scores.end()) - row;
}

Tokens generate(Model& model, Tokens tokens, std::size_t count, const Tokens& end) {
  Tensors cache;
  for (const auto& spec : model.inputs())
    if (present_of(spec.name)) cache.emplace(spec.name, empty_cache(spec));
  Tokens answer;
  std::size_t done = 0;
  while (answer.size() < count) {
    auto inputs = feeds(model, tokens, done);
    inputs.merge(cache);
    auto outputs = model.run(inputs);
    done = tokens.size();
    tokens.push_back(best_of_last(outputs.at("logits")));
    answer.push_back(tokens.back());
    if (std::find(end.begin(), end.end(), tokens.back()) != end.end()) break;
    cache.clear();
    for (const auto& spec : model.inputs())
      if (const auto present = present_of(spec.name)) cache.emplace(spec.name, std::move(outputs.at(*present)));
  }
  return answer;
}

std::size_t differing(const Tokens& answer, const Tokens& expected) {
  std::size_t same = 0;
  while (same < std::min(answer.size(), expected.size()) && answer[same] == expected[same]) ++same;
  return std::max(answer.size(), expected.size()) - same;
}

}  // namespace

int main(int count, char** words) try {
  auto golden = read_generation("golden/generation.txt");
  Model model("model/model.onnx");
  if (count > 1) {
    Tokens prompt;
    for (int i = 1; i < count; ++i) prompt.push_back(std::strtoll(words[i], nullptr, 10));
    for (const auto token : generate(model, prompt, 16, golden.end)) std::printf("%lld ", static_cast<long long>(token));
    std::printf("\n");
    return 0;
  }
  const auto wrong = differing(generate(model, golden.prompt, golden.expected.size(), golden.end), golden.expected);
  std::printf("generated_tokens %zu 0 %zu\n", wrong, wrong);
  return wrong == 0 ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "generate: %s\n", error.what());
  return 2;
}

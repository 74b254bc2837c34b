// SPDX-License-Identifier: Apache-2.0
// Runs the model on the golden samples and prints one line an output:
//
//   OUTPUT DIFFERENCE TOLERANCE DIFFERENCE-FROM-PYTHON
//
// Exit code 0 where every output is within its tolerance. To be run in the folder that holds model/ and golden/.
//
// golden/tensors.txt has one line a tensor, SAMPLE KIND NAME DTYPE OFFSET BYTES TOLERANCE RANK DIM..., and
// golden/tensors.bin the numbers. KIND is `input`, `reference` (the original model's answer) or `python`.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model.h"

enum { LINE = 4096, MAX_TENSORS = 16384 };

typedef struct Golden {
  long sample;
  char kind;  // its first letter: i, r or p
  double tolerance;
  Tensor tensor;
} Golden;

typedef struct Result {
  double difference, tolerance, from_python;
  bool seen;
} Result;

static _Noreturn void fail(const char *message) {
  fprintf(stderr, "check: %s\n", message);
  exit(2);
}

static void *allocated(size_t size) {
  void *memory = calloc(1, size > 0 ? size : 1);
  if (memory == NULL) fail("out of memory");
  return memory;
}

static const char *field(char **line) {
  char *start = *line, *end = start + strcspn(start, " \r\n");
  *line = *end != '\0' ? end + 1 : end;
  *end = '\0';
  if (*start == '\0') fail("golden/tensors.txt is damaged");
  return start;
}

static Golden read_tensor(char *line, FILE *numbers) {
  Golden golden = {0};
  golden.sample = strtol(field(&line), NULL, 10);
  golden.kind = *field(&line);
  const char *name = field(&line);
  golden.tensor.name = strcpy(allocated(strlen(name) + 1), name);
  golden.tensor.type = type_named(field(&line));
  const long offset = strtol(field(&line), NULL, 10);
  golden.tensor.size = strtoull(field(&line), NULL, 10);
  golden.tolerance = strtod(field(&line), NULL);
  golden.tensor.rank = strtoull(field(&line), NULL, 10);
  if (golden.tensor.rank > MODEL_MAX_RANK) fail("a golden tensor has too many axes");
  for (size_t axis = 0; axis < golden.tensor.rank; ++axis) golden.tensor.shape[axis] = strtoll(field(&line), NULL, 10);
  golden.tensor.data = allocated(golden.tensor.size);
  if (fseek(numbers, offset, SEEK_SET) != 0 ||
      fread(golden.tensor.data, 1, golden.tensor.size, numbers) != golden.tensor.size)
    fail("golden/tensors.bin is cut short");
  return golden;
}

static size_t read_golden(Golden *golden) {
  FILE *index = fopen("golden/tensors.txt", "r"), *numbers = fopen("golden/tensors.bin", "rb");
  if (index == NULL || numbers == NULL) fail("there are no golden tensors");
  size_t count = 0;
  for (char line[LINE]; fgets(line, LINE, index) != NULL; ++count) {
    if (count == MAX_TENSORS || strchr(line, '\n') == NULL) fail("golden/tensors.txt is too large");
    golden[count] = read_tensor(line, numbers);
  }
  fclose(index);
  fclose(numbers);
  return count;
}

// Largest absolute difference. Equal infinities, and two NaN, do not differ; finite and not finite differ infinitely.
static double largest_difference(const Tensor *actual, const Tensor *expected) {
  bool same = actual->rank == expected->rank;
  for (size_t axis = 0; same && axis < actual->rank; ++axis) same = actual->shape[axis] == expected->shape[axis];
  if (!same) return INFINITY;
  double worst = 0;
  for (size_t i = 0; i < tensor_count(actual); ++i) {
    const double a = tensor_number(actual, i), b = tensor_number(expected, i);
    if (a == b || (isnan(a) && isnan(b))) continue;
    const double difference = fabs(a - b);
    worst = fmax(worst, isnan(difference) ? INFINITY : difference);
  }
  return worst;
}

static void compare(const Tensor *output, const Golden *golden, Result *result) {
  const double difference = largest_difference(output, &golden->tensor);
  if (golden->kind == 'p') {
    result->from_python = fmax(result->from_python, difference);
  } else {
    result->difference = fmax(result->difference, difference);
    result->tolerance = golden->tolerance;
    result->seen = true;
  }
}

// Runs one sample, whose tensors are `count` golden ones in a row.
static void run_sample(Model *model, const Golden *golden, size_t count, Result *results) {
  char error[MODEL_ERROR_SIZE] = "out of memory";
  Tensor *inputs = allocated(count * sizeof *inputs), *outputs = allocated(model_output_count(model) * sizeof *outputs);
  size_t given = 0;
  for (size_t i = 0; i < count; ++i)
    if (golden[i].kind == 'i') inputs[given++] = golden[i].tensor;
  if (!model_run(model, inputs, given, outputs, error)) fail(error);
  for (size_t o = 0; o < model_output_count(model); ++o) {
    for (size_t i = 0; i < count; ++i)
      if (golden[i].kind != 'i' && strcmp(golden[i].tensor.name, outputs[o].name) == 0)
        compare(&outputs[o], &golden[i], &results[o]);
    tensor_release(&outputs[o]);
  }
  free(outputs);
  free(inputs);
}

int main(void) {
  char error[MODEL_ERROR_SIZE] = "out of memory";
  Model *model = model_open(ORT_TSTR("model/model.onnx"), 1, error);
  if (model == NULL) fail(error);
  Golden *golden = allocated(MAX_TENSORS * sizeof *golden);
  Result *results = allocated(model_output_count(model) * sizeof *results);
  const size_t count = read_golden(golden);
  for (size_t first = 0, next; first < count; first = next) {
    for (next = first; next < count && golden[next].sample == golden[first].sample;) ++next;
    run_sample(model, golden + first, next - first, results);
  }
  bool within = true;
  for (size_t o = 0; o < model_output_count(model); ++o) {
    const Result *result = &results[o];
    printf("%s %.9g %.9g %.9g\n", model_output(model, o)->name, result->difference, result->tolerance,
           result->from_python);
    within = within && result->seen && result->difference <= result->tolerance;
  }
  for (size_t i = 0; i < count; ++i) {
    free((char *)golden[i].tensor.name);
    free(golden[i].tensor.data);
  }
  free(golden);
  free(results);
  model_close(model);
  return within ? 0 : 1;
}

// SPDX-License-Identifier: Apache-2.0
// One ONNX model in ONNX Runtime: loaded once, run many times, tensors by name. C11, ONNX Runtime's C interface only.
#ifndef MODEL_H
#define MODEL_H

#include <onnxruntime_c_api.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { MODEL_MAX_RANK = 8, MODEL_ERROR_SIZE = 512 };

typedef struct Model Model;

// One input or output. As a specification (model_input, model_output), `shape` has -1 where any size goes and there is
// no data. As an input of model_run, `data` is yours. As an output, it belongs to `value`: see tensor_release.
typedef struct Tensor {
  const char *name;
  ONNXTensorElementDataType type;
  size_t rank;
  int64_t shape[MODEL_MAX_RANK];
  void *data;   // in C order; may be null where `size` is 0
  size_t size;  // in bytes
  OrtValue *value;
} Tensor;

// Null and a message in `error` (MODEL_ERROR_SIZE bytes) where it cannot be loaded. `threads`: for one operator, 0 for
// the runtime's choice. model_close takes null, too.
Model *model_open(const ORTCHAR_T *file, int threads, char *error);
void model_close(Model *model);

size_t model_input_count(const Model *model);
size_t model_output_count(const Model *model);
const Tensor *model_input(const Model *model, size_t index);
const Tensor *model_output(const Model *model, size_t index);

// Runs the model on `count` inputs in any order and fills model_output_count() outputs in the model's order; each is to
// be released. False and a message in `error` where an input is missing, unknown, or of another type or shape, or where
// the model fails; no output is to be released then. May be called from several threads at once.
bool model_run(Model *model, const Tensor *inputs, size_t count, Tensor *outputs, char *error);
void tensor_release(Tensor *tensor);

// How many numbers a tensor holds; one of them, whatever its type; the bytes of one, 0 for a type that is no number.
size_t tensor_count(const Tensor *tensor);
double tensor_number(const Tensor *tensor, size_t index);
size_t type_size(ONNXTensorElementDataType type);

// `float16` for ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 and back; UNDEFINED for a name that is not known.
const char *type_name(ONNXTensorElementDataType type);
ONNXTensorElementDataType type_named(const char *name);

#ifdef __cplusplus
}
#endif

#endif

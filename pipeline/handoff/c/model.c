// SPDX-License-Identifier: Apache-2.0
#include "model.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct Model {
  const OrtApi *ort;
  OrtEnv *env;
  OrtSession *session;
  OrtMemoryInfo *memory;
  size_t input_count, output_count;
  Tensor *inputs, *outputs;
};

static const struct {
  const char *name;
  ONNXTensorElementDataType type;
  size_t size;
} element_types[] = {
    {"float32", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 4},   {"float64", ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, 8},
    {"float16", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, 2}, {"bfloat16", ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, 2},
    {"int64", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, 8},     {"int32", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, 4},
    {"int16", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16, 2},     {"int8", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, 1},
    {"uint64", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64, 8},   {"uint32", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32, 4},
    {"uint16", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16, 2},   {"uint8", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, 1},
    {"bool", ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL, 1},
};
enum { ELEMENT_TYPES = sizeof element_types / sizeof *element_types };

// Takes a status: true for success, otherwise its message goes to `error`.
static bool succeeded(const OrtApi *ort, OrtStatus *status, char *error) {
  if (status == NULL) return true;
  snprintf(error, MODEL_ERROR_SIZE, "%s", ort->GetErrorMessage(status));
  ort->ReleaseStatus(status);
  return false;
}

static char *copied(const char *text) {
  char *copy = malloc(strlen(text) + 1);
  if (copy != NULL) strcpy(copy, text);
  return copy;
}

static bool read_shape(const OrtApi *ort, const OrtTensorTypeAndShapeInfo *info, Tensor *tensor, char *error) {
  if (!succeeded(ort, ort->GetTensorElementType(info, &tensor->type), error) ||
      !succeeded(ort, ort->GetDimensionsCount(info, &tensor->rank), error))
    return false;
  if (tensor->rank > MODEL_MAX_RANK) {
    snprintf(error, MODEL_ERROR_SIZE, "'%s' has more than %d axes", tensor->name, (int)MODEL_MAX_RANK);
    return false;
  }
  return succeeded(ort, ort->GetDimensions(info, tensor->shape, tensor->rank), error);
}

static bool read_type(const OrtApi *ort, const OrtTypeInfo *type, Tensor *tensor, char *error) {
  const OrtTensorTypeAndShapeInfo *info = NULL;  // belongs to `type`
  if (!succeeded(ort, ort->CastTypeInfoToTensorInfo(type, &info), error)) return false;
  if (info != NULL) return read_shape(ort, info, tensor, error);
  snprintf(error, MODEL_ERROR_SIZE, "'%s' is no tensor", tensor->name);
  return false;
}

static bool read_spec(Model *model, size_t index, bool input, Tensor *spec, char *error) {
  const OrtApi *ort = model->ort;
  OrtAllocator *allocator = NULL;  // the runtime's own, not to be released
  if (!succeeded(ort, ort->GetAllocatorWithDefaultOptions(&allocator), error)) return false;
  char *name = NULL;
  OrtTypeInfo *type = NULL;
  const OrtSession *session = model->session;
  OrtStatus *status = input ? ort->SessionGetInputName(session, index, allocator, &name)
                            : ort->SessionGetOutputName(session, index, allocator, &name);
  if (!succeeded(ort, status, error)) return false;
  spec->name = copied(name);
  if (!succeeded(ort, ort->AllocatorFree(allocator, name), error)) return false;
  status = input ? ort->SessionGetInputTypeInfo(session, index, &type)
                 : ort->SessionGetOutputTypeInfo(session, index, &type);
  if (!succeeded(ort, status, error)) return false;
  const bool read = spec->name != NULL && read_type(ort, type, spec, error);
  ort->ReleaseTypeInfo(type);
  return read;
}

static bool read_specs(Model *model, char *error) {
  const OrtApi *ort = model->ort;
  if (!succeeded(ort, ort->SessionGetInputCount(model->session, &model->input_count), error) ||
      !succeeded(ort, ort->SessionGetOutputCount(model->session, &model->output_count), error))
    return false;
  model->inputs = calloc(model->input_count + 1, sizeof *model->inputs);
  model->outputs = calloc(model->output_count + 1, sizeof *model->outputs);
  bool read = model->inputs != NULL && model->outputs != NULL;
  for (size_t i = 0; read && i < model->input_count; ++i) read = read_spec(model, i, true, &model->inputs[i], error);
  for (size_t i = 0; read && i < model->output_count; ++i) read = read_spec(model, i, false, &model->outputs[i], error);
  return read;
}

static bool open_session(Model *model, const ORTCHAR_T *file, int threads, char *error) {
  const OrtApi *ort = model->ort;
  OrtSessionOptions *options = NULL;
  if (!succeeded(ort, ort->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "model", &model->env), error) ||
      !succeeded(ort, ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &model->memory), error) ||
      !succeeded(ort, ort->CreateSessionOptions(&options), error))
    return false;
  const bool opened = (threads <= 0 || succeeded(ort, ort->SetIntraOpNumThreads(options, threads), error)) &&
                      succeeded(ort, ort->CreateSession(model->env, file, options, &model->session), error);
  ort->ReleaseSessionOptions(options);
  return opened;
}

Model *model_open(const ORTCHAR_T *file, int threads, char *error) {
  const OrtApiBase *base = OrtGetApiBase();
  Model *model = calloc(1, sizeof *model);
  if (model == NULL) return NULL;
  model->ort = base->GetApi(ORT_API_VERSION);  // null where the library is older than the headers
  if (model->ort == NULL) {
    snprintf(error, MODEL_ERROR_SIZE, "built for ONNX Runtime 1.%d, but the library is %s", ORT_API_VERSION,
             base->GetVersionString());
  } else if (open_session(model, file, threads, error) && read_specs(model, error)) {
    return model;
  }
  model_close(model);
  return NULL;
}

static void free_specs(Tensor *specs, size_t count) {
  for (size_t i = 0; specs != NULL && i < count; ++i) free((char *)specs[i].name);
  free(specs);
}

void model_close(Model *model) {
  if (model == NULL) return;
  free_specs(model->inputs, model->input_count);
  free_specs(model->outputs, model->output_count);
  if (model->memory != NULL) model->ort->ReleaseMemoryInfo(model->memory);
  if (model->session != NULL) model->ort->ReleaseSession(model->session);
  if (model->env != NULL) model->ort->ReleaseEnv(model->env);
  free(model);
}

size_t model_input_count(const Model *model) { return model->input_count; }
size_t model_output_count(const Model *model) { return model->output_count; }
const Tensor *model_input(const Model *model, size_t index) { return &model->inputs[index]; }
const Tensor *model_output(const Model *model, size_t index) { return &model->outputs[index]; }

static const Tensor *named(const Tensor *tensors, size_t count, const char *name) {
  for (size_t i = 0; i < count; ++i)
    if (strcmp(tensors[i].name, name) == 0) return &tensors[i];
  return NULL;
}

static bool fits(const Tensor *tensor, const Tensor *spec) {
  bool same = tensor->type == spec->type && tensor->rank == spec->rank &&
              tensor->size == tensor_count(tensor) * type_size(tensor->type);
  for (size_t axis = 0; same && axis < spec->rank; ++axis)
    same = spec->shape[axis] < 0 ? tensor->shape[axis] >= 0 : tensor->shape[axis] == spec->shape[axis];
  return same;
}

static bool inputs_fit(const Model *model, const Tensor *inputs, size_t count, char *error) {
  for (size_t i = 0; i < model->input_count; ++i) {
    const Tensor *spec = &model->inputs[i], *given = named(inputs, count, spec->name);
    if (given == NULL || !fits(given, spec)) {
      const char *wrong = given == NULL ? "is missing" : "has another type, shape or size than the model takes";
      snprintf(error, MODEL_ERROR_SIZE, "input '%s' %s", spec->name, wrong);
      return false;
    }
  }
  if (count == model->input_count) return true;
  snprintf(error, MODEL_ERROR_SIZE, "%zu inputs are given: the model takes %zu", count, model->input_count);
  return false;
}

// Runs with values that exist; `values` has room for all outputs, too.
static bool run_values(Model *model, const char **names, OrtValue **values, Tensor *outputs, char *error) {
  const OrtApi *ort = model->ort;
  const size_t count = model->input_count;
  for (size_t i = 0; i < model->output_count; ++i) names[count + i] = model->outputs[i].name;
  OrtStatus *status = ort->Run(model->session, NULL, names, (const OrtValue *const *)values, count, names + count,
                               model->output_count, values + count);
  if (!succeeded(ort, status, error)) return false;
  bool read = true;
  for (size_t i = 0; i < model->output_count; ++i) {
    outputs[i] = (Tensor){.name = model->outputs[i].name, .value = values[count + i]};
    OrtTensorTypeAndShapeInfo *info = NULL;
    if (!read || !succeeded(ort, ort->GetTensorTypeAndShape(outputs[i].value, &info), error)) {
      read = false;
      continue;
    }
    read = read_shape(ort, info, &outputs[i], error) &&
           succeeded(ort, ort->GetTensorMutableData(outputs[i].value, &outputs[i].data), error);
    outputs[i].size = tensor_count(&outputs[i]) * type_size(outputs[i].type);
    ort->ReleaseTensorTypeAndShapeInfo(info);
  }
  for (size_t i = 0; !read && i < model->output_count; ++i) tensor_release(&outputs[i]);
  return read;
}

bool model_run(Model *model, const Tensor *inputs, size_t count, Tensor *outputs, char *error) {
  static char nothing[8];  // ONNX Runtime refuses a null pointer even for no bytes
  if (!inputs_fit(model, inputs, count, error)) return false;
  const size_t total = model->input_count + model->output_count;
  const char **names = calloc(total + 1, sizeof *names);
  OrtValue **values = calloc(total + 1, sizeof *values);
  bool done = names != NULL && values != NULL;
  if (!done) snprintf(error, MODEL_ERROR_SIZE, "out of memory");
  for (size_t i = 0; done && i < count; ++i) {
    const Tensor *t = &inputs[i];
    names[i] = t->name;
    done = succeeded(model->ort,
                     model->ort->CreateTensorWithDataAsOrtValue(model->memory, t->size > 0 ? t->data : nothing, t->size,
                                                                t->shape, t->rank, t->type, &values[i]),
                     error);
  }
  done = done && run_values(model, names, values, outputs, error);
  for (size_t i = 0; values != NULL && i < count; ++i)
    if (values[i] != NULL) model->ort->ReleaseValue(values[i]);
  free(values);
  free(names);
  return done;
}

void tensor_release(Tensor *tensor) {
  if (tensor->value != NULL) OrtGetApiBase()->GetApi(ORT_API_VERSION)->ReleaseValue(tensor->value);
  *tensor = (Tensor){.name = tensor->name};
}

size_t tensor_count(const Tensor *tensor) {
  size_t count = 1;
  for (size_t axis = 0; axis < tensor->rank; ++axis) count *= (size_t)tensor->shape[axis];
  return count;
}

static double half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double magnitude = exponent == 31  ? (fraction != 0 ? NAN : INFINITY)
                           : exponent == 0 ? ldexp(fraction, -24)
                                           : ldexp(fraction + 1024, exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

static double brain_float(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float number;
  memcpy(&number, &wide, sizeof number);
  return number;
}

double tensor_number(const Tensor *tensor, size_t index) {
  const void *data = tensor->data;
  switch (tensor->type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return ((const float *)data)[index];
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE: return ((const double *)data)[index];
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return half(((const uint16_t *)data)[index]);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return brain_float(((const uint16_t *)data)[index]);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64: return (double)((const int64_t *)data)[index];
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32: return ((const int32_t *)data)[index];
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16: return ((const int16_t *)data)[index];
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8: return ((const int8_t *)data)[index];
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64: return (double)((const uint64_t *)data)[index];
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32: return ((const uint32_t *)data)[index];
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16: return ((const uint16_t *)data)[index];
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL: return ((const uint8_t *)data)[index];
    default: return NAN;
  }
}

size_t type_size(ONNXTensorElementDataType type) {
  for (size_t i = 0; i < ELEMENT_TYPES; ++i)
    if (element_types[i].type == type) return element_types[i].size;
  return 0;
}

const char *type_name(ONNXTensorElementDataType type) {
  for (size_t i = 0; i < ELEMENT_TYPES; ++i)
    if (element_types[i].type == type) return element_types[i].name;
  return "no number";
}

ONNXTensorElementDataType type_named(const char *name) {
  for (size_t i = 0; i < ELEMENT_TYPES; ++i)
    if (strcmp(element_types[i].name, name) == 0) return element_types[i].type;
  return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

// SPDX-License-Identifier: Apache-2.0
// Signatures only, so that the consumer can be compiled without the library. Nothing here can run.
package ai.onnxruntime;

public abstract class OnnxTensorLike implements OnnxValue {}

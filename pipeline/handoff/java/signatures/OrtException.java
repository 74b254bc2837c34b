// SPDX-License-Identifier: Apache-2.0
// Signatures only, so that the consumer can be compiled without the library. Nothing here can run.
package ai.onnxruntime;

public class OrtException extends Exception {
    private static final long serialVersionUID = 1L;
}

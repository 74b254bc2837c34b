// SPDX-License-Identifier: Apache-2.0
package model;

import java.util.Map;

/** What answers tensors with tensors, by name: {@link Model}, or a stand-in in a test. */
public interface Runner {
    Map<String, Tensor> run(Map<String, Tensor> inputs) throws Exception;
}

# SPDX-License-Identifier: Apache-2.0
"""BentoML, as its documentation has adaptive batching (docs.bentoml.com, "Adaptive batching"), access log off.

Its batches are arrays along one axis, so a row is [3, tokens]: the three inputs one above the other. `max_latency_ms`
is what it steers by, not a wait: at the wait of the other servers it would refuse most requests; it has its default.
"""

import bentoml
import numpy as np
import onnx_model


@bentoml.service(workers=onnx_model.WORKERS, traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class OnnxRuntime:
    def __init__(self) -> None:
        self.session = onnx_model.load()

    @bentoml.api(batchable=True, batch_dim=0, max_batch_size=onnx_model.MAX_BATCH)
    def infer(self, rows: np.ndarray) -> np.ndarray:
        feeds = {name: np.ascontiguousarray(rows[:, i], np.int64) for i, name in enumerate(onnx_model.NAMES)}
        return self.session.run(["logits"], feeds)[0]

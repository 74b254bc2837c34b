# SPDX-License-Identifier: Apache-2.0
"""MLServer with a runtime of one's own, as its documentation ("Custom Inference Runtimes") has it.

Adaptive batching by model-settings.json, `parallel_workers: 0` (one process; a pool of workers costs it a copy of each
request and is slower here). ONNX Runtime runs beside the event loop.
"""

import asyncio

import numpy as np
import onnx_model
from mlserver import MLModel
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput


class OnnxRuntime(MLModel):
    async def load(self) -> bool:
        self.session = onnx_model.load()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        feeds = {i.name: np.asarray(i.data.root, np.int64).reshape(i.shape) for i in payload.inputs}
        (logits,) = await asyncio.to_thread(self.session.run, ["logits"], feeds)
        output = ResponseOutput(name="logits", shape=list(logits.shape), datatype="FP32", data=logits.ravel().tolist())
        return InferenceResponse(id=payload.id, model_name=self.name, outputs=[output])

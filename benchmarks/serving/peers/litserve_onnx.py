# SPDX-License-Identifier: Apache-2.0
"""LitServe, as its documentation has batching, with the fast queue that it offers for throughput; a v2 request's body.

python litserve_onnx.py PORT
"""

import sys

import litserve
import numpy as np
import onnx_model


class OnnxRuntime(litserve.LitAPI):
    def setup(self, device):
        self.session = onnx_model.load()

    def decode_request(self, request):
        return onnx_model.tensors(request["inputs"])

    def batch(self, inputs):
        return {name: np.concatenate([one[name] for one in inputs]) for name in inputs[0]}

    def predict(self, x):
        return self.session.run(["logits"], x)[0]

    def unbatch(self, output):
        return list(output)

    def encode_response(self, output):
        return {"logits": np.ravel(output).tolist()}


if __name__ == "__main__":
    api = OnnxRuntime(max_batch_size=onnx_model.MAX_BATCH, batch_timeout=onnx_model.WAIT_SECONDS)
    server = litserve.LitServer(
        api, accelerator="cpu", workers_per_device=onnx_model.WORKERS, timeout=60, fast_queue=True
    )
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")

# SPDX-License-Identifier: Apache-2.0
"""The model as every peer loads it: the session options of the server that it is compared with.

MODEL, THREADS, WORKERS, MAX_BATCH and WAIT_MS come from the environment.
"""

import os

import numpy as np
import onnxruntime

NAMES = ("input_ids", "attention_mask", "token_type_ids")
MAX_BATCH, WAIT_SECONDS = int(os.environ["MAX_BATCH"]), float(os.environ["WAIT_MS"]) / 1e3
WORKERS = int(os.environ["WORKERS"])


def load() -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ["THREADS"])
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])


def tensors(inputs: list) -> dict[str, np.ndarray]:
    """The tensors of a v2 request."""
    return {t["name"]: np.asarray(t["data"], np.int64).reshape(t["shape"]) for t in inputs}

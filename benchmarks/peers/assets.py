# SPDX-License-Identifier: Apache-2.0
"""Where the models and data lie that the benchmark does not bring along."""

from __future__ import annotations

import os
from pathlib import Path

ASSETS = Path(os.environ.get("ONNXPRESS_ASSETS", Path(__file__).parents[3] / "shared" / "assets")).resolve()

_WHAT = {
    "cifar_resnet": "ResNet-20 and -44 for CIFAR-10 by Yerlan Idelbayev (akamaster/pytorch_resnet_cifar10)",
    "data_cifar10": "5,000 test images of CIFAR-10 in one .npz: images, labels",
    "squeezenet_v1.0/derived": "SqueezeNet 1.0 with torchvision's keys",
    "data_imagenet_sample": "200 photos, one a class, named after the synset",
    "minilm-sst2": "all-MiniLM-L6-v2 fine-tuned on SST-2, a transformers folder",
    "rxnmapper_albert": "RXNMapper's ALBERT, a transformers folder",
    "stories260K": "stories260K of llama2.c, with a transformers folder derived from it",
    "silero_vad": "Silero VAD, TorchScript and .onnx",
    "magika_onnx": "Magika's file type classifier, .onnx",
    "fastestdet": "FastestDet, with its .onnx",
    "ultralight_face/models/onnx": "Ultra-Light-Fast-Generic-Face-Detector-1MB, .onnx",
    "onnx_zoo": "small .onnx files of ONNX Runtime's examples",
    "data_planetoid": "Cora with Planetoid's split in one .npz",
    "data_sst2": "SST-2: train.tsv and dev.tsv, sentence TAB label",
}


def find(name: str) -> Path:
    """The folder of one of the assets; ends the program with what is missing and where it was looked for."""
    path = ASSETS / name
    if not path.is_dir():
        raise SystemExit(
            f"{path} is absent: {_WHAT[name]}. Point ONNXPRESS_ASSETS at the folder that holds it, or leave the model "
            "out with --models."
        )
    return path

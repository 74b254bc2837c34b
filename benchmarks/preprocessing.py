# SPDX-License-Identifier: Apache-2.0
"""Every image processor and feature extractor of transformers, with its default settings: do numbers say what it does?

    .venv/bin/python benchmarks/preprocessing.py [--quick] [--write] [--list]

Each class is saved as a checkpoint would have it and goes the way of a bundle: its settings as numbers, the numbers
held against the class itself on four pictures or three batches of sound. What comes out is `the same` (pictures bit for
bit, sound within 1e-3), or `refused` with the reason; nothing else is possible. Where timm and torchvision are
installed, the same for every distinct set of preprocessing settings among timm's published models. `--quick` takes
every fifth; `--list` names what is refused, and why.

Prediction, before anything was measured: half of the image processors, since most of the others pad or cut into tiles.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import onnx_ir as ir
from markdown import environment, table, write_section

from onnxpress.contracts.signature import Signature, TensorSpec
from onnxpress.exporters.exported import ExportedModel, SourceInfo
from onnxpress.pipeline.golden_preprocessing import write_preprocessing
from onnxpress.pipeline.versions import versions
from onnxpress.runtime.machine import machine

FILE = "preprocessor_config.json"
SHAPES = {
    "pixel_values": ("batch", 3, "height", "width"),
    "input_values": ("batch", "samples"),
    "input_features": ("batch", "bands", "frames"),
}


def image_processors() -> Iterator[tuple[str, str]]:
    """The Pillow form of each class."""
    auto = import_module("transformers.models.auto.image_processing_auto")
    names = {row.get("pil") for row in auto.IMAGE_PROCESSOR_MAPPING_NAMES.values()}
    yield from (("image processors of transformers", name) for name in sorted(filter(None, names)))


def feature_extractors() -> Iterator[tuple[str, str]]:
    auto = import_module("transformers.models.auto.feature_extraction_auto")
    names = {name for name in auto.FEATURE_EXTRACTOR_MAPPING_NAMES.values() if name.endswith("FeatureExtractor")}
    yield from (("feature extractors of transformers", name) for name in sorted(names))


def timm_settings() -> dict[str, dict[str, Any]]:
    """A model for each distinct set of settings; empty where timm and torchvision are not installed."""
    try:
        timm: Any = import_module("timm")
    except (ImportError, RuntimeError):
        return {}
    found: dict[Any, tuple[str, dict[str, Any]]] = {}
    for name in timm.list_models(pretrained=True):
        config = timm.get_pretrained_cfg(name).to_dict()
        key = tuple(str(config.get(k)) for k in ("interpolation", "crop_mode", "crop_pct", "input_size"))
        found.setdefault(key, (name, config))
    return dict(found.values())


def outcome(name: str, folder: Path) -> str:
    """`the same`, `refused: reason`, or why the class was not tried."""
    transformers = import_module("transformers")
    try:
        processor = getattr(transformers, name)()
        processor.save_pretrained(folder)
    except Exception as error:  # noqa: BLE001 - a class without defaults, or one whose libraries are not here
        return f"not tried: {type(error).__name__}"
    inputs = [n for n in processor.model_input_names if n in SHAPES]
    if not inputs:
        return f"refused: it makes {', '.join(processor.model_input_names)}"
    return judged(stand_in(inputs[0], processor_files={FILE: folder / FILE}))


def stand_in(name: str, **fields: Any) -> ExportedModel:
    model = ir.Model(ir.Graph([], [], nodes=[], name="main"), ir_version=10)
    signature = Signature((TensorSpec(name, "float32", SHAPES[name]),), ())
    return ExportedModel(model, signature, "generic", SourceInfo("transformers", "x", None, None, None), **fields)


def judged(exported: ExportedModel) -> str:
    with tempfile.TemporaryDirectory() as bundle:
        facts = write_preprocessing(Path(bundle), exported) or {"refused": "nothing was found"}
    return f"refused: {facts['refused']}" if "refused" in facts else "the same"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    for option in ("--quick", "--write", "--list"):
        parser.add_argument(option, action="store_true")
    chosen = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    step = 5 if chosen.quick else 1
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for kind, name in [*image_processors(), *feature_extractors()][::step]:
        with tempfile.TemporaryDirectory() as folder:
            verdict = outcome(name, Path(folder))
        counts[kind][verdict.partition(":")[0]] += 1
        if chosen.list and verdict != "the same":
            print(f"{name}: {verdict}")
    for name, config in list(timm_settings().items())[::step]:
        verdict = judged(stand_in("pixel_values", image_settings=config))
        counts["settings of timm's models"][verdict.partition(":")[0]] += 1
        if chosen.list and verdict != "the same":
            print(f"{name}: {verdict}")
    columns = ("the same", "refused", "not tried")
    rows = [[kind, sum(found.values()), *(found[column] for column in columns)] for kind, found in counts.items()]
    text = table("**Preprocessing as numbers**, default settings", ["", "in all", *columns], rows)
    text += "\n\n" + environment(machine(), versions(), ["transformers", "numpy"])
    print(text)
    if chosen.write:
        write_section("preprocessing", text)


if __name__ == "__main__":
    main()

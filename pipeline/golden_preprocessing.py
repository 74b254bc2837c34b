# SPDX-License-Identifier: Apache-2.0
"""Write a bundle's preprocessing.json with golden tensors, held against the source's own processor."""

from __future__ import annotations

import io
import json
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from ..contracts.errors import OnnxpressError
from ..exporters.exported import ExportedModel
from ..exporters.preprocessor import Preprocessing, Unsaid, preprocessing_of, timm_preprocessing
from ..runtime.audio import AudioSteps
from ..runtime.golden_inputs import GOLDEN_ARRAYS
from ..runtime.images import ImageSteps
from ..runtime.opened import PREPROCESSING

PICTURES = {"landscape": (150, 200), "portrait": (260, 170), "small": (21, 34), "square": (64, 64)}
"""Rows and columns of the pictures on which numbers and processor are compared; the first is kept."""

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_READ = {"pixel_values", "input_values", "input_features"}
_SAME = {"image": 1e-5, "audio": 1e-3}
"""Largest difference from the processor that is called the same: its sums may be in another order, and transformers
computes spectra in float32, whose rounding the logarithm enlarges where there is nearly no sound."""


def write_preprocessing(folder: Path, exported: ExportedModel) -> dict[str, Any] | None:
    """Write preprocessing.json, golden/preprocessing.safetensors and the example as a file into a bundle.

    Returns:
        What the manifest says of it; None for a model that reads neither pictures nor sound from a known processor.
    """
    specs = {s.name: s for part in (exported, *exported.companions) for s in part.signature.inputs}
    try:
        found = _found(exported, set(specs))
        if found is None:
            return None
        for name, array in found.files.items():
            np.save(folder / name, array, allow_pickle=False)
        examples, same = _examples(folder, found, specs)
    except Unsaid as error:
        return _refused(folder, specs, str(error))
    except OnnxpressError as error:
        return _refused(folder, specs, error.message)
    facts: dict[str, Any] = {"file": PREPROCESSING, "kind": found.numbers["kind"]}
    if same is None:
        facts |= {"golden": None, "reason": "the source's own transforms are not installed here: not compared"}
    else:
        facts |= {"golden": GOLDEN_ARRAYS, "difference": same, "tolerance": _tolerance(found.numbers, same)}
        (folder / "golden").mkdir(exist_ok=True)
        flat = {f"{name}/{key}": array for name, arrays in examples.items() for key, array in arrays.items()}
        (folder / GOLDEN_ARRAYS).write_bytes(save({k: np.ascontiguousarray(v) for k, v in flat.items()}))
        _write_example(folder, found.numbers, next(iter(examples.values())))
    _write_json(folder, found.numbers)
    return facts


def preprocessing_warnings(facts: Mapping[str, Any] | None) -> list[str]:
    """One line where the numbers are missing or were not compared."""
    if facts is None or facts.get("golden"):
        return []
    what = "was not compared with the source" if "file" in facts and "refused" not in facts else "cannot be given"
    return [f"How inputs are prepared {what}: {facts.get('refused') or facts['reason']}."]


def _found(exported: ExportedModel, inputs: set[str]) -> Preprocessing | None:
    if exported.image_settings is not None and "pixel_values" in inputs:
        return timm_preprocessing(exported.image_settings)
    files = [file for name, file in exported.processor_files.items() if name in _PROCESSOR_FILES]
    return preprocessing_of(files[0].parent, inputs) if files else None


def _refused(folder: Path, specs: Mapping[str, Any], reason: str) -> dict[str, Any]:
    kind = "image" if "pixel_values" in specs else "audio"
    _write_json(folder, {"kind": kind, "refused": reason})
    return {"file": PREPROCESSING, "kind": kind, "refused": reason}


def _write_json(folder: Path, numbers: Mapping[str, Any]) -> None:
    (folder / PREPROCESSING).write_text(json.dumps({"schema_version": 1, **numbers}, indent=2) + "\n", "utf-8")


def _examples(
    folder: Path, found: Preprocessing, specs: Mapping[str, Any]
) -> tuple[dict[str, dict[str, np.ndarray]], float | None]:
    """The example that is kept with what the processor made of it, and the largest difference over all; or None."""
    numbers, process = found.numbers, found.process
    image = numbers["kind"] == "image"
    raw = {n: picture(*s) for n, s in PICTURES.items()} if image else clips(numbers["sampling_rate"])
    steps: Any = ImageSteps(numbers) if image else AudioSteps(numbers, folder)
    batches = [[array] for array in raw.values()] + ([] if image else [list(raw.values())])
    worst = 0.0
    kept: dict[str, np.ndarray] = {}
    for batch in batches:
        made = {numbers["input"]: np.stack([steps(p) for p in batch])} if image else steps(batch)
        _check_shapes(made, specs)
        if process is None:
            continue
        wanted = _processed(process, batch, numbers["processor"])
        for name, array in wanted.items():
            if made[name].shape != array.shape:
                raise Unsaid(f"{numbers['processor']} gives {list(array.shape)}, not {list(made[name].shape)}")
            worst = max(worst, float(np.abs(made[name] - array).max(initial=0.0)))
        kept = kept or {name: array[0] for name, array in wanted.items()}
    if not worst <= _SAME[numbers["kind"]]:
        raise Unsaid(f"{numbers['processor']} does more than its settings say: a difference of {worst:.3g}")
    name, first = next(iter(raw.items()))
    return {name: {"picture" if image else "clip": first, **kept}}, None if process is None else worst


def _processed(process: Any, batch: list[np.ndarray], name: str) -> dict[str, np.ndarray]:
    try:
        return dict(process(batch))
    except Exception as error:  # a processor's own code
        raise Unsaid(f"{name} fails on a plain example ({type(error).__name__}: {str(error)[:120]})") from error


def _check_shapes(made: Mapping[str, np.ndarray], specs: Mapping[str, Any]) -> None:
    """Whether the graphs take what comes out."""
    for name, array in made.items():
        shape = specs[name].shape if name in specs else ()
        if len(shape) != array.ndim or any(
            isinstance(dim, int) and dim != n for dim, n in zip(shape[1:], array.shape[1:], strict=True)
        ):
            raise Unsaid(f"the processor gives {list(array.shape)} for '{name}', the graph takes {list(shape)}")


def _tolerance(numbers: Mapping[str, Any], difference: float) -> float:
    """Other versions of Pillow may round a pixel to the next of its 256 levels, and other FFTs the last bits."""
    if numbers["kind"] == "audio":
        return max(2 * difference, 1e-4)
    level = 1.0
    for step in numbers["steps"]:
        level = level * step["factor"] if step["step"] == "rescale" else level
        level = level / min(step["std"]) if step["step"] == "normalize" else level
    return round(max(2 * difference, 1.01 * level), 6)


def picture(rows: int, columns: int) -> np.ndarray:
    """A picture with slopes, edges, thin lines and a texture, uint8 [rows, columns, 3], the same everywhere."""
    y, x = np.mgrid[0:rows, 0:columns]
    red = 255 * x // max(1, columns - 1)
    green = np.where((x - columns // 3) ** 2 + (y - rows // 2) ** 2 < (min(rows, columns) // 4) ** 2, 230, 255 - red)
    blue = (x * x * 7 + y * 13 + x * y * 3) % 256
    stripes = ((x + 2 * y) % 9 == 0)[..., None]
    return np.where(stripes, 255 - np.stack([red, green, blue], -1), np.stack([red, green, blue], -1)).astype(np.uint8)


def clips(rate: int) -> dict[str, np.ndarray]:
    """A rising tone with echoes of 1 s, and a shorter clip, float32 [samples], multiples of 2^-15 as WAV has them."""
    time = np.arange(rate) / rate
    tone = 0.5 * np.sin(2 * np.pi * (120 + 900 * time) * time) + 0.1 * np.sin(2 * np.pi * 2500 * time) * (time > 0.5)
    whole = (np.round(tone * 32767) / 32768).astype(np.float32)
    return {"tone": whole, "short tone": whole[: rate * 2 // 5]}


def _write_example(folder: Path, numbers: Mapping[str, Any], example: Mapping[str, np.ndarray]) -> None:
    """The example as a file, for consumers that decode files."""
    if numbers["kind"] == "image":
        from PIL import Image

        stream = io.BytesIO()
        Image.fromarray(example["picture"]).save(stream, "PNG")
        (folder / "golden" / "picture.png").write_bytes(stream.getvalue())
        return
    with wave.open(str(folder / "golden" / "clip.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(numbers["sampling_rate"])
        file.writeframes(np.round(example["clip"] * 32768).astype("<i2").tobytes())

# SPDX-License-Identifier: Apache-2.0
"""Pictures to a model's input by the numbers in preprocessing.json, with Pillow and numpy (extra `vision`).

`steps` is a list, done in its order on a picture of rows x columns x channels, uint8:

{"step": "resize", "height": H, "width": W, "resample": R}        exactly this size
{"step": "resize", "shortest_edge": S, "resample": R}             the other edge is floor(S * longer / shorter)
{"step": "crop", "height": H, "width": W, "rounding": "floor"}    the middle: what is cut off before it is the rest
                                                                  halved, rounded down, and zeros stand around what is
                                                                  too small, the odd one first (transformers); with
                                                                  "half_even" half is rounded to the even number, and
                                                                  the odd zero stands last (torchvision)
{"step": "rescale", "factor": F}                                  times F in float64, then float32
{"step": "normalize", "mean": [..], "std": [..]}                  (x - mean) / std in float32, by channel

R is a filter of Pillow, which averages over all pixels that a smaller picture leaves out (antialias): nearest, box,
bilinear, hamming, bicubic, lanczos. Before all steps the picture is turned as its EXIF data says and converted to
`channels` (RGB, BGR or L); behind them it has `layout` (NCHW) and `dtype`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..contracts.errors import BundleError, InputError, MissingDependency
from ..contracts.preprocessing import RESAMPLES
from .session import Array

if TYPE_CHECKING:
    from .opened import Bundle

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 64 << 20
"""Pictures with more are refused before they are unpacked."""


class ImageEncoder:
    """Pictures to feeds, as `TextEncoder` is for texts.

    Args:
        bundle: An opened bundle with a preprocessing.json of kind `image`.

    Attributes:
        inputs: The input that pictures become.

    Raises:
        BundleError: The bundle has no such numbers, or they cannot be read.
        MissingDependency: Pillow is not installed.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._steps = ImageSteps(bundle.preprocessing)
        self.inputs = (self._steps.input,)

    def __call__(self, pictures: Sequence[bytes | Array] | bytes | Array) -> dict[str, Array]:
        """One picture or several, each a PNG or JPEG file's bytes or uint8 [rows, columns(, channels)], to feeds.

        Raises:
            InputError: One cannot be read, is too large, or gives another size than the ones before.
        """
        many = [pictures] if isinstance(pictures, bytes | np.ndarray) else list(pictures)
        rows = [self._steps(picture) for picture in many]
        if not rows:
            raise InputError("no picture was given", next_step="Give at least one.")
        if len({row.shape for row in rows}) > 1:
            raise InputError("the pictures have several sizes", next_step="Send them one by one.")
        return {self._steps.input: np.stack(rows)}


class ImageSteps:
    """The steps of a preprocessing.json: one picture to one row of the model's input.

    Args:
        numbers: The file's content, of kind `image`.

    Raises:
        BundleError: It is something else.
        MissingDependency: Pillow is not installed.
    """

    def __init__(self, numbers: Mapping[str, Any]) -> None:
        _require_pillow()
        if numbers.get("kind") != "image" or "refused" in numbers:
            reason = numbers.get("refused") or "it reads no pictures"
            raise BundleError(f"the bundle has no numbers for pictures: {reason}", next_step="Prepare arrays yourself.")
        try:
            self.input, self.channels = str(numbers["input"]), str(numbers["channels"])
            self.dtype = np.dtype(str(numbers["dtype"]))
            self._steps = [(str(step["step"]), dict(step)) for step in numbers["steps"]]
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError("preprocessing.json cannot be read", next_step="Press it again.") from error
        unknown = [name for name, _ in self._steps if name not in _STEPS]
        if unknown or self.channels not in ("RGB", "BGR", "L") or numbers.get("layout") != "NCHW":
            raise BundleError(
                f"preprocessing.json asks for what this version cannot do ({', '.join(unknown) or 'layout'})",
                next_step="Install the version of onnxpress that wrote the bundle.",
            )

    def __call__(self, picture: bytes | Array) -> Array:
        """One picture to [channels, rows, columns]."""
        pixels = _in_channels(decoded(picture), self.channels)
        for name, step in self._steps:
            pixels = _STEPS[name](pixels, step)
        if self.channels == "BGR":
            pixels = pixels[..., ::-1]
        return np.ascontiguousarray(np.moveaxis(pixels, -1, 0), dtype=self.dtype)


def decoded(picture: bytes | Array) -> Any:
    """A Pillow image of a file's bytes or of uint8 [rows, columns(, 1, 3 or 4 channels)].

    Raises:
        InputError: It is neither, is broken, or has more than `MAX_PIXELS`.
    """
    from PIL import Image, ImageOps

    if isinstance(picture, np.ndarray):
        return Image.fromarray(_checked(picture))
    try:
        image = Image.open(io.BytesIO(picture), formats=FORMATS)
        if math.prod(image.size) <= MAX_PIXELS:
            return ImageOps.exif_transpose(image)
    except Exception as error:  # what Pillow raises for a broken file is of many kinds
        raise InputError(
            f"the picture cannot be read ({type(error).__name__})", next_step=f"Send one of: {', '.join(FORMATS)}."
        ) from error
    raise InputError(
        f"the picture has {image.size[0]} x {image.size[1]} pixels", next_step="Send a smaller one; 64 million at most."
    )


def _checked(picture: Array) -> Array:
    """An array as Pillow takes it."""
    shape = picture.shape[:-1] if picture.ndim == 3 and picture.shape[-1] == 1 else picture.shape
    fits = len(shape) == 2 or (len(shape) == 3 and shape[-1] in (3, 4))
    if picture.dtype != np.uint8 or not fits or 0 in shape or math.prod(shape[:2]) > MAX_PIXELS:
        raise InputError(
            f"a picture is uint8 [rows, columns, channels], not {picture.dtype} {list(picture.shape)}",
            next_step="Convert it first.",
        )
    return np.ascontiguousarray(picture.reshape(shape))


def _in_channels(image: Any, channels: str) -> Array:
    """The pixels of a Pillow image as uint8 [rows, columns, channels]; BGR is turned at the end."""
    mode = "L" if channels == "L" else "RGB"
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _resize(pixels: Array, step: Mapping[str, Any]) -> Array:
    from PIL import Image

    rows, columns = pixels.shape[:2]
    if "shortest_edge" in step:
        short, edge = min(rows, columns), int(step["shortest_edge"])
        height, width = (edge if side == short else int(edge * side / short) for side in (rows, columns))
    else:
        height, width = int(step["height"]), int(step["width"])
    if height * width > MAX_PIXELS:
        raise InputError("the picture is too long and narrow to be resized", next_step="Cut it first.")
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    resized = np.asarray(image.resize((width, height), resample=RESAMPLES.index(str(step["resample"]))))
    return resized[..., None] if resized.ndim == 2 else resized


def _crop(pixels: Array, step: Mapping[str, Any]) -> Array:
    """The middle, with zeros around what is too small."""
    floor = step.get("rounding", "floor") == "floor"
    for axis, key in enumerate(("height", "width")):
        size, have = int(step[key]), pixels.shape[axis]
        missing = max(0, size - have)
        if missing:
            before = (missing + 1) // 2 if floor else missing // 2
            pixels = np.pad(pixels, [(before, missing - before) if i == axis else (0, 0) for i in range(3)])
            continue
        rest = have - size
        start = rest // 2 if floor else round(rest / 2)
        pixels = pixels[start : start + size] if axis == 0 else pixels[:, start : start + size]
    return pixels


def _rescale(pixels: Array, step: Mapping[str, Any]) -> Array:
    return (pixels.astype(np.float64) * float(step["factor"])).astype(np.float32)


def _normalize(pixels: Array, step: Mapping[str, Any]) -> Array:
    mean, std = (np.asarray(step[key], np.float32) for key in ("mean", "std"))
    return (pixels.astype(np.float32) - mean) / std


_STEPS = {"resize": _resize, "crop": _crop, "rescale": _rescale, "normalize": _normalize}


def _require_pillow() -> None:
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            "reading pictures needs Pillow, which is not installed", next_step="pip install 'onnxpress[vision]'"
        ) from error

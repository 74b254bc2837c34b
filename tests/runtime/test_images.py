# SPDX-License-Identifier: Apache-2.0
"""Pictures by numbers: each step against an exact computation, files of every kind, and what is refused."""

from __future__ import annotations

import io
import struct
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from onnxpress.contracts.errors import BundleError, InputError
from onnxpress.runtime.images import ImageEncoder, ImageSteps, decoded


def numbers(*steps: dict[str, Any], channels: str = "RGB") -> dict[str, Any]:
    return {
        "kind": "image", "input": "pixel_values", "channels": channels, "steps": list(steps), "layout": "NCHW",
        "dtype": "float32",
    }  # fmt: skip


def bundle(*steps: dict[str, Any], **more: Any) -> Any:
    return SimpleNamespace(preprocessing=numbers(*steps, **more))


def picture(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(rows * columns).integers(0, 256, (rows, columns, 3), np.uint8)


def file_of(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


CROP = {"step": "crop", "height": 6, "width": 4}


def test_rescaling_and_normalizing_are_exact() -> None:
    pixels = picture(5, 7)
    mean, std = [0.5, 0.25, 0.125], [0.5, 1.0, 2.0]
    steps = [{"step": "rescale", "factor": 1 / 255}, {"step": "normalize", "mean": mean, "std": std}]
    made = ImageEncoder(bundle(*steps))(pixels)["pixel_values"]
    assert made.shape == (1, 3, 5, 7)
    assert made.dtype == np.float32
    wanted = (pixels / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(made[0], wanted.transpose(2, 0, 1), atol=2e-7)
    identity = ImageEncoder(bundle())(pixels)["pixel_values"]
    assert not np.allclose(identity, made)


@given(rows=st.integers(1, 30), columns=st.integers(1, 30), height=st.integers(1, 30), width=st.integers(1, 30))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_crop_is_the_middle_with_zeros_around_what_is_too_small(
    rows: int, columns: int, height: int, width: int
) -> None:
    pixels = np.full((rows, columns, 3), 9, np.uint8)
    made = ImageSteps(numbers({"step": "crop", "height": height, "width": width}))(pixels)
    assert made.shape == (3, height, width)
    assert np.count_nonzero(made[0]) == min(rows, height) * min(columns, width)
    filled = np.flatnonzero(made[0].any(1))
    before, behind = filled[0], height - 1 - filled[-1]
    assert before - behind in (0, 1), "the odd row of zeros stands above"


def test_the_odd_zero_stands_first_or_last() -> None:
    pixels = np.full((1, 1, 3), 9, np.uint8)
    for rounding, wanted in (("floor", [0, 0, 9, 0]), ("half_even", [0, 9, 0, 0])):
        made = ImageSteps(numbers({"step": "crop", "height": 4, "width": 1, "rounding": rounding}))(pixels)
        assert made[0, :, 0].tolist() == wanted


def test_an_odd_rest_goes_below_or_to_the_even_side() -> None:
    column = np.arange(9, dtype=np.uint8)[:, None].repeat(3, 1)[:, None]  # 9 x 1, values 0..8
    floor = ImageSteps(numbers({"step": "crop", "height": 6, "width": 1}))(column)
    even = ImageSteps(numbers({"step": "crop", "height": 6, "width": 1, "rounding": "half_even"}))(column)
    assert floor[0, :, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert even[0, :, 0].tolist() == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("rows", "columns", "height", "width"), [(100, 80, 25, 20), (80, 133, 20, 33), (20, 20, 20, 20), (3, 400, 20, 2666)]
)
def test_the_shorter_edge_keeps_the_shape(rows: int, columns: int, height: int, width: int) -> None:
    steps = ImageSteps(numbers({"step": "resize", "shortest_edge": 20, "resample": "bilinear"}))
    assert steps(picture(rows, columns)).shape == (3, height, width)


def test_resizing_averages_what_is_left_out() -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[::2] = 200
    made = ImageSteps(numbers({"step": "resize", "height": 2, "width": 2, "resample": "box"}))(pixels)
    assert made.tolist() == [[[100.0, 100.0], [100.0, 100.0]]] * 3


def test_colours_come_in_the_order_that_is_asked_for() -> None:
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[..., 0] = 255
    assert ImageSteps(numbers())(pixels)[:, 0, 0].tolist() == [255, 0, 0]
    assert ImageSteps(numbers(channels="BGR"))(pixels)[:, 0, 0].tolist() == [0, 0, 255]
    assert ImageSteps(numbers(channels="L"))(pixels)[:, 0, 0].tolist() == [76]


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP", "JPEG"])
def test_files(kind: str) -> None:
    pixels = np.full((9, 7, 3), 200, np.uint8)
    options = {"lossless": True} if kind == "WEBP" else {}
    made = ImageEncoder(bundle())(file_of(pixels, kind, **options))["pixel_values"]
    np.testing.assert_allclose(made[0], pixels.transpose(2, 0, 1), atol=2 if kind == "JPEG" else 0)


def test_grey_and_transparent_pictures_become_colours() -> None:
    encoder = ImageEncoder(bundle())
    for shape in ((4, 5), (4, 5, 1), (4, 5, 3), (4, 5, 4)):
        assert encoder(np.full(shape, 255, np.uint8))["pixel_values"].shape == (1, 3, 4, 5)


def test_a_turned_photo_is_turned_back() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    assert ImageEncoder(bundle())(file_of(picture(4, 9), "JPEG", exif=exif))["pixel_values"].shape == (1, 3, 9, 4)


def test_several_pictures_are_one_batch() -> None:
    encoder = ImageEncoder(bundle(CROP))
    batch = [picture(6, 9), file_of(picture(12, 5))]
    made = encoder(batch)["pixel_values"]
    assert made.shape == (2, 3, 6, 4)
    for row, one in zip(made, batch, strict=True):
        np.testing.assert_array_equal(row, encoder(one)["pixel_values"][0])
    with pytest.raises(InputError, match="several sizes"):
        ImageEncoder(bundle())([picture(6, 9), picture(6, 8)])
    with pytest.raises(InputError, match="no picture"):
        encoder([])


def _bomb() -> bytes:
    """A PNG of a hundred bytes that claims to be 100,000 x 100,000."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


@pytest.mark.parametrize(
    "data", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0", _bomb()]
)
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(InputError, match="picture"):
        ImageEncoder(bundle())(data)
    with pytest.raises(InputError):
        decoded(file_of(picture(40, 40))[:-900])


def test_too_many_pixels_are_refused_before_they_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxpress.runtime.images.MAX_PIXELS", 99)
    with pytest.raises(InputError, match="10 x 10 pixels"):
        ImageEncoder(bundle())(file_of(picture(10, 10)))
    with pytest.raises(InputError, match="uint8"):
        ImageEncoder(bundle())(picture(10, 10))
    resize = {"step": "resize", "shortest_edge": 9, "resample": "box"}
    with pytest.raises(InputError, match="too long and narrow"):
        ImageEncoder(bundle(resize))(picture(1, 90))


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4, 3), np.uint8), np.zeros(4)],
)
def test_arrays_of_another_kind_are_refused(array: np.ndarray) -> None:
    with pytest.raises(InputError, match="a picture is uint8"):
        ImageEncoder(bundle())(array)


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"kind": "audio"},
        {"kind": "image", "refused": "it pads"},
        numbers({"step": "pad"}),
        {**numbers(), "layout": "NHWC"},
        {**numbers(), "channels": "CMYK"},
        {**numbers(), "dtype": "no"},
        {k: v for k, v in numbers().items() if k != "steps"},
    ],
)
def test_numbers_that_cannot_be_followed_are_refused(broken: dict[str, Any]) -> None:
    with pytest.raises(BundleError):
        ImageEncoder(SimpleNamespace(preprocessing=broken))  # type: ignore[arg-type]

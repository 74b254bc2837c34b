# SPDX-License-Identifier: Apache-2.0
"""Sound by numbers: against direct sums, WAV files of every width, and what is refused."""

from __future__ import annotations

import io
import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from onnxpress.contracts.errors import BundleError, InputError
from onnxpress.runtime.audio import AudioEncoder, read_wav

RATE = 100
WAVEFORM: dict[str, Any] = {
    "kind": "audio", "form": "waveform", "inputs": ["input_values", "attention_mask"], "sampling_rate": RATE,
    "normalize": True, "normalize_padding": False, "padding_value": 0.0,
}  # fmt: skip
LOG_MEL: dict[str, Any] = {
    "kind": "audio", "form": "log_mel", "inputs": ["input_features"], "sampling_rate": RATE, "samples": 64, "n_fft": 16,
    "hop": 4, "mel_filters": "mel.npy", "range": 8.0, "shift": 4.0, "scale": 4.0,
}  # fmt: skip


def encoder(numbers: dict[str, Any], folder: Path = Path()) -> AudioEncoder:
    return AudioEncoder(SimpleNamespace(preprocessing=numbers, folder=folder))  # type: ignore[arg-type]


def clip(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, count).astype(np.float32)


def wav(frames: bytes, *, width: int = 2, rate: int = RATE, channels: int = 1) -> bytes:
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(frames)
    return stream.getvalue()


def test_a_waveform_gets_mean_zero_and_variance_one() -> None:
    made = encoder(WAVEFORM)([clip(50), clip(80, 1) * 0.1 + 0.3])
    values, mask = made["input_values"], made["attention_mask"]
    assert (values.shape, values.dtype, mask.dtype) == ((2, 80), np.float32, np.int64)
    assert mask.sum(1).tolist() == [50, 80]
    for row, count in zip(values, (50, 80), strict=True):
        assert abs(row[:count].mean()) < 1e-6
        assert row[:count].var() == pytest.approx(1, abs=1e-3)
    assert not values[0, 50:].any()


def test_without_a_mask_the_padding_counts() -> None:
    short = encoder({**WAVEFORM, "inputs": ["input_values"], "normalize_padding": True})
    made = short([clip(50) + 1, clip(80)])
    assert list(made) == ["input_values"]
    assert abs(made["input_values"][0].mean()) < 1e-6
    assert made["input_values"][0, 50:].max() < -0.5
    as_it_is = encoder({**WAVEFORM, "normalize": False})(clip(9))["input_values"]
    np.testing.assert_array_equal(as_it_is[0], clip(9))


def test_a_spectrum_is_the_sum_that_it_stands_for(tmp_path: Path) -> None:
    filters = np.abs(np.random.default_rng(1).standard_normal((9, 5))).astype(np.float32)
    np.save(tmp_path / "mel.npy", filters)
    signal = clip(40)
    made = encoder(LOG_MEL, tmp_path)([signal, clip(90, 2)])["input_features"]
    assert (made.shape, made.dtype) == ((2, 5, 16), np.float32)
    padded = np.pad(np.concatenate([signal, np.zeros(24)]), 8, mode="reflect")
    window = np.array([0.5 - 0.5 * np.cos(2 * np.pi * n / 16) for n in range(16)])
    power = np.zeros((9, 16))
    for frame in range(16):
        for k in range(9):
            part = padded[4 * frame : 4 * frame + 16] * window
            power[k, frame] = abs(sum(part[n] * np.exp(-2j * np.pi * k * n / 16) for n in range(16))) ** 2
    logs = np.log10(np.maximum(filters.T @ power, 1e-10))
    np.testing.assert_allclose(made[0], (np.maximum(logs, logs.max() - 8) + 4) / 4, atol=1e-5)


@pytest.mark.parametrize(("width", "step"), [(1, 1 / 128), (2, 2**-15), (3, 2**-23), (4, 2**-24)])
def test_wav_files_of_every_width(width: int, step: float) -> None:
    wanted = clip(30)
    whole = np.round(wanted.astype(np.float64) * (1 << (8 * width - 1)) * (1 - 1e-9)).astype(np.int64)
    raw = (whole + 128) if width == 1 else whole
    frames = b"".join(int(v).to_bytes(width, "little", signed=width > 1) for v in np.clip(raw, *_ends(width)))
    np.testing.assert_allclose(read_wav(wav(frames, width=width), RATE), wanted, atol=step)
    if width == 2:
        made = encoder({**WAVEFORM, "normalize": False})(wav(frames, width=width))["input_values"]
        np.testing.assert_allclose(made[0], wanted, atol=step)


def _ends(width: int) -> tuple[int, int]:
    return (0, 255) if width == 1 else (-(1 << (8 * width - 1)), (1 << (8 * width - 1)) - 1)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no uncompressed WAV"),
        (b"RIFF\x00\x00\x00\x00WAVE", "no uncompressed WAV"),
        (b"ID3 mp3", "no uncompressed WAV"),
        (wav(b"\0\0" * 4, rate=44100), "44100 samples a second in 1 channels"),
        (wav(b"\0\0" * 4, channels=2), "100 samples a second in 2 channels"),
        (wav(b""), "a clip is"),
    ],
)
def test_sound_that_would_need_converting_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(InputError, match=words):
        encoder(WAVEFORM)(data)


@pytest.mark.parametrize(
    "array", [np.zeros(4, np.int16), np.zeros((2, 4), np.float32), np.zeros(0, np.float32), np.array([1.0, np.nan])]
)
def test_arrays_of_another_kind_are_refused(array: np.ndarray) -> None:
    with pytest.raises(InputError, match="one channel of finite float samples"):
        encoder(WAVEFORM)(array)


def test_nothing_and_too_much_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no sound"):
        encoder(WAVEFORM)([])
    monkeypatch.setattr("onnxpress.runtime.audio.MAX_SECONDS", 1)
    with pytest.raises(InputError, match="longer than"):
        encoder(WAVEFORM)(clip(RATE + 1))


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"kind": "image"},
        {"kind": "audio", "refused": "noise"},
        {**WAVEFORM, "form": "mfcc"},
        {**WAVEFORM, "sampling_rate": "fast"},
        LOG_MEL,
        {**LOG_MEL, "mel_filters": "../../etc/hostname"},
    ],
)
def test_numbers_that_cannot_be_followed_are_refused(broken: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        encoder(broken, tmp_path)

# SPDX-License-Identifier: Apache-2.0
"""Sound to a model's input by the numbers in preprocessing.json, in numpy alone.

Both kinds take one channel of float samples in [-1, 1] at `sampling_rate`:

`waveform`   the samples, padded behind to the longest of a batch with `padding_value`, and normalized to mean 0 and
             variance 1 where "normalize" is true ((x - mean) / sqrt(var + 1e-7)), with "normalize_padding" over the
             padding too; the mask, where the model reads one, is 1 where there is sound (Wav2Vec2, HuBERT, WavLM)
`log_mel`    cut or padded with zeros to `samples`; short-time Fourier transform with a periodic Hann window of `n_fft`
             samples every `hop` samples, the signal reflected by n_fft / 2 at both ends, the last frame left out;
             squared magnitudes times `mel_filters` (a .npy of frequencies x bands), log10 of at least 1e-10, at least
             the clip's maximum less `range`, plus `shift`, divided by `scale` (Whisper)
"""

from __future__ import annotations

import io
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..contracts.errors import BundleError, InputError
from .session import Array

if TYPE_CHECKING:
    from .opened import Bundle

MASK = "attention_mask"
MAX_SECONDS = 3600
"""Longer clips are refused."""


class AudioEncoder:
    """Sound to feeds, as `TextEncoder` is for texts.

    Args:
        bundle: An opened bundle with a preprocessing.json of kind `audio`.

    Attributes:
        inputs: The inputs that sound becomes.
        sampling_rate: Samples a second that it takes.

    Raises:
        BundleError: The bundle has no such numbers, or they cannot be read.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._steps = AudioSteps(bundle.preprocessing, bundle.folder)
        self.inputs, self.sampling_rate = self._steps.inputs, self._steps.sampling_rate

    def __call__(self, clips: Sequence[bytes | Array] | bytes | Array) -> dict[str, Array]:
        """One clip or several, each a WAV file's bytes or float [samples] at `sampling_rate`, to feeds.

        Raises:
            InputError: One cannot be read, has another rate or several channels, or is empty or too long.
        """
        many = [clips] if isinstance(clips, bytes | np.ndarray) else list(clips)
        if not many:
            raise InputError("no sound was given", next_step="Give at least one clip.")
        return self._steps([read_wav(c, self.sampling_rate) if isinstance(c, bytes) else c for c in many])


class AudioSteps:
    """What a preprocessing.json does to clips: a batch of them to the model's inputs.

    Args:
        numbers: The file's content, of kind `audio`.
        folder: Where the file of mel filters lies.

    Raises:
        BundleError: It is something else, or cannot be read.
    """

    def __init__(self, numbers: Mapping[str, Any], folder: Path) -> None:
        if numbers.get("kind") != "audio" or "refused" in numbers:
            reason = numbers.get("refused") or "it reads no sound"
            raise BundleError(f"the bundle has no numbers for sound: {reason}", next_step="Prepare arrays yourself.")
        try:
            self.sampling_rate = int(numbers["sampling_rate"])
            self.inputs = tuple(str(name) for name in numbers["inputs"])
            self._numbers = dict(numbers)
            self._rows = {"waveform": self._waveforms, "log_mel": self._log_mels}[str(numbers["form"])]
            if numbers["form"] == "log_mel":
                file = (folder / str(numbers["mel_filters"])).resolve()
                if not file.is_relative_to(folder.resolve()):
                    raise ValueError("outside")
                self._filters: Array = np.load(file, allow_pickle=False).astype(np.float64)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise BundleError("preprocessing.json cannot be read", next_step="Press it again.") from error

    def __call__(self, clips: Sequence[Array]) -> dict[str, Array]:
        """Clips of float [samples] to the inputs."""
        return self._rows([_checked(clip, self.sampling_rate) for clip in clips])

    def _waveforms(self, clips: Sequence[Array]) -> dict[str, Array]:
        longest = max(map(len, clips))
        values = np.full((len(clips), longest), float(self._numbers["padding_value"]), np.float32)
        mask = np.zeros((len(clips), longest), np.int64)
        whole = bool(self._numbers.get("normalize_padding"))
        for row, clip in enumerate(clips):
            values[row, : len(clip)], mask[row, : len(clip)] = clip, 1
            if self._numbers["normalize"]:
                part = values[row] if whole else values[row, : len(clip)]
                part[:] = (part - part.mean()) / np.sqrt(part.var() + 1e-7)
        return {name: mask if name == MASK else values for name in self.inputs}

    def _log_mels(self, clips: Sequence[Array]) -> dict[str, Array]:
        (name,) = self.inputs
        return {name: np.stack([self._log_mel(clip) for clip in clips])}

    def _log_mel(self, clip: Array) -> Array:
        """float32 [bands, frames]."""
        length, size, hop = (int(self._numbers[key]) for key in ("samples", "n_fft", "hop"))
        samples = np.zeros(length)
        samples[: min(len(clip), length)] = clip[:length]
        samples = np.pad(samples, size // 2, mode="reflect")
        frames = np.lib.stride_tricks.sliding_window_view(samples, size)[::hop][:-1]
        window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
        power = np.abs(np.fft.rfft(frames * window, axis=-1)) ** 2
        decibels = np.log10(np.maximum(power @ self._filters, 1e-10)).T
        decibels = np.maximum(decibels, decibels.max() - float(self._numbers["range"]))
        row: Array = (decibels + float(self._numbers["shift"])) / float(self._numbers["scale"])
        return row.astype(np.float32)


def read_wav(data: bytes, sampling_rate: int) -> Array:
    """The samples of an uncompressed WAV file with one channel, float32 in [-1, 1].

    Raises:
        InputError: It is none, or has another rate or several channels: nothing is resampled in silence.
    """
    try:
        with wave.open(io.BytesIO(data)) as file:
            width, rate, channels = file.getsampwidth(), file.getframerate(), file.getnchannels()
            frames = file.readframes(file.getnframes())
    except Exception as error:  # the module raises errors of several kinds for broken files
        raise InputError("the sound is no uncompressed WAV file", next_step="Convert it to 16-bit WAV.") from error
    if rate != sampling_rate or channels != 1:
        raise InputError(
            f"the sound has {rate} samples a second in {channels} channels",
            next_step=f"Convert it to {sampling_rate} samples a second in one channel.",
        )
    raw = np.frombuffer(frames[: len(frames) // width * width], np.uint8).reshape(-1, width)
    if width == 1:  # unsigned, unlike all wider ones
        return ((raw[:, 0].astype(np.float32) - 128) / 128).astype(np.float32)
    whole = np.zeros((len(raw), 4), np.uint8)
    whole[:, 4 - width :] = raw
    values: Array = (whole.view("<i4")[:, 0] / 2.0**31).astype(np.float32)
    return values


def _checked(clip: Array, sampling_rate: int) -> Array:
    """A clip as float32."""
    if clip.ndim != 1 or clip.dtype.kind != "f" or not clip.size or not np.isfinite(clip).all():
        raise InputError(
            f"a clip is one channel of finite float samples, not {clip.dtype} {list(clip.shape)}",
            next_step="Convert it to float in [-1, 1], one channel.",
        )
    if clip.size > MAX_SECONDS * sampling_rate:
        raise InputError("the sound is longer than an hour", next_step="Cut it into pieces.")
    return clip.astype(np.float32)

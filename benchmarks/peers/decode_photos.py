# SPDX-License-Identifier: Apache-2.0
"""Photos as a network of ImageNet takes them; runs in an environment of its own, which has Pillow.

    python decode_photos.py FOLDER OUT.npz

As Caffe's networks take them: 256 x 256, the central 227 x 227, blue first, less the mean of ImageNet: images float32
[n, 3, 227, 227], and labels int64 [n]: the file's rank in sorted order, times five.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image


def main(folder: str, out: str) -> None:
    images = []
    files = sorted(Path(folder).glob("*.JPEG"))
    for file in files:
        photo = Image.open(file).convert("RGB")
        pixels = np.asarray(photo.resize((256, 256), Image.Resampling.BILINEAR), np.float32)
        images.append((pixels[14:241, 14:241, ::-1] - [104, 117, 123]).transpose(2, 0, 1))
    np.savez(out, images=np.stack(images).astype(np.float32), labels=np.arange(len(files)) * 5)


if __name__ == "__main__":
    main(*sys.argv[1:])

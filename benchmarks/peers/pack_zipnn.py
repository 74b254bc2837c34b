# SPDX-License-Identifier: Apache-2.0
"""ZipNN on the bytes of some weights; runs in an environment of its own.

    python pack_zipnn.py REPEATS DTYPE FILE [DTYPE FILE ...]

DTYPE is ZipNN's name of the type; it has none for integers, whose bytes it is given as float8, which it does not split.
One thread, its other settings as they are. Its last line is a list of {"bytes": ..., "encode": ..., "decode": ...},
times in seconds, the best of REPEATS or of half a second of them.
"""

import json
import sys
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")  # torch's, about what safetensors does

from zipnn import ZipNN  # noqa: E402


def main(repeats: str, *words: str) -> None:
    print(json.dumps([measure(*pair, int(repeats)) for pair in zip(words[::2], words[1::2], strict=True)]))


def measure(dtype: str, file: str, repeats: int) -> dict[str, float]:
    data = Path(file).read_bytes()
    best = {"encode": float("inf"), "decode": float("inf")}
    begun, runs = time.process_time(), 0
    while runs < repeats or (repeats > 1 and time.process_time() - begun < 0.5):
        runs += 1
        given = bytearray(data)  # it rearranges what it is given
        started = time.process_time()
        packed = ZipNN(input_format="byte", bytearray_dtype=dtype, threads=1).compress(given)
        best["encode"] = min(best["encode"], time.process_time() - started)
        packed = bytearray(packed)
        started = time.process_time()
        back = ZipNN(input_format="byte", bytearray_dtype=dtype, threads=1).decompress(packed)
        best["decode"] = min(best["decode"], time.process_time() - started)
        assert bytes(back) == data
    return {"bytes": len(packed), **best}


if __name__ == "__main__":
    main(*sys.argv[1:])

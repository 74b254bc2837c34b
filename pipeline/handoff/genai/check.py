# SPDX-License-Identifier: Apache-2.0
"""Compare with the golden samples: the logits behind each prompt, and greedy tokens.

Prints `logits DIFFERENCE TOLERANCE DIFFERENCE-FROM-PYTHON`, the largest over all prompts; exits with 0 if it is within
the tolerance and all greedy tokens are the expected ones. golden/tensors.txt has a line for each tensor:
SAMPLE KIND NAME DTYPE OFFSET BYTES TOLERANCE RANK DIM...
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
Sample = dict[str, dict[str, Any]]
"""Kind -> name -> array."""


def read_golden() -> tuple[list[Sample], float]:
    """The samples, and the tolerance of the logits."""
    numbers, tolerance = (HERE / "golden/tensors.bin").read_bytes(), 0.0
    samples: defaultdict[int, Sample] = defaultdict(dict)
    for line in (HERE / "golden/tensors.txt").read_text("utf-8").splitlines():
        sample, kind, name, dtype, offset, size, limit, _rank, *dims = line.split(" ")
        shape, start = [int(dim) for dim in dims], int(offset)
        array = np.frombuffer(numbers[start : start + int(size)], dtype).reshape(shape)
        samples[int(sample)].setdefault(kind, {})[name] = array
        if kind == "reference" and name == "logits":
            tolerance = float(limit)
    return list(samples.values()), tolerance


def begun(model: Any, prompt: Sequence[int] | np.ndarray, new: int) -> Any:
    """A generator that has read the prompt."""
    import onnxruntime_genai as og

    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + new, do_sample=False, num_beams=1)
    generator = og.Generator(model, params)
    generator.append_tokens(np.asarray(prompt, np.int32))
    return generator


def logits_differ(model: Any, samples: Iterable[Sample]) -> tuple[float, float]:
    """Largest difference from the original and from ONNX Runtime in Python.

    Left out are samples that begin with a cache, and prompts that leave no room for another token.
    """
    worst, other = 0.0, 0.0
    longest = json.loads((HERE / "genai_config.json").read_text("utf-8"))["model"]["context_length"]
    for sample in samples:
        inputs = sample["input"]
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask", np.ones_like(ids))
        if mask.shape != ids.shape:
            continue
        for row in range(len(ids)):
            kept = np.flatnonzero(mask[row])
            if not 0 < len(kept) < longest:
                continue
            logits = np.asarray(begun(model, ids[row][kept], 1).get_logits(), np.float32).reshape(-1)
            worst = max(worst, float(np.abs(logits - sample["reference"]["logits"][row, kept[-1]]).max()))
            other = max(other, float(np.abs(logits - sample["python"]["logits"][row, kept[-1]]).max()))
    return worst, other


def tokens_differ(model: Any) -> str:
    """What to say of the first prompt that is continued in another way; empty if none is."""
    for row in json.loads((HERE / "golden/greedy.json").read_text("utf-8")):
        generator, tokens = begun(model, row["prompt"], len(row["tokens"])), list[int]()
        while not generator.is_done() and len(tokens) < len(row["tokens"]):
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        if tokens != row["tokens"]:
            return f"greedy tokens are {tokens}, and should be {row['tokens']}"
    return ""


def main() -> None:
    import onnxruntime_genai as og

    model = og.Model(str(HERE))
    samples, tolerance = read_golden()
    worst, other = logits_differ(model, samples)
    sys.stdout.write(f"logits {worst} {tolerance} {other}\n")
    problem = tokens_differ(model)
    if problem:
        sys.stderr.write(problem + "\n")
    sys.exit(1 if problem or not worst <= tolerance else 0)


if __name__ == "__main__":
    main()

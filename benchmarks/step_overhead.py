# SPDX-License-Identifier: Apache-2.0
"""What a decoding step takes outside the graph: binding, choosing a token, bookkeeping.

    .venv/bin/python -m benchmarks.step_overhead BUNDLE... [--tokens 400] [--rounds 5] [--threads 1]

Each bundle is a causal language model's. From one token on, texts are written in four ways; the figures are medians
over the steps of the round that took least. "late" is the last quarter of the text alone: nothing but the attention
mask may grow with it.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from onnxpress.runtime.generation import Generator, Sampling

WAYS = {
    "greedy": (1, {}),
    "greedy, 8 texts": (8, {}),
    "drawn: temperature, top-k, top-p": (1, {"temperature": 0.8, "top_p": 0.9, "seed": 1}),
    "greedy, repetition penalty": (1, {"repetition_penalty": 1.2}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    print("| bundle | way | outside µs | late µs | in the graph µs |\n|---|---|---|---|---|")
    for folder in options.bundles:
        generator = Generator(folder, threads=options.threads)
        for way, (rows, changes) in WAYS.items():
            sampling = Sampling(max_new_tokens=options.tokens, **changes)
            outside, late, inside = min(steps(generator, rows, sampling) for _ in range(options.rounds))
            print(f"| {folder.name} | {way} | {outside:.0f} | {late:.0f} | {inside:.0f} |")


def steps(generator: Generator, rows: int, sampling: Sampling) -> tuple[float, float, float]:
    """Medians of the microseconds outside the graph, of the last quarter of them, and within it."""
    stream = generator.stream_batch([[1]] * rows, sampling)
    outside, inside, before = [], [], (0.0, 0.0)
    for chunk in stream:
        if chunk.row == rows - 1:
            now = stream.usage.decode_seconds, stream.usage.graph_seconds
            inside.append(now[1] - before[1])
            outside.append(now[0] - before[0] - inside[-1])
            before = now
    last = outside[-max(1, len(outside) // 4) :]
    return tuple(1e6 * statistics.median(times) for times in (outside[1:], last, inside[1:]))  # type: ignore[return-value]


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""One decoder in a process of its own, which generates when it is told to: see benchmarks/decoding.py.

    PYTHON decode_turns.py KIND FOLDER THREADS

KIND is `onnxpress` (a bundle), `small-pages` (the same with its weights in pages of 4 KiB), `genai` (a folder of
onnxruntime_genai) or `pytorch` (a checkpoint, in bf16); PYTHON is one that has it. Prints a JSON line once loaded, then
reads lines `{"prompt": [ids], "tokens": n}` and answers each with `{"prefill": seconds, "decode": seconds, "tokens":
[ids], "peak_mib": n}`: prefill until the first token is known, decode from there to the last of n. No token ends a text
early. GenAI and PyTorch run their own loops.
"""

import json
import resource
import sys
import time
from pathlib import Path


class OnnxPress:
    """Our Generator."""

    def __init__(self, folder, threads):
        from onnxpress.runtime.generation import Generator

        self.model = Generator(folder, threads=threads, spinning=True)  # as `onnxpress generate` does
        self.sampling = self.model.defaults.changed(temperature=0.0, eos=())

    def generate(self, prompt, count):
        with self.model.stream(prompt, self.sampling.changed(max_new_tokens=count)) as stream:
            tokens = [token for chunk in stream for token in chunk.tokens]
        return stream.usage.prefill_seconds, stream.usage.decode_seconds, tokens


class SmallPages(OnnxPress):
    """The same without huge pages."""

    def __init__(self, folder, threads):
        from onnxpress.runtime.generation import graphs

        graphs.use_huge_pages = int
        super().__init__(folder, threads)


class GenAI:
    """onnxruntime_genai, with its own defaults but for the threads."""

    def __init__(self, folder, threads):
        import onnxruntime_genai as og

        self.og, config = og, og.Config(folder)
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self.model = og.Model(config)

    def generate(self, prompt, count):
        import numpy as np

        params, length = self.og.GeneratorParams(self.model), len(prompt) + count
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        began = time.perf_counter()
        generator = self.og.Generator(self.model, params)
        generator.append_tokens(np.asarray(prompt, np.int32))
        generator.generate_next_token()
        first, tokens = time.perf_counter(), [int(generator.get_next_tokens()[0])]
        for _ in range(count - 1):
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        return first - began, time.perf_counter() - first, tokens


class PyTorch:
    """transformers' generate, in bf16."""

    def __init__(self, folder, threads):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def generate(self, prompt, count):
        clock, ids = Clock(), self.torch.tensor([prompt])
        began = time.perf_counter()
        with self.torch.inference_mode():
            self.model.generate(
                ids,
                attention_mask=self.torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                streamer=clock,
            )
        _, first, *later = clock.times  # transformers hands the prompt over before the first token
        return first - began, later[-1] - first, clock.tokens[len(prompt) :]


class Clock:
    """A streamer that notes when each token came."""

    def __init__(self):
        self.times, self.tokens = [], []

    def put(self, value):
        self.times.append(time.perf_counter())
        self.tokens += value.reshape(-1).tolist()

    def end(self):
        pass


KINDS = {"onnxpress": OnnxPress, "small-pages": SmallPages, "genai": GenAI, "pytorch": PyTorch}


def main():
    kind, folder, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    began = time.perf_counter()
    runner = KINDS[kind](folder, threads)
    print(json.dumps({"load": time.perf_counter() - began}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        prefill, decode, tokens = runner.generate(asked["prompt"], asked["tokens"])
        print(json.dumps({"prefill": prefill, "decode": decode, "tokens": tokens, "peak_mib": peak_mib()}), flush=True)


def peak_mib():
    status = Path("/proc/self/status")
    if status.is_file():
        found = [line.split() for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(found[0][1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()

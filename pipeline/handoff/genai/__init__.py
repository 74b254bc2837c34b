# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime GenAI: a flat folder with genai_config.json, for causal language models with a cache.

What GenAI does differently from other consumers, and what is changed for it:

- It has no input `num_logits_to_keep`. It becomes the constant 0: all logits. GenAI 0.18 also takes logits of the fixed
  length 1, but then gives wrong answers for batches of prompts that are padded on the right.
- It looks for `model.onnx.data`, as its own builder writes it, where others look for `model.onnx_data`.
- It keeps one buffer a cache for past and present only where told so: with GroupQueryAttention, which appends in place.

The check runs the folder's own check.py with a Python that has onnxruntime-genai: the last logits of each golden prompt
are compared, and 16 greedy tokens have to be those that the bundle itself gives.

References: genai_config.json as written by `onnxruntime_genai.models.builder`; Config reference of ONNX Runtime GenAI.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from ....contracts.decoding import INPUT_IDS, KEEP, MASK, Decoding
from ....contracts.errors import InputError
from ....exporters import graph_file
from ....runtime.opened import Bundle
from ....runtime.session import Array, Session
from ...passes.graph import MICROSOFT, is_op
from ..base import Check, MissingTool, Target, copy_files, judge, render, run_tool
from ..golden import write_golden
from .config import config_of

PYTHON = "ONNXPRESS_GENAI_PYTHON"
"""Environment variable: the Python that has onnxruntime-genai, where it is not this one."""

MODEL, DATA = "model.onnx", "model.onnx.data"
COMMAND = "python check.py"
_HERE = Path(__file__).parent
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
_GREEDY = 16
_PROMPTS = 4


class GenAI(Target):
    """The folder is what `onnxruntime_genai.Model` opens."""

    name: ClassVar[str] = "genai"
    summary: ClassVar[str] = "ONNX Runtime GenAI, for causal language models"

    def write(self, bundle: Bundle, folder: Path) -> None:
        decoding = decoding_of(bundle)
        model = graph_file.read(bundle.model_file())
        model = without_keep(model)
        graph_file.write(model, folder / MODEL, external_from=0, data_name=DATA)
        config = config_of(bundle, decoding, in_place=appends_in_place(model))
        (folder / "genai_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        has_text = (bundle.folder / _TOKENIZER[0]).is_file()
        for name in _TOKENIZER:
            if (bundle.folder / name).is_file():
                shutil.copyfile(bundle.folder / name, folder / name)
        write_golden(bundle, folder / "golden")
        greedy = greedy_tokens(bundle, decoding, config["model"])
        (folder / "golden" / "greedy.json").write_text(json.dumps(greedy) + "\n", "utf-8")
        copy_files(_HERE, folder, ["generate.py", "check.py"])
        (folder / "README.md").write_text(render(__name__, "README.md.j2", name=bundle.name, text=has_text), "utf-8")

    def check(self, bundle: Bundle, folder: Path, scratch: Path) -> Check:
        python = genai_python()
        asked = run_tool([python, "-c", "import onnxruntime_genai as og; print(og.__version__)"], folder)
        if asked.returncode:
            raise MissingTool(f"{python} has no onnxruntime-genai", next_step="pip install onnxruntime-genai")
        done = run_tool([python, "check.py"], folder, seconds=900)
        versions = {"onnxruntime-genai": asked.stdout.strip()}
        return judge(done, ["logits"], command=COMMAND, stages=("generated", "run"), versions=versions)


def decoding_of(bundle: Bundle) -> Decoding:
    """How the decoder is fed.

    Raises:
        InputError: It is no causal language model with keys and values in its cache, and with nothing else in it.
    """
    decoding = None if bundle.manifest.get("companions") else Decoding.of(bundle.signature)
    if decoding is None:
        raise InputError("ONNX Runtime GenAI runs causal language models with a cache, and this is none")
    other = [spec.name for spec in decoding.caches if not spec.name.startswith("past_key_values.")]
    if other:
        raise InputError(f"ONNX Runtime GenAI has no name for the state '{other[0]}'")
    known = {INPUT_IDS, MASK, "position_ids", KEEP, *(spec.name for spec in decoding.caches)}
    unknown = [name for name in decoding.inputs if name not in known]
    if unknown:
        raise InputError(f"ONNX Runtime GenAI does not feed '{unknown[0]}'")
    return decoding


def without_keep(model: ir.Model) -> ir.Model:
    """The model with `num_logits_to_keep` as the constant 0, and logits [batch, sequence, vocabulary]."""
    keep = next((value for value in model.graph.inputs if value.name == KEEP), None)
    if keep is None:
        return model
    model.graph.inputs.remove(keep)
    keep.const_value = ir.Tensor(np.asarray(0, (keep.dtype or ir.DataType.INT64).numpy()), name=KEEP)
    model.graph.register_initializer(keep)
    tokens = next(value for value in model.graph.inputs if value.name == INPUT_IDS)
    for value in model.graph.outputs:
        if value.name == "logits" and value.shape is not None and tokens.shape is not None:
            value.shape = ir.Shape([*tokens.shape, value.shape[-1]])
    return model


def appends_in_place(model: ir.Model) -> bool:
    """Whether all caches are those of GroupQueryAttention, so that one buffer can be past and present."""
    writers = [value.producer() for value in model.graph.outputs if str(value.name).startswith("present.")]
    return all(node is not None and is_op(node, "GroupQueryAttention", domain=MICROSOFT) for node in writers)


def greedy_tokens(bundle: Bundle, decoding: Decoding, config: Mapping[str, Any]) -> list[dict[str, list[int]]]:
    """Prompts out of the golden samples, and what the bundle itself continues them with."""
    session, prompts = bundle.session(), list[list[int]]()
    for sample in bundle.golden:
        if decoding.past_length(sample.inputs):
            continue
        ids, mask = sample.inputs[INPUT_IDS], sample.inputs.get(MASK)
        for row in range(len(ids)):
            prompt = [int(i) for i in (ids[row] if mask is None else ids[row][mask[row] == 1])]
            if prompt and prompt not in prompts:
                prompts.append(prompt)
    rows = []
    for prompt in prompts[:_PROMPTS]:
        room = min(_GREEDY, config["context_length"] - len(prompt))
        rows.append({"prompt": prompt, "tokens": _continued(session, decoding, prompt, room, config["eos_token_id"])})
    return rows


def _continued(session: Session, decoding: Decoding, prompt: list[int], room: int, eos: int | list[int]) -> list[int]:
    tokens, cache, given = list[int](), dict[str, Array](), np.asarray([prompt], np.int64)
    ends = set(eos) if isinstance(eos, list) else {eos}
    while len(tokens) < room and not ends & set(tokens[-1:]):
        outputs = session.run(decoding.feeds(given, cache=cache or None, keep=1))
        tokens.append(int(outputs["logits"][0, -1].argmax()))
        given, cache = np.asarray([tokens[-1:]], np.int64), decoding.next_cache(outputs)
    return tokens


def genai_python() -> Path:
    """The Python to run GenAI with.

    Raises:
        MissingTool: onnxruntime-genai is not installed here, and the variable names no other Python.
    """
    named = os.environ.get(PYTHON)
    if named:
        return Path(named)
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise MissingTool(
            "onnxruntime-genai is not installed",
            next_step=f"pip install onnxruntime-genai, or let {PYTHON} name a Python that has it.",
        )
    return Path(sys.executable)


TARGETS: dict[str, Target] = {"genai": GenAI()}

# SPDX-License-Identifier: Apache-2.0
"""A transformers folder or hub id: load it for its task, trace it, keep the original as the reference."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..contracts.decoding import Decoding
from ..contracts.digest import sha256_of
from ..contracts.errors import InputError
from ..contracts.tasks import TASKS, Task, task_named
from .backends import chosen, export_with
from .decoder_text import DecoderText
from .encoder import pooling_plan
from .exported import ExportedModel, SourceInfo, Tokenize
from .families.choice import traces_of
from .families.encoder_decoder import decoding_samples
from .families.forward import sample_inputs
from .families.traced import Traced, plain_kernels
from .graph_file import signature_of
from .reference import TorchReference
from .settings import ExportSettings
from .streamed_checkpoint import INDEX, Checkpoint
from .tokenizer import (
    INPUT_ORDER,
    TextInputs,
    class_names,
    load_tokenizer,
    longest_sequence,
    processor_files,
    quiet_transformers,
    read_config,
)


def export_folder(folder: Path, name: str, task_name: str | None, settings: ExportSettings) -> ExportedModel:
    """Export the model in `folder` for its task.

    Args:
        folder: Holds config.json, the weights (safetensors, or a `.bin` that loads with weights_only) and, as a rule,
            the tokenizer.
        name: What the manifest calls it.
        task_name: One of `contracts.tasks`; None takes it from the checkpoint's own architecture.
        settings: See `ExportSettings`.

    Raises:
        InputError: The folder, its weights or the task do not fit together.
        ExportError: The model cannot be exported.
    """
    loaded = _Loaded(folder, name, task_name, settings)
    started = time.perf_counter()
    with plain_kernels(loaded.model):
        traces = loaded.traces()
        graphs = [_graph(trace, settings) for trace in traces]
    used = {key for graph in graphs for key in graph.graph.initializers}
    _refuse_untrained(loaded.missing, used, loaded.task, name)
    seconds = round(time.perf_counter() - started, 3)
    parts = [loaded.exported(trace, graph, seconds) for trace, graph in zip(traces, graphs, strict=True)]
    parts[0].companions = tuple(parts[1:])
    for encoder, trace in zip(parts[1:], traces[1:], strict=True):
        parts[0].known_inputs += decoding_samples(traces[0], trace, encoder.known_inputs[-1])
    return parts[0]


def load_reference(folder: Path, task_name: str | None, settings: ExportSettings) -> TorchReference:
    """Load the PyTorch original alone, as `export_folder` does: for measuring its load time and memory."""
    trace = _Loaded(folder, folder.name, task_name, settings).traces()[0]
    return TorchReference(trace.reference, trace.inputs, trace.outputs, name="pytorch-fp32")


def _graph(trace: Traced, settings: ExportSettings) -> Any:
    graph = export_with(
        settings.backend,
        trace.module,
        trace.examples,
        output_names=trace.outputs,
        dynamic_axes=trace.axes,
        opset=settings.opset,
        strip_prefix=trace.prefix,
    )
    trace.finish(graph)
    return graph


class _Loaded:
    """A folder that has been read: its model, and what lies beside it."""

    def __init__(self, folder: Path, name: str, task_name: str | None, settings: ExportSettings) -> None:
        self.folder, self.name, self.settings = folder, name, settings
        self.config = read_config(folder)
        self.task = task_named(task_name) if task_name else infer_task(self.config, name)
        self.pooling = pooling_plan(folder, self.task, settings.pooling)
        self.preprocessor = _preprocessor(folder)
        self.model, self.missing = _load(folder, self.task, name, settings)
        self.tokenizer = load_tokenizer(folder, trust_remote_code=settings.trust_remote_code)
        self.max_length = longest_sequence(self.config, self.tokenizer, folder if self.pooling.kind != "none" else None)

    def traces(self) -> list[Traced]:
        return traces_of(
            self.model,
            self.task,
            pooling=self.pooling,
            tokenizer=self.tokenizer,
            preprocessor=self.preprocessor,
            max_length=self.max_length,
            cache=self.settings.cache,
        )

    def exported(self, trace: Traced, graph: Any, seconds: float) -> ExportedModel:
        """The graph with everything that the rest of the way needs to know of it."""
        signature = signature_of(graph)
        names = [spec.name for spec in signature.inputs]
        tokenize: Tokenize | None = None
        if self.tokenizer is not None and set(names) <= set(INPUT_ORDER):
            tokenize = TextInputs(self.tokenizer, dict.fromkeys(names, "int64"), self.max_length)
        elif self.tokenizer is not None and trace.name == "model" and Decoding.of(signature) is not None:
            tokenize = DecoderText(self.tokenizer, signature, self.max_length)
        examples = {name: tensor.numpy() for name, tensor in trace.examples.items() if name in names}
        return ExportedModel(
            model=graph,
            name=trace.name,
            signature=signature,
            task=self.task.name,
            source=SourceInfo(
                "transformers",
                self.name,
                hash_weights(self.folder),
                type(self.model).__name__,
                sum(p.numel() for p in self.model.parameters()),
            ),
            reference=TorchReference(trace.reference, trace.inputs, trace.outputs, name="pytorch-fp32"),
            processor_files=processor_files(self.folder),
            tokenize=tokenize,
            max_length=self.max_length,
            id2label=class_names(self.config) if self.task.name.endswith("classification") else None,
            fixed_inputs=examples if tokenize is None else None,
            known_inputs=self._samples(trace, tokenize),
            export_details={
                "backend": chosen(self.settings.backend),
                "opset": self.settings.opset,
                "reference_attention": getattr(self.model.config, "_attn_implementation", "eager"),
                **trace.details,
                "seconds": seconds,
            },
        )

    def _samples(self, trace: Traced, tokenize: Tokenize | None) -> tuple[dict[str, np.ndarray], ...]:
        """Inputs to compare on, for models that read no plain text."""
        if tokenize is not None or {*trace.examples} != {*trace.inputs} or any("past" in n for n in trace.inputs):
            return ()
        return sample_inputs(self.model, self.preprocessor, list(trace.examples), trace.examples)


def _preprocessor(folder: Path) -> Mapping[str, Any]:
    """preprocessor_config.json, or processor_config.json's part about images; empty without them."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        try:
            found = json.loads((folder / name).read_text("utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise InputError(f"{folder.name}/{name} cannot be read: {error}", next_step="Copy it again.") from error
        if isinstance(found, dict):
            inner = found.get("image_processor") or found.get("feature_extractor")
            return dict(inner) if isinstance(inner, dict) else found
    return {}


def infer_task(config: dict[str, Any], name: str) -> Task:
    """The task that the checkpoint's class was made for, by optimum's table of transformers' auto classes."""
    import transformers
    from optimum.exporters.tasks import TasksManager

    architectures = config.get("architectures") or []
    for auto_class, place in dict(config.get("auto_map") or {}).items():  # a class of the folder's own
        if architectures and str(place).rpartition(".")[2] == architectures[0]:
            fitting = [task for task in TASKS.values() if auto_class in task.auto_classes]
            if fitting:
                return fitting[0]
    model_class = getattr(transformers, str(architectures[0]), None) if architectures else None
    if not isinstance(model_class, type):
        raise InputError(f"cannot tell the task of {name} from its config.json", next_step="Add --task.")
    try:
        inferred = str(TasksManager.infer_task_from_model(model_class))
    except (ValueError, KeyError):
        inferred = ""
    if inferred not in TASKS:
        known = ", ".join(sorted(TASKS))
        raise InputError(
            f"{name} is a {architectures[0]}, whose task ({inferred or 'unknown'}) cannot be exported yet",
            next_step=f"Add --task with one of: {known}.",
        )
    return TASKS[inferred]


def hash_weights(folder: Path) -> str | None:
    """SHA-256 over the weight files in name order; None when there are none."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    return sha256_of(files) if files else None


def _load(folder: Path, task: Task, name: str, settings: ExportSettings) -> tuple[Any, set[str]]:
    """Load in fp32, from this folder alone; return the model and the keys it lacks.

    Code that lies in the folder runs where the settings allow it, and nowhere else.
    """
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise InputError(
            f"{name} holds no weights (model.safetensors)",
            next_step="Save it with save_pretrained; pickled weights on the hub are not downloaded.",
        )
    if (folder / INDEX).is_file():
        Checkpoint.open(folder)  # names the shard that is missing or cut short
    auto_class = _auto_class(folder, task, settings)
    try:
        with quiet_transformers():
            model, info = auto_class.from_pretrained(
                folder,
                dtype=torch.float32,
                trust_remote_code=settings.trust_remote_code,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # refused below, where the tensor can be named
                output_loading_info=True,
            )
    except Exception as error:  # transformers raises OSError, ValueError, pickle and safetensors errors
        raise _load_error(error, task, name) from error
    mismatched = sorted(info.get("mismatched_keys") or (), key=str)
    if mismatched:
        key, stored, asked = mismatched[0]
        raise InputError(
            f"{name}: {key} is {list(stored)} in the weights, but {list(asked)} by config.json",
            next_step="Use the config.json that was saved with these weights.",
        )
    model.eval()
    return model, set(info.get("missing_keys") or ())


def _auto_class(folder: Path, task: Task, settings: ExportSettings) -> Any:
    """The first of the task's classes that knows this kind of model."""
    import transformers

    classes = [getattr(transformers, name) for name in task.auto_classes]
    if len(classes) == 1:
        return classes[0]
    try:
        with quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(
                folder, trust_remote_code=settings.trust_remote_code, local_files_only=True
            )
    except Exception:  # noqa: BLE001 - loading the model says it better
        return classes[0]
    return next((c for c in classes if type(config) in c._model_mapping), classes[0])


def _load_error(error: Exception, task: Task, name: str) -> InputError:
    text = str(error)
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)[:240]
    if "trust_remote_code" in text:
        return InputError(
            f"{name} needs the Python code in its folder to load",
            next_step="Read that code, then add --trust-remote-code; or pass a package.module:factory of your own.",
        )
    if "weights_only" in text or "unpickl" in text.lower() or "Unsupported operand" in text:
        return InputError(
            f"{name}: its weights file would have to be unpickled, which can run any code",
            next_step="Save the weights as safetensors (save_pretrained does) and try again.",
        )
    if "Unrecognized configuration class" in text:
        return InputError(f"{name} cannot be used for {task.name}", next_step="Choose another --task.")
    return InputError(f"cannot load {name}: {first}", next_step="Check that the folder is complete.")


def _refuse_untrained(missing: set[str], initializers: set[str], task: Task, name: str) -> None:
    """A head that the checkpoint lacks is filled with random numbers; exporting that helps nobody."""
    used = sorted(key for key in missing if key in initializers)
    if used:
        raise InputError(
            f"{name} has no weights for {task.name}: {used[0]} and {len(used) - 1} more would be random",
            next_step="Choose the --task that the checkpoint was trained for.",
        )

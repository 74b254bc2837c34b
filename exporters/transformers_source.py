# SPDX-License-Identifier: Apache-2.0
"""A transformers folder or hub id: load it for its task, trace it, keep the original as the reference."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..contracts.digest import sha256_of
from ..contracts.errors import ExportError, InputError
from ..contracts.tasks import TASKS, Task, task_named
from .dynamo import export_module, place
from .encoder import Encoder, pooling_plan
from .exported import ExportedModel, SourceInfo
from .graph_file import signature_of
from .reference import TorchReference
from .settings import ExportSettings
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
    """Export the encoder in `folder` for its task.

    Args:
        folder: Holds config.json, the weights (safetensors, or a `.bin` that loads with weights_only) and, as a rule,
            the tokenizer.
        name: What the manifest calls it.
        task_name: One of `contracts.tasks`; None takes it from the checkpoint's own architecture.
        settings: See `ExportSettings`.

    Raises:
        InputError: The folder, its weights or the task do not fit together.
        ExportError: torch.export refuses the model.
    """
    config = read_config(folder)
    task = task_named(task_name) if task_name else infer_task(config, name)
    pooling = pooling_plan(folder, task, settings.pooling)
    model, missing = _load(folder, task, name)
    tokenizer = load_tokenizer(folder)
    names = _input_names(model, tokenizer)
    output_names = pooling.output_names(task)
    max_length = longest_sequence(config, tokenizer, folder if pooling.kind != "none" else None)

    started = time.perf_counter()
    encoder = Encoder(model, pooling, task.outputs)
    reference = TorchReference(encoder, names, output_names, name="pytorch-fp32")
    _check_it_runs(encoder, _example(names, config), name)
    with _eager_attention(model):
        traced = _with_broadcast_mask(encoder, names, config, max_length)
        graph = export_module(
            traced,
            _example(names, config),
            output_names=output_names,
            dynamic_axes={n: {0: "batch", 1: "sequence"} for n in names},
            opset=settings.opset,
            strip_prefix="model.",
        )
    _refuse_untrained(missing, graph.graph.initializers, task, name)
    return ExportedModel(
        model=graph,
        signature=signature_of(graph),
        task=task.name,
        source=SourceInfo(
            "transformers", name, hash_weights(folder), type(model).__name__, sum(p.numel() for p in model.parameters())
        ),
        reference=reference,
        processor_files=processor_files(folder),
        tokenize=None if tokenizer is None else TextInputs(tokenizer, dict.fromkeys(names, "int64"), max_length),
        max_length=max_length,
        id2label=class_names(config) if task.name.endswith("classification") else None,
        export_details={
            "backend": "dynamo",
            "opset": settings.opset,
            "pooling": pooling.kind,
            "reference_attention": getattr(model.config, "_attn_implementation", "eager"),
            "mask": "broadcast" if traced.broadcast_mask else "as the model builds it",
            "seconds": round(time.perf_counter() - started, 3),
        },
    )


def load_reference(folder: Path, task_name: str | None, settings: ExportSettings) -> TorchReference:
    """Load the PyTorch original alone, as `export_folder` does: for measuring its load time and memory."""
    config = read_config(folder)
    task = task_named(task_name) if task_name else infer_task(config, folder.name)
    model, _ = _load(folder, task, folder.name)
    pooling = pooling_plan(folder, task, settings.pooling)
    names = _input_names(model, load_tokenizer(folder))
    return TorchReference(Encoder(model, pooling, task.outputs), names, pooling.output_names(task), name="pytorch-fp32")


def infer_task(config: dict[str, Any], name: str) -> Task:
    """The task that the checkpoint's class was made for, by optimum's table of transformers' auto classes."""
    import transformers
    from optimum.exporters.tasks import TasksManager

    architectures = config.get("architectures") or []
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


def _load(folder: Path, task: Task, name: str) -> tuple[torch.nn.Module, set[str]]:
    """Load in fp32, from this folder alone, running none of its code; return the model and the keys it lacks."""
    import transformers

    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise InputError(
            f"{name} holds no weights (model.safetensors)",
            next_step="Save it with save_pretrained; pickled weights on the hub are not downloaded.",
        )
    auto_class = getattr(transformers, task.auto_class)
    try:
        with quiet_transformers():
            model, info = auto_class.from_pretrained(
                folder,
                dtype=torch.float32,
                trust_remote_code=False,
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


def _load_error(error: Exception, task: Task, name: str) -> InputError:
    text = str(error)
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)[:240]
    if "trust_remote_code" in text:
        return InputError(
            f"{name} needs its own Python code to load, which onnxpress does not run",
            next_step="Write a factory that builds the model and pass package.module:factory.",
        )
    if "weights_only" in text or "unpickl" in text.lower() or "Unsupported operand" in text:
        return InputError(
            f"{name}: its weights file would have to be unpickled, which can run any code",
            next_step="Save the weights as safetensors (save_pretrained does) and try again.",
        )
    if "Unrecognized configuration class" in text:
        return InputError(f"{name} cannot be used for {task.name}", next_step="Choose another --task.")
    return InputError(f"cannot load {name}: {first}", next_step="Check that the folder is complete.")


def _refuse_untrained(missing: set[str], initializers: Any, task: Task, name: str) -> None:
    """A head that the checkpoint lacks is filled with random numbers; exporting that helps nobody."""
    used = sorted(key for key in missing if key in initializers)
    if used:
        raise InputError(
            f"{name} has no weights for {task.name}: {used[0]} and {len(used) - 1} more would be random",
            next_step="Choose the --task that the checkpoint was trained for.",
        )


def _input_names(model: torch.nn.Module, tokenizer: Any) -> list[str]:
    accepted = set(inspect.signature(model.forward).parameters)
    if tokenizer is not None:
        accepted &= {"input_ids", "attention_mask", *tokenizer.model_input_names}
    elif getattr(getattr(model, "config", None), "type_vocab_size", 0) < 2:
        accepted.discard("token_type_ids")
    names = [n for n in INPUT_ORDER if n in accepted]
    if "input_ids" not in names:
        raise ExportError(
            f"{type(model).__name__} does not read input_ids; only text encoders can be exported by task",
            next_step="Write a factory and pass package.module:factory.",
        )
    return names


def _example(names: Sequence[str], config: dict[str, Any], length: int = 7) -> dict[str, torch.Tensor]:
    """Two sequences, one of them padded on the right; the numbers only have to be valid token ids."""
    generator = torch.Generator().manual_seed(0)
    high = max(8, min(int(config.get("vocab_size") or 1000), 1000))
    shape = (2, length)
    ids = torch.randint(5, high, shape, generator=generator) if high > 8 else torch.ones(shape, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    if isinstance(config.get("pad_token_id"), int):
        ids[1, -2:] = config["pad_token_id"]
    values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return {n: values[n] for n in names}


def _check_it_runs(encoder: Encoder, examples: dict[str, torch.Tensor], name: str) -> None:
    """Tell a checkpoint whose own PyTorch code fails from one that cannot be exported."""
    try:
        with torch.no_grad():
            encoder(*examples.values())
    except Exception as error:  # whatever the model's code raises
        first = (str(error).splitlines() or [""])[0][:240]
        raise InputError(
            f"{name} fails in PyTorch already: {type(error).__name__}: {first}{place(error)}",
            next_step="Check that config.json, the weights and --task belong together.",
        ) from error


class _eager_attention:
    """Within the block, attention is plain MatMul, Softmax, MatMul: the form that every fuser and runtime knows.

    SDPA's ONNX translation adds a NaN check on every score and reshapes the keys twice (12 IsNaN, 36 Slice on
    BERT-base), for rows that attend to nothing.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model: Any = model
        self.before = getattr(getattr(model, "config", None), "_attn_implementation", None)

    def __enter__(self) -> None:
        self._set("eager")

    def __exit__(self, *_: object) -> None:
        self._set(self.before)

    def _set(self, implementation: str | None) -> None:
        if implementation and hasattr(self.model, "set_attn_implementation"):
            self.model.set_attn_implementation(implementation)


def _with_broadcast_mask(
    encoder: Encoder, names: Sequence[str], config: dict[str, Any], max_length: int | None
) -> Encoder:
    """Hand the model a ready `[batch, 1, 1, sequence]` mask if it proves to give the same outputs.

    transformers builds `[batch, 1, sequence, sequence]` with index arithmetic that ONNX keeps as a dozen nodes; most
    encoders take a ready mask as it is. Whether this one does is measured here, not looked up, except for attention
    within a window: it shows only in texts longer than the window, so a config that speaks of one settles it.
    """
    if "attention_mask" not in names or _has_window(encoder.model):
        return encoder
    candidate = Encoder(encoder.model, encoder.pooling, encoder.outputs, broadcast_mask=True)
    for length in (7, min(max_length or 200, 200)):
        examples = _example(names, config, length)
        keep = examples["attention_mask"].bool()
        try:
            with torch.no_grad():
                wanted, got = encoder(*examples.values()), candidate(*examples.values())
        except Exception:  # noqa: BLE001 - a model that cannot take the mask may fail in any way; the plain one remains
            return encoder
        for a, b in zip(wanted, got, strict=True):
            if a.shape[:2] == keep.shape:
                a, b = a[keep], b[keep]
            if not torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max())):
                return encoder
    return candidate


def _has_window(model: Any) -> bool:
    """Whether some layer attends to a part of the sequence only, as far as the configuration tells."""
    config: dict[str, Any] = model.config.to_dict()
    words = ("window", "local_attention", "attention_chunk")
    return any(layer != "full_attention" for layer in config.get("layer_types") or ()) or any(
        value for key, value in config.items() if any(word in key for word in words)
    )

# SPDX-License-Identifier: Apache-2.0
"""What every manifest says of a pressed model, however it was pressed and whatever was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..contracts.signature import Signature
from ..exporters.exported import ExportedModel
from ..exporters.graph_file import operator_counts
from ..runtime import machine as machine_facts
from .recipe import Recipe
from .versions import versions


def pressed_facts(exported: ExportedModel, recipe: Recipe, file: Path, signature: Signature) -> dict[str, Any]:
    """Schema, versions, recipe, machine, and the outside of the graph.

    Args:
        exported: The model, its graph after the passes.
        recipe: What was done.
        file: The graph, in the bundle's folder `onnx`.
        signature: Of the graph in `file`.
    """
    return {
        "schema_version": 1,
        "onnxpress": versions()["onnxpress"],
        "created_by": f"onnxpress {versions()['onnxpress']}",
        "task": exported.task,
        "export": exported.export_details,
        "max_length": exported.max_length,
        "recipe": {
            "name": recipe.name,
            "sha256": recipe.sha256(),
            "passes": [dict(entry) for entry in recipe.to_json()["passes"]],
        },
        "versions": versions(),
        "machine": machine_facts.machine(),
        "variant": recipe.name,
        "variants": {recipe.name: {"path": f"onnx/{file.name}"}},
        "signature": signature.to_json(),
        "opsets": dict(exported.model.opset_imports),
        "operators": operator_counts(exported.model),
    }

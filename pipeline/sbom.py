# SPDX-License-Identifier: Apache-2.0
"""sbom.cdx.json: a CycloneDX 1.6 bill of materials of a bundle (https://cyclonedx.org/capabilities/mlbom/).

The model is the component that it describes: its files with their hashes, the source as its ancestor, what it was
calibrated and evaluated on as data (names and hashes, never content), the tools that made it, and in its model card
task, inputs, outputs and measured quality. No time, no random number, and nothing that was timed is in it: the same
model, data, recipe and versions give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from typing import Any

from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType, Pedigree
from cyclonedx.model.license import DisjunctiveLicense
from cyclonedx.model.tool import ToolRepository
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.spdx import fixup_id

from ..runtime.sbom import SBOM_PATH

MODEL = "model"
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "onnxpress sbom")
_ERRORS = ("cosine", "sqnr_db", "max_abs_error", "top1_agreement")


def sbom_of(manifest: Mapping[str, Any]) -> str:
    """The JSON of a bundle's bill of materials.

    Args:
        manifest: With `files` that hold at least the models and what lies beside them.
    """
    model = _model(manifest)
    datasets = _datasets(manifest)
    bom = Bom(metadata=BomMetaData(component=model, tools=ToolRepository(components=_tools(manifest))))
    for component in datasets:
        bom.components.add(component)
    bom.register_dependency(model, datasets)
    data: dict[str, Any] = json.loads(JsonV1Dot6(bom).output_as_string())
    del data["metadata"]["timestamp"]
    # The library has no model card yet (component.py: "model_card ... not yet supported")
    data["metadata"]["component"]["modelCard"] = _card(manifest, datasets)
    del data["serialNumber"]
    digest = hashlib.sha256(_dump(data).encode()).hexdigest()
    return _dump({"serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, digest)}", **data})


def _dump(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _model(manifest: Mapping[str, Any]) -> Component:
    source = manifest.get("source") or {}
    licence = source.get("license")
    files = manifest["files"]
    return Component(
        name=str(manifest["name"]),
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=MODEL,
        hashes=_hashes(files[next(iter(manifest["variants"].values()))["path"]]["sha256"]),
        licenses=[_licence(licence)] if licence else [],
        components=[_file(path, files[path]["sha256"]) for path in sorted(files)],
        pedigree=_pedigree(source),
        properties=[
            Property(name="onnxpress:recipe", value=str(manifest["recipe"]["name"])),
            Property(name="onnxpress:recipe:sha256", value=str(manifest["recipe"]["sha256"])),
        ],
    )


def _licence(name: str) -> DisjunctiveLicense:
    known = fixup_id(name)
    return DisjunctiveLicense(id=known) if known else DisjunctiveLicense(name=name)


def _file(path: str, sha256: str) -> Component:
    graph = path.startswith("onnx/")
    return Component(
        name=path,
        type=ComponentType.MACHINE_LEARNING_MODEL if graph else ComponentType.FILE,
        bom_ref=f"file:{path}",
        hashes=_hashes(sha256),
        properties=[Property(name=SBOM_PATH, value=path)],
    )


def _pedigree(source: Mapping[str, Any]) -> Pedigree | None:
    name = source.get("name")
    if not name:
        return None
    details = {key: source.get(key) for key in ("kind", "architecture", "parameters")}
    ancestor = Component(
        name=str(name),
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="source",
        hashes=_hashes(source.get("sha256")),
        properties=[Property(name=f"onnxpress:source:{k}", value=str(v)) for k, v in details.items() if v is not None],
    )
    return Pedigree(ancestors=[ancestor], notes=f"Exported and pressed by onnxpress from {name}.")


def _datasets(manifest: Mapping[str, Any]) -> list[Component]:
    found = []
    for use, data in (manifest.get("data") or {}).items():
        if data:
            properties = [Property(name="onnxpress:use", value=use)]
            if data.get("examples") is not None:
                properties.append(Property(name="onnxpress:examples", value=str(data["examples"])))
            found.append(
                Component(
                    name=str(data["name"]),
                    type=ComponentType.DATA,
                    bom_ref=f"data:{use}",
                    hashes=_hashes(data.get("sha256")),
                    properties=properties,
                )
            )
    return found


def _tools(manifest: Mapping[str, Any]) -> list[Component]:
    """onnxpress, and the libraries that took part."""
    return [
        Component(
            name=name,
            type=ComponentType.APPLICATION if name == "onnxpress" else ComponentType.LIBRARY,
            bom_ref=f"tool:{name}",
            version=str(version),
        )
        for name, version in manifest["versions"].items()
    ]


def _hashes(sha256: str | None) -> list[HashType]:
    return [HashType(alg=HashAlgorithm.SHA_256, content=sha256)] if sha256 else []


def _card(manifest: Mapping[str, Any], datasets: list[Component]) -> dict[str, Any]:
    signature = manifest.get("signature") or {}
    architecture = (manifest.get("source") or {}).get("architecture")
    parameters: dict[str, Any] = {
        "task": str(manifest.get("task", "generic")),
        "datasets": [{"ref": str(component.bom_ref.value)} for component in datasets],
        "inputs": [{"format": _format(spec)} for spec in signature.get("inputs") or ()],
        "outputs": [{"format": _format(spec)} for spec in signature.get("outputs") or ()],
    }
    if architecture:
        parameters["modelArchitecture"] = str(architecture)
    return {"modelParameters": parameters, "quantitativeAnalysis": {"performanceMetrics": _metrics(manifest)}}


def _format(spec: Mapping[str, Any]) -> str:
    dims = ", ".join("?" if dim is None else str(dim) for dim in spec.get("shape") or ())
    return f"{spec['name']}: {spec['dtype']} [{dims}]"


def _metrics(manifest: Mapping[str, Any]) -> list[dict[str, str]]:
    """Quality of the original and of the pressed model, how far their outputs are apart, and the size."""
    evaluation = ((manifest.get("data") or {}).get("evaluation") or {}).get("name")
    rows: list[dict[str, str]] = []
    for name, row in (manifest.get("metrics") or {}).items():
        for who in ("reference", "candidate"):
            if row.get(who) is not None:
                rows.append({"type": f"{name} ({who})", "value": str(row[who])})
    rows = [{**row, "slice": str(evaluation)} for row in rows] if evaluation else rows
    for output, parity in (manifest.get("parity") or {}).items():
        rows += [
            {"type": f"{error} to the original", "value": str(parity[error]), "slice": f"output {output}"}
            for error in _ERRORS
            if parity.get(error) is not None
        ]
    size = manifest.get("size") or {}
    return rows + [
        {"type": key, "value": str(size[key])} for key in ("reference_bytes", "candidate_bytes") if key in size
    ]

# SPDX-License-Identifier: Apache-2.0
"""The bundle for transformers.js: the Hub's layout, and its pipelines held to what Python answers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, ClassVar

from ....contracts.tasks import GENERATION
from ....runtime.opened import Bundle
from .. import node
from ..base import Check, Target, copy_files, render, write_json
from ..golden import golden_texts, write_golden
from ..node import checked_in_node, readme_values
from ..node.layout import check_types, describe
from .expected import generation, image
from .layout import pipeline_for, require_what_it_reads, write_model

SOURCES = ("check.mjs", "example.mjs", "load.mjs", "package.json")
SHARED = ("golden.mjs", "tensors.mjs")
PACKAGES = ("@huggingface/transformers", "onnxruntime-node")


class TransformersJs(Target):
    """See the module."""

    name: ClassVar[str] = "transformers.js"
    summary: ClassVar[str] = "the Hub's layout with its pipelines in JavaScript"

    def write(self, bundle: Bundle, folder: Path) -> None:
        require_what_it_reads(bundle)
        check_types(bundle)
        files, dtype = write_model(bundle, folder / "model")
        about = describe(bundle) | {"model": f"model/onnx/{files[0]}", "pipeline": pipeline_for(bundle), "dtype": dtype}
        external = (folder / "model" / "onnx" / f"{files[0]}_data").is_file()
        about["externalData"] = [f"{about['model']}_data"] if external else []
        write_json(about, folder / "model.json", indent=2)
        self._write_golden(bundle, folder / "golden")
        copy_files(Path(__file__).parent, folder, SOURCES)
        shared = Path(node.__file__).parent
        copy_files(shared, folder, SHARED)
        shutil.copyfile(shared / "npmrc", folder / ".npmrc")
        values = readme_values(about) | {"pipeline": about["pipeline"], "dtype": dtype, "files": files}
        values |= {"external": external, "output": about["outputs"][0]["name"], "example": _example(about)}
        (folder / "README.md").write_text(render(__name__, "README.md.j2", **values), "utf-8")

    def check(self, bundle: Bundle, folder: Path, scratch: Path) -> Check:
        return checked_in_node(bundle, folder, scratch, PACKAGES)

    def _write_golden(self, bundle: Bundle, folder: Path) -> None:
        write_golden(bundle, folder)
        for name, rows in (
            ("texts.json", golden_texts(bundle)),
            ("generation.json", generation(bundle)),
            ("images.json", image(bundle, folder)),
        ):
            if rows:
                write_json(rows, folder / name)


def _example(about: dict[str, Any]) -> str:
    """How the model is used, for the README."""
    name, output = about["pipeline"], about["outputs"][0]["name"]
    if name is None:
        return (
            'import { AutoModel, AutoTokenizer } from "@huggingface/transformers";\n\n'
            'const tokenizer = await AutoTokenizer.from_pretrained("model");\n'
            'const model = await AutoModel.from_pretrained("model");\n'
            f'const {{ {output} }} = await model(await tokenizer(["first text", "second"], {{ padding: true }}));'
        )
    given = '"an image.png"' if "image" in name or name == "object-detection" else '"Once upon a time"'
    options = ", { max_new_tokens: 64 }" if name == GENERATION else ""
    return (
        'import { pipeline } from "@huggingface/transformers";\n\n'
        f'const pipe = await pipeline("{name}", "model");\n'
        f"console.log(await pipe({given}{options}));"
    )


TARGETS: dict[str, Target] = {"transformers.js": TransformersJs()}

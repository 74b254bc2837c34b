# SPDX-License-Identifier: Apache-2.0
"""Every consumer with every family of models, run on the golden samples, and how far it is from Python.

    .venv/bin/python benchmarks/consumers.py [CONSUMER ...] [--families encoder vision language] [--work DIR] [--write]

Three bundles are pressed (or found in DIR from the last time): a text classifier in int8, a ResNet-18 with random
weights in fp32, and a causal language model with its cache in fp32. Each is handed to each consumer with `--check`: the
consumer is compiled where it has to be, runs all golden samples, and compares every output. What cannot run here says
why.
`scripts/consumers` installs what the checks need; ONNXPRESS_RAY_PYTHON and ONNXPRESS_GENAI_PYTHON may name
environments with Ray and ONNX Runtime GenAI.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown import table, write_section
from peers.assets import find

ROOT = Path(__file__).parents[1]
FAMILIES = ("encoder", "vision", "language")
TITLES = {
    "encoder": "encoder, int8 (MiniLM, SST-2)",
    "vision": "vision, fp32 (ResNet-18)",
    "language": "causal LM with cache, fp32 (stories260K)",
}
QUICK = ("--set", "benchmark.rounds=5", "--set", "benchmark.max_seconds=5")


@dataclass(frozen=True)
class Cell:
    """What one consumer made of one bundle.

    Attributes:
        status: `passed`, `failed`, `not run`, or `refused`: the bundle is nothing for this consumer.
        difference: Largest difference from what ONNX Runtime in Python answers, over all outputs and samples.
        note: Why it was not run, how far it went, or what failed.
        versions: Of what ran.
    """

    status: str
    difference: float | None
    note: str
    versions: dict[str, str]

    def text(self) -> str:
        """For the table."""
        if self.status == "passed":
            return f"{self.difference:.1e}" if self.difference else "0"
        return f"*{self.status}*"


def random_resnet(folder: Path) -> Path:
    """A transformers folder: ResNet-18 with weights drawn from a fixed seed, and its image processor's numbers."""
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(
        hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", embedding_size=64, num_labels=10
    )
    ResNetForImageClassification(config).eval().save_pretrained(folder)
    processor = {
        "image_processor_type": "ConvNextImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": 224},
        "crop_pct": 0.875,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", "utf-8")
    return folder


def stories_with_tokenizer(folder: Path) -> Path:
    """stories260K as a transformers folder, with the SentencePiece tokenizer that lies beside it."""
    assets = find("stories260K")
    shutil.copytree(assets / "derived" / "hf", folder, dirs_exist_ok=True)
    shutil.copyfile(assets / "tok512.model", folder / "tokenizer.model")
    names = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=2) + "\n", "utf-8")
    return folder


def onnxpress(*words: object) -> subprocess.CompletedProcess[str]:
    """The command line, in a process of its own: nothing of one model stays in memory for the next."""
    command = [sys.executable, "-m", "onnxpress.pipeline.cli", *map(str, words)]
    packages = ROOT / ".consumers" / "node_modules"  # scripts/consumers
    environment = {"ONNXPRESS_NODE_MODULES": str(packages), **os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT / "benchmarks", env=environment, capture_output=True, text=True)


def bundle_of(family: str, work: Path) -> Path:
    """Press the bundle of a family, unless it is there from the last time."""
    folder = work / family
    if not (folder / "manifest.json").is_file():
        source, recipe = {
            "encoder": lambda: (find("minilm-sst2"), "int8-dynamic"),
            "vision": lambda: (random_resnet(work / "resnet"), "fp32"),
            "language": lambda: (stories_with_tokenizer(work / "stories260K"), "fp32"),
        }[family]()
        print(f"... pressing {family}", flush=True)
        done = onnxpress("press", source, "--recipe", recipe, "-o", folder, *QUICK)
        if done.returncode:
            raise SystemExit(done.stderr)
    return folder


def handed(bundle: Path, consumer: str, work: Path) -> Cell:
    """Hand a bundle to a consumer and check it."""
    place = work / f"{bundle.name}-{consumer}"
    done = onnxpress("handoff", bundle, "--to", consumer, "--check", "--force", "-o", place, "--json")
    try:
        report: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        return Cell("failed", None, (done.stderr.strip().splitlines() or ["no output"])[-1], {})
    if "check" not in report:
        return Cell("refused" if done.returncode == 2 else "failed", None, str(report.get("error", "")), {})
    check = report["check"]
    differences = [float(value) for value in check["from_python"].values()]
    note = check["reason"] or ", ".join(check["done"])
    if check["status"] == "not run":
        note = f"{', '.join(check['done'])}; {check['reason']}"
    return Cell(check["status"], max(differences, default=None), note, dict(check["versions"]))


def text_of(cells: dict[str, dict[str, Cell]], families: Sequence[str]) -> str:
    """The table, and below it why something was not run, and the versions."""
    rows = [[consumer, *(row[family].text() for family in families)] for consumer, row in cells.items()]
    columns = ["consumer", *(TITLES[family] for family in families)]
    lines = [table("**Largest difference from ONNX Runtime in Python**, over all outputs", columns, rows), ""]
    for consumer, row in cells.items():
        notes = dict.fromkeys(cell.note for cell in row.values() if cell.status != "passed")
        lines += [f"* {consumer}: {note}" for note in notes]
    versions = {
        name: version for row in cells.values() for cell in row.values() for name, version in cell.versions.items()
    }
    lines += ["", "; ".join(f"{name} {version}" for name, version in sorted(versions.items())) + "."]
    return "\n".join(lines)


def main() -> None:
    from onnxpress.pipeline.handoff.handing import TARGETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("consumers", nargs="*", default=[], metavar="CONSUMER")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--work", type=Path, default=ROOT / "artifacts" / "consumers")
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    words = parser.parse_args()
    words.work.mkdir(parents=True, exist_ok=True)
    cells: dict[str, dict[str, Cell]] = {}
    bundles = {family: bundle_of(family, words.work) for family in words.families}
    for consumer in words.consumers or TARGETS:
        cells[consumer] = {}
        for family, bundle in bundles.items():
            cell = cells[consumer][family] = handed(bundle, consumer, words.work)
            print(f"{consumer:16} {family:9} {cell.text():10} {cell.note}", flush=True)
    text = text_of(cells, words.families)
    print(f"\n{text}")
    if words.write:
        write_section("consumers", text)


if __name__ == "__main__":
    main()

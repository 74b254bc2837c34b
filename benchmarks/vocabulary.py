# SPDX-License-Identifier: Apache-2.0
"""Vocabulary pruning: what MiniLM on SST-2 loses in bytes and in accuracy, by how seldom a token may be to go.

    .venv/bin/python benchmarks/vocabulary.py [--quick] [--write]

The tokens of SST-2's 6,920 training sentences stay, and the accuracy is that on the 872 sentences of dev, which the cut
tokenizer reads. Nothing is timed. Needs the model and data in ONNXPRESS_ASSETS.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

from markdown import environment, table, write_section
from peers.assets import find

from onnxpress.exporters import graph_file, sources
from onnxpress.exporters.exported import ExportedModel
from onnxpress.exporters.vocabulary import read_vocabulary
from onnxpress.exporters.vocabulary_cut import cut_exported
from onnxpress.pipeline.data import Dataset, load_dataset
from onnxpress.pipeline.evaluate import evaluate
from onnxpress.pipeline.inputs import calibration_batches
from onnxpress.pipeline.passes.base import Pass, run_pass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.fuse import Fuse
from onnxpress.pipeline.passes.prune_vocabulary import PruneVocabulary
from onnxpress.pipeline.passes.quantize_dynamic import QuantizeDynamic
from onnxpress.pipeline.recipe import CalibrationSettings
from onnxpress.pipeline.statistics import Calibration
from onnxpress.pipeline.token_identity import CutVocabulary, vocabulary_facts
from onnxpress.pipeline.versions import versions
from onnxpress.runtime.machine import machine
from onnxpress.runtime.session import Session

COLUMNS = ("tokens that stay", "tokens", "dev read as before", "tokens of dev", "tokenizer.json, KB",
           "fp32: MB", "accuracy %", "drop", "int8: MB", "accuracy %", "drop")  # fmt: skip
CUTS: dict[str, PruneVocabulary | None] = {
    "all": None,
    "seen once": PruneVocabulary(),
    "seen twice": PruneVocabulary(minimum_count=2),
    "seen 5 times": PruneVocabulary(minimum_count=5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="100 sentences of dev")
    parser.add_argument("--write", action="store_true", help="replace the table in README.md")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    data = find("data_sst2")
    train, dev = load_dataset(str(data / "train.tsv")), load_dataset(str(data / "dev.tsv"))
    comparison = Comparison(train, dev.head(100) if options.quick else dev)
    rows = [(name, *comparison.row(cut)) for name, cut in CUTS.items()]
    title = f"**MiniLM-L6, SST-2** ({len(train)} training sentences, accuracy on {len(comparison.dev)} of dev)"
    packages = ("torch", "transformers", "onnxruntime")
    text = "\n\n".join([table(title, COLUMNS, rows), environment(machine(), versions(), packages)])
    print(text)
    if options.write:
        write_section("vocabulary", text)


class Comparison:
    """The exported model, with the data that it is cut and judged by."""

    def __init__(self, train: Dataset, dev: Dataset) -> None:
        self.train, self.dev = train, dev
        self.folder = tempfile.TemporaryDirectory()
        self.exported: ExportedModel = sources.load(str(find("minilm-sst2")))
        batches = calibration_batches(self.exported, train, CalibrationSettings(examples=len(train)))
        self.calibration = Calibration(batches, processor_files=self.exported.processor_files)
        self.cleaned, _ = run_pass(Clean(), self.exported.model)
        self.original = self._session("reference", self.cleaned.clone())
        self.answers: dict[bytes, Any] = {}

    def reference(self, feeds: Any) -> Any:
        """What the original answers, computed once for each batch of dev."""
        key = feeds["input_ids"].tobytes()
        if key not in self.answers:
            self.answers[key] = self.original.run(feeds)
        return self.answers[key]

    def row(self, cut: PruneVocabulary | None) -> list[object]:
        """The cells of one cut, behind its name."""
        print(f"... {'all tokens' if cut is None else f'seen {cut.minimum_count} x'}", file=sys.stderr, flush=True)
        model, vocabulary = self.cleaned.clone(), None
        if cut is not None:
            model, report = run_pass(cut, model, self.calibration)
            assert report.renumbering is not None
            kept = report.renumbering.kept.tolist()
            pressed = cut_exported(self.exported, kept, Path(self.folder.name) / f"{len(kept)}-tokens")
            vocabulary = CutVocabulary(pressed, report.renumbering)
        cells = self._reading(vocabulary)
        for rounding in ([], [QuantizeDynamic()]):
            rounded = model.clone()
            passes: list[Pass] = [Fuse(), *rounding]
            for settings in passes:
                rounded, _ = run_pass(settings, rounded)
            candidate = self._session("candidate", rounded)
            size = graph_file.file_bytes(Path(self.folder.name) / "candidate.onnx")
            found = evaluate(self.exported, self.dev, self.reference, candidate.run, 8, vocabulary)["accuracy"]
            cells += [f"{size / 1e6:.2f}", f"{found['candidate']:.2f}", f"{found['drop']:.2f}"]
        return cells

    def _reading(self, vocabulary: CutVocabulary | None) -> list[object]:
        """How many tokens there are, how the dev sentences are read with them, and the size of the tokenizer."""
        whole = self.exported.processor_files["tokenizer.json"].stat().st_size
        if vocabulary is None:
            tokens = len(read_vocabulary(self.exported.processor_files).ids)
            return [tokens, f"{len(self.dev)} of {len(self.dev)}", "–", f"{whole / 1e3:.0f}"]
        facts: dict[str, Any] = vocabulary_facts(self.exported, vocabulary, {"dev": self.dev, "train": self.train})
        reading = facts["readings"]["dev"]
        more = 100 * (reading["tokens_after"] / reading["tokens_before"] - 1)
        size = vocabulary.pressed.processor_files["tokenizer.json"].stat().st_size
        read = f"{reading['as_before']} of {reading['texts']}"
        return [facts["tokens_after"], read, f"{more:+.1f} %", f"{size / 1e3:.0f}"]

    def _session(self, name: str, model: Any) -> Session:
        file = Path(self.folder.name) / f"{name}.onnx"
        graph_file.write(model, file)
        return Session(file)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""The Node consumer really runs: every kind of model, typed tensors, the tokenizer; and a wrong answer is found."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from onnxpress.contracts.errors import InputError
from onnxpress.contracts.signature import Signature, TensorSpec
from onnxpress.pipeline.handoff.base import FAILED, MissingTool, run_tool
from onnxpress.pipeline.handoff.golden import golden_texts
from onnxpress.pipeline.handoff.handing import target_named
from onnxpress.pipeline.handoff.node import PACKAGES, packages
from onnxpress.pipeline.handoff.node.layout import check_types
from onnxpress.runtime.opened import Bundle

from ...exporters import tiny_tokenizers
from ..samples import write_net
from .javascript import ROOT, broken, handed, need_packages

SOURCES = ROOT / "pipeline" / "handoff" / "node"
TEXTS = ["", "ok", "naïve café, 他们!", "👍🏽 emoji 😀", "  spaces\tand\nlines ", "the cat sat " * 60, "[CLS] x [SEP]"]


@pytest.fixture(scope="module")
def node() -> str:
    """The program, where it is there."""
    found = shutil.which("node")
    if found is None:
        pytest.skip("node is not installed")
    return found


def _script(node: str, folder: Path, source: str, *words: str) -> Any:
    """Run a module beside a handoff's and return the JSON that it prints."""
    (folder / "script.mjs").write_text(source, "utf-8")
    done = run_tool([node, "script.mjs", *words], folder, seconds=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kind_of_model_runs(
    text_bundle: Bundle,
    vision_bundle: Bundle,
    decoder_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need_packages(monkeypatch, PACKAGES)
    for bundle in (text_bundle, vision_bundle, decoder_bundle):
        check = handed(bundle, "node", tmp_path / bundle.task, check=True)["check"]
        assert check["status"] == "passed", check
        assert check["done"] == ["generated", "run"]
        assert set(check["worst"]) == {spec.name for spec in bundle.signature.outputs}
        assert all(check["worst"][name] <= bundle.tolerance(name) for name in check["worst"])
        assert max(check["from_python"].values()) < 1e-5
        assert check["versions"].keys() == {"node", *PACKAGES}


def test_the_folder_says_what_python_knew(text_bundle: Bundle, decoder_bundle: Bundle, tmp_path: Path) -> None:
    report = handed(text_bundle, "node", tmp_path)
    folder = tmp_path / "handoff"
    assert report["check"]["status"] == "not run"
    about = json.loads((folder / "model.json").read_text("utf-8"))
    assert (folder / about["model"]).read_bytes() == text_bundle.model_file().read_bytes()
    assert about["maxLength"] == text_bundle.max_length == 40
    assert about["labels"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    rows = json.loads((folder / "golden" / "texts.json").read_text("utf-8"))
    assert text_bundle.encoder is not None
    assert [row["ids"] for row in rows] == [text_bundle.encoder([row["text"]])["input_ids"][0].tolist() for row in rows]
    assert {len(row["ids"]) for row in rows} >= {2, 40}, "the empty text and one that was cut"
    assert [len(line) for line in (folder / "README.md").read_text("utf-8").splitlines() if "|" not in line]
    assert not re.search(r"\{[{%]", (folder / "README.md").read_text("utf-8"))
    assert len(golden_texts(decoder_bundle)) == len(decoder_bundle.golden)


def test_wrong_answers_and_wrong_tokens_fail(
    text_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_packages(monkeypatch, PACKAGES)
    handed(text_bundle, "node", tmp_path)
    folder, target = tmp_path / "handoff", target_named("node")
    rows = json.loads((folder / "golden" / "texts.json").read_text("utf-8"))
    rows[0]["ids"][1] += 1
    (folder / "golden" / "texts.json").write_text(json.dumps(rows), "utf-8")
    check = target.check(text_bundle, folder, tmp_path / "tokens")
    assert check.status == FAILED
    assert "token ids" in check.reason
    broken(text_bundle, folder, "logits")
    check = target.check(text_bundle, folder, tmp_path / "answers")
    assert check.status == FAILED
    assert check.worst["logits"] > 90
    assert "tolerance" in check.reason


def test_generation_is_pythons(
    node: str, decoder_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxpress.pipeline.handoff.transformers_js.expected import PROMPT, generation

    place = need_packages(monkeypatch, PACKAGES)
    handed(decoder_bundle, "node", tmp_path)
    folder = packages.workplace(tmp_path / "handoff", tmp_path, place)
    source = """
        import { generate } from "./generate.mjs";
        import { Model, ort } from "./model.mjs";
        const model = await Model.load(), tokens = [], prompt = process.argv[2];
        const ids = model.text.encode(prompt).ids;
        for await (const id of generate(ort, model.session, model.about, ids, { count: 16 })) tokens.push(id);
        let text = "";
        for await (const piece of model.write(prompt, { count: 16 })) text += piece;
        let length = 0;
        for await (const _ of generate(ort, model.session, model.about, ids, { count: 1000 })) length++;
        console.log(JSON.stringify({ ids, tokens, text, length }));
    """
    (expected,) = generation(decoder_bundle)
    got = _script(node, folder, source, PROMPT)
    assert got["ids"] == expected["ids"]
    assert got["tokens"][: len(expected["tokens"])] == expected["tokens"]
    assert decoder_bundle.encoder is not None
    whole = decoder_bundle.encoder.decode(got["tokens"])
    assert whole.startswith(got["text"])
    assert len(got["text"]) > 0
    assert got["length"] == 64 - len(got["ids"]) + 1, "it stops where the model's longest sequence ends"


@pytest.mark.parametrize("kind", ["WordPiece", "BPE, bytes", "Unigram"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_tokens_are_pythons(kind: str, side: str, node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut at a limit with the special tokens kept, padded on the side that the configuration names."""
    place = need_packages(monkeypatch, ["@huggingface/tokenizers"])
    (tmp_path / "node_modules").symlink_to(place, target_is_directory=True)
    shutil.copyfile(SOURCES / "text.mjs", tmp_path / "text.mjs")
    file = tiny_tokenizers.text_of(kind)
    tokenizer = Tokenizer.from_str(file)
    tokenizer.enable_truncation(24, direction=side)
    texts = TEXTS if kind != "Unigram" else [text.strip() for text in TEXTS if text.isascii()]
    rows = [row.ids for row in tokenizer.encode_batch(texts)]
    longest = max(map(len, rows))
    assert longest == 24
    config = {"pad_token": "[PAD]", "padding_side": side, "truncation_side": side}
    source = """
        import { Tokenizer } from "@huggingface/tokenizers";
        import { Text } from "./text.mjs";
        const [file, config, texts] = process.argv.slice(2).map((word) => JSON.parse(word));
        const text = new Text(Tokenizer, file, config, 24);
        console.log(JSON.stringify(text.batch(texts, ["input_ids", "attention_mask"])));
    """
    got = _script(node, tmp_path, source, file, json.dumps(config), json.dumps(texts))
    pad = [[0] * (longest - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    order = (lambda row, fill: row + fill) if side == "right" else (lambda row, fill: fill + row)
    assert got["input_ids"] == [order(*pair) for pair in zip(rows, pad, strict=True)]
    assert got["attention_mask"] == [order(*pair) for pair in zip(ones, pad, strict=True)]


def test_half_precision_is_numpys(node: str) -> None:
    """All 65,536 bit patterns to numbers, and numbers of every size back, ties included."""
    bits = np.arange(65536, dtype=np.uint16)
    exact = bits.view(np.float16).astype(np.float64)
    rng = np.random.default_rng(0)
    spread = np.concatenate(
        [
            rng.standard_normal(4000) * 10.0 ** rng.uniform(-9, 6, 4000),
            (exact[:31743] + exact[1:31744]) / 2,  # halfway between neighbours
            [0.0, -0.0, 65519.9, 65520, 2.0**-25, 2.0**-24, np.inf, -np.inf],
        ]
    )
    script = (
        f"import {{ fromHalf, toHalf }} from {json.dumps((SOURCES / 'tensors.mjs').as_uri())};"
        "import { readFileSync } from 'node:fs';"
        "const given = new Float64Array(new Uint8Array(readFileSync(0)).buffer);"
        "process.stdout.write(new Uint8Array(Float64Array.from([...Array(65536).keys()].map(fromHalf)"
        ".concat(Array.from(given, toHalf))).buffer))"
    )
    done = subprocess.run(
        [node, "--input-type=module", "-e", script], input=spread.tobytes(), capture_output=True, check=True
    )
    answers = np.frombuffer(done.stdout, np.float64)
    np.testing.assert_array_equal(answers[:65536], exact)
    with np.errstate(over="ignore"):
        wanted = spread.astype(np.float16)
    np.testing.assert_array_equal(answers[65536:].astype(np.uint16).view(np.float16), wanted)


TYPED = """
<ir_version: 10, opset_import: ["": 20]>
typed (float16[n] half, int64[n, 2] big, bool[n] yes, int8[n] small, uint64[] one, double[n] wide)
  => (float16[n] half2, int64[n, 2] big2, bool[n] no, int8[n] small2, uint64[] two, double[n] wide2)
{
    half2 = Add(half, half)
    big2 = Add(big, big)
    no = Not(yes)
    small2 = Add(small, small)
    two = Add(one, one)
    wide2 = Add(wide, wide)
}
"""


def test_every_type_goes_in_and_comes_out(node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "node_modules").symlink_to(need_packages(monkeypatch, PACKAGES), target_is_directory=True)
    for name in ("model.mjs", "tensors.mjs", "text.mjs", "generate.mjs"):
        shutil.copyfile(SOURCES / name, tmp_path / name)
    write_net(tmp_path / "model.onnx", TYPED)
    types = {"half": "float16", "big": "int64", "yes": "bool", "small": "int8", "one": "uint64", "wide": "float64"}
    inputs = [{"name": name, "dtype": dtype} for name, dtype in types.items()]
    about = {"model": "model.onnx", "tokenizer": False, "inputs": inputs}
    (tmp_path / "model.json").write_text(json.dumps(about), "utf-8")
    source = """
        import { Model } from "./model.mjs";
        import { numbers } from "./tensors.mjs";
        const big = [[9007199254740993n / 2n, -4n], [5n, 6n]];
        const model = await Model.load();
        const answers = await model.run(
          { half: [0.1, -60000], big, yes: [true, false], small: [-64, 63], one: 7, wide: [1e300, 0.1] });
        const plain = Object.entries(answers).map(([name, t]) => [name, [...numbers(t)].map(String)]);
        console.log(JSON.stringify({ ...Object.fromEntries(plain), exact: String(answers.big2.data[0]) }));
    """
    got = _script(node, tmp_path, source)
    assert got["exact"] == "9007199254740992"
    assert [float(v) for v in got["half2"]] == [float(np.float16(0.1) * 2), -np.inf]
    assert got["big2"][1:] == ["-8", "10", "12"]
    assert got["no"] == ["0", "1"]
    assert got["small2"] == ["-128", "126"]
    assert got["two"] == ["14"]
    assert got["wide2"] == ["2e+300", "0.2"]


def test_what_javascript_has_no_array_for_is_refused(text_bundle: Bundle) -> None:
    class Odd(Bundle):
        signature = Signature((TensorSpec("x", "bfloat16", ("batch",)),), ())

    with pytest.raises(InputError, match="bfloat16"):
        check_types(Odd(text_bundle.folder))


def test_a_model_of_two_graphs_is_refused(text_bundle: Bundle, tmp_path: Path) -> None:
    bundle = Bundle(text_bundle.folder)
    bundle.manifest["companions"] = [{"name": "encoder_model", "path": "onnx/encoder_model.onnx"}]
    for target in ("node", "web"):
        with pytest.raises(InputError, match="one graph"):
            target_named(target).write(bundle, tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_is_downloaded(text_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(packages.VARIABLE, raising=False)
    with pytest.raises(MissingTool) as raised:
        packages.require_packages(tmp_path, PACKAGES, "npm install --ignore-scripts")
    assert "npm install" in raised.value.next_step
    assert packages.find_packages(tmp_path, PACKAGES) is None
    for name in PACKAGES:
        (tmp_path / "node_modules" / name).mkdir(parents=True)
        (tmp_path / "node_modules" / name / "package.json").write_text('{"version": "1.2.3"}', "utf-8")
    assert packages.find_packages(tmp_path, PACKAGES) == tmp_path / "node_modules"
    assert packages.versions_of(tmp_path / "node_modules", PACKAGES) == dict.fromkeys(PACKAGES, "1.2.3")


def test_the_handoffs_ask_for_the_versions_that_are_tested() -> None:
    tested = json.loads((ROOT / "scripts" / "packages" / "package.json").read_text("utf-8"))["dependencies"]
    for target in ("node", "web", "transformers_js"):
        own = json.loads((ROOT / "pipeline" / "handoff" / target / "package.json").read_text("utf-8"))
        for name, version in {**own["dependencies"], **own.get("optionalDependencies", {})}.items():
            assert tested[name] == version, name
    lock = json.loads((ROOT / "scripts" / "packages" / "package-lock.json").read_text("utf-8"))
    assert lock["packages"][""]["dependencies"] == tested
    assert not any("resolved" in entry for entry in lock["packages"].values())
    assert all("integrity" in entry for name, entry in lock["packages"].items() if name)

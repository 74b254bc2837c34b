# SPDX-License-Identifier: Apache-2.0
"""Recipes: built-in and own ones, changed from the command line, and every way to write one wrongly."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from onnxpress.contracts.errors import InputError
from onnxpress.pipeline.recipe import SUFFIXES, Recipe, built_in, load_recipe


def _written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text, "utf-8")
    return str(path)


def test_the_issue_s_recipes_are_there() -> None:
    assert {"fp32", "fp16", "int8-dynamic"} <= set(built_in())


@pytest.mark.parametrize("name", sorted(built_in()))
def test_every_built_in_recipe_loads_under_its_own_name_and_explains_itself(name: str) -> None:
    text = built_in()[name]
    recipe = load_recipe(name)
    assert recipe.name == name
    assert text.startswith("# ")
    assert recipe.built_passes()
    assert recipe.parsed_gates()
    assert [p.name for p in recipe.built_passes()] == [entry["pass"] for entry in recipe.passes]


@pytest.mark.parametrize("name", sorted(built_in()))
def test_a_recipe_survives_its_own_yaml(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, ["benchmark.threads=1"], ["size_ratio >= 0.1"])
    again = load_recipe(_written(tmp_path, recipe.to_yaml()))
    assert again == recipe
    assert again.sha256() == recipe.sha256()
    assert again.to_yaml() == recipe.to_yaml()


def test_the_hash_depends_on_the_content_and_not_on_its_order_or_comments(tmp_path: Path) -> None:
    one = _written(tmp_path, "name: a\nvariant: fp16\npasses: [{pass: clean}]\n")
    first = load_recipe(one).sha256()
    two = _written(tmp_path, "# hello\npasses:\n- pass: clean\nvariant: fp16\nschema_version: 1\nname: a\n")
    assert load_recipe(two).sha256() == first
    three = _written(tmp_path, "name: a\nvariant: fp16\npasses: []\n")
    assert load_recipe(three).sha256() != first


def test_a_default_that_is_written_out_changes_no_hash(tmp_path: Path) -> None:
    plain = load_recipe(_written(tmp_path, "name: a\n"))
    full = "name: a\nschema_version: 1\nvariant: fp32\nexport: {opset: 20, pooling: auto}\nbenchmark: {rounds: 30}\n"
    assert load_recipe(_written(tmp_path, full)).sha256() == plain.sha256()
    assert len(plain.sha256()) == 64


@pytest.mark.parametrize(("variant", "suffix"), SUFFIXES.items())
def test_a_variant_names_its_file_as_transformers_js_looks_for_it(variant: str, suffix: str) -> None:
    assert Recipe(name="r", variant=variant).file_name == f"model{suffix}.onnx"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("passes.2.per_channel=false", "per_channel", False),
        ("passes.quantize_dynamic.per_channel=false", "per_channel", False),
        ("passes.quantize_dynamic.operators=[MatMul]", "operators", ["MatMul"]),
        ("passes.2.exclude=['*head*', 'a=b']", "exclude", ["*head*", "a=b"]),
    ],
)
def test_set_changes_a_pass_by_number_or_by_name(override: str, key: str, value: object) -> None:
    recipe = load_recipe("int8-dynamic", [override])
    assert recipe.passes[2][key] == value
    built = getattr(recipe.built_passes()[2], key)
    assert (list(built) if isinstance(value, list) else built) == value
    assert load_recipe("int8-dynamic").passes[:2] == recipe.passes[:2]


def test_set_changes_sections_also_absent_ones_and_later_ones_win() -> None:
    recipe = load_recipe("fp32", ["export.opset=18", "export.opset=21", "benchmark.rounds=7", "name=mine"])
    assert (recipe.export.opset, recipe.benchmark.rounds, recipe.name) == (21, 7, "mine")
    assert load_recipe("fp32", ["validation.examples=null"]).validation.examples is None
    assert load_recipe("fp32", ["passes=[]"]).passes == ()


def test_gates_of_the_command_line_come_after_the_recipe_s() -> None:
    assert load_recipe("fp32", [], ["size_ratio >= 1"]).gates == ("cosine >= 0.9999", "size_ratio >= 1")
    assert load_recipe("fp32", ["gates=[]"], ["size_ratio >= 1"]).gates == ("size_ratio >= 1",)


@pytest.mark.parametrize(
    ("override", "message", "next_step"),
    [
        ("benchmark.rounds", "--set benchmark.rounds: not of the form key=value", "Example: --set export.opset=20"),
        ("=5", "--set =5: not of the form key=value", "Example: --set export.opset=20"),
        ("passes.7.bits=4", "--set passes.7: no such pass", "This recipe has 0 (clean), 1 (fuse), 2 (qua"),
        ("passes.fusee.x=4", "--set passes.fusee: no such pass", "This recipe has 0 (clean), 1 (fuse)"),
        ("passes.².x=4", "--set passes.²: no such pass", "This recipe has 0 (clean)"),
        ("passes.2=4", "--set passes.2: names a whole list entry", "Name a key inside it."),
        ("name.first=4", "--set name: not a section", "See: onnxpress recipes NAME"),
        ("name.first.second=4", "--set name.first: not a section", "See: onnxpress recipes NAME"),
        ("benchmark.rounds=[1", "--set benchmark.rounds=[1: the value is not YAML", "Quote it."),
        ("name=2024-13-45", "--set name=2024-13-45: the value is not YAML", "Quote it."),
        ("benchmark.rouns=5", "int8-dynamic: unknown key 'benchmark.rouns'", "Did you mean 'rounds'?"),
        ("benchmark.rounds=many", "int8-dynamic: benchmark.rounds: Input should be a valid integer", "See: onnxpress"),
        ("benchmark.rounds=1", "int8-dynamic: benchmark.rounds: Input should be greater than or equal to 5", "See:"),
        ("passes.2.per_chanel=true", "passes.2 (quantize_dynamic): unknown key 'per_chanel'", "Did you mean 'per_"),
        ("passes.2.per_channel=1", "passes.2 (quantize_dynamic): per_channel: Input should be a valid boolean", "See:"),
        ("passes.0.pass=cleen", "unknown pass 'cleen'", "Did you mean 'clean'?"),
        ("export.poling=mean", "int8-dynamic: unknown key 'export.poling'", "Did you mean 'pooling'?"),
        ("variant=int9", "int8-dynamic: variant: unknown variant 'int9'. Did you mean 'int8'?", "See:"),
        ("gates=['size_ratio']", "gate 'size_ratio' is not of the form name <= number", "Example:"),
        ("gates=cosine >= 0.9", "int8-dynamic: gates: Input should be a valid tuple", "See:"),
        ("gates=3", "int8-dynamic: gates: Input should be a valid tuple", "See:"),
    ],
)  # fmt: skip
def test_a_wrong_set_says_which_key_and_what_to_do(override: str, message: str, next_step: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe("int8-dynamic", [override], ["cosine >= 0.5"])
    assert caught.value.message.startswith(message)
    assert caught.value.next_step.startswith(next_step)


@pytest.mark.parametrize(
    ("text", "message", "next_step"),
    [
        ("nam: x\n", "mine.yaml: name: Field required", "See: onnxpress recipes NAME"),
        ("name: x\npases: []\n", "mine.yaml: unknown key 'pases'", "Did you mean 'passes'?"),
        ("name: x\n1: y\n", "mine.yaml: 1", "See: onnxpress recipes NAME"),
        ("name: x\npasses: [clean]\n", "mine.yaml: passes.0: Input should be a valid dictionary", "See:"),
        ("name: x\npasses: [{path: clean}]\n", "passes.0 has no 'pass' key", "Write it as: - pass: clean"),
        ("name: x\npasses: [{pass: 7}]\n", "passes.0 has no 'pass' key", "Write it as: - pass: clean"),
        ("name: x\npasses: [{pass: claen}]\n", "unknown pass 'claen'", "Did you mean 'clean'?"),
        ("name: x\npasses: [{pass: clean, deep: 1}]\n", "passes.0 (clean): unknown key 'deep'", ""),
        ("name: ../x\n", "mine.yaml: name: String should match pattern", "See:"),
        ("name: ''\n", "mine.yaml: name: String should have at least 1 character", "See:"),
        ("name: x\nschema_version: 2\n", "mine.yaml: schema_version: Input should be 1", "See:"),
        ("name: x\nexport: {opset: 3}\n", "mine.yaml: export.opset: Input should be greater than or equal", "See:"),
        ("name: x\nexport: twenty\n", "mine.yaml: export: Input should be a valid dictionary", "See:"),
        ("name: x\ngates: ['size >> 3']\n", "gate 'size >> 3' is not of the form name <= number", "Example:"),
        ("name: x\ngates: [3]\n", "mine.yaml: gates.0: Input should be a valid string", "See:"),
        ("- name: x\n", "mine.yaml: a recipe is a mapping of keys", "Start from: onnxpress recipes fp32"),
        ("", "mine.yaml: a recipe is a mapping of keys", "Start from: onnxpress recipes fp32"),
        ("name: x\n  passes: y\n", "mine.yaml line 2: not valid YAML", "Check the indentation."),
        ("name: x\npasses: [\n", "mine.yaml line 3: not valid YAML", "Check the indentation."),
        ("name: 2024-13-45\n", "mine.yaml: not valid YAML", "Check the indentation."),
        ("a: " + "[" * 5000, "mine.yaml: not valid YAML", "Check the indentation."),
        ("name: \0\n", "mine.yaml: not valid YAML", "Check the indentation."),
        ("name: !!python/object/apply:os.getcwd []\n", "mine.yaml line 1: not valid YAML", "Check the indentation."),
    ],
)  # fmt: skip
def test_a_wrong_file_says_where_and_what_to_do(text: str, message: str, next_step: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(_written(tmp_path, text))
    assert caught.value.message.startswith(message)
    assert caught.value.next_step.startswith(next_step)
    assert str(tmp_path) not in caught.value.message


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown recipe 'int8-dynamik'") as caught:
        load_recipe("int8-dynamik")
    assert caught.value.next_step == "Did you mean 'int8-dynamic'?"
    with pytest.raises(InputError, match=r"no such recipe file: .*absent\.yaml"):
        load_recipe(str(tmp_path / "absent.yaml"))
    with pytest.raises(InputError, match="cannot read recipe"):
        load_recipe(_folder(tmp_path / "folder.yaml"))
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("name: x # größer".encode("latin-1"))
    with pytest.raises(InputError, match="cannot read recipe"):
        load_recipe(str(latin))


def _folder(path: Path) -> str:
    path.mkdir()
    return str(path)


def test_a_file_needs_no_suffix_and_a_built_in_name_wins_over_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("fp32").write_text("name: other\n", "utf-8")
    Path("plain").write_text("name: other\n", "utf-8")
    assert load_recipe("plain").name == "other"
    assert load_recipe("fp32").name == "fp32"


def test_the_printed_yaml_is_a_mapping_in_reading_order() -> None:
    assert list(yaml.safe_load(load_recipe("fp16").to_yaml()))[:3] == ["schema_version", "name", "variant"]
